"""A study that is killed, refused the disk or told to stop ends as the one that was left alone."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import jax
import pytest

from experiments import quickstart
from qupeD_jax.checks import BadInput
from qupeD_jax.io import checkpoint, files
from qupeD_jax.results import metrics
from qupeD_jax.study import cli, folders, portrait
from qupeD_jax.study.durability.progress import Bar
from qupeD_jax.study.errors import Terminated
from tests import survivor

SMALL = {"rounds": 8, "finetune_rounds": 2, "eval_every": 2, "seeds": 1}


def kept(folder):
  """Reads what a study leaves, without when, where and how fast it ran."""
  found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  summary = json.loads(found["summary.json"])
  for entry in summary["methods"].values():
    assert entry.pop("seconds") > 0
  del found["config.json"], found["table.md"]
  assert any(name.endswith(".safetensors") for name in found)
  return found | {"summary.json": summary}


def assert_same(folder, other):
  ours, theirs = kept(folder), kept(other)
  assert ours.keys() == theirs.keys()
  for name in ours:
    assert ours[name] == theirs[name], name


# --- killed


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Returns a function: target, arguments -> a process that has imported all it needs."""
  # Small programs are kept, too: every life would compile them anew.
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.survivor"])
  started = []

  def start(target, *arguments):
    process = context.Process(target=target, args=tuple(map(str, arguments)))
    process.start()
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()


def saves(folder):
  """Returns the names of saves, and of those that are being written."""
  return [path.name for path in (folder / folders.CHECKPOINTS).glob("*/*")]


def newest(folder):
  return max((int(name) for name in saves(folder) if name.isdecimal()), default=-1)


def wait_until(process, holds):
  while process.is_alive() and not holds():
    time.sleep(0.0005)


def die_starting(process, folder, rng):
  del process, folder
  time.sleep(rng.uniform(0.0, 0.8))


def die_training(process, folder, rng):
  for _ in range(rng.randrange(1, 8)):
    before = newest(folder)
    wait_until(process, lambda before=before: newest(folder) != before)
  time.sleep(rng.uniform(0.0, 0.01))


def die_saving(process, folder, rng):
  if rng.random() < 0.5:
    die_training(process, folder, rng)
  wait_until(process, lambda: any("tmp" in name for name in saves(folder)))


DEATHS = [die_starting] * 4 + [die_training] * 9 + [die_saving] * 7


def test_killed_at_twenty_moments_it_ends_as_if_it_never_was(start, tmp_path):
  whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"

  def ended(process):
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return process.exitcode == 0

  assert ended(start(survivor.run_quietly, whole, log))
  rng, deaths, rows = random.Random(0), [*DEATHS], set()
  rng.shuffle(deaths)
  while deaths:
    process = start(survivor.run_quietly, killed, log)
    deaths[-1](process, killed, rng)
    process.kill()
    if ended(process):  # too soon: one more study
      assert_same(killed, whole)
      shutil.rmtree(killed)
    else:
      written = killed / "metrics.jsonl"
      rows.add(written.read_bytes().count(b"\n") if written.exists() else 0)
      deaths.pop()
  assert len(rows) > len(DEATHS) / 3  # it died in many places
  assert ended(start(survivor.run_quietly, killed, log))
  assert_same(killed, whole)
  assert "warning" not in log.read_text()


# --- cut off, and what is on the disk is no more what it was


@pytest.fixture(scope="module", autouse=True)
def compiled():
  """Keeps even small programs while these tests run."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, 0.0)
  yield
  jax.config.update(name, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A small study that was left alone."""
  folder = tmp_path_factory.mktemp("whole")
  survivor.run(folder, **SMALL)
  return folder


class Crash(BaseException):
  """Ends a study as nothing that is caught does."""


