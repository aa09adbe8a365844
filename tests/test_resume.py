"""A study that is stopped and continued is the one that ran in one go; saves by themselves."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import quickstart
from experiments.common import cli, methods, portrait, resume, study, tuning
from experiments.common.errors import OutOfTime
from experiments.common.jobs import Phase
from experiments.common.options import Options
from experiments.common.tuning import Tuning
from qupeD_jax import checkpoint, metrics, report
from qupeD_jax.checks import BadInput

OPTIONS = Options(
  dataset="digits", models=("mlp2",), clients=4, bits=(1, 2), rounds=4, finetune_rounds=1,
  local_steps=1, batch_size=4, eval_every=2, seeds=1,
)  # fmt: skip
# Chunks of 2 and 2 rounds; of 2 rounds of FedAvg, which train once for both, 1 and 1.
JOBS = (
  methods.local_training,
  functools.partial(methods.averaging_then_quantised, bits=(2, 1)),
)
CHUNKS = 5
SAME = ("metrics.jsonl", "accuracies.json", "weights.png", "centers.png")
AT_ONCE = 1e-9  # minutes


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
  """Keeps compiled programs while these tests run: every continuation would compile them anew."""
  names = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in names}
  set_all(names)
  yield
  set_all(before)


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
  """Leaves out the pictures that a stop has no part in."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("clients", "curves"):
      patch.setattr(report, name, lambda *_: None)
    yield


