"""Centers moving over the rounds."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qupeD_jax.checks import require
from qupeD_jax.results.plots.style import WHOLE, literal, save, styled


def centers(
  rounds: Sequence[int],
  by_tensor: Mapping[str, np.ndarray],
  path: str | os.PathLike,
  title: str,
) -> None:
  """Writes how the centers of a model move; see `draw_centers`."""
  save(draw_centers(rounds, by_tensor, title), path)


@styled
def draw_centers(rounds: Sequence[int], by_tensor: Mapping[str, np.ndarray], title: str) -> Figure:
  """Draws every tensor's centers over the rounds: a panel per tensor, a line per center.

  Panels share the axis of rounds; each has its own axis of values, as layers differ in scale.

  Args:
    rounds: [R], in order.
    by_tensor: the path of each tensor -> its centers, [R, m]; those that are +inf are not drawn.
    title: what is shown, such as the method and the client.

  Returns:
    The figure, panels in the order of the tensors, row by row.

  Raises:
    BadInput: there are no tensors, or centers are not [R, m].
  """
  require(len(by_tensor) > 0, "tensors with centers", "()", "at least one")
  for name, values in by_tensor.items():
    fits = np.ndim(values) == 2 and len(values) == len(rounds)
    require(fits, f"{name}: centers of shape", np.shape(values), f"[{len(rounds)} rounds, m]")
  num_columns = _num_columns(len(by_tensor))
  num_rows = math.ceil(len(by_tensor) / num_columns)
  size = (max(4.2, 0.6 + 1.9 * num_columns), 0.9 + 1.35 * num_rows)
  figure = Figure(figsize=size, layout="constrained")
  panels = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False).ravel()
  for axes, (name, values) in zip(panels, by_tensor.items(), strict=False):
    _paths(axes, np.asarray(rounds), np.asarray(values, np.float64))
    axes.set_title(literal(name.removesuffix("/kernel")), fontsize=7.5)
  for axes in panels[len(by_tensor) :]:
    axes.remove()
  for axes in panels[: len(by_tensor)][-num_columns:]:
    axes.tick_params(labelbottom=True)  # nothing may be below it
  figure.suptitle(literal(title), fontsize=10)
  figure.supxlabel("Round", fontsize=9)
  figure.supylabel("Center", fontsize=9)
  return figure


def _num_columns(panels: int) -> int:
  """Returns the columns that leave the fewest places empty.

  >>> [_num_columns(n) for n in (1, 3, 6, 18, 30)]
  [1, 3, 3, 6, 6]
  """
  if panels <= 3:
    return panels
  return min((3, 4) if panels < 10 else (6, 5, 4), key=lambda columns: -panels % columns)


def _paths(axes: Axes, rounds: np.ndarray, values: np.ndarray) -> None:
  """Draws the centers [R, m] of one tensor, coloured from the lowest to the highest."""
  used = values[:, np.any(np.isfinite(values), axis=0)]
  colors = colormaps["viridis"](np.linspace(0, 0.85, used.shape[1]))
  marker = "o" if len(rounds) == 1 else None  # a line of one point is invisible
  for path, color in zip(used.T, colors, strict=True):
    axes.plot(rounds, path, color=color, marker=marker, markersize=3, linewidth=1.1)
  axes.xaxis.set_major_locator(MaxNLocator(3, **WHOLE))
  axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
  axes.tick_params(labelsize=7)
  axes.margins(x=0.02)
  axes.grid(True)
