"""Mutants of every file that is read: each is read, and can be used, or refused in one line."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.recipes import tuned, tuning
from qupeD_jax.data import sources
from qupeD_jax.io import files, packing, tensor_file
from qupeD_jax.results import folder as reports
from qupeD_jax.results import metrics, page, plots, statistics
from qupeD_jax.results.plots import over_rounds
from qupeD_jax.study import parts
from tests import mutate

mutants = settings(
  max_examples=max(300, settings.default.max_examples // 10),
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

METHODS = ("local", "QuPeD 2 bit", "Grüße")
ROW = {"loss": 1.5, "dropped": 0, "accuracy": 0.5, "global_accuracy": None, "gradient_mapping": 0.1}
ROWS = [{"method": m, "seed": s, "round": r} | ROW for m in METHODS for s in (0, 1) for r in (1, 2)]
COSTS = {"bytes_per_model": 40, "bytes_per_round": 160, "flops_per_example": 10, "seconds": 2.0}
SUMMARY = {m: metrics.summarise([[0.5, 0.75]] * 2, bits=[1, 2], **COSTS) for m in METHODS}
ACCURACIES = {m: {"seeds": [0, 1], "accuracy": [[0.5, None], [0.25, 1.0]]} for m in METHODS}
COMPARISON = statistics.Comparison(0.1, 0.05, 0.15, 1, clients=None)._asdict()
COMPARISONS = {"level": 0.95, "comparisons": {"local": {"QuPeD 2 bit": COMPARISON}}}
OPTIONS = {"experiment": "tiny", "rounds": 2, "seed_list": [0, 1], "models": ["mlp"], "out": None}
CONFIG = {"config": OPTIONS, "environment": {"device": "cpu", "devices": 2}, "date": "2026-01-01"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A results folder that is whole."""
  folder = tmp_path_factory.mktemp("results")
  files.write(folder / metrics.CONFIG, files.dump(CONFIG))
  files.write(folder / metrics.METRICS, "".join(files.dump(row) + "\n" for row in ROWS))
  files.write(folder / metrics.SUMMARY, files.dump({"methods": SUMMARY}))
  files.write(folder / metrics.ACCURACIES, files.dump({"methods": ACCURACIES}))
  files.write(folder / metrics.COMPARISON, files.dump(COMPARISONS))
  return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A packed model."""
  variables = {
    "params": {"stem": {"kernel": np.ones((2, 3))}, "dense": {"kernel": np.ones((3, 2))}},
    "stats": {"norm": {"var": np.ones(2)}},
  }
  path = tmp_path_factory.mktemp("models") / "client.safetensors"
  packed = packing.pack(variables, {"dense/kernel": np.float32([-1, 1])})
  packing.save(path, packed, {"client": 3, "model": "mlp"})
  return path


def drawn_cheaply(monkeypatch):
  """Leaves of the pictures what is computed for them."""
  monkeypatch.setattr(plots, "svg", lambda figure: str(figure))
  monkeypatch.setattr(plots, "draw_curves", _curves)
  monkeypatch.setattr(plots, "draw_pareto", lambda points: [x * y for *_, x, y, _ in points])
  monkeypatch.setattr(plots, "draw_stationarity", lambda rows: _curves(rows, "gradient_mapping"))
  monkeypatch.setattr(plots, "draw_gains", _gains)


def _curves(rows, *keys):
  return [over_rounds.series(rows, key) for key in keys or ("loss", "accuracy")]


def _gains(accuracies, baseline):
  return [statistics.differences(*statistics.paired(accuracies, m, baseline)) for m in accuracies]


MUTANTS = {
  metrics.CONFIG: mutate.of_json(CONFIG),
  metrics.SUMMARY: mutate.of_json({"methods": SUMMARY}),
  metrics.ACCURACIES: mutate.of_json({"methods": ACCURACIES}),
  metrics.COMPARISON: mutate.of_json(COMPARISONS),
  metrics.METRICS: mutate.of_bytes("".join(files.dump(row) + "\n" for row in ROWS).encode())
  | mutate.of_json(ROWS[0]).map(lambda line: line + b"\n" + json.dumps(ROWS[1]).encode() + b"\n"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_results_folder_is_shown_or_refused(folder, name, monkeypatch):
  drawn_cheaply(monkeypatch)
  path, seen = folder / name, set()
  # Methods that were paired and do not fit are named themselves, not the file.
  where = "" if name == metrics.ACCURACIES else folder
  whole = path.read_bytes()

  @mutants
  @given(MUTANTS[name])
  def check(content):
    path.write_bytes(content)
    use = lambda: (page.html_page(reports.read(folder)), parts.differences(folder, OPTIONS))
    seen.add(mutate.reads_or_refuses(use, where))

  try:
    check()
  finally:
    path.write_bytes(whole)
  assert seen == {True, False}


@pytest.mark.parametrize("name", ["tuning.json", "tuned.toml"])
def test_a_file_of_a_search_is_read_or_refused(tmp_path, name):
  scores = {"scores": {"local #0": [0.5, 0.25], "local #1": None}}
  toml = b'[digits_mlp."QuPeD 2 bit"]\nlambda_p = 0.25\nmu = 1\n\n[cifar10_cnn1.local]\n'
  drawn = mutate.of_json(scores) if name == "tuning.json" else mutate.of_bytes(toml)
  path, seen = tmp_path / name, set()

  def use():
    if name == "tuned.toml":
      return [tuned.of(tuned.read(path), "digits_mlp", "QuPeD 2 bit")]
    return [np.mean(scores or -1.0) for scores in tuning.read_scores(tmp_path).values()]

  @mutants
  @given(drawn)
  def check(content):
    path.write_bytes(content)
    seen.add(mutate.reads_or_refuses(use, ""))

  check()
  assert seen == {True, False}


def test_a_shard_of_leaf_is_read_or_refused(tmp_path):
  pixels = b"[" + b", ".join([b"0.5"] * 784) + b"]"
  few = [0.5, 0.5, 0.5]  # stand for all of them, so that all else is mutated as often
  shard = {"users": ["a", "b"], "user_data": {"a": {"x": [few], "y": [1]}}}
  shard["user_data"]["b"] = {"x": [few, few], "y": [61, 0]}
  path, seen = tmp_path / "train" / "all_data_0.json", set()

  def write(path, content):
    path.write_bytes(content.replace(json.dumps(few).encode(), pixels))

  for part in ("train", "test"):
    (tmp_path / part).mkdir()
    write(tmp_path / part / "all_data_0.json", json.dumps(shard).encode())

  @mutants
  @given(mutate.of_json(shard))
  def check(content):
    write(path, content)
    seen.add(mutate.reads_or_refuses(lambda: sources.load("femnist", tmp_path), path))

  check()
  assert seen == {True, False}


@st.composite
def repacked(draw, content):
  """Draws a mutant of a packed model in which the checksum is right again."""
  tensors, header = content
  header = {k: v for k, v in header.items() if k != "crc32"}
  what = draw(st.sampled_from(("layout", "metadata", "tensors", "names")))
  if what == "tensors":
    name = draw(st.sampled_from(sorted(tensors)))
    other = [np.zeros(0), np.ones(5, np.int8), np.full(2, np.nan, np.float32), np.uint8([[1]])]
    tensors = tensors | {name: draw(st.sampled_from(other))}
  elif what == "names":
    name = draw(st.sampled_from(sorted(tensors)))
    new = draw(
      st.sampled_from(["", "params", "params/stem", "stats//x", "x\ny", "stats/norm/var/a"])
    )
    tensors = {k: x for k, x in tensors.items() if k != name or draw(st.booleans())}
    tensors = tensors | {new: np.ones(2, np.float32)}
  else:
    key = {"layout": "quantised", "metadata": "metadata"}[what]
    text = draw(mutate.of_json(json.loads(header[key]))).decode("utf-8", "replace")
    header = header | {key: text}
  return tensors, header


def test_a_packed_model_is_read_or_refused(model, tmp_path):
  content, path, seen = tensor_file.read(model), tmp_path / "mutant.safetensors", set()

  @mutants
  @given(repacked(content))
  def check(mutant):
    tensor_file.save(path, *mutant)
    use = lambda: packing.unpack(packing.load(path)[0])
    seen.add(mutate.reads_or_refuses(use, path))

  check()
  assert seen == {True, False}


def test_any_bytes_for_a_packed_model_are_read_or_refused(model, tmp_path):
  path = tmp_path / "mutant.safetensors"

  @mutants
  @given(mutate.of_bytes(model.read_bytes()))
  def check(content):
    path.write_bytes(content)
    mutate.reads_or_refuses(lambda: packing.unpack(packing.load(path)[0]), path)

  check()
