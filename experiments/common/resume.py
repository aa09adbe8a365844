"""Stops a job when its time is over and lets it go on from there."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.common.errors import OutOfTime
from qupeD_jax import checkpoint
from qupeD_jax.types import FedState


class Position(NamedTuple):
  """Where a job's training stands."""

  phase: int  # counted from 0
  done: int  # rounds of the phases before
  seconds: float  # spent on rounds
  start: FedState | None  # what the phase before left
  state: FedState | None  # of this phase


BEGIN = Position(0, 0, 0.0, None, None)


class Saves(NamedTuple):
  """When and where one job is saved."""

  folder: Path | None = None  # of its checkpoints; None saves nothing
  deadline: float = float("inf")  # on the monotonic clock

  def after_chunk(self, position: Position) -> None:
    """Saves and leaves if the time is over; raises OutOfTime then."""
    if self.folder is None or time.monotonic() < self.deadline:
      return
    progress = {name: getattr(position, name) for name in ("phase", "done", "seconds")}
    before = checkpoint.latest(self.folder)
    number = before.number + 1 if before else 0
    checkpoint.save(self.folder, number, (position.start, position.state), progress)
    raise OutOfTime("saved and stopped, as --minutes has it; the same command goes on from here")

  def restore(self, shapes: Callable) -> Position | None:
    """Reads the newest save; None where there is none.

    Args:
      shapes: phase -> the shapes of (start, state).
    """
    latest = self.folder and checkpoint.latest(self.folder)
    if not latest:
      return None
    progress = latest.progress
    saved = checkpoint.restore(self.folder, latest.number, shapes(progress["phase"]))
    return Position(**progress, start=saved[0], state=saved[1])


NOTHING = Saves()


def deadline(minutes: float | None) -> float:
  """Returns when so many minutes from now are over, on the monotonic clock; None for never."""
  return float("inf") if minutes is None else time.monotonic() + 60 * minutes
