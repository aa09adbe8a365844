"""Paired comparison of methods that ran on the same seeds and the same clients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from qupeD_jax.checks import BadInput, require


class Comparison(NamedTuple):
  """By how much one method is more accurate than another, as fractions of 1."""

  difference: float  # mean over seeds of the mean over clients
  low: float | None  # ends of its interval over seeds; None with one seed, which has none
  high: float | None
  wins: int  # +1 or -1 where the interval lies above or below 0, else 0
  clients: float | None  # with one seed, the standard deviation over its clients; else None


def paired_difference(ours, theirs, *, level: float = 0.95) -> Comparison:
  """Compares two methods client by client, with Student's interval over the seeds.

  Clients of one seed share a split and a server, so they are not independent, but seeds are. With
  d_s the mean of a seed's differences over its clients, S seeds, d their mean and s their standard
  deviation, the interval is d +- t s / sqrt(S), t the quantile of Student's distribution with S - 1
  degrees of freedom.

  One seed says nothing about what another would have brought: it has no interval and neither wins
  nor loses. How far its clients differ is told instead, which is no interval of the difference.

  Args:
    ours: [S, K] accuracies; NaN for a client without one.
    theirs: [S, K] of the same seeds and clients; a client that is NaN in either is left out.
    level: of the interval, above 0 and below 1.

  Returns:
    The comparison.

  Raises:
    BadInput: shapes differ, a seed has no client with both accuracies, or level is out of range.

  >>> paired_difference([[0.75, 0.5], [0.5, 0.5]], [[0.5, 0.25], [0.25, 0.25]])
  Comparison(difference=0.25, low=0.25, high=0.25, wins=1, clients=None)
  """
  require(0 < level < 1, "level", level, "above 0 and below 1")
  difference = differences(ours, theirs)
  means = np.nanmean(difference, axis=1)
  center = float(np.mean(means))
  if len(means) == 1:
    known = difference[~np.isnan(difference)]
    return Comparison(
      center, None, None, 0, float(np.std(known, ddof=1)) if known.size > 1 else None
    )
  quantile = scipy.stats.t.ppf((1 + level) / 2, len(means) - 1)
  half = float(quantile * np.std(means, ddof=1)) / math.sqrt(len(means))
  low, high = center - half, center + half
  return Comparison(center, low, high, int(low > 0) - int(high < 0), None)


def compare(
  accuracies: Mapping[str, Mapping[str, Any]], ours: str, theirs: Sequence[str], level: float = 0.95
) -> dict[str, Comparison]:
  """Compares one method with several others.

  Args:
    accuracies: method -> "seeds" [S] and "accuracy" [S, K], as `metrics.read_accuracies` returns.
    ours: the method of which the differences tell.
    theirs: those it is compared with.
    level: of the intervals.

  Returns:
    Method of theirs -> its comparison, in their order.

  Raises:
    BadInput: a method is unknown, or ran on other seeds or clients.
  """
  return {
    rival: paired_difference(*paired(accuracies, ours, rival), level=level) for rival in theirs
  }


def paired(accuracies: Mapping[str, Mapping[str, Any]], one: str, other: str) -> tuple[Any, Any]:
  """Looks up two methods' accuracies, which must be of the same seeds.

  Args:
    accuracies: as for `compare`.
    one, other: the methods.

  Returns:
    The [S, K] of each.

  Raises:
    BadInput: a method is unknown, or their seeds differ.
  """
  for method in (one, other):
    require(method in accuracies, "method", method, f"one of {', '.join(accuracies)}")
  seeds = [list(accuracies[method]["seeds"]) for method in (one, other)]
  require(seeds[0] == seeds[1], f"seeds of {other}", seeds[1], f"those of {one}, {seeds[0]}")
  return accuracies[one]["accuracy"], accuracies[other]["accuracy"]


def differences(ours, theirs) -> np.ndarray:
  """Subtracts accuracies client by client.

  Args:
    ours, theirs: [S, K], as for `paired_difference`.

  Returns:
    [S, K]; NaN where either is.

  Raises:
    BadInput: shapes differ, or a seed has no client with both.
  """
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  require(ours.ndim == 2, "accuracies of shape", ours.shape, "[seeds, clients]")
  require(theirs.shape == ours.shape, "accuracies of shape", theirs.shape, f"{ours.shape}")
  difference = ours - theirs
  if not (difference.size and np.all(np.any(~np.isnan(difference), axis=1))):
    raise BadInput("accuracies: in each seed, at least one client must have one of both methods")
  return difference


def mean_over_seeds(values: np.ndarray) -> float:
  """Means over clients, [S, K] with NaN left out, then over seeds."""
  return float(np.mean(np.nanmean(values, axis=1)))
