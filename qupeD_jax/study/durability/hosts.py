"""Runs of several processes, on one host or many: how they meet, and what if one is lost.

Every process is started with the same command but for its number. All of them train; the first one
alone prints and keeps results.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from qupeD_jax import checks
from qupeD_jax.checks import refusal
from qupeD_jax.engine import parallel
from qupeD_jax.study.errors import Lost
from qupeD_jax.study.options import Federated, replaced, value_of

MOST_DEVICES = 1_024  # of a process
AUTO = "auto"  # --coordinator: SLURM, a TPU pod or Open MPI tell
LOST = "another process of this run was lost; the same commands go on from the last save"

# What is said, by one library or another, when a process does not answer any more.
_BROKEN = "gloo|nccl|coordination service|connection (reset|closed|refused)|unavailable"
_WATCHER = "QUPED_JAX_WATCHER"  # process that watches this one


def check(options: Federated) -> None:
  """Raises BadInput unless the options say where the processes meet and how many there are."""
  if options.hardware.devices is not None:
    checks.whole("devices", options.hardware.devices, 1, MOST_DEVICES)
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
  options = join(options)
  if options.hardware.coordinator is None:
    return main(options)
  options = replaced(options, processes=jax.process_count())
  try:
    with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nothing:
      first, shared = (
        jax.process_index() == 0,
        Path(options.run.out or f"results/{name}").expanduser(),
      )
      # All go on from the same saves: the others from copies, made before the first changes any.
      if not first and shared.is_dir():
        shutil.copytree(shared, own, dirs_exist_ok=True)
      multihost_utils.sync_global_devices("copied")
      if first:
        return main(options)
      with contextlib.redirect_stdout(nothing):
        return main(replaced(options, out=own))
  except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter where a result is read
    if not re.search(_BROKEN, str(error), re.IGNORECASE):
      raise
    raise Lost(f"{LOST} ({str(error).splitlines()[0]})") from error


def join(options: Federated) -> Federated:
  """Joins the other processes, before anything touches a device.

  Returns:
    The options, with the number of devices where it was not given.

  Raises:
    BadInput: the options do not fit, or the others cannot be reached.
  """
  check(options)
  devices = options.hardware.devices or usual_devices(options)
  if devices > 1:
    parallel.split_processor(devices)
  if options.hardware.coordinator is not None:
    _end_with_watcher()
    _initialize(options)
  if options.hardware.devices is None and jax.default_backend() != "cpu":
    devices = 1
  return replaced(options, devices=devices)


def usual_devices(options: Federated) -> int:
  """Returns over how many devices a CPU's clients are spread unless the options say: its cores.

  It is one where that gains nothing: with a share of the clients in each round, who may all be on
  one device, with a store, and in one of several processes, which may share the cores.
  """
  hardware, networks = options.hardware, max(1, len(options.networks.models))
  if hardware.coordinator or hardware.store != "device" or options.server.participation < 1:
    return 1
  return parallel.fewest(-(-options.division.clients // networks), parallel.cores())


def _initialize(options: Federated) -> None:
  given = (options.hardware.coordinator, options.hardware.processes, options.hardware.process)
  try:
    jax.distributed.initialize(*(() if options.hardware.coordinator == AUTO else given))
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise refusal("coordinator", options.hardware.coordinator, reason) from None


def must_be_watched(options: Federated) -> bool:
  """Tells whether the options ask for several processes, and nobody watches this one yet."""
  check(options)
  return options.hardware.coordinator is not None and _WATCHER not in os.environ


def watch(arguments: Sequence[str]) -> int:
  """Runs an experiment in a process below this one; returns its exit code.

  Where the process that coordinates the others is lost, jax aborts them with a trace of its own
  stack: the line that a user needs comes from here.
  """
  command = [sys.executable, "-m", "experiments", *arguments]
  child = subprocess.Popen(command, env=os.environ | {_WATCHER: str(os.getpid())})
  # A terminal interrupts both; a plain kill reaches this process alone.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: child.terminate())
  code = child.wait()
  if code == -signal.SIGABRT:
    print("error:", LOST, file=sys.stderr)
    return 1
  return code if code >= 0 else 128 - code


def _end_with_watcher() -> None:
  watcher = int(os.environ.get(_WATCHER, os.getppid()))

  def look():
    while os.getppid() == watcher:
      time.sleep(1)
    os._exit(1)

  threading.Thread(target=look, daemon=True).start()
