"""Runs of several processes, on one host or many: how they meet, and what if one is lost.

Every process is started with the same command but for its number. All of them train; the first one
alone prints and keeps results.
"""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
from jax._src import distributed  # its client's key-value store works whatever devices there are
from jax.experimental import multihost_utils

import qupeD_jax
from qupeD_jax import checks
from qupeD_jax.checks import BadInput, place, refusal
from qupeD_jax.engine import parallel
from qupeD_jax.study.errors import Lost
from qupeD_jax.study.options import Federated, Hardware, flat, replaced, value_of
from qupeD_jax.wrappers.sampling import num_participants

MOST_DEVICES = 1_024  # of a process
AUTO = "auto"  # --coordinator: SLURM, a TPU pod or Open MPI tell
LOST = "another process of this run was lost; the same commands go on from the last save"

# What is said, by one library or another, when a process does not answer any more.
_BROKEN = "gloo|nccl|coordination service|connection (reset|closed|refused)|unavailable"
_WATCHER = "QUPED_JAX_WATCHER"  # process that watches this one
_COPIES = "QUPED_JAX_COPIES"  # folder of the watcher's, which removes it whatever happens here

# What processes may differ in: who they are, where their own disk has the data, how they are shown.
_OWN = ("process", "data_dir", "join_timeout")
_TOLD = 30  # seconds in which processes that have met tell each other their options


def check(options: Federated) -> None:
  """Raises BadInput unless the options say where the processes meet and how many there are."""
  if options.hardware.devices is not None:
    checks.whole("devices", options.hardware.devices, 1, MOST_DEVICES)
  checks.at_least("join_timeout", options.hardware.join_timeout, 1)
  if options.hardware.coordinator in (None, AUTO):
    for name in ("processes", "process"):
      value = value_of(options, name)
      checks.require(value is None, name, value, "given with `coordinator` HOST:PORT only")
    return
  host, _, port = options.hardware.coordinator.rpartition(":")
  known = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
  checks.require(known, "coordinator", options.hardware.coordinator, f"HOST:PORT or {AUTO}")
  checks.at_least("processes", options.hardware.processes, 1)
  own = options.hardware.process
  holds = own is not None and 0 <= own < options.hardware.processes
  checks.require(holds, "process", own, f"0 to {options.hardware.processes - 1}, each of them once")


def run(name: str, main: Callable[[Federated], None], options: Federated) -> None:
  """Runs an experiment as one of the processes that its options tell of.

  Args:
    name: of the experiment.
    main: runs it.
    options: as typed.

  Raises:
    BadInput: the options do not fit, or the others cannot be reached.
    Lost: another process is gone.
  """
  check(options)
  if options.hardware.coordinator is None:
    return main(join(options))
  try:
    with tempfile.TemporaryDirectory(dir=os.environ.get(_COPIES)) as own:
      _end_with_watcher(own)
      options = join(options)
      return _as_one_of_several(name, main, options, Path(own))
  except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter where a result is read
    if isinstance(error, BadInput) or not re.search(_BROKEN, str(error), re.IGNORECASE):
      raise
    raise Lost(f"{LOST} ({str(error).splitlines()[0]})") from error


def _as_one_of_several(
  name: str, main: Callable[[Federated], None], options: Federated, own: Path
) -> None:
  """Runs an experiment once all have the same saves; the others have copies, in `own`."""
  agree(_told(name, options))
  options = replaced(options, processes=jax.process_count())
  shared = place("out", options.run.out or f"results/{name}")
  first = jax.process_index() == 0
  if not first:
    shared = copied(shared, own)
  multihost_utils.sync_global_devices("copied")  # before the first one changes any
  with contextlib.ExitStack() as stack:
    if not first:
      nothing = stack.enter_context(open(os.devnull, "w"))
      stack.enter_context(contextlib.redirect_stdout(nothing))
      options = replaced(options, out=str(shared))
    main(options)


def copied(shared: Path, own: Path) -> Path:
  """Copies a results folder, if there is one, below a folder that others may not enter.

  Args:
    shared: the results folder.
    own: readable by its owner alone; remains so, whatever `shared` is.

  Returns:
    The copy.
  """
  copy = own / "results"
  if shared.is_dir():
    shutil.copytree(shared, copy)
  return copy


def agree(told: Mapping[str, str]) -> None:
  """Tells the other processes one's options and versions, and hears theirs.

  Args:
    told: name -> value, as text.

  Raises:
    BadInput: they differ, at every process in the same words, which name the first that does.
  """
  client, number = distributed.global_state.client, jax.process_index()
  client.key_value_set(f"quped_jax/told/{number}", json.dumps(told))
  heard = [
    json.loads(client.blocking_key_value_get(f"quped_jax/told/{other}", 1000 * _TOLD))
    for other in range(jax.process_count())
  ]
  if error := disagreement(heard):
    jax.distributed.shutdown()  # waits until all have heard
    raise error


def disagreement(heard: Sequence[Mapping[str, str]]) -> BadInput | None:
  """Finds what processes, by their numbers, differ in; None if they agree.

  >>> print(disagreement([{"seed": "0"}, {"seed": "0"}, {"seed": "1"}]))
  seed 1: that is at process 2, while process 0 has 0
  >>> print(disagreement([{"seed": "0"}, {"error": "--sed: belongs to no option"}]))
  process 1 was refused: --sed: belongs to no option
  """
  for number, told in enumerate(heard):
    if "error" in told:
      return BadInput(f"process {number} was refused: {told['error']}")
  for number, told in enumerate(heard):
    for name in {**heard[0], **told}:
      ours, theirs = heard[0].get(name), told.get(name)
      if ours != theirs:
        return refusal(name, theirs, f"that is at process {number}, while process 0 has {ours}")
  return None


