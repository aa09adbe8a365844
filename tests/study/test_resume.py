"""A study that is stopped and continued is the one that ran in one go; saves by themselves."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import quickstart
from qupeD_jax.checks import BadInput
from qupeD_jax.io import checkpoint
from qupeD_jax.results import metrics, plots
from qupeD_jax.study import cli, folders, methods, portrait, study
from qupeD_jax.study.durability import resume
from qupeD_jax.study.errors import Incomplete, OutOfTime
from qupeD_jax.study.options import Options, replaced
from qupeD_jax.types import FedState

OPTIONS = replaced(
  Options(),
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
      patch.setattr(plots, name, lambda *_: None)
    yield


def set_all(values):
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def run(folder, jobs=JOBS, **changes):
  return study.run("tiny", replaced(OPTIONS, out=str(folder), **changes), jobs).folder


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
      assert (stopped / folders.CHECKPOINTS).is_dir()
      if stops == 3:  # the first method is finished
        with pytest.raises(BadInput, match=r"unfinished run with methods that are not .*, local; "):
          run(stopped, JOBS[1:])
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
  for name in (folders.CHECKPOINTS, portrait.FOLDER):
    assert not (uninterrupted / name).exists()


@pytest.mark.parametrize(
  ("changes", "differs"),
  [
    ({"local_steps": 2, "seed": 3}, "--seed 0, here 3; --local-steps 1, here 2"),
    ({"bits": (2,)}, "--bits 1 2, here 2"),
    ({"weights_rate": 0.2}, "--weights-rate 0.1, here 0.2"),
  ],
)
def test_other_options_in_between_are_refused(stopped_once, changes, differs):
  before = {path: path.read_bytes() for path in stopped_once.rglob("*") if path.is_file()}
  with pytest.raises(BadInput, match=f"holds an unfinished run with {differs}; .*--fresh begins"):
    run(stopped_once, JOBS[:1], **changes)
  assert before == {path: path.read_bytes() for path in stopped_once.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
  folder = tmp_path_factory.mktemp("once")
  with pytest.raises(OutOfTime):
    run(folder, JOBS[:1], minutes=AT_ONCE)
  return folder


def test_a_shared_phase_is_that_of_each_variant(uninterrupted, tmp_path, monkeypatch):
  shared = methods.averaging_phases

  def apart(*arguments):
    (phase,) = shared(*arguments)
    assert phase.shared
    return (phase._replace(shared=False),)

  monkeypatch.setattr(methods, "averaging_phases", apart)
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
  with pytest.raises(BadInput, match=r"minutes 0: allowed is"):
    run("nowhere", minutes=0)


# --- whose snapshots are taken


def test_the_first_quantised_client_is_drawn(tmp_path):
  job = methods.quped_quantised(OPTIONS, federation(bits=(32, 2)), bits=(32, 1), mixed=True)
  chosen = portrait.of_job(job, tmp_path)
  assert (chosen.method, chosen.run, chosen.client) == ("QuPeD 1 bit", 1, 0)
  assert portrait.of_job(job, tmp_path, "QuPeD 32 bit") is None
  alone = methods.local_training(OPTIONS, federation())
  assert portrait.of_job(alone, tmp_path) is None


def federation(**changes):
  return study.fed.load(replaced(OPTIONS, **changes))


class Clients(NamedTuple):
  variables: dict
  codebooks: dict


def test_snapshots_hold_all_centers_and_weights_at_five_moments(tmp_path, monkeypatch):
  sitter = portrait.Portrait("ours", 1, 7, 0, rounds=16, folder=tmp_path / "snapshots")
  for done in range(6, 17, 2):  # the phase before has no codebooks
    tensor = jnp.full((2, 1, 3, 4), 1.0 * done)
    books = {"dense_1/kernel": jnp.array([[[0.0, 1.0]], [[done, jnp.inf]]])}
    clients = Clients({"params": {"dense_1": {"kernel": tensor}}}, books)
    sitter.take(FedState({}, (clients,), jnp.int32(done)), done)
  shown = {}
  monkeypatch.setattr(plots, "weights", lambda *drawn: shown.update(weights=drawn))
  monkeypatch.setattr(plots, "centers", lambda *drawn: shown.update(centers=drawn))
  sitter.draw(tmp_path, range(6, 17, 2), print)
  kept, _, title = shown["weights"]
  assert title == "ours, client 7: dense_1/kernel"
  assert [number for number, *_ in kept] == [6, 8, 12, 16]
  assert all(np.all(values == number) and values.shape == (12,) for number, values, _ in kept)
  rounds, by_tensor, _, title = shown["centers"]
  assert rounds == [6, 8, 10, 12, 14, 16]
  np.testing.assert_array_equal(by_tensor["dense_1/kernel"], np.transpose([rounds]))
  assert title == "ours, client 7"
  said, taken = [], tmp_path / "snapshots"
  (taken / "notes.npz").write_bytes(b"of somebody else")
  sitter.cut_back(14)
  sitter.draw(tmp_path, range(6, 17, 2), said.append)
  (taken / "000000016.npz").write_bytes((taken / "000000014.npz").read_bytes()[:-9])
  sitter.draw(tmp_path, range(6, 17, 2), said.append)
  lost, cut = said
  assert lost.endswith(": 1 of 6 snapshots are missing; weights.png and centers.png are left out")
  assert cut.endswith("16.npz: damaged; weights.png and centers.png are left out")


def test_results_that_went_while_a_run_was_at_work_are_missed(tmp_path):
  config = {"seed_list": [0, 1]}
  metrics.open_results(tmp_path, config)
  metrics.write_summary(tmp_path, {})
  metrics.write_accuracies(tmp_path, {})
  row = lambda seed, number: {"method": "local", "seed": seed, "round": number}
  metrics.append_metrics(tmp_path, [row(seed, number) for seed in (0, 1) for number in (1, 2)])
  names = ("summary.json", "accuracies.json")
  folders.require_whole(tmp_path, {"local": 4}, names)
  with pytest.raises(Incomplete, match=r"missing at the end are 2 of 6 rows of local; "):
    folders.require_whole(tmp_path, {"local": 6}, names)
  with pytest.raises(Incomplete, match=r"are models/0, .*models/6 and 3 more; "):
    folders.require_whole(tmp_path, {}, [f"models/{i}" for i in range(12)])
  (tmp_path / "config.json").unlink()
  with pytest.raises(Incomplete, match=r"are config\.json; "):
    folders.require_whole(tmp_path, {"local": 4}, names)
  (tmp_path / "metrics.jsonl").unlink()
  with pytest.raises(BadInput, match=r"metrics\.jsonl: cannot be written"):
    metrics.append_metrics(tmp_path, [row(0, 3)])


# --- saves by themselves


class State(NamedTuple):
  weights: dict
  empty: tuple
  rounds: jax.Array


def states(number):
  centers = jnp.array([-1.5, 0.25, jnp.inf, jnp.inf])
  return None, State({"c": centers + number, "x": jnp.ones((2, 3))}, (), jnp.int32(number))


@pytest.fixture
def saved(tmp_path):
  """A folder with the last two of four saves."""
  folder = tmp_path / "not" / "there"
  assert checkpoint.restore(folder, None, None) is None
  for number in range(4):
    save = checkpoint.Save(jax.device_get(states(number)), {"phase": number, "seconds": 0.5})
    checkpoint.save(folder, save)
  return folder


def restored(folder, like=lambda progress: jax.eval_shape(lambda: states(0))):
  warnings = []
  return checkpoint.restore(folder, like, warnings.append), warnings


def test_a_save_comes_back_as_it_was(saved):
  found, warnings = restored(saved)
  assert found.progress == {"phase": 3, "seconds": 0.5}
  assert isinstance(found.state[1], State)
  chex.assert_trees_all_equal(found.state, states(3))
  assert not warnings
  assert names(saved) == ["2", "3"]


def names(saved):
  return sorted(path.name for path in saved.iterdir())


def damaged(save, how):
  """Damages the file that holds the progress, or those that hold the state."""
  for path in filter(Path.is_file, save.glob("about/*" if how == "progress" else "state/**/*")):
    whole = bytearray(path.read_bytes())
    match how:
      case "cut":
        whole = whole[: len(whole) // 2]
      case "empty":
        whole = b""
      case "tensor":
        whole[len(whole) // 2] ^= 1
      case "progress":
        whole = whole.replace(b"seconds", b"minutes")
    path.write_bytes(whole)


@pytest.mark.parametrize("how", ["cut", "empty", "tensor", "progress"])
def test_a_damaged_save_falls_back_to_the_one_before(saved, how):
  damaged(saved / "3", how)
  found, (warning,) = restored(saved)
  chex.assert_trees_all_equal(found.state, states(2))
  assert re.fullmatch(r"[^\n]*/3: damaged[^\n]*the save before it is taken[^\n]*", warning)
  assert restored(saved)[1] == []
  checkpoint.save(saved, found)
  assert names(saved) == ["2", "3", "3.damaged"]
  damaged(saved / "2", how)
  damaged(saved / "3", how)
  found, warnings = restored(saved)
  assert found is None
  assert len(warnings) == 2


@pytest.mark.parametrize("text", ["[]", '{"item_handlers": 7}'])
def test_a_save_whose_own_description_is_no_object_falls_back_too(saved, text):
  (described,) = (saved / "3").glob("_CHECKPOINT_METADATA")
  described.write_text(text)
  found, warnings = restored(saved)
  assert found.progress["phase"] == 2
  assert re.fullmatch(r"[^\n]*/3: damaged[^\n]*", warnings[0])
  checkpoint.save(saved, found)


def test_a_save_of_another_program_is_put_aside(saved):
  like = lambda progress: jax.eval_shape(lambda: (None, states(0)[1].weights))
  found, warnings = restored(saved, like)
  assert found is None
  assert all("damaged" in warning for warning in warnings)
  assert len(list(saved.glob("*.damaged"))) == 2  # and can be looked at


def test_without_a_folder_nothing_is_saved():
  here = resume.Position(0, 0, 0, 0.0, None, None)
  resume.Saves(deadline=0.0).after_chunk(0, here)
  assert resume.NOTHING.restore(None) == resume.BEGIN


def test_what_is_saved_is_where_a_job_stands(tmp_path):
  saves = resume.Saves(tmp_path / "job", deadline=0.0)
  assert saves.restore(None) == resume.BEGIN
  here = resume.Position(1, 3, 5, 2.5, {"start": jnp.zeros(2)}, {"now": jnp.ones(3)})
  with pytest.raises(OutOfTime):
    saves.after_chunk(4, here)
  shapes = lambda phase: jax.eval_shape(lambda: (here.start, here.state)) if phase == 1 else None
  chex.assert_trees_all_equal(saves.restore(shapes), here)


# --- how often


def test_saves_come_after_so_many_rounds():
  ends = [3, 5, 6, 10, 20, 21]
  chunks = list(zip([0, *ends], ends, strict=False))
  saved = lambda every: [end for begin, end in chunks if resume.Pace(every).due(begin, end)]
  assert saved(1) == ends
  assert saved(5) == [5, 10, 20]
  assert saved(7) == [10, 20, 21]
  assert saved(0) == []


def test_saves_by_the_clock_take_a_small_share_of_the_time(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
  pace, saved = resume.Pace(None), []
  for second in range(3000):
    now[0] = float(second)
    if pace.due(0, 1):
      saved.append(second)
      pace.saved(1.0 if second < 200 else 30.0)
  assert saved == [60, 120, 180, 240, 840, 1440, 2040, 2640]