def crash_after(chunks, folder):
  """Has a study crash when so many chunks were written down, the last of them not yet saved."""
  advance = mock.Mock(side_effect=[None] * (chunks - 1) + [Crash])
  with mock.patch.object(Bar, "advance", advance), pytest.raises(Crash):
    survivor.run(folder, **SMALL)


@pytest.fixture(scope="module")
def crashed_once(tmp_path_factory):
  folder = tmp_path_factory.mktemp("crashed")
  crash_after(8 + 5, folder)  # in the second job's second phase
  return folder


@pytest.fixture
def crashed(crashed_once, tmp_path):
  """A study that crashed in its second job, with a row more than is saved."""
  return shutil.copytree(crashed_once, tmp_path / "crashed")


def saved(folder):
  return sorted(p for p in (folder / folders.CHECKPOINTS).glob("*/*") if p.name.isdecimal())


def test_what_was_written_after_the_last_save_is_cut_off(crashed, whole):
  path = crashed / "metrics.jsonl"
  assert metrics.read_metrics(crashed)[-1]["round"] == 5
  files.append(path, json.dumps(metrics.read_metrics(crashed)[-1] | {"round": 6}) + '\n{"meth')
  snapshots = crashed / portrait.FOLDER / "walk_2_bit_and_1_more"
  snapshots.mkdir(parents=True, exist_ok=True)
  (snapshots / "000000005.npz").write_bytes(b"of a moment that is not looked at again")
  survivor.run(crashed, **SMALL)
  assert_same(crashed, whole)


@pytest.mark.parametrize("count", [1, 2])
def test_damaged_saves_cost_no_more_than_what_they_held(crashed, whole, capsys, count):
  for path in saved(crashed)[-count:]:
    for file in filter(Path.is_file, path.glob("state/**/*")):
      file.write_bytes(file.read_bytes()[:-1])
  survivor.run(crashed, **SMALL)
  assert len(re.findall(r"^[^\n]*/[0-9]+: damaged[^\n]*$", said(capsys), re.M)) == count
  assert_same(crashed, whole)


def test_a_save_that_knows_more_rounds_than_were_written_is_not_taken(crashed, whole, capsys):
  metrics.keep_rows(crashed, lambda row: row["method"] == "alone" or row["round"] <= 3)
  survivor.run(crashed, **SMALL)
  assert "saved after round 4, but metrics.jsonl ends at round 3" in said(capsys)
  assert_same(crashed, whole)


def test_a_job_that_was_finished_is_not_trained_again(crashed, whole, capsys):
  one_phase = survivor.jobs.one_phase
  untrained = lambda options, build: one_phase(options, lambda *_: pytest.fail("trained again"))
  with mock.patch.object(survivor.jobs, "one_phase", untrained):
    survivor.run(crashed, **SMALL)
  assert f"{crashed}: goes on with the run that was cut off there" in said(capsys)
  assert_same(crashed, whole)


def said(capsys):
  return capsys.readouterr().out


# --- started again


def test_a_finished_run_says_so_and_does_nothing(whole, tmp_path, capsys):
  folder = shutil.copytree(whole, tmp_path / "copy")
  before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
  survivor.run(folder, **SMALL, checkpoint_every=3, minutes=1.0)
  said_ = said(capsys)
  assert said_ == f"{folder}: finished already, with the same options; --fresh runs it anew\n"
  assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_fresh_run_begins_anew_and_a_finished_one_gives_way_to_other_options(
  crashed, whole, capsys
):
  with pytest.raises(BadInput, match=r"unfinished run with --seed 0, here 1; "):
    survivor.run(crashed, **SMALL, seed=1)
  survivor.run(crashed, **SMALL, seed=1, fresh=True)
  assert {row["seed"] for row in metrics.read_metrics(crashed)} == {1}
  assert "goes on" not in said(capsys)
  survivor.run(crashed, **SMALL)
  assert f"{crashed}: replaces a finished run with --seed 1, here 0\n" in said(capsys)
  assert_same(crashed, whole)


