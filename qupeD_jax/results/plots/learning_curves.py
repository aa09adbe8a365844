"""Learning curves: accuracy and loss over the rounds."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qupeD_jax.checks import BadInput
from qupeD_jax.results.plots.over_rounds import Series, finish, line_styles, lines, series
from qupeD_jax.results.plots.style import literal, save, styled


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
  accuracy, loss = series(rows, "accuracy", unit=100), series(rows, "loss")
  if not accuracy:
    raise BadInput("learning curves: no row has an accuracy")
  methods = list(accuracy | loss)
  styles = dict(zip(methods, line_styles(), strict=False))
  figure = Figure(figsize=(9, 3.4), layout="constrained")
  left, right = figure.subplots(1, 2, sharex=True)
  drawn = lines(right, loss, styles) | lines(left, accuracy, styles)
  finish(left, "Personal validation accuracy (%)")
  finish(right, "Training loss")
  if _spans_decades(loss):
    right.set_yscale("log")
  methods.sort(key=lambda method: -accuracy[method].mean[-1] if method in accuracy else np.inf)
  names = [literal(method) for method in methods]
  figure.legend([drawn[m] for m in methods], names, loc="outside right center", handlelength=2.4)
  return figure


def _spans_decades(loss: Mapping[str, Series]) -> bool:
  """Whether losses are best read on a logarithmic axis."""
  means = np.concatenate([curve.mean for curve in loss.values()] or [[1.0]])
  return 0 < means.max() < np.inf and means.min() > 0 and means.max() > 30 * means.min()
