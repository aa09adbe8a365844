"""The results folder: what is written, what survives a crash, and the numbers of the summary."""

import dataclasses
import datetime
import errno
import json
import math
import resource
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qupeD_jax.checks import BadInput
from qupeD_jax.results import metrics

COSTS = {"bytes_per_model": 81, "bytes_per_round": 20_000, "flops_per_example": 10, "seconds": 2.5}


def strict(text):
  """Parses JSON and refuses NaN and infinities."""

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  return json.loads(text, parse_constant=refuse)


def row(number, accuracy=None, **more):
  return {"method": "local", "seed": 0, "round": number, "accuracy": accuracy, **more}


class Options(NamedTuple):
  rate: float
  folder: Path


@dataclasses.dataclass(frozen=True)
class Config:
  options: Options
  bits: tuple[int, ...]


def test_config_holds_options_and_environment(tmp_path):
  config = Config(Options(rate=math.inf, folder=Path("data")), bits=(1, 32))
  folder = metrics.open_results(tmp_path / "a" / "b", config)
  written = strict((folder / "config.json").read_text())
  assert written["config"] == {"options": {"rate": None, "folder": "data"}, "bits": [1, 32]}
  names = "qupeD_jax jax jaxlib flax optax numpy python platform backend device devices"
  assert written["environment"].keys() == set(names.split())
  assert all(written["environment"].values())
  assert datetime.datetime.fromisoformat(written["date"]).utcoffset() == datetime.timedelta(0)
  read = metrics.read_config(folder)
  assert read == written


def test_a_value_without_a_place_in_json_is_an_error(tmp_path):
  with pytest.raises(TypeError, match="no place"):
    metrics.open_results(tmp_path, {"loss": object()})


def test_rows_come_back_in_order_and_strict(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.append_metrics(folder, [row(1, loss=jnp.float32(0.5)), row(2, loss=np.float64("nan"))])
  metrics.append_metrics(folder, [row(np.int32(3), clients=jnp.array([0.5, jnp.inf]))])
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  assert [strict(line)["round"] for line in lines] == [1, 2, 3]
  rows = metrics.read_metrics(folder)
  assert rows == [row(1, loss=0.5), row(2, loss=None), row(3, clients=[0.5, None])]


JSON = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=8,
)


@settings(deadline=None, max_examples=50)  # the disk sets the pace
@given(JSON)
def test_any_row_is_one_strict_line(tmp_path_factory, value):
  folder = metrics.open_results(tmp_path_factory.mktemp("results"), {})
  metrics.append_metrics(folder, [row(1, value=value), row(2)])
  text = (folder / "metrics.jsonl").read_text()
  assert len(text.splitlines()) == 2
  first, second = metrics.read_metrics(folder)
  assert first == strict(text.splitlines()[0])
  assert second == row(2)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300))
def test_a_crash_anywhere_leaves_every_complete_line(tmp_path_factory, cut):
  folder = metrics.open_results(tmp_path_factory.mktemp("results"), {})
  rows = [row(number, accuracy=0.5, note="Grüße") for number in range(3)]
  metrics.append_metrics(folder, rows)
  file = folder / "metrics.jsonl"
  torn = file.read_bytes()[:cut]
  file.write_bytes(torn)
  complete = rows[: torn.count(b"\n")]
  assert metrics.read_metrics(folder) == complete
  metrics.open_results(folder, {}, resume=True)
  metrics.append_metrics(folder, [row(9)])
  assert metrics.read_metrics(folder) == [*complete, row(9)]


def test_a_run_that_is_not_resumed_starts_anew(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.append_metrics(folder, [row(1)])
  assert metrics.read_metrics(metrics.open_results(tmp_path, {}, resume=True)) == [row(1)]
  assert metrics.read_metrics(metrics.open_results(tmp_path, {})) == []


def test_rows_are_dropped_all_at_once_or_not_at_all(tmp_path, monkeypatch):
  folder = metrics.open_results(tmp_path, {})
  metrics.append_metrics(folder, [row(number) for number in range(1, 5)])
  path = folder / "metrics.jsonl"
  path.write_bytes(path.read_bytes() + b'{"round": 5')
  before = path.read_bytes()

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(metrics.os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device"):
      metrics.keep_rows(folder, lambda row: row["round"] < 3)
  assert path.read_bytes() == before
  metrics.keep_rows(folder, lambda row: row["round"] < 3)
  assert metrics.read_metrics(folder) == [row(1), row(2)]
  assert path.read_bytes() == b"".join(before.splitlines(True)[:2])
  metrics.keep_rows(folder, lambda row: False)
  assert path.read_bytes() == b""


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 120))
def test_rows_are_written_all_or_none(tmp_path_factory, room):
  folder = metrics.open_results(tmp_path_factory.mktemp("results"), {})
  metrics.append_metrics(folder, [row(1)])
  before = (folder / "metrics.jsonl").read_bytes()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  # A limit on the size of files: what fits is written, as on a disk that runs full.
  resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))
  try:
    metrics.append_metrics(folder, [row(2), row(3)])
    expected = [row(1), row(2), row(3)]
  except BadInput:
    expected = [row(1)]
    assert (folder / "metrics.jsonl").read_bytes() == before
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert metrics.read_metrics(folder) == expected


