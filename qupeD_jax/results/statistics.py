"""Paired comparison of methods that ran on the same seeds and the same clients."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qupeD_jax.checks import BadInput, at_least, require

_CHUNK = 2_000_000  # drawn clients held in memory at a time


class Comparison(NamedTuple):
  """By how much one method is more accurate than another, as fractions of 1."""

  difference: float  # mean over seeds of the mean over clients
  low: float  # ends of its interval
  high: float
  wins: int  # +1 or -1 where the interval lies above or below 0, else 0


def paired_difference(
  ours, theirs, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Comparison:
  """Compares two methods client by client, with a bootstrap interval.

  Clients of one seed share a split and a server, so they are not independent, but seeds are. A
  draw therefore resamples twice: seeds with replacement, then clients within each drawn seed with
  replacement. The interval lies between percentiles of the draws' means.

  One seed says nothing about what another would have brought: its interval is over clients alone.
  Where seeds differ by more than their clients explain, the spread of S drawn seeds comes out too
  small, its variance by (S - 1) / S: the interval of two or three seeds is on the short side.

  Args:
    ours: [S, K] accuracies; NaN for a client without one.
    theirs: [S, K] of the same seeds and clients; a client that is NaN in either is left out.
    level: of the interval, above 0 and below 1.
    draws: resamples.
    seed: of the resamples; the same seed gives the same interval.

  Returns:
    The comparison.

  Raises:
    BadInput: shapes differ, a seed has no client with both accuracies, or level or draws are out
      of range.

  >>> paired_difference([[0.75, 0.5]], [[0.5, 0.25]])
  Comparison(difference=0.25, low=0.25, high=0.25, wins=1)
  """
  require(0 < level < 1, "level", level, "above 0 and below 1")
  at_least("draws", draws, 1)
  difference = differences(ours, theirs)
  means = _resampled(difference, draws, np.random.default_rng(seed))
  low, high = map(float, np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
  return Comparison(mean_over_seeds(difference), low, high, int(low > 0) - int(high < 0))


def compare(
  accuracies: Mapping[str, Mapping[str, Any]], ours: str, theirs: Sequence[str], **options
) -> dict[str, Comparison]:
  """Compares one method with several others.

  Args:
    accuracies: method -> "seeds" [S] and "accuracy" [S, K], as `metrics.read_accuracies` returns.
    ours: the method of which the differences tell.
    theirs: those it is compared with.
    options: level, draws and seed of `paired_difference`.

  Returns:
    Method of theirs -> its comparison, in their order.

  Raises:
    BadInput: a method is unknown, or ran on other seeds or clients.
  """
  return {rival: paired_difference(*paired(accuracies, ours, rival), **options) for rival in theirs}


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


def _resampled(difference: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
  """Draws seeds, then clients of each drawn seed, and returns the draws' means, [draws]."""
  counts = np.sum(~np.isnan(difference), axis=1)  # clients of each seed, [S]
  order = np.argsort(np.isnan(difference), axis=1, kind="stable")
  # Those that are left out go last, where no draw reaches them.
  packed = np.take_along_axis(difference, order, axis=1)[:, : counts.max()]
  chunk = max(1, _CHUNK // packed.size)
  sizes = [min(chunk, draws - start) for start in range(0, draws, chunk)]
  return np.concatenate([_drawn_means(packed, counts, size, rng) for size in sizes])


def _drawn_means(
  packed: np.ndarray, counts: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
  """Draws from clients packed to the left, [S, K] with [S] counts; returns means, [draws]."""
  num_seeds, most = packed.shape
  seeds = rng.integers(num_seeds, size=(draws, num_seeds, 1))
  clients = rng.integers(counts[seeds], size=(draws, num_seeds, most))
  # As many clients are drawn as the seed has: what goes beyond counts for nothing.
  taken = np.arange(most) < counts[seeds]
  sums = np.sum(packed[seeds, clients], axis=2, where=taken)
  return np.mean(sums / counts[seeds[..., 0]], axis=1)
