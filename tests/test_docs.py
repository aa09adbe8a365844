"""The programs in the documents run, are short, and print what is written there."""

import contextlib
import functools
import importlib.util
import io
import json
import pathlib
import re
import subprocess
import sys
from types import ModuleType
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import models
from qupeD_jax.algorithms.local import local
from qupeD_jax.data import splits
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.io import packing
from qupeD_jax.results import metrics
from qupeD_jax.study import cli, jobs, study
from qupeD_jax.study.federation import of_server
from qupeD_jax.study.options import Options, replaced
from tests import toy
from tests.algorithms import test_contract

ROOT = pathlib.Path(__file__).parent.parent
EXTENDING = "docs/extending.md"
MOST_LINES = 29  # that are not blank
# Fences are matched whole, so that a comment in a program is no heading.
_PIECE = re.compile(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Example(NamedTuple):
  """A program in a document."""

  name: str  # file and heading, as in "extending-a-model"
  code: str
  prints: str | None  # None where the document does not say


def examples(path: str) -> list[Example]:
  """Finds the programs of a document by the headings above them; [] if there is no document."""
  file = ROOT / path
  text = file.read_text("utf-8") if file.exists() else ""
  found, heading, end_of_program = [], "", None
  for piece in _PIECE.finditer(text):
    title, language, body = piece.groups()
    if title:
      heading = title
    elif language == "python":
      slug = re.sub(r"\W+", "-", f"{file.stem} {heading}".lower()).strip("-")
      taken = any(example.name == slug for example in found)
      found.append(Example(f"{slug}-{len(found)}" if taken else slug, body, None))
      end_of_program = piece.end()
    elif language == "text" and found and not text[end_of_program : piece.start()].strip():
      found[-1] = found[-1]._replace(prints=body)
  return found


EXAMPLES = {
  e.name: e for path in (EXTENDING, "README.md", "docs/deployment.md") for e in examples(path)
}
AFTER = {"deployment-back-in-python": "readme-a-dozen-lines"}  # reads what the other writes


class Ran(NamedTuple):
  """A program after it ran."""

  module: ModuleType
  printed: str


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Runs a program as a module of its own, once, in an empty folder."""
  folder = tmp_path_factory.mktemp("programs")

  @functools.cache
  def run_once(name: str) -> Ran:
    if name in AFTER:
      run_once(AFTER[name])
    file = folder / f"{name.replace('-', '_')}.py"
    file.write_text(EXAMPLES[name].code, "utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, file.stem, module)  # tyro looks up there where docstrings are
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
      spec.loader.exec_module(module)
    return Ran(module, printed.getvalue())

  with pytest.MonkeyPatch.context() as patch:
    yield run_once


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_program_runs_and_prints_what_is_written(name, run):
  printed, written = run(name).printed, EXAMPLES[name].prints
  assert written is None or printed == written


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_program_is_short(name):
  lines = [line for line in EXAMPLES[name].code.splitlines() if line.strip()]
  assert len(lines) <= MOST_LINES


def test_programs_are_in_the_style_of_the_house(tmp_path):
  for example in EXAMPLES.values():
    (tmp_path / f"{example.name.replace('-', '_')}.py").write_text(example.code, "utf-8")
  for command in (["check"], ["format", "--check"]):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache"]
    config = ["--config", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
      [*ruff, *config, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_model_read_again_scores_as_it_did(run):
  ((again, trained),) = ((run(name), run(first)) for name, first in AFTER.items())
  result, own = trained.module.result, again.module.own
  assert float(again.printed) == pytest.approx(result.accuracy["personal"][7])
  packed, metadata = packing.load(
    pathlib.Path(again.module.__file__).with_name("client_7.safetensors")
  )
  images = again.module.federation.test.x[:5]
  logits = lambda model, variables: model.apply(variables, images, False)[0]
  expected = logits(own.model, own.variables)
  for said in (metadata, own.model.about):
    found = logits(models.make(**said), packing.unpack(packed))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_kind_of_extension_has_a_program():
  kinds = ("an-experiment", "a-model", "data-of-your-own", "a-partition", "a-quantiser")
  kinds += ("an-algorithm", "a-sweep")
  assert [e.name for e in examples(EXTENDING)] == [f"extending-{kind}" for kind in kinds]


@pytest.mark.usefixtures("no_pictures")
def test_the_experiment_runs_from_its_command_line(run, tmp_path, monkeypatch):
  """On two devices, as any processor with two cores has them."""
  monkeypatch.chdir(tmp_path)
  module = run("extending-an-experiment").module
  typed = "--momentum 0.5 --clients 4 --rounds 2 --finetune-rounds 1 --local-steps 1 --batch-size 4"
  typed += " --seeds 1 --eval-every 2 --models mlp2 --devices 2 --out out"
  options = cli.parse(module.DEFAULTS, typed.split(), "heavy_ball")
  assert options.momentum == 0.5
  module.main(options)
  summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
  assert set(summary["methods"]) == {"FedAvg", "FedAvg with momentum"}
  rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
  assert [(r["method"], r["round"]) for r in rows] == [
    (m, r) for m in ("FedAvg", "FedAvg with momentum") for r in (1, 2)
  ]


@pytest.mark.usefixtures("no_pictures")
def test_the_other_programs_are_jobs_that_two_devices_share(run, tmp_path):
  """The algorithm, the quantiser, the model and the partition, in one study."""
  power_law = run("extending-a-partition").module.power_law
  network = run("extending-a-model").module.Residual()
  quantizer = run("extending-a-quantiser").module.straight_through(max_bits=2)
  lg_fedavg = run("extending-an-algorithm").module.lg_fedavg
  changes = {"clients": 3, "rounds": 2, "finetune_rounds": 0, "eval_every": 2, "seeds": 1}
  options = replaced(Options(), **changes, devices=2, out=str(tmp_path))
  steps = {"work": LocalWork(steps=1, batch_size=4)}

  def shared_heads(options, federation):
    build = lambda options, _: lg_fedavg(federation.models[0], **steps)
    variants = jobs.full_precision("LG-FedAvg", federation)
    return jobs.Job(options, of_server(federation), variants, jobs.one_phase(options, build))

  def quantised(options, federation):
    build = lambda options, _: local(federation.models, quantizer, **steps)
    variants = jobs.precisions("even grid", options, federation, (2,), False)
    phases = jobs.one_phase(options, build, jobs.local_phase)
    return jobs.Job(options, federation, variants, phases)

  def split(options, train, test, seed):
    owner = power_law(train.y, options.division.clients, exponent=1.0, seed=seed)
    return splits.split(train, test, owner, splits.own_proportions, validation=0.2)

  def make_model(name, num_classes, image_shape, mean, std, **form):
    del name, num_classes, form
    return models.from_linen(network, image_shape=image_shape, mean=mean, std=std)

  study.run("own", options, (shared_heads, quantised), split=split, make_model=make_model)
  rows = metrics.read_metrics(tmp_path)
  assert {row["method"] for row in rows} == {"LG-FedAvg", "even grid 2 bit"}
  assert all(np.isfinite(row["loss"]) for row in rows)


def test_the_options_of_the_experiment_explain_themselves(run, capsys):
  module = run("extending-an-experiment").module
  with pytest.raises(SystemExit):
    cli.parse(module.DEFAULTS, ["--help"], "heavy_ball")
  assert "Momentum of a client's optimiser, started anew every round." in " ".join(
    capsys.readouterr().out.replace("│", " ").split()
  )


def test_the_algorithm_shares_heads_and_nothing_else(run):
  """Trained on a toy federation: state keeps its form, losses fall, only the head is common."""
  model = toy.mlp(5)
  algorithm = run("extending-an-algorithm").module.lg_fedavg(model, work=LocalWork(5, 4))
  data = jax.tree.map(jnp.asarray, toy.dataset(48))
  cohorts = (toy.cohort((0, 1), (32, 32)), toy.cohort((2, 3), (32, 32)))
  key = jax.random.key(0)
  first = state = jax.jit(algorithm.init)(key, data, cohorts)
  step = jax.jit(chex.assert_max_traces(algorithm.round, 1))
  losses = []
  for i in range(4):
    state, info = step(jax.random.fold_in(key, i), state, data, cohorts)
    losses.append(np.mean([cohort.loss for cohort in info]))
  chex.assert_trees_all_equal_shapes_and_dtypes(first, state)
  assert losses[-1] < losses[0]
  params = [v["params"] for v in state.clients]
  heads = jnp.concatenate([p["head"]["kernel"] for p in params])  # equally many rows per client
  np.testing.assert_allclose(state.server["kernel"], heads.mean(axis=0), rtol=1e-5, atol=1e-6)
  stems = jnp.concatenate([p["stem"]["kernel"] for p in params])
  assert len(np.unique(stems, axis=0)) == 4
  scored = algorithm.personalize(key, state, data, cohorts)["personal"]
  chex.assert_trees_all_equal(scored[1].variables, state.clients[1])


def test_an_algorithm_takes_one_file_and_two_lines(run, monkeypatch):
  """One line has the contract hold it to its promises, one a study train it (see above)."""
  lg_fedavg = run("extending-an-algorithm").module.lg_fedavg
  one_line = {"lg_fedavg": lambda: lg_fedavg(toy.mlp(8), work=LocalWork(3, 4))}
  monkeypatch.setattr(test_contract, "ALGORITHMS", test_contract.ALGORITHMS | one_line)
  test_contract.test_a_round_keeps_structure_shapes_and_dtypes("lg_fedavg")
  test_contract.test_training_lowers_the_loss("lg_fedavg")
  test_contract.test_what_stands_in_padding_rows_changes_nothing("lg_fedavg")
  package = ROOT / "qupeD_jax"
  named = {
    str(path.relative_to(package))
    for path in package.rglob("*.py")
    if re.search(r"\bditto\b", path.read_text("utf-8"))
  }
  assert named == {"algorithms/ditto.py", "study/rivals.py", "__init__.py"}  # the last: `qj.ditto`


def test_the_partition_deals_every_row_by_a_power_law(run):
  power_law = run("extending-a-partition").module.power_law
  owner = power_law(np.zeros(1100, np.int32), num_clients=3, exponent=1.0, seed=1)
  assert owner.dtype == np.int32
  np.testing.assert_array_equal(np.bincount(owner), [600, 300, 200])


@pytest.mark.parametrize(("bits", "levels"), [(2, 4), (3, 8), (32, 0)])
def test_the_quantiser_is_even_and_passes_gradients_through(run, bits, levels):
  quantizer = run("extending-a-quantiser").module.straight_through(max_bits=3)
  x = np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32)

  @jax.jit
  def after_a_step(params):
    books = quantizer.init(params, jnp.int32(bits))
    books = quantizer.update(books, params, None, 0.1, 0.0)
    slope = jax.grad(lambda p: quantizer.project(p, books, 0)["dense_1"]["kernel"].sum())(params)
    return books, quantizer.project(params, books, 0), slope

  params = {"dense_1": {"kernel": x}, "head": {"kernel": x}}
  books, value, slope = after_a_step(params)
  assert list(books) == ["dense_1/kernel"]
  even = np.full(8, np.inf)
  even[:levels] = 2 * abs(x).mean() * np.linspace(-1, 1, levels)
  np.testing.assert_allclose(books["dense_1/kernel"], even, rtol=1e-6)
  assert len(np.unique(value["dense_1"]["kernel"])) == (levels or x.size)
  np.testing.assert_array_equal(value["head"]["kernel"], x)
  np.testing.assert_array_equal(slope["dense_1"]["kernel"], np.ones_like(x))
