"""Personal accuracy against the share of the rounds that was FedAvg before personal models."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from qupeD_jax.checks import require
from qupeD_jax.results.plots.over_rounds import Series, line_styles, lines
from qupeD_jax.results.plots.style import literal, save, styled

Point = tuple[float, float, float]  # share, mean and standard deviation of the accuracy


def shares(
  curves: Mapping[str, Sequence[Point]], levels: Mapping[str, float], path: str | os.PathLike
) -> None:
  """Writes accuracy against the share of averaging; see `draw_shares`."""
  save(draw_shares(curves, levels), path)


@styled
def draw_shares(curves: Mapping[str, Sequence[Point]], levels: Mapping[str, float]) -> Figure:
  """Draws a line per variant, in a band of one standard deviation to either side.

  Args:
    curves: by variant, (share, mean accuracy, its standard deviation), all in [0, 1].
    levels: mean accuracies in [0, 1] that do not depend on the share, drawn dotted, by method.

  Returns:
    The figure, both axes in percent.

  Raises:
    BadInput: there are no curves, or one has no point.
  """
  require(len(curves) > 0 and all(curves.values()), "curves", curves, "at least one point each")
  figure = Figure(figsize=(7.8, 4.2), layout="constrained")
  axes = figure.subplots()
  styles = dict(zip(curves, line_styles(), strict=False))
  drawn = lines(axes, {name: _series(points) for name, points in curves.items()}, styles)
  for line in drawn.values():
    line.set(marker="o", markersize=4)
  for name, level in levels.items():
    drawn[name] = axes.axhline(100 * level, color="0.4", linestyle=":")
  axes.set(
    xlabel="Rounds that were FedAvg before personal models began (%)",
    ylabel="Test accuracy of personal models (%)",
  )
  axes.grid(True)
  names = [literal(name) for name in drawn]
  figure.legend(list(drawn.values()), names, loc="outside right upper")
  return figure


def _series(points: Sequence[Point]) -> Series:
  share, mean, std = 100 * np.array(sorted(points)).T
  return Series(share, mean, mean - std, mean + std)
