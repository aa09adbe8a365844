"""The squared gradient mapping over the rounds."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qupeD_jax.checks import BadInput
from qupeD_jax.results.plots.over_rounds import Series, finish, line_styles, lines, series
from qupeD_jax.results.plots.style import literal, save, styled

KEY = "gradient_mapping"  # in a row of metrics.jsonl


def stationarity(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Writes how stationary models become; see `draw_stationarity`."""
  save(draw_stationarity(rows), path)


def has_stationarity(rows: Iterable[Mapping[str, Any]]) -> bool:
  """Tells whether there is anything for `draw_stationarity` to draw."""
  return any(_is_measured(row) for row in rows)


@styled
def draw_stationarity(rows: Iterable[Mapping[str, Any]]) -> Figure:
  """Draws the squared gradient mapping over the rounds, on a logarithmic axis.

  A line per method, the geometric mean over seeds, in a band of one standard deviation of the
  logarithm to either side. A mapping of exactly 0 has no place on the axis and is left out. Where
  the pull toward the centers grows during training, each round has an objective of its own: the
  curve leaps where the pull does, and falls as the weights follow.

  Args:
    rows: as in metrics.jsonl: "method", "seed", "round" and "gradient_mapping"; null or missing
      where it was not measured.

  Returns:
    The figure; its legend lists the methods from the largest last value down.

  Raises:
    BadInput: no row has a gradient mapping above 0.
  """
  measured = [row | {KEY: math.log(row[KEY])} for row in rows if _is_measured(row)]
  if not measured:
    raise BadInput("stationarity: no row has a gradient mapping above 0")
  curves = {name: _exponential(curve) for name, curve in series(measured, KEY).items()}
  figure = Figure(figsize=(6.6, 3.4), layout="constrained")
  axes = figure.subplots()
  axes.set_yscale("log")
  drawn = lines(axes, curves, dict(zip(curves, line_styles(), strict=False)))
  finish(axes, "Squared gradient mapping")
  methods = sorted(curves, key=lambda method: -curves[method].mean[-1])
  names = [literal(method) for method in methods]
  figure.legend([drawn[m] for m in methods], names, loc="outside right center", handlelength=2.4)
  return figure


def _is_measured(row: Mapping[str, Any]) -> bool:
  return (row.get(KEY) or 0) > 0


def _exponential(curve: Series) -> Series:
  """Takes a curve of logarithms back to what they are of."""
  return Series(curve.rounds, *(np.exp(values) for values in curve[1:]))
