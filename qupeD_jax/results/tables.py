"""Tables for people: the summary of an experiment and its comparisons, as Markdown and the like."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from qupeD_jax.results.statistics import Comparison

COLUMNS = (
  "Method",
  "Accuracy (%)",
  "Worst decile (%)",
  "Global (%)",
  "Bits",
  "Model",
  "Round traffic",
  "Seconds",
)

NEW = "New clients (%)"  # a last column, where some took part in no round

_LEAST_NAME = 16  # characters: a terminal that leaves less gets the table in parts

# What a reader who has nothing but the table wants to know of its columns.
MEANINGS = {
  "Accuracy (%)": "of each client's personal model, as shipped, on test rows of its own classes"
  " after the last round: mean over clients, then over seeds, ± the standard deviation over seeds",
  "Worst decile (%)": "mean of the tenth of the clients that fare worst",
  "Global (%)": "the same as Accuracy of the server's model; - where there is none that is scored",
  "Bits": "precision of the clients' models; 32 is full precision",
  "Model": "mean size of a personal model as shipped",
  "Round traffic": "what all clients send and receive in a round",
  "Seconds": "training time of one run, without compilation and scoring; runs that train side by"
  " side share their time equally",
  NEW: "Accuracy of clients that took part in no round: each starts from the server's model and is"
  " fine-tuned alone, at full precision; - where the server has no model that is scored",
}

# What TeX would take for a command, or sets as another character. A bracket that opens a row would
# be read as an option of the line break before it.
_TEX = str.maketrans(
  {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",
    "*": "{*}",
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
  }
)


def columns(methods: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
  """Names the columns: COLUMNS, and one more where some clients took part in no round."""
  return (*COLUMNS, NEW) if _have_new(methods) else COLUMNS


def _have_new(methods: Mapping[str, Mapping[str, Any]]) -> bool:
  return any("new_clients" in entry for entry in methods.values())


def _of_new(entry: Mapping[str, Any]) -> str:
  found = entry.get("new_clients") or {}
  return accuracy(found.get("mean"), found.get("std"))


def cells(methods: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
  """Writes the summary as text.

  Args:
    methods: name -> what `metrics.summarise` returned.

  Returns:
    A row per method, with a cell for each of `columns`; "-" where there is no number.
  """
  has_new = _have_new(methods)
  return [
    (
      name,
      accuracy(entry["accuracy"]["mean"], entry["accuracy"]["std"]),
      _percent(entry["accuracy"]["worst_decile"]),
      _percent(entry["global_accuracy"]),
      ", ".join(map(str, np.ravel(entry["bits"]))),
      _bytes(entry["bytes_per_model"]),
      _bytes(entry["bytes_per_round"]),
      f"{entry['seconds']:,.1f}" if _is_number(entry["seconds"]) else "-",
      *((_of_new(entry),) if has_new else ()),
    )
    for name, entry in methods.items()
  ]


def accuracy(mean: float | None, std: float | None) -> str:
  """Writes an accuracy in percent with its standard deviation over seeds; one seed has none.

  >>> accuracy(0.875, 0.0058), accuracy(0.875, None), accuracy(None, None)
  ('87.5 ± 0.6', '87.5', '-')
  """
  return f"{_percent(mean)} ± {_percent(std)}" if _is_number(std) else _percent(mean)


def best_cells(methods: Mapping[str, Mapping[str, Any]]) -> set[tuple[int, int]]:
  """Finds the best accuracies, to be set in bold.

  Args:
    methods: name -> what `metrics.summarise` returned.

  Returns:
    (row, column) of the highest accuracy, worst decile and global accuracy; all that read the same
    where several do.
  """
  columns = {
    1: [_percent(entry["accuracy"]["mean"]) for entry in methods.values()],
    2: [_percent(entry["accuracy"]["worst_decile"]) for entry in methods.values()],
    3: [_percent(entry["global_accuracy"]) for entry in methods.values()],
  }
  return {(row, column) for column, texts in columns.items() for row in _highest(texts)}


def markdown_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
  """Lays the summary out as a Markdown table that reads well unrendered, too.

  Args:
    methods: name -> what `metrics.summarise` returned.

  Returns:
    The table, ending in a newline.
  """
  return markdown([columns(methods), *cells(methods)])


def latex_accuracies(
  methods: Mapping[str, Mapping[str, Any]], source: object, finished: bool = True
) -> str:
  """Lays the accuracies out as a LaTeX table in the style of booktabs, the best in bold.

  Args:
    methods: name -> what `metrics.summarise` returned.
    source: where the numbers are from, for a comment.
    finished: whether all methods are there; otherwise none is best.

  Returns:
    The table, ending in a newline; it can be \\input anywhere and is as wide as a line there.
  """
  best = best_cells(methods) if finished else set()
  rows = [
    [rf"\textbf{{{_tex(cell)}}}" if (i, j) in best else _tex(cell) for j, cell in enumerate(row)]
    for i, row in enumerate(cells(methods))
  ]
  shown = (0, 1, 2, 3, 8, 4) if _have_new(methods) else (0, 1, 2, 3, 4)
  return _latex(shown, rows, source, finished)


def latex_costs(
  methods: Mapping[str, Mapping[str, Any]], source: object, finished: bool = True
) -> str:
  """Lays out what models and rounds cost, as `latex_accuracies` does the accuracies."""
  rows = [[*map(_tex, row)] for row in cells(methods)]
  return _latex((0, 4, 5, 6, 7), rows, source, finished)


def _latex(
  columns: Sequence[int], rows: Sequence[Sequence[str]], source: object, finished: bool
) -> str:
  """Lays some columns of rows, which are LaTeX already, out below heads of two lines."""
  heads = [(*(*COLUMNS, NEW)[column].split(" ", 1), "")[:2] for column in columns]
  made = f"% {'' if finished else 'Unfinished. '}Made from {' '.join(str(source).split())}"
  lines = [
    f"{made}; needs \\usepackage{{booktabs,tabularx}}",
    rf"\begin{{tabularx}}{{\linewidth}}{{@{{}}X{'r' * (len(columns) - 1)}@{{}}}}",
    r"\toprule",
    *(_tex_row(map(_tex, line)) for line in zip(*heads, strict=True)),
    r"\midrule",
    *(_tex_row(row[column] for column in columns) for row in rows),
    r"\bottomrule",
    r"\end{tabularx}",
  ]
  return "\n".join(lines) + "\n"


def print_table(
  methods: Mapping[str, Mapping[str, Any]], console: rich.console.Console | None = None
) -> None:
  """Prints the summary to the terminal; one too narrow gets it in parts, each with the names.

  Args:
    methods: name -> what `metrics.summarise` returned.
    console: where to, if not standard output.
  """
  console = console or rich.console.Console()
  rows = cells(methods)
  if console.options.ascii_only:
    rows = [tuple(cell.replace("±", "+-") for cell in row) for row in rows]
  names = columns(methods)
  heads = [names[:1], *(column.split(" ") for column in names[1:])]
  texts = [[*head, *(row[i] for row in rows)] for i, head in enumerate(heads)]
  first, *others = (max(map(len, column)) for column in texts)
  first = min(first, _room_for_names(others, console.width))
  for part in _parted(others, console.width - first):
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column(names[0], overflow="fold", width=first)
    for column in part:
      table.add_column(names[column].replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:  # a plain string's [brackets] would be read as markup
      table.add_row(*(rich.text.Text(row[column]) for column in (0, *part)))
    console.print(table)


def _room_for_names(others: Sequence[int], width: int) -> int:
  """Returns how wide the first column may be: beside all others, or beside a part of them.

  >>> _room_for_names([10, 10], 80), _room_for_names([10, 10], 30)
  (58, 15)
  """
  room = width - sum(others) - len(others)
  return room if room >= _LEAST_NAME else max(1, min(width // 2, width - max(others) - 1))


def _parted(widths: Sequence[int], room: int) -> list[list[int]]:
  """Parts columns, numbered from 1 and with a space before each, so that every part has room.

  >>> _parted([5, 5, 5], 13)
  [[1, 2], [3]]
  """
  parts, left = [], -1
  for column, width in enumerate(widths, start=1):
    if width + 1 > left:
      parts.append([])
      left = room
    parts[-1].append(column)
    left -= width + 1
  return parts


def comparison_columns(ours: str, level: float) -> tuple[str, ...]:
  """Returns the heads of a comparison's columns.

  >>> comparison_columns("QuPeD", 0.95)
  ('QuPeD against', 'Points more', '95% interval', 'Verdict')
  """
  return f"{ours} against", "Points more", f"{100 * level:g}% interval", "Verdict"


def comparison_cells(rivals: Mapping[str, Comparison]) -> list[tuple[str, ...]]:
  """Writes the comparisons of one method as text.

  Args:
    rivals: rival -> how the method compares with it.

  Returns:
    A row per rival: its name, the difference and its interval in points, and "win", "loss" or "-".
  """
  verdicts = {1: "win", -1: "loss", 0: "-"}
  return [
    (rival, points(one.difference), spread(one), verdicts[one.wins])
    for rival, one in rivals.items()
  ]


def spread(one: Comparison) -> str:
  """Writes the interval of a comparison, or of one seed how far its clients differ.

  >>> spread(Comparison(0.018, 0.0004, 0.0356, 1, None))
  '[+0.04, +3.6]'
  >>> spread(Comparison(0.018, None, None, 0, 0.0312))
  'one seed; clients ± 3.1'
  """
  if one.low is not None:
    return f"[{_end(one.low)}, {_end(one.high)}]"
  return f"one seed; clients ± {_percent(one.clients)}" if one.clients is not None else "one seed"


def comparison_table(
  comparisons: Mapping[str, Mapping[str, Comparison]], level: float = 0.95
) -> str:
  """Lays comparisons out as Markdown tables, one for each reference method.

  Args:
    comparisons: reference method -> rival -> comparison, as `statistics.compare` returns.
    level: of the intervals.

  Returns:
    The tables, a blank line between them, ending in a newline.
  """
  return "\n".join(
    markdown([comparison_columns(ours, level), *comparison_cells(rivals)])
    for ours, rivals in comparisons.items()
  )


def markdown(rows: Iterable[Sequence[str]], texts: int = 1) -> str:
  """Lays cells out as a Markdown table that reads well unrendered, too.

  Args:
    rows: cells; the first row is the head.
    texts: how many columns, from the left, hold text and are aligned there; numbers are on the
      right.

  Returns:
    The table, ending in a newline.
  """
  table = [[cell.replace("|", r"\|") for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  rule = ["-" * (width - 1) + ("-" if i < texts else ":") for i, width in enumerate(widths)]
  table.insert(1, rule)
  return "".join(_markdown_row(row, widths, texts) for row in table)


def _markdown_row(cells: Sequence[str], widths: Sequence[int], texts: int) -> str:
  sized = enumerate(zip(cells, widths, strict=True))
  aligned = [cell.ljust(width) if i < texts else cell.rjust(width) for i, (cell, width) in sized]
  return "| " + " | ".join(aligned) + " |\n"


def _highest(texts: Sequence[str]) -> list[int]:
  """Returns the places of the highest number.

  >>> _highest(["9.5", "-", "80.0", "80.0"])
  [2, 3]
  """
  numbers = [-math.inf if text == "-" else float(text) for text in texts]
  top = max(numbers, default=-math.inf)
  return [i for i, number in enumerate(numbers) if number == top > -math.inf]


def _tex(text: str) -> str:
  r"""Writes text as LaTeX.

  >>> _tex("a_b & 87.5 ± 0.6")
  'a\\_b \\& 87.5 $\\pm$ 0.6'
  """
  return text.translate(_TEX)


def _tex_row(cells: Iterable[str]) -> str:
  return " & ".join(cells) + r" \\"


def _is_number(value) -> bool:
  return value is not None and math.isfinite(value)


def _percent(value: float | None) -> str:
  return f"{100 * value:.1f}" if _is_number(value) else "-"


def points(value: float) -> str:
  """Writes a difference in percentage points.

  >>> [points(value) for value in (0.0132, -0.2, -0.0001)]
  ['+1.3', '-20.0', '0.0']
  """
  text = f"{100 * value:+.1f}"
  return text if float(text) else "0.0"


def _end(value: float) -> str:
  """Writes an end of an interval in points, with the digit that tells it from 0.

  >>> [_end(value) for value in (0.0132, -0.0004, 0.00002, 0.0)]
  ['+1.3', '-0.04', '+0.002', '0.0']
  """
  texts = (f"{100 * value:+.{digits}f}" for digits in range(1, 10))
  return next((text for text in texts if float(text)), "0.0")


def _bytes(value: float | None) -> str:
  """Writes a number of bytes for people, in decimal units.

  >>> [_bytes(n) for n in (999, 1_500, 999_950, 12_000_000)]
  ['999 B', '1.5 kB', '1.0 MB', '12.0 MB']
  """
  if not _is_number(value):
    return "-"
  for unit in ("B", "kB", "MB", "GB"):
    text = f"{value:.0f}" if unit == "B" else f"{value:.1f}"
    if float(text) < 1000:
      return f"{text} {unit}"
    value /= 1000
  return f"{value:,.1f} TB"