def set_all(values):
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def run(folder, jobs=JOBS, **changes):
  return study.run("tiny", dataclasses.replace(OPTIONS, out=str(folder), **changes), jobs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  return run(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """A study that was stopped after its second chunk."""
  folder = tmp_path_factory.mktemp("stopped")
  for _ in range(2):
    with pytest.raises(OutOfTime, match=r"saved and stopped.*the same command goes on from here"):
      run(folder, minutes=AT_ONCE)
  return folder


# --- a study


def test_a_study_stopped_after_every_chunk_is_the_same_study(uninterrupted, stopped):
  stops = 2
  while True:
    try:
      run(stopped, minutes=AT_ONCE)
      break
    except OutOfTime:
      stops += 1
      assert (stopped / study.CHECKPOINTS).is_dir()
  assert stops == CHUNKS
  for name in SAME:
    assert (stopped / name).read_bytes() == (uninterrupted / name).read_bytes(), name
  summaries = [metrics.read_summary(folder) for folder in (stopped, uninterrupted)]
  for entry in (entry for summary in summaries for entry in summary.values()):
    assert entry.pop("seconds") > 0
  assert summaries[0] == summaries[1]
  names = [{path.name for path in folder.iterdir()} for folder in (stopped, uninterrupted)]
  assert names[0] == names[1]


def test_nothing_temporary_is_left(uninterrupted):
  for name in (study.CHECKPOINTS, portrait.FOLDER):
    assert not (uninterrupted / name).exists()


@pytest.mark.parametrize(
  ("name", "value"), [("local_steps", 2), ("bits", (2,)), ("weights_rate", 0.2)]
)
def test_other_options_in_between_are_refused(stopped_once, name, value):
  with pytest.raises(BadInput, match=rf"holds a run that was stopped: made with {name} .*as here"):
    run(stopped_once, **{name: value})


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
  folder = tmp_path_factory.mktemp("once")
  with pytest.raises(OutOfTime):
    run(folder, JOBS[:1], minutes=AT_ONCE)
  return folder


def test_a_shared_phase_is_that_of_each_variant(uninterrupted, tmp_path, monkeypatch):
  shared = methods.averaging_phase

  def apart(*arguments):
    phase = shared(*arguments)
    assert phase.shared
    return phase._replace(shared=False)

  monkeypatch.setattr(methods, "averaging_phase", apart)
  folder = run(tmp_path, JOBS[1:])
  found, expected = (metrics.read_accuracies(path) for path in (folder, uninterrupted))
  assert found.keys() == expected.keys() - {"local"}
  for method, entry in found.items():
    np.testing.assert_array_equal(entry["accuracy"], expected[method]["accuracy"])


# --- the command line


def test_a_stop_has_an_exit_code_and_says_what_to_do(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(quickstart, "JOBS", JOBS[:1])
  typed = ("--models", "mlp2", "--clients", "4", "--bits", "1", "--rounds", "2", "--seeds", "1")
  typed += ("--finetune-rounds", "1", "--local-steps", "1", "--eval-every", "1")
  typed += ("--minutes", "1e-9", "--out", str(tmp_path))
  assert cli.main(["quickstart", *typed]) == cli.UNFINISHED == 75
  said = capsys.readouterr()
  assert said.out.endswith("the same command goes on from here\n")
  assert not said.err


def test_no_minutes_are_refused():
  with pytest.raises(BadInput, match=r"--minutes 0: allowed is"):
    run("nowhere", minutes=0)


def test_a_search_has_no_minutes():
  options = Tuning(dataset="digits", models=("mlp2",), minutes=1.0)
  with pytest.raises(BadInput, match=r"--minutes 1\.0: allowed is None in a search"):
    tuning.run("search", options)


# --- whose snapshots are taken


def test_the_first_quantised_client_is_drawn(tmp_path):
  job = methods.quped_quantised(OPTIONS, federation(bits=(32, 2)), bits=(32, 1), mixed=True)
  chosen = portrait.of_job(job, tmp_path)
  assert (chosen.method, chosen.run, chosen.client) == ("QuPeD 1 bit", 1, 0)
  assert portrait.of_job(job, tmp_path, "QuPeD 32 bit") is None
  alone = methods.local_training(OPTIONS, federation())
  assert portrait.of_job(alone, tmp_path) is None


def federation(**changes):
  return study.fed.load(dataclasses.replace(OPTIONS, **changes))


class Clients(NamedTuple):
  variables: dict
  codebooks: dict


def test_snapshots_hold_all_centers_and_weights_at_five_moments(tmp_path, monkeypatch):
  sitter = portrait.Portrait("ours", 1, 7, 0, rounds=16, folder=tmp_path / "snapshots")
  for done in range(6, 17, 2):  # the phase before has no codebooks
    tensor = jnp.full((2, 1, 3, 4), 1.0 * done)
    books = {"dense_1/kernel": jnp.array([[[0.0, 1.0]], [[done, jnp.inf]]])}
    clients = Clients({"params": {"dense_1": {"kernel": tensor}}}, books)
    sitter.take(study.FedState({}, (clients,), jnp.int32(done)), done - 2, done)
  shown = {}
  monkeypatch.setattr(report, "weights", lambda *drawn: shown.update(weights=drawn))
  monkeypatch.setattr(report, "centers", lambda *drawn: shown.update(centers=drawn))
  sitter.draw(tmp_path)
  kept, _, title = shown["weights"]
  assert title == "ours, client 7: dense_1/kernel"
  assert [number for number, *_ in kept] == [6, 8, 12, 16]
  assert all(np.all(values == number) and values.shape == (12,) for number, values, _ in kept)
  rounds, by_tensor, _, title = shown["centers"]
  assert rounds == [6, 8, 10, 12, 14, 16]
  np.testing.assert_array_equal(by_tensor["dense_1/kernel"], np.transpose([rounds]))
  assert title == "ours, client 7"


# --- saves by themselves


class State(NamedTuple):
  weights: dict
  empty: tuple
  rounds: jax.Array


def test_a_save_comes_back_as_it_was(tmp_path):
  folder = tmp_path / "not" / "there"
  assert checkpoint.latest(folder) is None
  centers = jnp.array([-1.5, 0.25, jnp.inf, jnp.inf])
  states = [
    (None, State({"c": centers + k, "x": jnp.ones((2, 3))}, (), jnp.int32(k))) for k in range(4)
  ]
  for number, state in enumerate(states):
    checkpoint.save(folder, number, state, {"phase": number, "seconds": 0.5})
  assert checkpoint.latest(folder) == (3, {"phase": 3, "seconds": 0.5})
  for number in (2, 3):
    like = jax.eval_shape(lambda number=number: states[number])
    restored = checkpoint.restore(folder, number, like)
    assert isinstance(restored[1], State)
    chex.assert_trees_all_equal(restored, states[number])
  kept = sorted(path.name for path in folder.iterdir() if path.is_dir())
  assert kept == ["2", "3"]


def test_without_a_folder_nothing_is_saved():
  here = resume.Position(Phase, 0, 0.0, None, None)
  resume.Saves(deadline=0.0).after_chunk(here)
  assert resume.NOTHING.restore(None) is None


def test_what_is_saved_is_where_a_job_stands(tmp_path):
  saves = resume.Saves(tmp_path / "job", deadline=0.0)
  assert saves.restore(None) is None
  here = resume.Position(1, 3, 2.5, {"start": jnp.zeros(2)}, {"now": jnp.ones(3)})
  with pytest.raises(OutOfTime):
    saves.after_chunk(here)
  shapes = lambda phase: jax.eval_shape(lambda: (here.start, here.state)) if phase == 1 else None
  chex.assert_trees_all_equal(saves.restore(shapes), here)
