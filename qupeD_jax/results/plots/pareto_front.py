"""Accuracy against the size of a shipped model."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from qupeD_jax.checks import require
from qupeD_jax.results.plots.style import COLORS, literal, save, styled

Point = tuple[str, str, float, float, float]  # family, label, bytes, mean and std of the accuracy

# Eight markers and seven colours: families look alike only from the 57th on.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_MARKER = 6.5  # points
_STEP = 8.0  # points between markers side by side
_FAR = 9  # points; a label from there on needs a line to its marker


class _Mark(NamedTuple):
  """A point and how far to the side of its place it is drawn, in typographic points."""

  point: Point
  shift: float


def pareto(points: Sequence[Point], path: str | os.PathLike) -> None:
  """Writes accuracy against size; see `draw_pareto`."""
  save(draw_pareto(points), path)


@styled
def draw_pareto(points: Sequence[Point]) -> Figure:
  """Draws accuracy against the bytes of a shipped model, and the front that no method beats.

  A colour and a marker per family; the legend lists the families, but for those that a label
  already names. Bars are one standard deviation to either side. Points of one size that would cover
  each other stand side by side, as in a swarm.

  Args:
    points: (family of methods, label, bytes of a model, mean accuracy in [0, 1], its standard
      deviation).

  Returns:
    The figure: bytes on a logarithmic axis, accuracy in percent.

  Raises:
    BadInput: there are no points, or one has no size above 0 or no accuracy.
  """
  require(len(points) > 0, "points", "()", "at least one")
  for family, label, *numbers in points:
    drawable = numbers[0] > 0 and np.all(np.isfinite(numbers))
    require(drawable, f"point {family} {label}", numbers, "bytes above 0 and finite accuracies")
  figure = Figure(figsize=(7.8, 4.8), layout="constrained")
  axes = figure.subplots()
  looks = _looks(points)
  _frame(axes, points)
  _legend(figure, points, looks)
  figure.draw_without_rendering()
  figure.set_layout_engine("none")  # what is measured from here on must stay where it is
  _front(axes, points)
  marks = _swarm(axes, points)
  for mark in marks:
    _draw_mark(axes, mark, looks[mark.point[0]])
  _place_labels(axes, marks, looks)
  return figure


def _front(axes: Axes, points: Sequence[Point]) -> None:
  """Joins the points for which no smaller or equal model is as accurate."""
  front, best = [], -math.inf
  for _, _, size, mean, _ in sorted(points, key=lambda point: (point[2], -point[3])):
    if mean > best:
      front.append((size, 100 * mean))
      best = mean
  axes.plot(*zip(*front, strict=True), color="0.6", linewidth=0.9, zorder=1)


def _looks(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
  families = dict.fromkeys(family for family, *_ in points)
  styles = zip(itertools.cycle(COLORS), itertools.cycle(_MARKERS), strict=False)
  return {
    family: {"color": color, "marker": marker, "linestyle": ""}
    for family, (color, marker) in zip(families, styles, strict=False)
  }


def _frame(axes: Axes, points: Sequence[Point]) -> None:
  """Fixes the axes: at least a decade of sizes, so that there are ticks, and room for labels."""
  _, _, sizes, means, stds = map(np.array, zip(*points, strict=True))
  middle = math.sqrt(sizes.min()) * math.sqrt(sizes.max())
  reach = max(math.sqrt(10), (sizes.max() / sizes.min()) ** 0.68)
  low, high = 100 * np.min(means - stds), 100 * np.max(means + stds)
  margin = max(1, 0.1 * (high - low))
  axes.set(xscale="log", xlim=(middle / reach, middle * reach), ylim=(low - margin, high + margin))
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _amount(size)))
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.set(xlabel="Size of a shipped model", ylabel="Test accuracy (%)")
  axes.grid(True)


def _amount(size: float) -> str:
  """Writes the bytes of a tick.

  >>> _amount(500), _amount(20_000), _amount(1_000_000)
  ('500 B', '20 kB', '1 MB')
  """
  power = min(3, int(math.log10(max(size, 1)) + 1e-9) // 3)
  return f"{size / 1000**power:g} {('B', 'kB', 'MB', 'GB')[power]}"


def _legend(
  figure: Figure, points: Sequence[Point], looks: Mapping[str, Mapping[str, Any]]
) -> None:
  families = dict.fromkeys(family for family, label, *_ in points if family != label)
  handles = [Line2D([], [], label=literal(family), **looks[family]) for family in families]
  handles.append(Line2D([], [], color="0.6", linewidth=0.9, label="Pareto front"))
  figure.legend(handles=handles, loc="outside right upper")


def _swarm(axes: Axes, points: Sequence[Point]) -> list[_Mark]:
  """Sets points that would cover each other side by side, from the most accurate down."""
  taken, marks = [], []
  for point in sorted(points, key=lambda point: -point[3]):
    x, y = axes.transData.transform((point[2], 100 * point[3]))
    shifts = (side * _STEP * step for step in range(len(points)) for side in (1, -1))
    shift = next(dx for dx in shifts if not _touches((x + _scale(axes) * dx, y), taken, axes))
    taken.append((x + _scale(axes) * shift, y))
    marks.append(_Mark(point, shift))
  return marks


def _touches(place: tuple[float, float], taken: Sequence[tuple[float, float]], axes: Axes) -> bool:
  return any(math.dist(place, other) < 0.99 * _STEP * _scale(axes) for other in taken)


def _scale(axes: Axes) -> float:
  """Returns the pixels of a typographic point."""
  return axes.figure.dpi / 72


def _draw_mark(axes: Axes, mark: _Mark, look: Mapping[str, Any]) -> None:
  _, _, size, mean, std = mark.point
  shift = ScaledTranslation(mark.shift / 72, 0, axes.figure.dpi_scale_trans)
  place = {"transform": axes.transData + shift}
  ends = [100 * (mean - std), 100 * (mean + std)]
  axes.vlines(size, *ends, look["color"], linewidth=0.9, alpha=0.5, zorder=2, **place)
  axes.plot(size, 100 * mean, markersize=_MARKER, mec="white", mew=0.5, zorder=3, **place, **look)


def _place_labels(
  axes: Axes, marks: Sequence[_Mark], looks: Mapping[str, Mapping[str, Any]]
) -> None:
  """Sets each label where it covers the least: no marker, no bar, no other label."""
  taken = [box for mark in marks for box in _extents(axes, mark)]
  for mark in marks:
    family, label, size, mean, _ = mark.point
    text = axes.annotate(
      literal(label), (size, 100 * mean), (0, 0), textcoords="offset points", fontsize=7.5,
      color=looks[family]["color"], ha="center", va="center",
    )  # fmt: skip
    taken.append(_move_clear(text, mark.shift, np.array(taken)))


# From here on everything is in pixels, and a box is (left, bottom, right, top).


def _extents(axes: Axes, mark: _Mark) -> list[np.ndarray]:
  """Returns the boxes of a point's marker and of its bar."""
  _, _, size, mean, std = mark.point
  heights = [100 * mean, 100 * (mean - std), 100 * (mean + std)]
  x, (y, low, high) = axes.transData.transform([(size, height) for height in heights]).T
  x, r = x[0] + _scale(axes) * mark.shift, _scale(axes) * _MARKER / 2
  return [np.array([x - r, y - r, x + r, y + r]), np.array([x - 1, low, x + 1, high])]


