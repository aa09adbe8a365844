"""Pictures of a run: learning curves, who holds what, and weights gathering at their centers.

Each picture has two functions: `draw_*` returns the matplotlib Figure, the other one writes it.
Neither touches pyplot, so there is no display and no global state to think of.
"""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qupeD_jax.checks import BadInput, require

# Okabe and Ito's palette, told apart by colour-blind readers, without its yellow, which fades on
# paper. The dashes change when the colours come round again.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_BLUE, _RED = _COLORS[:2]

_WHOLE = {"integer": True, "steps": [1, 2, 5, 10]}  # ticks at round numbers

_STYLE = {
  "font.size": 9,
  "axes.titlesize": 10,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.axisbelow": True,
  "grid.color": "0.92",
  "grid.linewidth": 0.6,
  "legend.frameon": False,
  "lines.linewidth": 1.4,
}


class _Series(NamedTuple):
  """One method's curve."""

  rounds: np.ndarray  # [R]
  mean: np.ndarray  # [R], over seeds
  spread: np.ndarray  # [R], standard deviation over seeds


def _styled(draw: Callable) -> Callable:
  """Draws in the house style and leaves matplotlib's own settings alone."""

  @functools.wraps(draw)
  def drawn(*args, **kwargs):
    with mpl.rc_context(_STYLE):
      return draw(*args, **kwargs)

  return drawn


def curves(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Writes the learning curves; see `draw_curves`."""
  _save(draw_curves(rows), path)


@_styled
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
    BadInput: no row has an accuracy.
  """
  rows = list(rows)
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
  figure.legend([lines[m] for m in methods], methods, loc="outside right center", handlelength=2.4)
  return figure


def clients(
  counts: np.ndarray, path: str | os.PathLike, labels: Sequence[str] | None = None
) -> None:
  """Writes who holds which classes; see `draw_clients`."""
  _save(draw_clients(counts, labels), path)


@_styled
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
  discs.xaxis.set_major_locator(MaxNLocator(num_ticks, **_WHOLE))
  discs.set_yticks(range(num_classes), labels, fontsize=min(9, 0.85 * 72 * cell))
  discs.set(xlabel="Client", xlim=(-0.5, num_clients - 0.5))
  discs.set(ylabel="Class", ylim=(num_classes - 0.5, -0.5))
  return figure


def weights(
  snapshots: Sequence[tuple[int, np.ndarray, np.ndarray | None]],
  path: str | os.PathLike,
  title: str,
) -> None:
  """Writes how a tensor gathers at its centers; see `draw_weights`."""
  _save(draw_weights(snapshots, title), path)


@_styled
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
  panels[0].set_title(title)
  panels[-1].set(xlabel="Weight", xlim=(edges[0], edges[-1]))
  if any(centers.size for *_, centers in finite):
    line = Line2D([], [], color=_RED, linewidth=0.9, label="center")
    panels[0].legend(handles=[line], loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
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
  for dashes, color in itertools.cycle(itertools.product(_DASHES, _COLORS)):
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
  axes.xaxis.set_major_locator(MaxNLocator(6, **_WHOLE))
  axes.margins(x=0.02)
  axes.grid(True)


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
  axes.yaxis.set_major_locator(MaxNLocator(3, **_WHOLE))
  axes.tick_params(axis="x", length=0, labelbottom=False)


def _discs(axes: Axes, counts: np.ndarray, cell: float) -> None:
  """Draws a disc per client and class; the largest one all but fills its cell, in inches."""
  client, label = np.nonzero(counts)
  held = counts[client, label]
  area = (0.94 * 72 * cell) ** 2 / held.max()  # square points per example
  axes.scatter(client, label, s=area * held, color=_BLUE, linewidths=0)
  axes.grid(True)
  disc = functools.partial(Line2D, [], [], linestyle="", marker="o", color=_BLUE, mew=0)
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


def _histogram(axes: Axes, values: np.ndarray, centers: np.ndarray, edges: np.ndarray) -> None:
  counts, _ = np.histogram(values, edges)
  axes.stairs(counts, edges, fill=True, color=_BLUE, alpha=0.75)
  height = 1 if centers.size <= 16 else 0.12  # more lines than that would hide the histogram
  axes.vlines(centers, 0, height, _RED, linewidth=0.9, transform=axes.get_xaxis_transform())
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


def _save(figure: Figure, path: str | os.PathLike) -> None:
  """Writes a figure in the format that the path's suffix names."""
  try:
    figure.savefig(path, dpi=200, bbox_inches="tight")
  except OSError as error:
    raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error
  except ValueError as error:
    raise BadInput(f"{path}: {error}") from error
