"""Weights gathering at their centers."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qupeD_jax.checks import require
from qupeD_jax.results.plots.style import BLUE, RED, literal, save, styled


def weights(
  snapshots: Sequence[tuple[int, np.ndarray, np.ndarray | None]],
  path: str | os.PathLike,
  title: str,
) -> None:
  """Writes how a tensor gathers at its centers; see `draw_weights`."""
  save(draw_weights(snapshots, title), path)


@styled
def draw_weights(
  snapshots: Sequence[tuple[int, np.ndarray, np.ndarray | None]], title: str
) -> Figure:
  """Draws the histogram of one tensor at several rounds, its centers as vertical lines.

  Args:
    snapshots: (round, entries of any shape, centers [m] or None), about five, in order; centers
      that are +inf are not drawn.
    title: what is shown, such as the tensor's path and its bits.

  Returns:
    The figure: a panel per snapshot, from top to bottom, all sharing the axis of values; each
    histogram fills its panel, as the peaks grow far beyond the height they start from.

  Raises:
    BadInput: there are no snapshots, or no finite entries.
  """
  finite = [(number, _finite(values), _finite(centers)) for number, values, centers in snapshots]
  edges = _edges([values for _, values, _ in finite], [centers for *_, centers in finite])
  figure = Figure(figsize=(6, 0.9 + 0.85 * len(finite)), layout="constrained")
  panels = figure.subplots(len(finite), 1, sharex=True, squeeze=False)[:, 0]
  for axes, (number, values, centers) in zip(panels, finite, strict=True):
    axes.set_ylabel(f"round {number}", rotation=0, ha="right", va="center")
    _histogram(axes, values, centers, edges)
  panels[0].set_title(literal(title))
  panels[-1].set(xlabel="Weight", xlim=(edges[0], edges[-1]))
  if any(centers.size for *_, centers in finite):
    line = Line2D([], [], color=RED, linewidth=0.9, label="center")
    panels[0].legend(handles=[line], loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
  return figure


def _histogram(axes: Axes, values: np.ndarray, centers: np.ndarray, edges: np.ndarray) -> None:
  counts, _ = np.histogram(values, edges)
  axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.75)
  height = 1 if centers.size <= 16 else 0.12  # more lines than that would hide the histogram
  axes.vlines(centers, 0, height, RED, linewidth=0.9, transform=axes.get_xaxis_transform())
  axes.set(yticks=[], ylim=(0, 1.05 * max(1, counts.max())))
  axes.spines["left"].set_visible(False)


def _finite(values: np.ndarray | None) -> np.ndarray:
  values = np.ravel([] if values is None else np.asarray(values, np.float64))
  return values[np.isfinite(values)]


def _edges(values: Sequence[np.ndarray], centers: Sequence[np.ndarray], bins: int = 140):
  """Returns common bin edges, [bins + 1], from the first to the last center or thousandth."""
  entries = np.concatenate([*values, []])
  require(entries.size > 0, "snapshots", "without finite entries", "at least one with some")
  marks = np.concatenate([np.quantile(entries, [0.001, 0.999]), *centers])
  margin = 0.04 * np.ptp(marks) or 1.0
  return np.linspace(marks.min() - margin, marks.max() + margin, bins + 1)