def _move_clear(text: Annotation, shift: float, taken: np.ndarray) -> np.ndarray:
  """Moves a label, joins it to its marker if that is far, and returns its box."""
  scale = _scale(text.axes)
  point = text.axes.transData.transform(text.xy)
  marker = point + np.array([scale * shift, 0])
  home = text.get_window_extent().translated(*(marker - point)).padded(scale)
  moves = scale * _moves(*(home.size / scale / 2))
  boxes = np.array(home.extents) + np.tile(moves, 2)
  best = np.argmin(_cost(boxes, marker, np.array(text.axes.bbox.extents), taken, scale))
  text.set_position((marker + moves[best] - point) / scale)
  _join(text, point, marker, _nearest(boxes[best], marker))
  return boxes[best]


def _moves(half_width: float, half_height: float) -> np.ndarray:
  """Returns offsets of a label's middle from its marker, in points, [N, 2]."""
  beside, above = 6 + half_width, 5 + half_height
  near = [(beside, 0), (-beside, 0), (0, above), (0, -above)]
  rise = np.arange(3, 75, 3)
  aside = beside + np.minimum(rise, 10)
  far = [np.stack([x * aside, y * rise], axis=1) for x in (1, -1) for y in (1, -1)]
  return np.concatenate([near, *far])


def _cost(
  boxes: np.ndarray, marker: np.ndarray, room: np.ndarray, taken: np.ndarray, scale: float
) -> np.ndarray:
  """Weighs places of a label by what they hide, above all, and by how far they are.

  Args:
    boxes: [N, 4], the places.
    marker: [2], what is labelled.
    room: [4], where a label may be.
    taken: [M, 4], what must be seen.
    scale: pixels of a point.

  Returns:
    [N].
  """
  outside = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - _shared(boxes, room[None])
  hidden = outside + _shared(boxes, taken)
  ends = _nearest(boxes, marker)
  crossed = [_crossed(marker, end, taken, scale) for end in ends]
  far = np.linalg.norm(ends - marker, axis=1)
  return (4 * hidden + crossed) / scale**2 + far / scale


def _crossed(marker: np.ndarray, end: np.ndarray, taken: np.ndarray, scale: float) -> float:
  """Returns the area of what the line from a marker to its label would cross."""
  length = math.dist(marker, end) / scale
  if length <= _FAR:
    return 0.0
  steps = np.arange(_MARKER, length, 2)[:, None] / length
  spots = marker + steps * (end - marker)
  return _shared(np.concatenate([spots - scale, spots + scale], axis=1), taken).sum()


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Returns the area that each of [N, 4] boxes shares with [M, 4] others, summed: [N]."""
  low = np.maximum(boxes[:, None, :2], others[:, :2])
  high = np.minimum(boxes[:, None, 2:], others[:, 2:])
  return np.prod(np.maximum(high - low, 0), axis=2).sum(axis=1)


def _nearest(box: np.ndarray, place: np.ndarray) -> np.ndarray:
  """Returns the point of a box, or of each of several, that is nearest to a place."""
  return np.clip(place, box[..., :2], box[..., 2:])


def _join(text: Annotation, point: np.ndarray, marker: np.ndarray, end: np.ndarray) -> None:
  """Draws a thin line from a marker to its label unless they are side by side."""
  if math.dist(marker, end) > _FAR * _scale(text.axes):
    # In inches from the point, so that it holds at any resolution.
    inches = text.figure.dpi_scale_trans + ScaledTranslation(*text.xy, text.axes.transData)
    x, y = (np.stack([marker, end]) - point).T / text.figure.dpi
    line = Line2D(x, y, color=text.get_color(), linewidth=0.5, alpha=0.7, transform=inches)
    text.axes.add_artist(line)
