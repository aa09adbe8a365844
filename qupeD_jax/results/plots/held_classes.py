"""Who holds what: examples of each class at every client."""

import functools
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qupeD_jax.checks import require
from qupeD_jax.results.plots.style import BLUE, WHOLE, save, styled


def clients(
  counts: np.ndarray, path: str | os.PathLike, labels: Sequence[str] | None = None
) -> None:
  """Writes who holds which classes; see `draw_clients`."""
  save(draw_clients(counts, labels), path)


@styled
def draw_clients(counts: np.ndarray, labels: Sequence[str] | None = None) -> Figure:
  """Draws how many examples of each class every client holds.

  The area of a disc is the amount; the bars above it add up the client.

  Args:
    counts: [K, C], examples of each class at each client.
    labels: C names of the classes; their numbers if None.

  Returns:
    The figure: bars above, discs below.

  Raises:
    BadInput: counts are not [K, C] or all 0, or labels are not C names.
  """
  counts = np.asarray(counts)
  held = counts.ndim == 2 and np.any(counts > 0)
  require(held, "counts of shape", counts.shape, "[clients, classes], not all 0")
  num_clients, num_classes = counts.shape
  labels = range(num_classes) if labels is None else labels
  require(len(labels) == num_classes, "labels", list(labels), f"{num_classes} names")
  cell = min(0.26, 9 / num_clients, 7 / num_classes)  # inches
  figure, bars, discs = _stacked_axes(cell * num_clients, cell * num_classes)
  _bars(bars, counts.sum(axis=1))
  _discs(discs, counts, cell)
  num_ticks = max(2, int(4 * cell * num_clients))
  discs.xaxis.set_major_locator(MaxNLocator(num_ticks, **WHOLE))
  discs.set_yticks(range(num_classes), labels, fontsize=min(9, 0.85 * 72 * cell))
  discs.set(xlabel="Client", xlim=(-0.5, num_clients - 0.5))
  discs.set(ylabel="Class", ylim=(num_classes - 0.5, -0.5))
  return figure


def _stacked_axes(width: float, height: float) -> tuple[Figure, Axes, Axes]:
  """Returns a low panel above one of the given inches, placed by hand to keep its cells square."""
  left, bottom, gap, low = 0.7, 0.5, 0.12, 0.7
  size = (left + width + 0.9, bottom + height + gap + low + 0.1)
  figure = Figure(figsize=size)
  x, w = left / size[0], width / size[0]
  lower = figure.add_axes((x, bottom / size[1], w, height / size[1]))
  upper = figure.add_axes((x, (bottom + height + gap) / size[1], w, low / size[1]), sharex=lower)
  return figure, upper, lower


def _bars(axes: Axes, totals: np.ndarray) -> None:
  axes.bar(np.arange(totals.size), totals, width=0.7, color="0.6")
  axes.set_ylabel("Examples")
  axes.yaxis.set_major_locator(MaxNLocator(3, **WHOLE))
  axes.tick_params(axis="x", length=0, labelbottom=False)


def _discs(axes: Axes, counts: np.ndarray, cell: float) -> None:
  """Draws a disc per client and class; the largest one all but fills its cell, in inches."""
  client, label = np.nonzero(counts)
  held = counts[client, label]
  area = (0.94 * 72 * cell) ** 2 / held.max()  # square points per example
  axes.scatter(client, label, s=area * held, color=BLUE, linewidths=0)
  axes.grid(True)
  disc = functools.partial(Line2D, [], [], linestyle="", marker="o", color=BLUE, mew=0)
  handles = [disc(markersize=(area * n) ** 0.5, label=str(n)) for n in _round_amounts(held.max())]
  axes.legend(
    handles=handles,
    title="Examples",
    loc="upper left",
    bbox_to_anchor=(1, 1),
    labelspacing=max(0.4, 8 * cell - 0.9),  # in font sizes: rows as far apart as the cells
  )


def _round_amounts(most: float) -> list[int]:
  """Returns three amounts, or fewer, that show the scale of those up to `most`.

  >>> _round_amounts(734), _round_amounts(3)
  ([100, 250, 500], [1, 2])
  """
  power = 10 ** int(np.log10(most))
  top = max(step * power for step in (1, 2, 5) if step * power <= most)
  return sorted({max(1, round(top * part)) for part in (0.2, 0.5, 1)})
