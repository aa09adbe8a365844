"""What pictures over the rounds have in common: a line per method, in a band over its seeds."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qupeD_jax.results.plots.style import COLORS, DASHES, WHOLE


class Series(NamedTuple):
  """One method's curve."""

  rounds: np.ndarray  # [R]
  mean: np.ndarray  # [R], over seeds
  low: np.ndarray  # [R], one standard deviation over seeds below
  high: np.ndarray  # [R], and above


def series(rows: Iterable[Mapping[str, Any]], key: str, unit: float = 1) -> dict[str, Series]:
  """Returns each method's curve, without the rounds at which `key` is null."""
  values = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    if row.get(key) is not None:
      values[row["method"]][row["round"]].append(unit * row[key])
  return {method: _over_seeds(by_round) for method, by_round in values.items()}


def _over_seeds(by_round: Mapping[int, Sequence[float]]) -> Series:
  rounds = sorted(by_round)
  seeds = [by_round[number] for number in rounds]
  mean = np.array([np.mean(values) for values in seeds])
  spread = np.array([np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in seeds])
  return Series(np.array(rounds), mean, mean - spread, mean + spread)


def line_styles() -> Iterator[dict[str, Any]]:
  """Yields looks that tell methods apart, over and over."""
  for dashes, color in itertools.cycle(itertools.product(DASHES, COLORS)):
    yield {"color": color, "linestyle": dashes}


def lines(
  axes: Axes, by_method: Mapping[str, Series], styles: Mapping[str, dict[str, Any]]
) -> dict[str, Line2D]:
  """Draws the curves and their bands; returns the lines by method."""
  drawn = {}
  for method, (rounds, mean, low, high) in by_method.items():
    marker = "o" if rounds.size == 1 else None  # a line of one point is invisible
    (drawn[method],) = axes.plot(rounds, mean, marker=marker, markersize=4, **styles[method])
    if np.any(low != high):
      color = styles[method]["color"]
      axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
  return drawn


def finish(axes: Axes, title: str) -> None:
  """Titles a panel and sets its axis of rounds."""
  axes.set_title(title)
  axes.set_xlabel("Round")
  axes.xaxis.set_major_locator(MaxNLocator(6, **WHOLE))
  axes.margins(x=0.02)
  axes.grid(True)
