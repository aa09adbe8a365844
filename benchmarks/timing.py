"""Timings of contenders that take turns, and what the machine they run on can do at most."""

import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import torch_forms
from benchmarks.jax_forms import MOST_ROUNDS
from benchmarks.workload import Form
from qupeD_jax.engine import parallel

_AT_LEAST = 0.05  # seconds of one timing: short rounds are timed several at a time
_PAUSE = 0.01  # seconds in which threads of the library that ran before stop spinning


class Quartiles(NamedTuple):
  """The middle and the spread of several numbers."""

  median: float
  low: float  # first quartile
  high: float  # third quartile


def quartiles(values) -> Quartiles:
  """Returns the median and the quartiles around it.

  >>> quartiles([1.0, 2.0, 3.0, 4.0, 10.0])
  Quartiles(median=3.0, low=2.0, high=4.0)
  """
  low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
  return Quartiles(median, low, high)


def take_turns(
  forms: Mapping[Any, Form],
  repeats: int,
  seconds: float,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, np.ndarray]:
  """Times a round of every contender, all of them once before any has its second turn.

  What slows the machine down for a while thus slows all of them down, and ratios within a turn stay
  what they are.

  Args:
    forms: the contenders, each of which has run before; one more call tells how long its turn is.
    repeats: turns, at most.
    seconds: after which no turn begins, but for the third.
    clock: what a turn is timed by; `time.process_time` counts what all threads have worked.

  Returns:
    Seconds per round of each, [turns].
  """
  states = {name: form.start() for name, form in forms.items()}
  rounds = {}

  def timed(name, count):
    time.sleep(_PAUSE)
    start = clock()
    states[name] = forms[name].run(states[name], count)
    forms[name].wait(states[name])
    return (clock() - start) / count

  for name in forms:
    rounds[name] = min(MOST_ROUNDS, math.ceil(_AT_LEAST / timed(name, 1)))
  turns, end = [], time.perf_counter() + seconds
  while len(turns) < min(3, repeats) or (len(turns) < repeats and time.perf_counter() < end):
    turns.append([timed(name, count) for name, count in rounds.items()])
  return dict(zip(forms, np.array(turns).T, strict=True))


def alternate(calls: Mapping[str, Callable], repeats: int) -> dict[str, tuple[float, float]]:
  """Times calls that take turns, after one of each to compile.

  Args:
    calls: without arguments, returning arrays of JAX.
    repeats: turns.

  Returns:
    Of each call the median of its seconds, and of its ratios to the first one within a turn.
  """
  for call in calls.values():
    jax.block_until_ready(call())
  waited = [lambda call=call: jax.block_until_ready(call()) for call in calls.values()]
  turns = np.array([[_seconds(call) for call in waited] for _ in range(repeats)])
  medians = np.median(turns, axis=0), np.median(turns / turns[:, :1], axis=0)
  return dict(zip(calls, zip(*(m.tolist() for m in medians), strict=True), strict=True))


def matmul_peak(dtype: str, size: int, repeats: int = 5) -> float:
  """Measures the most FLOP/s that products of square matrices get to.

  Args:
    dtype: of the factors.
    size: of the matrices.
    repeats: of which the fastest counts.
  """
  x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
  multiply = jax.jit(jnp.matmul)
  times = [_seconds(lambda: multiply(x, x).block_until_ready()) for _ in range(repeats + 1)]
  return 2 * size**3 / min(times[1:])


def machine() -> dict[str, Any]:
  """Says what was measured on: the device and the versions, and nothing that names the host."""
  device = jax.devices()[0]
  return {
    "backend": jax.default_backend(),
    "device": device.device_kind,
    "processor": _processor(),
    "cores": parallel.cores(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "torch": torch_forms.version(),
  }


def peak_bytes() -> int | None:
  """Returns the most memory that JAX held on the device since the start, where it is counted."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _seconds(call: Callable) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def _processor() -> str:
  """Names the processor, as Linux does; elsewhere its architecture."""
  facts = Path("/proc/cpuinfo")
  lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
  names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  return next(names, platform.machine())
