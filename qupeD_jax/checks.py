"""Checks of what users hand in, made on the host before anything is compiled."""

import math
import numbers
import os
from pathlib import Path


class BadInput(ValueError):
  """Input that cannot be used; its message is one line a user can act on.

  Attributes:
    name: of the argument that is to blame, with which the message begins; None where it is none.
  """

  def __init__(self, message: object, name: str | None = None):
    super().__init__(message)
    self.name = name


def refusal(name: str, value, reason: str) -> BadInput:
  """Makes the BadInput of an argument: its name, its value and why it is refused."""
  return BadInput(f"{name} {value}: {reason}", name)


def require(holds: bool, name: str, value, allowed: str) -> None:
  """Raises BadInput naming the argument, its value and what is allowed, unless `holds`.

  Other arguments that `allowed` speaks of stand in backquotes: a command line has other names for
  them.

  >>> require(False, "rounds", -3, "a whole number of at least 1")
  Traceback (most recent call last):
  ...
  qupeD_jax.checks.BadInput: rounds -3: allowed is a whole number of at least 1
  """
  if not holds:
    raise refusal(name, value, f"allowed is {allowed}")


def place(name: str, path: str | os.PathLike) -> Path:
  """Returns the path that an argument names, a leading `~` replaced by a home folder.

  Raises:
    BadInput: there is no such home folder, or what lies there cannot be looked at: the path is too
      long, say, or leads through a folder that is closed.
  """
  try:
    found = Path(path).expanduser()
    found.stat()
  except (FileNotFoundError, NotADirectoryError):
    return found
  except RuntimeError as error:
    raise refusal(name, path, "there is no such home folder") from error
  except (OSError, ValueError) as error:
    raise refusal(name, path, getattr(error, "strerror", None) or str(error)) from error
  return found


def concrete(value) -> bool:
  """Tells a plain number from a traced or array value, which is its maker's to check."""
  import numpy as np  # not at the top: names are checked where nothing is installed yet

  return isinstance(value, numbers.Real | np.generic)


def positive(name: str, value) -> None:
  """Requires a plain number to be finite and above 0; traced values pass."""
  if concrete(value):
    require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")


def non_negative(name: str, value) -> None:
  """Requires a plain number to be finite and at least 0; traced values pass."""
  if concrete(value):
    require(math.isfinite(value) and value >= 0, name, value, "a finite number of at least 0")


def fraction(name: str, value, *, closed: bool) -> None:
  """Requires a plain number in [0, 1), or in (0, 1] if `closed`; traced values pass."""
  if concrete(value):
    holds = 0 < value <= 1 if closed else 0 <= value < 1
    require(holds, name, value, "above 0 and at most 1" if closed else "in [0, 1)")


def share(name: str, value) -> None:
  """Requires a plain number in [0, 1]; traced values pass."""
  if concrete(value):
    require(0 <= value <= 1, name, value, "in [0, 1]")


def at_least(name: str, value: int, low: int) -> None:
  """Requires a whole number of at least `low`."""
  holds = isinstance(value, numbers.Integral) and value >= low
  require(holds, name, value, f"a whole number of at least {low}")


def whole(name: str, value: int, low: int, high: int) -> None:
  """Requires a whole number in [low, high]."""
  at_least(name, value, low)
  require(value <= high, name, value, f"a whole number of at most {high}")


def bits(name: str, values) -> None:
  """Requires every precision to be 1 to 8 bits, or 32 for full precision."""
  for value in values:
    require(value in (*range(1, 9), 32), name, value, "1 to 8, or 32 for full precision")