def test_a_row_measured_again_replaces_the_first(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.append_metrics(folder, [row(1, 0.1), row(2, 0.2), row(2, 0.3), row(3, 0.4)])
  assert metrics.read_metrics(folder) == [row(1, 0.1), row(2, 0.3), row(3, 0.4)]


@pytest.mark.parametrize("line", ["{", "3", ""])
def test_a_damaged_line_before_the_last_is_refused(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n{json.dumps(row(2))}\n")
  with pytest.raises(BadInput, match=r"metrics\.jsonl, line 2: damaged"):
    metrics.read_metrics(tmp_path)


def test_summary_against_numbers_by_hand():
  personal = np.full((2, 20), 0.5)
  personal[0, 3:5] = 0.1, 0.3  # seed means .47 and .5, worst two clients .2 and .5
  entry = metrics.summarise(personal, unquantised=personal + 0.1, bits=2, **COSTS)
  accuracy = entry.pop("accuracy")
  assert accuracy["per_seed"] == pytest.approx([0.47, 0.5])
  assert accuracy["mean"] == pytest.approx(0.485)
  assert accuracy["std"] == pytest.approx(0.03 / math.sqrt(2))
  assert accuracy["worst_decile"] == pytest.approx(0.35)
  assert entry.pop("unquantised_accuracy") == pytest.approx(0.585)
  assert entry == {"global_accuracy": None, "bits": 2, **COSTS}


def test_summary_of_one_seed_and_few_clients():
  entry = metrics.summarise([[0.9, 0.4, 0.5]], global_model=[[0.1, 0.2, 0.3]], bits=32, **COSTS)
  assert entry["accuracy"]["std"] is None
  assert entry["accuracy"]["worst_decile"] == pytest.approx(0.4)
  assert entry["global_accuracy"] == pytest.approx(0.2)


def test_clients_without_test_examples_are_left_out():
  with_gaps = [[0.2, np.nan, 0.4], [np.nan, np.nan, 0.9]]
  entry = metrics.summarise(with_gaps, bits=2, **COSTS)
  assert entry["accuracy"]["per_seed"] == pytest.approx([0.3, 0.9])
  assert entry["accuracy"]["worst_decile"] == pytest.approx((0.2 + 0.9) / 2)


@pytest.mark.parametrize("bad", [[0.5], np.zeros((0, 3)), np.zeros((2, 0)), [[np.nan], [0.1]]])
def test_accuracies_that_cannot_be_summed_up_are_refused(bad):
  with pytest.raises(BadInput, match="per-client accuracies"):
    metrics.summarise(bad, bits=2, **COSTS)


def summary():
  quped = metrics.summarise([[0.871, 0.871], [0.879, 0.879]], bits=[1, 2], **COSTS)
  local = metrics.summarise([[0.5]], global_model=[[0.25]], bits=32, **COSTS)
  return {"QuPeD [a|b]": quped, "local": local}


def test_summary_is_read_as_it_was_written(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.write_summary(folder, summary())
  assert strict((folder / "summary.json").read_text()) == {"methods": summary()}
  assert metrics.read_summary(folder) == summary()
  assert not list(tmp_path.glob("*.partial"))


ENTRY = metrics.summarise([[0.5]], bits=2, **COSTS)
NO_SUMMARIES = [
  "", "[]", '{"methods"', "{}", '{"methods": [1]}', '{"methods": {"a": 1}}',
  json.dumps({"methods": {"a": {k: v for k, v in ENTRY.items() if k != "seconds"}}}),
  json.dumps({"methods": {"a": ENTRY | {"accuracy": {"mean": 0.5}}}}),
  json.dumps({"methods": {"a": ENTRY | {"seconds": "long"}}}),
]  # fmt: skip


@pytest.mark.parametrize("text", NO_SUMMARIES)
def test_a_file_that_is_no_summary_is_refused(tmp_path, text):
  (tmp_path / "summary.json").write_text(text)
  with pytest.raises(BadInput, match=r"summary\.json"):
    metrics.read_summary(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(BadInput, match=r"metrics\.jsonl: No such file"):
    metrics.read_metrics(tmp_path)
  readers = {
    "summary": metrics.read_summary,
    "config": metrics.read_config,
    "accuracies": metrics.read_accuracies,
    "comparison": metrics.read_comparisons,
  }
  for name, read in readers.items():
    with pytest.raises(BadInput, match=rf"{name}\.json: No such file"):
      read(tmp_path)


@pytest.mark.parametrize(
  "text", ["{", "3", "{}", '{"config": {}}', '{"config": {}, "environment": 1}']
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(BadInput, match=r"config\.json: [^\n]*$"):
    metrics.read_config(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(BadInput, match=r"file/results: Not a directory"):
    metrics.open_results(tmp_path / "file" / "results", {})


def test_a_full_disk_keeps_the_old_summary_and_leaves_no_debris(tmp_path, monkeypatch):
  folder = metrics.open_results(tmp_path, {})
  metrics.write_summary(folder, summary())
  before = (folder / "summary.json").read_text()

  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(metrics.os, "fsync", full)
  refused = r"cannot be written \(No space left on device\)$"
  with pytest.raises(BadInput, match=rf"summary\.json: {refused}"):
    metrics.write_summary(folder, {})
  with pytest.raises(BadInput, match=rf"metrics\.jsonl: {refused}"):
    metrics.append_metrics(folder, [row(1)])
  assert (folder / "summary.json").read_text() == before
  assert not list(tmp_path.glob("*.partial"))


def accuracies():
  return {
    "QuPeD": {"seeds": [3, 4], "accuracy": [[0.5, math.nan, 1.0], [0.25, 0.5, 0.0]]},
    "local": {"seeds": [3, 4], "accuracy": np.full((2, 3), 0.25, np.float32)},
  }


def test_accuracies_come_back_with_their_gaps(tmp_path):
  metrics.write_accuracies(tmp_path, accuracies())
  written = strict((tmp_path / "accuracies.json").read_text())["methods"]
  assert written["QuPeD"] == {"seeds": [3, 4], "accuracy": [[0.5, None, 1.0], [0.25, 0.5, 0.0]]}
  read = metrics.read_accuracies(tmp_path)
  assert list(read) == ["QuPeD", "local"]
  for method, entry in accuracies().items():
    assert read[method]["seeds"] == [3, 4]
    np.testing.assert_array_equal(read[method]["accuracy"], entry["accuracy"])
  metrics.write_accuracies(tmp_path, read)
  assert strict((tmp_path / "accuracies.json").read_text())["methods"] == written


@pytest.mark.parametrize(
  "entry",
  [
    {"seeds": [0], "accuracy": [0.5, 0.5]},
    {"seeds": [0, 1], "accuracy": [[0.5, 0.5]]},
    {"seeds": [0], "accuracy": [[]]},
    {"seeds": [0, 1], "accuracy": [[0.5], [0.5, 0.5]]},
    {"seeds": [0], "accuracy": [[1.5]]},
    {"seeds": [0], "accuracy": [[-0.1]]},
    {"seeds": [0], "accuracy": [["high"]]},
    {"accuracy": [[0.5]]},
    {"seeds": [0]},
  ],
)
def test_what_are_no_accuracies_is_neither_written_nor_read(tmp_path, entry):
  with pytest.raises(BadInput, match=r"accuracies\.json: QuPeD[^\n]*$"):
    metrics.write_accuracies(tmp_path, {"QuPeD": entry})
  assert not list(tmp_path.iterdir())
  (tmp_path / "accuracies.json").write_text(json.dumps({"methods": {"QuPeD": entry}}))
  with pytest.raises(BadInput, match=r"accuracies\.json: QuPeD[^\n]*$"):
    metrics.read_accuracies(tmp_path)


def test_comparisons_are_written_for_people_and_programs(tmp_path):
  metrics.write_accuracies(tmp_path, accuracies())
  made = metrics.write_comparisons(tmp_path, {"QuPeD": ["local"], "local": ["QuPeD"]}, level=0.9)
  assert made["QuPeD"]["local"].difference == pytest.approx((0.5 + 0.0) / 2)
  assert made["local"]["QuPeD"].difference == pytest.approx(-(0.5 + 0.0) / 2)
  assert metrics.read_comparisons(tmp_path) == (made, 0.9)
  written = strict((tmp_path / "comparison.json").read_text())
  assert written["level"] == 0.9
  text = (tmp_path / "comparison.md").read_text()
  assert "90% interval" in text
  assert "+25.0" in text
  assert "-25.0" in text
  assert not list(tmp_path.glob("*.partial"))


def test_a_method_without_accuracies_is_not_compared(tmp_path):
  metrics.write_accuracies(tmp_path, accuracies())
  with pytest.raises(BadInput, match="method FedAvg: allowed is one of QuPeD, local"):
    metrics.write_comparisons(tmp_path, {"QuPeD": ["FedAvg"]})
  assert [path.name for path in tmp_path.iterdir()] == ["accuracies.json"]


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "{}",
    '{"level": 0.9, "comparisons": 3}',
    '{"level": 0.9, "comparisons": {"a": {"b": {}}}}',
  ],
)
def test_a_file_that_is_no_comparison_is_refused(tmp_path, text):
  (tmp_path / "comparison.json").write_text(text)
  with pytest.raises(BadInput, match=r"comparison\.json: [^\n]*$"):
    metrics.read_comparisons(tmp_path)
