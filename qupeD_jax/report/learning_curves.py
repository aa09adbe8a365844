"""Learning curves: accuracy and loss over the rounds."""

import collections
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qupeD_jax.checks import BadInput
from qupeD_jax.report.style import COLORS, DASHES, WHOLE, literal, save, styled


class _Series(NamedTuple):
  """One method's curve."""

  rounds: np.ndarray  # [R]
  mean: np.ndarray  # [R], over seeds
  spread: np.ndarray  # [R], standard deviation over seeds


def curves(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Writes the learning curves; see `draw_curves`."""
  save(draw_curves(rows), path)


@styled
def draw_curves(rows: Iterable[Mapping[str, Any]]) -> Figure:
  """Draws personal validation accuracy and training loss over the rounds.

  A line per method, the mean over seeds, in a band of one standard deviation to either side. The
  legend lists the methods from the best last accuracy down.

  Args:
    rows: as in metrics.jsonl: "method", "seed", "round", "loss", "accuracy" in [0, 1]; null where
      a round was not evaluated.

  Returns:
    The figure: accuracy on the left, loss on the right.

  Raises:
    BadInput: no row has an accuracy, or one lacks its method or round.
  """
  rows = list(rows)
  if not all({"method", "round"} <= row.keys() for row in rows):
    raise BadInput("learning curves: a row lacks its method or its round")
  accuracy, loss = _series(rows, "accuracy", unit=100), _series(rows, "loss")
  if not accuracy:
    raise BadInput("learning curves: no row has an accuracy")
  methods = list(accuracy | loss)
  styles = dict(zip(methods, _line_styles(), strict=False))
  figure = Figure(figsize=(9, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2, sharex=True)
  lines = _lines(right, loss, styles) | _lines(left, accuracy, styles)
  _finish_curves(left, "Personal validation accuracy (%)")
  _finish_curves(right, "Training loss")
  if _spans_decades(loss):
    right.set_yscale("log")
  methods.sort(key=lambda method: -accuracy[method].mean[-1] if method in accuracy else np.inf)
  names = [literal(method) for method in methods]
  figure.legend([lines[m] for m in methods], names, loc="outside right center", handlelength=2.4)
  return figure


def _series(rows: Iterable[Mapping[str, Any]], key: str, unit: float = 1) -> dict[str, _Series]:
  """Returns each method's curve, without the rounds at which `key` is null."""
  values = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    if row.get(key) is not None:
      values[row["method"]][row["round"]].append(unit * row[key])
  return {method: _over_seeds(by_round) for method, by_round in values.items()}


def _over_seeds(by_round: Mapping[int, Sequence[float]]) -> _Series:
  rounds = sorted(by_round)
  seeds = [by_round[number] for number in rounds]
  spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in seeds]
  return _Series(np.array(rounds), np.array([np.mean(v) for v in seeds]), np.array(spread))


def _line_styles() -> Iterator[dict[str, Any]]:
  for dashes, color in itertools.cycle(itertools.product(DASHES, COLORS)):
    yield {"color": color, "linestyle": dashes}


def _lines(
  axes: Axes, series: Mapping[str, _Series], styles: Mapping[str, dict[str, Any]]
) -> dict[str, Line2D]:
  lines = {}
  for method, (rounds, mean, spread) in series.items():
    marker = "o" if rounds.size == 1 else None  # a line of one point is invisible
    (lines[method],) = axes.plot(rounds, mean, marker=marker, markersize=4, **styles[method])
    if np.any(spread):
      color = styles[method]["color"]
      axes.fill_between(rounds, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
  return lines


def _spans_decades(loss: Mapping[str, _Series]) -> bool:
  """Whether losses are best read on a logarithmic axis."""
  means = np.concatenate([series.mean for series in loss.values()] or [[1.0]])
  return 0 < means.max() < np.inf and means.min() > 0 and means.max() > 30 * means.min()


def _finish_curves(axes: Axes, title: str) -> None:
  axes.set_title(title)
  axes.set_xlabel("Round")
  axes.xaxis.set_major_locator(MaxNLocator(6, **WHOLE))
  axes.margins(x=0.02)
  axes.grid(True)
