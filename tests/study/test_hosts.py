"""Runs of two processes on this host: what one process finds, also when one of them is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.engine import parallel
from qupeD_jax.results import metrics
from qupeD_jax.study import cli
from qupeD_jax.study.durability import hosts
from qupeD_jax.study.options import Options, replaced
from tests import federates

ROOT = Path(__file__).parents[2]
ROWS = federates.OPTIONS.work.rounds * federates.OPTIONS.run.seeds


@pytest.fixture
def start(tmp_path):
  """Returns a function: results folder, where to meet, number, options -> a process that began."""
  # One device a process, as it would be elsewhere; small programs are kept for the next one.
  own = {
    "XLA_FLAGS": " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device" not in flag),
    "PYTHONPATH": str(ROOT),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  started = []

  def start(folder, where, number, *changes):
    command = [sys.executable, "-m", "tests.federates", str(folder), where, str(number), *changes]
    log = (tmp_path / f"log_{len(started)}").open("w+")
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=log, stderr=log)
    process.log = Path(log.name)
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()


def somewhere():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def rows_in(folder):
  path = folder / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def test_two_processes_find_what_one_does_and_a_lost_one_can_be_replaced(start, tmp_path):
  """Float32 sums of two partial sums: the tolerance is that of a few dozen small steps."""
  alone, both = tmp_path / "alone", tmp_path / "both"
  where = somewhere()
  first, second = (start(both, where, number) for number in (0, 1))
  while rows_in(both) < ROWS / 4 and first.poll() is None:
    time.sleep(0.02)
  second.send_signal(signal.SIGKILL)
  assert first.wait() == 1, first.log.read_text()
  assert f"error: {hosts.LOST}" in first.log.read_text()
  assert 0 < rows_in(both) < ROWS
  where = somewhere()
  again = [start(both, where, number) for number in (0, 1)]
  assert [process.wait() for process in again] == [0, 0], again[0].log.read_text()
  assert "goes on with the run that was cut off there" in again[0].log.read_text().replace(
    "\n", " "
  )
  assert not re.search("tiny|results in|QuPeD", again[1].log.read_text())  # the first one prints
  federates.run(alone)
  ours, theirs = (metrics.read_metrics(folder) for folder in (both, alone))
  assert [(r["seed"], r["round"]) for r in ours] == [(r["seed"], r["round"]) for r in theirs]
  loss = [[row["loss"] for row in rows] for rows in (ours, theirs)]
  np.testing.assert_allclose(*loss, rtol=1e-3)
  found = [metrics.read_accuracies(folder)["QuPeD 2 bit"]["accuracy"] for folder in (both, alone)]
  np.testing.assert_allclose(*found, atol=0.03)  # of 24 to 107 rows one may change sides
  assert sorted(p.name for p in both.rglob("*")) == sorted(p.name for p in alone.rglob("*"))


@pytest.mark.parametrize(
  ("given", "line"),
  [
    ({"devices": 0}, "devices 0: allowed is a whole number of at least 1"),
    ({"process": 1}, "process 1: allowed is given with `coordinator` HOST:PORT only"),
    ({"coordinator": "host"}, "coordinator host: allowed is HOST:PORT or auto"),
    ({"coordinator": "host:70000"}, "coordinator host:70000: allowed is HOST:PORT or auto"),
    ({"coordinator": "h:1"}, "processes None: allowed is a whole number of at least 1"),
    (
      {"coordinator": "h:1", "processes": 2},
      "process None: allowed is 0 to 1, each of them once",
    ),
    (
      {"coordinator": "h:1", "processes": 2, "process": 2},
      "process 2: allowed is 0 to 1, each of them once",
    ),
  ],
)
def test_what_says_not_where_processes_meet_is_refused(given, line):
  with pytest.raises(BadInput) as refused:
    hosts.check(replaced(Options(), **given))
  assert str(refused.value) == line


@pytest.mark.parametrize(
  ("given", "devices"),
  [
    ({}, 8),
    ({"clients": 5}, 5),
    ({"clients": 20, "models": ("mlp", "mlp2")}, 5),  # ten a network, two on each device
    ({"clients": 1}, 1),
    ({"participation": 0.2}, 5),
    ({"participation": 0.01}, 1),
    ({"participation": float("nan")}, 8),  # refused later, with a line of its own
    ({"store": "host", "participation": 0.2}, 5),
    ({"coordinator": "h:1", "processes": 2, "process": 0}, 1),
    ({"models": ()}, 8),  # refused later, with a line of its own
  ],
)
def test_clients_share_the_cores_where_that_is_faster(given, devices, monkeypatch):
  monkeypatch.setattr(parallel, "cores", lambda: 8)
  assert hosts.usual_devices(replaced(Options(), **{"clients": 24, **given})) == devices


@pytest.mark.parametrize(("given", "devices"), [({}, 3), ({"devices": 2}, 2), ({"clients": 1}, 1)])
def test_a_run_knows_its_number_of_devices(given, devices, monkeypatch):
  monkeypatch.setattr(parallel, "cores", lambda: 3)
  assert hosts.join(replaced(Options(), **given)).hardware.devices == devices


def test_an_abort_is_put_into_one_line(monkeypatch, capfd):
  """As of jax, when the process that coordinates the others is gone."""
  abort = [sys.executable, "-c", "import os; os.abort()"]
  popen = subprocess.Popen
  copies = []

  def aborting(command, env):
    copies.append(Path(env[hosts._COPIES]))
    (copies[0] / "a copy of results").write_text("")
    return popen(abort, env=env)

  monkeypatch.setattr(subprocess, "Popen", aborting)
  where = ("--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "1")
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  try:
    assert cli.main(("quickstart", *where)) == 1
  finally:
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
      signal.signal(number, handler)
  assert capfd.readouterr().err == f"error: {hosts.LOST}\n"
  assert not copies[0].exists()  # what the aborted process could not remove


def test_processes_with_other_options_are_refused_at_all_in_one_line(start, tmp_path):
  where = somewhere()
  both = [start(tmp_path, where, 0), start(tmp_path, where, 1, "local_steps=2")]
  assert [process.wait() for process in both] == [1, 1]
  line = "error: local_steps 2: that is at process 1, while process 0 has 1\n"
  assert [process.log.read_text() for process in both] == [line, line]


def test_who_waits_in_vain_listens_where_told_and_says_so_in_one_line(start, tmp_path):
  where = somewhere()
  alone = start(tmp_path, where, 0, "join_timeout=4")
  port = int(where.split(":")[1])
  listening = set()
  while alone.poll() is None:
    rows = [
      row for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()
    ]
    ends = [row.split()[1] for row in rows if row.split()[3] == "0A"]  # LISTEN
    listening |= {end.split(":")[0] for end in ends if int(end.split(":")[1], 16) == port}
    time.sleep(0.1)
  assert alone.wait() == 2
  assert alone.log.read_text() == (
    f"error: --join-timeout 4: within so many seconds not all processes met at {where}\n"
  )
  assert listening  # at 127.0.0.1, as it is written there, alone
  assert {end[-8:] for end in listening} == {"0100007F"}


@pytest.mark.parametrize(
  ("name", "value"), [("jax", "0.10.1"), ("python", "3.12.1"), ("seed", "1"), ("NAME", "faults")]
)
def test_the_first_difference_is_named_with_both_values(name, value):
  ours = hosts._told("quickstart", Options())
  error = hosts.disagreement([ours, ours, ours | {name: value}])
  assert str(error) == f"{name} {value}: that is at process 2, while process 0 has {ours[name]}"
  assert hosts.disagreement([ours, ours]) is None


def test_what_may_differ_is_not_told():
  ours = hosts._told("quickstart", Options())
  other = replaced(Options(), process=1, data_dir="/d", join_timeout=5)
  assert hosts._told("quickstart", other) == ours


def test_a_refused_process_tells_the_others_if_it_knows_where(monkeypatch):
  met, told = [], []
  monkeypatch.setattr(hosts, "_initialize", lambda hardware, late: met.append(hardware))
  monkeypatch.setattr(hosts, "agree", told.append)
  typed = ("--coordinator=h:1", "--processes", "2", "--process", "1")
  assert cli.main(("quickstart", *typed, "--sed", "1")) == 2
  assert (met[0].coordinator, met[0].processes, met[0].process) == ("h:1", 2, 1)
  assert told == [{"error": "--sed: belongs to no option; nearest is --seed"}]
  assert cli.main(("quickstart", *typed[:3], "--sed", "1")) == 2
  assert len(told) == 1


def test_copies_of_results_are_their_owners_alone(tmp_path):
  shared, own = tmp_path / "results", tmp_path / "own"
  shared.mkdir(mode=0o755)
  own.mkdir(mode=0o700)
  (shared / "summary.json").write_text("{}")
  copy = hosts.copied(shared, own)
  assert (copy / "summary.json").read_text() == "{}"
  assert own.stat().st_mode & 0o777 == 0o700
  assert not hosts.copied(tmp_path / "nowhere", own / "other").exists()


ON_ONE_DEVICE = replaced(Options(), participation=0.5)


def test_numbers_are_those_of_float32_whatever_the_environment_asks_for():
  asked = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict",
           "jax_numpy_rank_promotion": "raise"}  # fmt: skip
  before = {name: getattr(jax.config, name) for name in asked}
  for name, value in asked.items():
    jax.config.update(name, value)
  hosts.join(ON_ONE_DEVICE)
  assert {name: getattr(jax.config, name) for name in asked} == before


def test_a_device_that_is_not_there_is_named(monkeypatch):
  def unavailable():
    raise RuntimeError("Unable to initialize backend 'cuda': no GPU\nand more")

  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setattr(jax, "default_backend", unavailable)
  line = r"^JAX_PLATFORMS=cuda: no such device here \(Unable .* no GPU\)$"
  with pytest.raises(BadInput, match=line):
    hosts.join(ON_ONE_DEVICE)
