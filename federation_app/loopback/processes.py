"""Flower's processes on this machine: started with TLS and node authentication, and ended.

Every process is the head of a group of its own, so that what it starts goes with it.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qupeD_jax.checks import BadInput

from . import certificates

APP = Path(__file__).parent.parent
ROOT = APP.parent
BIN = Path(sys.executable).parent
PATIENCE = 10  # seconds that a process has to end in order
_CONNECTION = """[superlink]
default = "loopback"

[superlink.loopback]
address = "127.0.0.1:{port}"
root-certificates = "{folder}/ca.crt"
"""


class Link(NamedTuple):
  """A SuperLink at work."""

  folder: Path
  port: int


def free_port() -> int:
  """Returns a port of 127.0.0.1 that nobody listens at."""
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    return taken.getsockname()[1]


def environment(home: Path) -> dict[str, str]:
  """Returns the environment of Flower's processes: they phone nobody and install nothing.

  Args:
    home: where Flower keeps its configuration and its copy of the app.
  """
  own = {
    "FLWR_HOME": str(home),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
  }
  return {"JAX_PLATFORMS": "cpu"} | os.environ | own


@contextlib.contextmanager
def running(command: list[str], log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
  """Runs a command as long as the context lasts, its output in a file."""
  with log.open("ab") as file:
    process = subprocess.Popen(
      [str(BIN / command[0]), *command[1:]],
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=file,
      env=env,
      start_new_session=True,
    )
  try:
    yield process
  finally:
    end(process)


def end(process: subprocess.Popen, patience: float = PATIENCE) -> None:
  """Ends a process and all that it has started: asked to, and after some seconds killed.

  A SuperLink starts what runs its apps in another group, so groups alone would leave that behind.
  """
  started = _descendants(process.pid)
  _signal(os.killpg, process.pid, signal.SIGTERM)
  stop = time.monotonic() + patience
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(patience)
  while started & _all_processes().keys() and time.monotonic() < stop:
    time.sleep(0.1)
  _signal(os.killpg, process.pid, signal.SIGKILL)
  for one in started & _all_processes().keys():
    _signal(os.kill, one.pid, signal.SIGKILL)
  process.wait()


class _Process(NamedTuple):
  """A process, told from a later one of the same number by when it began."""

  pid: int
  began: str


def _all_processes() -> dict[_Process, int]:
  """Returns the number of every process's parent; those that have ended are not among them."""
  if shutil.which("ps") is None:  # then what is left behind ends by itself when Flower sees it
    return {}
  command = ["ps", "-Ao", "pid=,ppid=,stat=,lstart="]
  listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  rows = (line.split(maxsplit=3) for line in listed.splitlines())
  return {
    _Process(int(pid), began): int(ppid) for pid, ppid, state, began in rows if state[0] != "Z"
  }


def _descendants(pid: int) -> set[_Process]:
  """Returns the processes that one has started, and those that they have."""
  parents = _all_processes()
  found, above = set(), {pid}
  while more := {one for one, parent in parents.items() if parent in above} - found:
    found |= more
    above = {one.pid for one in more}
  return found


def _signal(send: Callable[[int, int], None], number: int, which: int) -> None:
  with contextlib.suppress(ProcessLookupError):
    send(number, which)


@contextlib.contextmanager
def superlink(folder: Path, seconds: float = 180) -> Iterator[Link]:
  """Runs a SuperLink with TLS and node authentication.

  Args:
    folder: for its certificates, its log and Flower's configuration.
    seconds: in which it has to answer.

  Raises:
    BadInput: it does not.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / "ca.crt").exists():
    certificates.authority(folder)
  port = free_port()
  home = folder / "flwr"
  home.mkdir(exist_ok=True)
  (home / "config.toml").write_text(_CONNECTION.format(port=port, folder=folder))
  command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
  command += ["--ssl-ca-certfile", f"{folder}/ca.crt", "--ssl-certfile", f"{folder}/server.crt"]
  command += ["--ssl-keyfile", f"{folder}/server.key", "--enable-supernode-auth"]
  command += ["--disable-runtime-dependency-installation"]
  with running(command, folder / "superlink.log", environment(home)) as process:
    wait_for(lambda: _listens(port), seconds, folder / "superlink.log", process)
    yield Link(folder, port)


@contextlib.contextmanager
def supernode(
  link: Link, folder: Path, node_config: dict[str, Any], register: bool = True
) -> Iterator[subprocess.Popen]:
  """Runs a SuperNode.

  Args:
    link: the SuperLink it belongs to.
    folder: for its key, its log and Flower's copy of the app.
    node_config: as the app's `options.read_node` has it.
    register: make a key and have the SuperLink know it; without it the key must be there.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / "node.key").exists():
    certificates.node_key(folder)
  if register:
    flwr(link, "supernode", "register", str(folder / "node.key.pub"))
  command = ["flower-supernode", "--superlink", f"127.0.0.1:{link.port}"]
  command += ["--root-certificates", f"{link.folder}/ca.crt"]
  command += ["--auth-supernode-private-key", f"{folder}/node.key"]
  command += [
    "--host",
    "127.0.0.1",
    "--port",
    str(free_port()),
    "--node-config",
    words(node_config),
  ]
  log = folder / "supernode.log"
  log.unlink(missing_ok=True)
  with running(command, log, environment(folder / "flwr")) as process:
    yield process