def _told(name: str, options: Federated) -> dict[str, str]:
  """Returns what all processes must have alike, as text: versions and options."""
  versions = {"python": platform.python_version(), "jax": jax.__version__, "qupeD_jax": _code()}
  own = {option: str(value) for option, value in flat(options).items() if option not in _OWN}
  return versions | {"NAME": name} | own


def _code() -> str:
  """Returns a short hash of the package's code."""
  package = Path(qupeD_jax.__file__).parent
  code = b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))
  return hashlib.sha256(code).hexdigest()[:12]


def tell_refusal(arguments: Sequence[str], error: BadInput) -> None:
  """Tells the other processes that this one was refused before it could join them.

  Args:
    arguments: as typed; where they say not where to meet, nobody is told.
    error: what was refused.
  """
  typed = [part for argument in arguments for part in argument.split("=", 1)]
  values = dict(itertools.pairwise(typed))
  numbers = [values.get(name, "") for name in ("--processes", "--process")]
  if "--coordinator" not in values or not all(number.isdecimal() for number in numbers):
    return
  processes, process = map(int, numbers)
  hardware = Hardware(
    coordinator=values["--coordinator"], processes=processes, process=process, join_timeout=10
  )
  with contextlib.suppress(BadInput, jax.errors.JaxRuntimeError):
    check(Federated(hardware=hardware))
    _initialize(hardware, late="")
    agree({"error": str(error)})


def join(options: Federated) -> Federated:
  """Joins the other processes, before anything touches a device.

  Returns:
    The options, with the number of devices where it was not given.

  Raises:
    BadInput: the options do not fit, there is no device, or the others cannot be reached.
  """
  check(options)
  _set_arithmetic()
  devices = options.hardware.devices or usual_devices(options)
  if devices > 1:
    parallel.split_processor(devices)
  if options.hardware.coordinator is not None:
    seconds = options.hardware.join_timeout
    reason = f"within so many seconds not all processes met at {options.hardware.coordinator}"
    _initialize(options.hardware, late=f"error: --join-timeout {seconds}: {reason}\n")
  if options.hardware.devices is None and _backend() != "cpu":
    devices = 1
  return replaced(options, devices=devices)


def _set_arithmetic() -> None:
  """Computes as the results that come with the repository did, whatever JAX_... variables say."""
  jax.config.update("jax_enable_x64", False)
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  jax.config.update("jax_numpy_rank_promotion", "allow")


def _backend() -> str:
  try:
    return jax.default_backend()
  except RuntimeError as error:
    asked = os.environ.get("JAX_PLATFORMS")
    reason = str(error).strip().splitlines()[0]
    raise BadInput(f"JAX_PLATFORMS={asked}: no such device here ({reason})") from error


def usual_devices(options: Federated) -> int:
  """Returns over how many devices a CPU's clients are spread unless the options say: its cores.

  There are no more than clients take part in a round. It is one for each of several processes,
  which may share the cores.
  """
  if options.hardware.coordinator:
    return 1
  networks = max(1, len(options.networks.models))
  clients, share = -(-options.division.clients // networks), options.server.participation
  if 0 < share < 1:  # what else it may be is refused later
    clients = num_participants(clients, share)
  return parallel.fewest(clients, parallel.cores())


def _initialize(hardware: Hardware, late: str) -> None:
  """Joins the other processes, or ends this one with a text if they do not come in time."""
  given = {}
  if hardware.coordinator != AUTO:
    given = {
      "coordinator_address": hardware.coordinator,
      "num_processes": hardware.processes,
      "process_id": hardware.process,
      "coordinator_bind_address": hardware.coordinator,  # by default it listens on all interfaces
    }
  # Where others do not come jax would abort this process with a trace of its own stack.
  with _at_most(hardware.join_timeout, late):
    try:
      jax.distributed.initialize(**given, initialization_timeout=hardware.join_timeout + _TOLD)
    except (RuntimeError, ValueError) as error:
      reason = str(error).strip().splitlines()[0]
      raise refusal("coordinator", hardware.coordinator, reason) from None


@contextlib.contextmanager
def _at_most(seconds: int, late: str) -> Iterator[None]:
  """Ends the process with a text and exit code 2 unless what it holds is over in time."""

  def end():
    print(late, end="", file=sys.stderr, flush=True)
    os._exit(2)

  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def must_be_watched(options: Federated) -> bool:
  """Tells whether the options ask for several processes, and nobody watches this one yet."""
  check(options)
  return options.hardware.coordinator is not None and _WATCHER not in os.environ


def watch(arguments: Sequence[str]) -> int:
  """Runs an experiment in a process below this one; returns its exit code.

  Where the process that coordinates the others is lost, jax aborts them with a trace of its own
  stack: the line that a user needs comes from here. Copies of the results are removed here, too.
  """
  command = [sys.executable, "-m", "experiments", *arguments]
  with tempfile.TemporaryDirectory() as copies:
    own = {_WATCHER: str(os.getpid()), _COPIES: copies}
    child = subprocess.Popen(command, env=os.environ | own)
    # A terminal interrupts both; a plain kill reaches this process alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
  if code == -signal.SIGABRT:
    print("error:", LOST, file=sys.stderr)
    return 1
  return code if code >= 0 else 128 - code


def _end_with_watcher(copies: str) -> None:
  watcher = int(os.environ.get(_WATCHER, os.getppid()))

  def look():
    while os.getppid() == watcher:
      time.sleep(1)
    shutil.rmtree(copies, ignore_errors=True)
    os._exit(1)

  threading.Thread(target=look, daemon=True).start()
