"""Saves a job while it trains, stops it when it is told to, and lets it go on from there."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qupeD_jax.checks import BadInput
from qupeD_jax.engine import parallel
from qupeD_jax.io import checkpoint
from qupeD_jax.study.errors import OutOfTime, Terminated
from qupeD_jax.types import FedState

GOES_ON = "the same command goes on from here"


class Position(NamedTuple):
  """Where a job's training stands."""

  phase: int  # counted from 0
  done: int  # rounds of the phases before
  rounds: int  # of all phases until now
  seconds: float  # spent on rounds
  start: FedState | None  # what the phase before left
  state: FedState | None  # of this phase


BEGIN = Position(0, 0, 0, 0.0, None, None)


class Pace:
  """Tells when a save is due: every so many rounds, or by the clock, so that it costs little."""

  LEAST = 60.0  # seconds between two saves by the clock
  SHARE = 0.05  # of the time, at most, that they take

  def __init__(self, every: int | None = 0):
    self.every = every  # rounds; 0 for never; None goes by the clock
    self._next = time.monotonic() + self.LEAST

  def due(self, before: int, after: int) -> bool:
    """Tells whether to save after a chunk, of the rounds between these two of a job."""
    if self.every is None:
      return time.monotonic() >= self._next
    return self.every > 0 and before // self.every < after // self.every

  def saved(self, seconds: float) -> None:
    """Hears that there was a save and how long it took."""
    self._next = time.monotonic() + max(self.LEAST, seconds / self.SHARE)


class Saves(NamedTuple):
  """When and where one job is saved, and what was written beside its saves."""

  folder: Path | None = None  # of its saves; None saves nothing
  pace: Pace = Pace()
  deadline: float = float("inf")  # on the monotonic clock
  asked: Callable[[], bool] = lambda: False  # to stop, by a signal
  written: Callable[[], float] = lambda: float("inf")  # rounds that metrics.jsonl has of the job
  cut_back: Callable[[int], None] = lambda rounds: None  # what was written, to so many rounds
  warn: Callable[[str], None] = print

  def after_chunk(self, before: int, here: Position) -> None:
    """Saves if it is time; leaves if it is told to.

    Args:
      before: rounds of the job before the chunk.
      here: where the job stands after it.

    Raises:
      OutOfTime, Terminated: the job is saved.
    """
    now = self.asked(), time.monotonic() >= self.deadline, self.pace.due(before, here.rounds)
    asked, over, due = parallel.anywhere(now)
    if self.folder and (asked or over or due):
      self._save(here)
    if asked:
      done = f"saved and stopped, as SIGTERM has it; {GOES_ON}"
      raise Terminated(done if self.folder else "stopped, as SIGTERM has it; nothing was saved")
    if over and self.folder:
      raise OutOfTime(f"saved and stopped, as --minutes has it; {GOES_ON}")

  def restore(self, shapes: Callable) -> Position:
    """Reads the newest save that can be read, and cuts back what was written after it.

    Args:
      shapes: phase -> the shapes of (start, state).

    Returns:
      Where the job goes on; its beginning where there is no such save.

    Raises:
      Terminated: it is told to stop.
    """
    if parallel.anywhere((self.asked(),))[0]:
      raise Terminated(f"stopped, as SIGTERM has it; {GOES_ON}")
    found = self.folder and checkpoint.restore(self.folder, self._like(shapes), self.warn)
    here = BEGIN
    if found:
      start, state = found.state
      here = Position(**found.progress, start=start, state=state)
    self.cut_back(here.rounds)
    return here

  def _save(self, here: Position) -> None:
    began, progress = time.monotonic(), here._asdict()
    state = parallel.fetch((progress.pop("start"), progress.pop("state")))
    checkpoint.save(self.folder, checkpoint.Save(state, progress))
    self.pace.saved(time.monotonic() - began)

  def _like(self, shapes: Callable) -> Callable:
    def like(progress: dict):
      written = self.written()
      if progress["rounds"] > written:
        raise BadInput(f"{self.folder}: saved after round {progress['rounds']}, but metrics.jsonl "
                       f"ends at round {written}")  # fmt: skip
      return shapes(progress["phase"])

    return like


NOTHING = Saves()


def deadline(minutes: float | None) -> float:
  """Returns when so many minutes from now are over, on the monotonic clock; None for never."""
  return float("inf") if minutes is None else time.monotonic() + 60 * minutes