def joined(process: subprocess.Popen, folder: Path, seconds: float = 180) -> None:
  """Waits until a SuperNode has joined.

  Args:
    process: of `supernode`.
    folder: the node's.
    seconds: in which it has to.

  Raises:
    BadInput: it has not, or the SuperLink has refused it, which ends it.
  """
  log = folder / "supernode.log"
  there = lambda: "SuperNode ID" in log.read_text()
  wait_for(lambda: there() or process.poll() is not None, seconds, log)
  if not there():
    raise BadInput(
      f"{folder.name}: refused by the SuperLink: it does not know the key, or the node was killed "
      "less than a minute ago"
    )


def flwr(link: Link, *arguments: str, seconds: float = 120) -> str:
  """Runs the command flwr and returns what it prints.

  Raises:
    BadInput: it fails, or takes longer.
  """
  command = [str(BIN / "flwr"), *arguments]
  env = environment(link.folder / "flwr")
  try:
    done = subprocess.run(
      command, env=env, capture_output=True, text=True, timeout=seconds, check=False
    )
  except subprocess.TimeoutExpired as error:
    raise BadInput(f"flwr {arguments[0]}: takes more than {seconds:g} s") from error
  if done.returncode:
    raise BadInput(f"flwr {arguments[0]}: {' '.join((done.stdout + done.stderr).split())[-300:]}")
  return done.stdout


def run(link: Link, run_config: dict[str, Any], say: Callable[[str], None], seconds: float) -> None:
  """Runs the app and passes on what the server tells, until it has finished.

  Args:
    link: the SuperLink, whose nodes are there or on their way.
    run_config: what differs from the app's defaults; `out` is among it, an absolute path.
    say: told every line.
    seconds: in which it has to end.

  Raises:
    BadInput: it ends before, or takes longer.
  """
  config, log = link.folder / "run.toml", link.folder / "run.log"
  config.write_text(toml(run_config))
  told = Path(run_config["out"]) / "log.txt"
  seen, stop = told.stat().st_size if told.exists() else 0, time.monotonic() + seconds
  command = ["flwr", "run", str(APP), "--stream", "--run-config", str(config)]
  with running(command, log, environment(link.folder / "flwr")) as process:
    going = True
    while going:
      going = process.poll() is None  # before what it told last is read
      lines, seen = _lines(told, seen)
      for line in lines:
        say(line)
        if line.startswith("finished"):
          return
        if line.startswith("error: "):
          raise BadInput(line.removeprefix("error: "))
      if time.monotonic() > stop:
        raise BadInput(f"the run: takes more than {seconds:g} s; {_tail(log)}")
      time.sleep(0.2)
  raise BadInput(f"the run: ended early; {_tail(log)}")


def _lines(path: Path, seen: int) -> tuple[list[str], int]:
  """Returns the whole lines of a file beyond so many bytes, and how many are read then."""
  text = path.read_bytes()[seen:] if path.exists() else b""
  lines, newline, _ = text.rpartition(b"\n")
  return lines.decode().splitlines(), seen + len(lines) + len(newline)


def wait_for(
  holds: Callable[[], bool], seconds: float, log: Path, process: subprocess.Popen | None = None
) -> None:
  """Waits until something holds.

  Raises:
    BadInput: it does not within so many seconds, or the process ends before.
  """
  stop = time.monotonic() + seconds
  while not holds():
    over = process is not None and process.poll() is not None
    if over or time.monotonic() > stop:
      why = "has ended" if over else f"is not there within {seconds:g} s"
      raise BadInput(f"{log.stem}: {why}; {_tail(log)}")
    time.sleep(0.1)


def _tail(log: Path) -> str:
  lines = log.read_text(errors="replace").split("\n") if log.exists() else []
  return " / ".join(line.strip() for line in lines if line.strip())[-500:]


def _listens(port: int) -> bool:
  with socket.socket() as probe:
    probe.settimeout(1)
    return probe.connect_ex(("127.0.0.1", port)) == 0


def toml(config: Mapping[str, Any]) -> str:
  """Writes a config as a TOML file; JSON's texts, numbers and booleans are TOML's as well."""
  return "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())


def words(config: Mapping[str, Any]) -> str:
  """Writes a config in one line, as Flower's commands take it.

  >>> words({"bits": 2, "model": "mlp"})
  'bits=2 model="mlp"'
  """
  return " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
