"""A results folder as one HTML page and one LaTeX table.

  quped report FOLDER [OUT]

writes report.html, which needs neither a server nor a network, and table.tex into OUT, by default
FOLDER itself.
"""

import base64
import html
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from qupeD_jax.checks import BadInput, require
from qupeD_jax.command_line import nearest
from qupeD_jax.io import files
from qupeD_jax.results import metrics, plots, tables

PAGE, LATEX = "report.html", "table.tex"

_CAPTIONS = {
  "centers": "Centers over the rounds, tensor by tensor",
  "clients": "Who holds what: examples of each class at every client",
  "curves": "Learning curves",
  "weights": "Weights gathering at their centers",
}

_VERSIONS = ("qupeD_jax", "jax", "flax", "optax", "numpy", "python")

_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #667; --line: #d9dce1;
  --win: #00703c; --loss: #b3420a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #16181c; --faint: #9aa3ad;
  --line: #3a3f47; --win: #5fd39a; --loss: #ff9b63; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem; }
h1 { margin: 0; font-size: 1.7rem; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; }
.ran, .note, figcaption { color: var(--faint); }
.ran { margin: .2rem 0 0; }
.wide { overflow-x: auto; }
table { margin-bottom: 1rem; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
.numbers :is(th, td) { white-space: nowrap; }
.numbers :is(th, td):not(:first-child) { text-align: right; }
.options td { overflow-wrap: anywhere; }
.win { color: var(--win); } .loss { color: var(--loss); }
figure { margin: 0 0 1.5rem; }
img { max-width: min(100%, 54rem); box-sizing: border-box; padding: .5rem; border-radius: 6px;
  background: #fff; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: bold; margin-top: 2.2rem; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444; --line: #bbb;
    --win: #00703c; --loss: #b3420a; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  th, td { padding-right: .5rem; } img { padding: 0; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


class Results(NamedTuple):
  """All that a page tells of; None for a file that is not there."""

  name: str
  options: dict[str, Any]
  environment: dict[str, Any]
  date: str | None
  summary: dict[str, dict[str, Any]]
  rows: list[dict[str, Any]] | None  # of metrics.jsonl
  accuracies: dict[str, dict[str, Any]] | None
  comparisons: tuple[dict[str, dict], float] | None
  pictures: dict[str, bytes]  # file name -> PNG


def write_page(folder: str | Path, out: str | Path | None = None) -> list[Path]:
  """Writes report.html and table.tex of a results folder.

  Args:
    folder: the results folder.
    out: where to, a folder that is made; by default into the results folder.

  Returns:
    The files that were written.

  Raises:
    BadInput: the folder, config.json or summary.json is missing, a file is damaged, or nothing can
      be written.
  """
  folder, out = Path(folder), Path(out or folder)
  results = read_results(folder)
  page = html_page(results)
  latex = tables.latex_table(results.summary, folder / metrics.SUMMARY)
  with files.writing(out):
    out.mkdir(parents=True, exist_ok=True)
  files.write(out / PAGE, page)
  files.write(out / LATEX, latex)
  return [out / PAGE, out / LATEX]


def read_results(folder: Path) -> Results:
  """Reads a results folder.

  Args:
    folder: with at least config.json and summary.json.

  Returns:
    What is there.

  Raises:
    BadInput: the folder or one of these two is missing, or any file is damaged.
  """
  if not folder.is_dir():
    raise BadInput(f"{folder}: no such results folder{nearest(folder.name, _neighbours(folder))}")
  written, summary = metrics.read_config(folder), metrics.read_summary(folder)
  require(bool(summary), f"{folder / metrics.SUMMARY}: methods", "{}", "at least one")
  return Results(
    name=str(written["config"].get("experiment") or folder.resolve().name),
    options=written["config"],
    environment=written["environment"],
    date=written.get("date"),
    summary=summary,
    rows=_if_there(metrics.read_metrics, folder, metrics.METRICS),
    accuracies=_if_there(metrics.read_accuracies, folder, metrics.ACCURACIES),
    comparisons=_if_there(metrics.read_comparisons, folder, metrics.COMPARISON),
    pictures=_read_pictures(folder),
  )


def html_page(results: Results) -> str:
  """Lays results out as a page that stands alone.

  Args:
    results: what the page tells.

  Returns:
    HTML with its style and its pictures inside.
  """
  title = _text(results.name)
  parts = [
    f'<h1>{title}</h1>\n<p class="ran">{_text(ran(results))}</p>',
    _section("Results", _summary_table(results.summary)),
    _section("Comparisons", *_comparisons(results)),
    _section("Learning curves", _curves(results)),
    *_stationarity(results),
    _section("Gains over local training", _gains(results)),
    _section("Accuracy and size", _pareto(results)),
    *_other_pictures(results),
    _options("Options", results.options),
    _options("Versions and device", results.environment),
  ]
  head = (
    '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{title}</title>\n<style>{_CSS}</style>"
  )
  body = "\n".join(parts)
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
    f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
  )


def ran(results: Results) -> str:
  """Says in one line what ran: device, versions, seeds and date, as far as they are known."""
  environment, seeds = results.environment, results.options.get("seed_list")
  device, count = environment.get("device"), environment.get("devices")
  facts = [f"{count} devices {device}" if isinstance(count, int) and count > 1 else device]
  facts += [f"{name} {environment[name]}" for name in _VERSIONS if environment.get(name)]
  if isinstance(seeds, list):
    facts.append(f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}")
  if results.date:
    facts.append(str(results.date).replace("T", " ").replace("+00:00", " UTC"))
  return " · ".join(str(fact) for fact in facts if fact)


def point(method: str, entry: Mapping[str, Any], methods: Iterable[str]) -> tuple:
  """Makes a method's point of the Pareto picture; see `report.draw_pareto`.

  What precedes "2 bit" or "mixed" in a name is its family. A family of one goes by its full name.

  Args:
    method: its name.
    entry: its part of the summary.
    methods: the names of all, itself among them.

  Returns:
    (family, label, bytes of a model, mean accuracy, its standard deviation); 0 for that of one
    seed, which gets no bar.
  """
  family, precision = _split_name(method)
  if sum(_split_name(other)[0] == family for other in methods) == 1:
    family, label = method, method
  else:
    label = precision or "32 bit"
  accuracy = entry["accuracy"]
  return family, label, entry["bytes_per_model"], accuracy["mean"], accuracy["std"] or 0.0


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""
  if len(arguments) not in (1, 2) or arguments[0].startswith("-"):
    return _fail("usage: quped report FOLDER [OUT], where FOLDER holds results")
  try:
    for path in write_page(*arguments):
      print(path)
  except BadInput as error:
    return _fail(error)
  return 0


def _fail(message: object) -> int:
  print("error:", " ".join(str(message).split()), file=sys.stderr)
  return 2


def _if_there(read: Callable, folder: Path, name: str) -> Any:
  return read(folder) if (folder / name).exists() else None


def _neighbours(folder: Path) -> list[str]:
  """Lists what lies beside a folder, and with the experiments' own results of that name."""
  beside = (folder.parent, Path("experiments") / folder.parent)
  return sorted({path.name for parent in beside for path in parent.glob("*") if path.is_dir()})


def _read_pictures(folder: Path) -> dict[str, bytes]:
  with files.on_disk(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# --- the parts of the page


def _text(value: object) -> str:
  return html.escape(str(value))


def _section(title: str, *parts: str) -> str:
  body = "\n".join(parts)
  return f"<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>"


def _note(text: str) -> str:
  return f'<p class="note">{_text(text)}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
  """Lays cells, which are HTML already, out as a table that scrolls where it is too wide."""
  columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
  lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
  body = "\n".join(lines)
  head = f"<thead><tr>{columns}</tr></thead>\n" if head else ""
  return f'<div class="wide"><table class="{kind}">\n{head}<tbody>\n{body}\n</tbody></table></div>'


def _summary_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
  best = tables.best_cells(summary)
  rows = [
    [f"<b>{_text(cell)}</b>" if (i, j) in best else _text(cell) for j, cell in enumerate(row)]
    for i, row in enumerate(tables.cells(summary))
  ]
  return _table([_text(column) for column in tables.COLUMNS], rows, "numbers")


def _comparisons(results: Results) -> list[str]:
  if results.comparisons is None:
    return [_note(f"No {metrics.COMPARISON}: methods were not compared client by client.")]
  comparisons, level = results.comparisons
  how = _note(
    "Accuracy less the rival's, paired by seed and client, with its t interval over seeds; a win "
    "or a loss where the interval lies off 0. One seed has none, and decides nothing."
  )
  return [how, *(_comparison_table(ours, rivals, level) for ours, rivals in comparisons.items())]


def _comparison_table(ours: str, rivals: Mapping[str, Any], level: float) -> str:
  rows = [
    [*map(_text, cells), f'<span class="{verdict}">{verdict}</span>']
    for *cells, verdict in tables.comparison_cells(rivals)
  ]
  return _table([_text(head) for head in tables.comparison_columns(ours, level)], rows, "numbers")


def _curves(results: Results) -> str:
  if not _has_curves(results):
    return _note(f"No {metrics.METRICS} with accuracies: there are no learning curves.")
  caption = "Mean over seeds, in a band of one standard deviation to either side"
  return _figure(plots.draw_curves(results.rows), caption)


def _has_curves(results: Results) -> bool:
  return any(row.get("accuracy") is not None for row in results.rows or [])


def _stationarity(results: Results) -> list[str]:
  """Shows the squared gradient mapping where it was measured."""
  if not plots.has_stationarity(results.rows or []):
    return []
  caption = "Squared gradient mapping: geometric mean over seeds, in a band of one deviation"
  return [_section("Stationarity", _figure(plots.draw_stationarity(results.rows), caption))]


def _gains(results: Results) -> str:
  if not _has_gains(results):
    return _note(
      f'No {metrics.ACCURACIES} with "local" and others: what each client gains is not known.'
    )
  caption = "Gain in test accuracy of each client, mean over seeds"
  return _figure(plots.draw_gains(results.accuracies, "local"), caption)


def _has_gains(results: Results) -> bool:
  accuracies = results.accuracies or {}
  return "local" in accuracies and len(accuracies) > 1


def _pareto(results: Results) -> str:
  methods = results.summary
  points = [point(method, entry, methods) for method, entry in methods.items()]
  points = [one for one in points if None not in one and one[2] > 0]
  if not points:
    return _note("No method has both a size and an accuracy: there is nothing to draw.")
  caption = "Mean over seeds and one standard deviation to either side, by size of a shipped model"
  return _figure(plots.draw_pareto(points), caption)


def _split_name(method: str) -> tuple[str, str]:
  """Parts the family of a method from its precision.

  >>> _split_name("QuPeD 2 bit"), _split_name("QuPeD mixed"), _split_name("FedAvg")
  (('QuPeD', '2 bit'), ('QuPeD', 'mixed'), ('FedAvg', ''))
  """
  family, precision = re.fullmatch(r"(.+?)(?: (\d+ bit|mixed))?", method, re.DOTALL).groups()
  return family, precision or ""


def _other_pictures(results: Results) -> list[str]:
  """Shows the folder's pictures, but for those of what the page has drawn itself."""
  drawn = {"pareto.png"}
  drawn |= {"curves.png"} if _has_curves(results) else set()
  drawn |= {"gains.png"} if _has_gains(results) else set()
  drawn |= {"stationarity.png"} if plots.has_stationarity(results.rows or []) else set()
  return [
    _section(_caption(Path(name).stem), _image("image/png", picture, _caption(Path(name).stem)))
    for name, picture in results.pictures.items()
    if name not in drawn
  ]


def _caption(stem: str) -> str:
  """Makes a caption of a file's name.

  >>> _caption("client_drift"), _caption("weights")
  ('Client drift', 'Weights gathering at their centers')
  """
  words = re.sub(r"[_\-\s]+", " ", stem).strip()
  return _CAPTIONS.get(stem, words[:1].upper() + words[1:])


def _figure(figure: Figure, caption: str) -> str:
  picture = _image("image/svg+xml", plots.svg(figure).encode(), caption)
  return f"<figure>\n{picture}\n<figcaption>{_text(caption)}</figcaption>\n</figure>"


def _image(kind: str, content: bytes, alternative: str) -> str:
  data = base64.b64encode(content).decode("ascii")
  return f'<img src="data:{kind};base64,{data}" alt="{_text(alternative)}">'


def _options(title: str, values: Mapping[str, Any]) -> str:
  """Shows a config as a table that opens on a click."""
  rows = [(_text(name), _text(_value(value))) for name, value in values.items()]
  return f"<details>\n<summary>{_text(title)}</summary>\n{_table((), rows, 'options')}\n</details>"


def _value(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
