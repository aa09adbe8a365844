"""The look that all pictures share, and how they are written."""

import functools
import io
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files

# Okabe and Ito's palette, told apart by colour-blind readers, without its yellow, which fades on
# paper. The dashes change when the colours come round again.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
BLUE, RED = COLORS[:2]

DPI = 200  # of what is written as pixels

WHOLE = {"integer": True, "steps": [1, 2, 5, 10]}  # ticks at round numbers

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


def styled(draw: Callable) -> Callable:
  """Draws in the house style and leaves matplotlib's own settings alone."""

  @functools.wraps(draw)
  def drawn(*args, **kwargs):
    with mpl.rc_context(_STYLE):
      return draw(*args, **kwargs)

  return drawn


def literal(text: str) -> str:
  """Keeps matplotlib from taking what is between two dollars for a formula."""
  return text.replace("$", r"\$")


def save(figure: Figure, path: str | os.PathLike) -> None:
  """Writes a figure in the format that the path's suffix names."""
  path = Path(path)
  try:
    with files.whole(path) as file:
      figure.savefig(file, format=path.suffix[1:] or None, dpi=DPI, bbox_inches="tight")
  except BadInput:
    raise
  except ValueError as error:
    raise BadInput(f"{path}: {error}") from error


def svg(figure: Figure) -> str:
  """Writes a figure as SVG text; the same figure gives the same text."""
  text = io.StringIO()
  with mpl.rc_context({"svg.hashsalt": "qupeD_jax"}):
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
  return text.getvalue()
