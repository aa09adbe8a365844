"""What each client gains over another method, such as training alone."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qupeD_jax.checks import require
from qupeD_jax.results import statistics
from qupeD_jax.results.plots.style import BLUE, RED, literal, save, styled


def gains(
  accuracies: Mapping[str, Mapping[str, Any]], baseline: str, path: str | os.PathLike
) -> None:
  """Writes what clients gain over a method; see `draw_gains`."""
  save(draw_gains(accuracies, baseline), path)


@styled
def draw_gains(accuracies: Mapping[str, Mapping[str, Any]], baseline: str = "local") -> Figure:
  """Draws the gain in accuracy of each client over a baseline, in percentage points.

  A panel per method, a bar per client: its mean over seeds, from the greatest gain to the greatest
  loss. Panels share their axes; a title tells the method and its mean gain.

  Args:
    accuracies: method -> "seeds" [S] and "accuracy" [S, K], as `metrics.read_accuracies` returns.
    baseline: the method that the others are compared with.

  Returns:
    The figure.

  Raises:
    BadInput: the baseline is unknown or alone, or methods differ in seeds or clients.
  """
  methods = [method for method in accuracies if method != baseline]
  require(bool(methods), "methods", list(accuracies), f"{baseline} and at least one other")
  num_columns = _num_columns(len(methods))
  num_rows = math.ceil(len(methods) / num_columns)
  size = (max(3.2, 0.7 + 2.1 * num_columns), 0.7 + 1.5 * num_rows)
  figure = Figure(figsize=size, layout="constrained")
  panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
  for axes, method in zip(panels, methods, strict=False):
    difference = statistics.differences(*statistics.paired(accuracies, method, baseline))
    _bars(axes, 100 * _per_client(difference))
    mean = 100 * statistics.mean_over_seeds(difference)
    axes.set_title(f"{literal(method)}\nmean {mean:+.1f}", fontsize=8)
  for axes in panels[len(methods) :]:
    axes.remove()
  figure.supylabel(f"Gain over {literal(baseline)} (points)", fontsize=9)
  figure.supxlabel("Clients, sorted by gain", fontsize=9)
  return figure


def _num_columns(panels: int) -> int:
  """Returns the columns, five at most, that leave the fewest places empty.

  >>> [_num_columns(n) for n in (1, 3, 8, 16, 19)]
  [1, 3, 4, 4, 5]
  """
  return panels if panels <= 3 else min((5, 4, 3), key=lambda columns: -panels % columns)


def _per_client(difference: np.ndarray) -> np.ndarray:
  """Means over seeds, [S, K] -> [clients that have any], in falling order."""
  seen = ~np.all(np.isnan(difference), axis=0)
  return np.sort(np.nanmean(difference[:, seen], axis=0))[::-1]


def _bars(axes: Axes, gain: np.ndarray) -> None:
  colors = np.where(gain < 0, RED, BLUE)
  axes.bar(np.arange(gain.size), gain, width=0.8, color=colors, linewidth=0)
  axes.axhline(0, color="0.3", linewidth=0.6)
  axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
  axes.grid(axis="y")
  axes.set_xticks([])
  axes.spines["bottom"].set_visible(False)
