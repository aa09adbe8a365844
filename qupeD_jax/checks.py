"""Checks of what users hand in, made on the host before anything is compiled."""

import numbers

import numpy as np


class BadInput(ValueError):
  """Input that cannot be used; its message is one line a user can act on."""


def require(holds: bool, name: str, value, allowed: str) -> None:
  """Raises BadInput naming the option, its value and what is allowed, unless `holds`.

  >>> require(False, "--rounds", -3, "a whole number of at least 1")
  Traceback (most recent call last):
  ...
  qupeD_jax.checks.BadInput: --rounds -3: allowed is a whole number of at least 1
  """
  if not holds:
    raise BadInput(f"{name} {value}: allowed is {allowed}")


def concrete(value) -> bool:
  """Tells a plain number from a traced or array value, which is its maker's to check."""
  return isinstance(value, numbers.Real | np.generic)


def positive(name: str, value) -> None:
  """Requires a plain number to be finite and above 0; traced values pass."""
  if concrete(value):
    require(np.isfinite(value) and value > 0, name, value, "a finite number above 0")


def non_negative(name: str, value) -> None:
  """Requires a plain number to be finite and at least 0; traced values pass."""
  if concrete(value):
    require(np.isfinite(value) and value >= 0, name, value, "a finite number of at least 0")


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


def bits(name: str, values) -> None:
  """Requires every precision to be 1 to 8 bits, or 32 for full precision."""
  for value in values:
    require(value in (*range(1, 9), 32), name, value, "1 to 8, or 32 for full precision")
