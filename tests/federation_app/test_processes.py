"""Flower's own processes on loopback, with TLS and node authentication: one federation for all."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: make federation-tools")

from federation_app.loopback import parity, processes
from qupeD_jax.checks import BadInput
from qupeD_jax.study.options import replaced
from tests.federation_app.in_process import EXPERIMENT, federation, recorded

TWO_ROUNDS = replaced(EXPERIMENT, rounds=2, finetune_rounds=0)
MINUTES = 10  # for all of it, where machines are slow or busy


def of_folder(folder: Path) -> list[str]:
  """Returns what runs with a folder's name in its command or its environment."""
  found = []
  for path in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
      if os.fsencode(folder) in text and path.name != str(os.getpid()):
        found.append(path.name)
  return found


def refused(link, folder: Path, config: dict, register: bool = False) -> tuple[int, str]:
  """Starts a node that the SuperLink has to refuse; returns its exit code and our one line."""
  with processes.supernode(link, folder, config, register) as process:
    with pytest.raises(BadInput) as error:
      processes.joined(process, folder)
    return process.wait(), str(error.value)


def test_a_federation_of_processes(tmp_path):
  """Two sound nodes and one that fails in every round; before it starts, nodes come and go."""
  made = federation(tmp_path, experiment=TWO_ROUNDS, rounds=2, finetune_rounds=0)
  sound, killed = (config for config in made.node_configs.values())
  run_config = made.run_config | {"nodes": 3, "min_clients": 2}
  told = []
  with contextlib.ExitStack() as stack:
    link = stack.enter_context(processes.superlink(tmp_path / "superlink"))
    folders = {name: tmp_path / name for name in ("sound", "killed", "broken", "stranger")}

    with processes.supernode(link, folders["killed"], killed) as process:
      processes.joined(process, folders["killed"])
      os.killpg(process.pid, signal.SIGKILL)
    after_kill = refused(link, folders["killed"], killed)
    stranger = refused(link, folders["stranger"], sound)
    assert after_kill[0] == stranger[0] != 0
    told_of = "{}: refused by the SuperLink: it does not know the key, or the node was killed less "
    for name, (_, line) in (("killed", after_kill), ("stranger", stranger)):
      assert line.startswith(told_of.format(name))

    with processes.supernode(link, folders["sound"], sound) as process:
      processes.joined(process, folders["sound"])  # and is asked to end, as by SIGTERM
    no_rows = {"client": 2, "rows": str(tmp_path / "none.npz"), "folder": str(tmp_path / "other")}
    broken = {**sound, **no_rows, "record": str(tmp_path / "broken.jsonl")}
    joined = [
      (stack.enter_context(processes.supernode(link, folders["sound"], sound, False)), "sound"),
      (stack.enter_context(processes.supernode(link, folders["broken"], broken)), "broken"),
    ]
    for process, name in joined:
      processes.joined(process, folders[name])
    stack.enter_context(rejoined(link, folders["killed"], killed))
    processes.run(link, run_config, told.append, 60 * MINUTES)

  assert of_folder(tmp_path) == []
  simulated = parity.simulate("quped", TWO_ROUNDS, made.dealt)
  far = parity.difference(made.settings, Path(run_config["out"]), simulated)
  assert max(far) < 1e-5
  left_out = [line for line in told if "is left out" in line]
  assert [line.split(":")[0] for line in left_out] == ["round 1", "round 2", "finish"]
  assert all("No such file" in line and line.endswith("(code 2)") for line in left_out)
  for config in (sound, killed):
    assert [set(line["records"]) for line in recorded(config)] == [{"counts", "w"}] * 5 + [
      {"counts"}
    ]


@contextlib.contextmanager
def rejoined(link, folder: Path, config: dict):
  """Starts a node that was killed until it is let in again."""
  end = time.monotonic() + 60 * MINUTES
  while True:
    with processes.supernode(link, folder, config, register=False) as process:
      try:
        processes.joined(process, folder)
      except BadInput:
        assert time.monotonic() < end
      else:
        yield
        return
    time.sleep(10)


def test_ctrl_c_leaves_nothing_behind(tmp_path):
  command = [sys.executable, "-m", "federation_app.loopback", "--nodes", "1", "--bits", "32"]
  command += ["--models", "mlp2", "--rounds", "2", "--out", str(tmp_path / "out")]
  env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(processes.ROOT)}
  process = subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  line = ""
  while not re.match("1 of 1 nodes", line):  # all processes are at work
    line = process.stdout.readline()
    assert line, process.stderr.read()
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=60 * MINUTES)
  assert (process.returncode, errors) == (130, "error: interrupted; all processes are ended\n")
  assert of_folder(tmp_path) == []
  assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_one_line():
  command = [sys.executable, "-m", "federation_app.loopback", "--nodes", "0"]
  done = subprocess.run(
    command, cwd=processes.ROOT, capture_output=True, text=True, check=False, timeout=60 * MINUTES
  )
  assert done.stderr == "error: --nodes 0: allowed is a whole number of at least 1\n"
  assert done.returncode == 2