def test_what_had_saved_nothing_gives_way_to_other_options(tmp_path):
  with mock.patch.object(Bar, "start", side_effect=Crash), pytest.raises(Crash):
    survivor.run(tmp_path, **SMALL, seed=1)
  with mock.patch.object(Bar, "start", side_effect=Crash), pytest.raises(Crash):
    survivor.run(tmp_path, **SMALL)


def test_an_old_summary_never_passes_for_that_of_other_options(whole, tmp_path, monkeypatch):
  folder = shutil.copytree(whole, tmp_path / "copy")
  monkeypatch.setattr(metrics, "open_results", mock.Mock(side_effect=Crash))
  with pytest.raises(Crash):
    survivor.run(folder, **SMALL, seed=1)
  assert not (folder / "summary.json").exists()


def test_a_damaged_config_of_an_unfinished_run_is_no_way_to_lose_it(crashed):
  (crashed / "config.json").write_text("{")
  with pytest.raises(BadInput, match=r"config\.json: damaged .*; --fresh begins anew"):
    survivor.run(crashed, **SMALL)


# --- a second run


def test_a_second_run_in_a_folder_is_refused(crashed):
  refused = pytest.raises(BadInput, match=rf"^{crashed}: another run is at work there; --out ")
  with folders.held(crashed), refused:
    survivor.run(crashed, **SMALL)
  assert not (crashed / ".lock").exists()


# --- a full disk


@pytest.mark.parametrize("full", ["metrics.jsonl", "/3", "000000006.npz", "client_0001"])
def test_a_full_disk_ends_in_one_line_and_costs_nothing_that_was_complete(
  full, whole, tmp_path, monkeypatch
):
  sync, room = files.sync, iter(range(3))

  def sync_if_room(file):
    if full in file.name and (full != "metrics.jsonl" or next(room, None) is None):
      raise OSError(errno.ENOSPC, "No space left on device")
    sync(file)

  save = checkpoint.ocp.CheckpointManager.save

  def save_if_room(manager, number, **items):
    if full == "/3" and number == 3:
      raise ValueError("Error writing 1.a/0: No space left on device")
    save(manager, number, **items)

  monkeypatch.setattr(files, "sync", sync_if_room)
  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", save_if_room)
  line = rf"^[^\n]*{full}[^\n]*cannot be written \(No space left on device\)$"
  with pytest.raises(BadInput, match=line):
    survivor.run(tmp_path, **SMALL)
  for row in metrics.read_metrics(tmp_path):
    assert row in metrics.read_metrics(whole)
  assert not [*tmp_path.rglob("*.partial")]
  monkeypatch.undo()
  survivor.run(tmp_path, **SMALL)
  assert_same(tmp_path, whole)


# --- told to stop


def test_sigterm_saves_and_ends(whole, tmp_path):
  def ask(*_):
    os.kill(os.getpid(), signal.SIGTERM)

  line = "saved and stopped, as SIGTERM has it; the same command goes on from here"
  with mock.patch.object(Bar, "advance", ask), pytest.raises(Terminated, match=line):
    survivor.run(tmp_path, **SMALL, checkpoint_every=0)
  assert len(saved(tmp_path)) == 1
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  with mock.patch.object(survivor.study, "draw", ask), pytest.raises(Terminated, match="finished"):
    survivor.run(tmp_path, **SMALL, checkpoint_every=0)
  assert_same(tmp_path, whole)


def test_sigterm_has_an_exit_code(tmp_path, monkeypatch, capsys):
  def told(*_):
    raise Terminated("saved and stopped")

  monkeypatch.setattr(quickstart, "main", told)
  assert cli.main(["quickstart"]) == cli.TERMINATED == 128 + signal.SIGTERM
  assert capsys.readouterr() == ("saved and stopped\n", "")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start, second):
  process = start(survivor.deaf, int(second))
  process.join()
  assert process.exitcode == 128 + second
