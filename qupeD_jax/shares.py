"""Whole numbers that are shares of others: one rule, exact for the decimal number that was typed.

A float is next to the decimal it stands for: 0.07 * 100 is more than 7, 0.09 * 650 is 58.5 in one
precision and more in another. Here a share is the shortest decimal that reads as its float, and
products are those of fractions.
"""

import math
from fractions import Fraction


def rounded(share: float, count: int) -> int:
  """Returns the whole number nearest to a share of a count; of two as near, the even one.

  >>> rounded(0.09, 650), rounded(0.5, 3)
  (58, 2)
  """
  return round(_exact(share) * int(count))


def rounded_up(share: float, count: int) -> int:
  """Returns the least whole number that is no less than a share of a count.

  >>> rounded_up(0.07, 100)
  7
  """
  return math.ceil(_exact(share) * int(count))


def rounded_down(share: float, count: int) -> int:
  """Returns the largest whole number that is no more than a share of a count.

  >>> rounded_down(0.42, 150), rounded_down(0.49999, 2)
  (63, 0)
  """
  return math.floor(_exact(share) * int(count))


def _exact(share: float) -> Fraction:
  return Fraction(str(share))
