"""Results as one HTML page and as LaTeX tables.

  quped report FOLDER [OUT]

writes report.html, which needs neither a server nor a network, table.tex and costs.tex into OUT, by
default FOLDER itself. A folder with several results, such as the topics of an experiment, makes one
page; its tables lie in folders of their names.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files
from qupeD_jax.results import folder as results_folder
from qupeD_jax.results import markup, metrics, plots, tables
from qupeD_jax.results.folder import Results

PAGE, ACCURACIES, COSTS = "report.html", "table.tex", "costs.tex"

_CAPTIONS = {
  "centers": "Centers over the rounds, tensor by tensor",
  "clients": "Who holds what: examples of each class at every client",
  "curves": "Learning curves",
  "groups": "Groups of clients",
  "tuning": "Configurations that were tried",
  "weights": "Weights gathering at their centers",
}

_VERSIONS = ("qupeD_jax", "jax", "flax", "optax", "numpy", "python")


def write_page(
  folder: str | Path, out: str | Path | None = None, about: Callable[[str], str] = lambda name: ""
) -> list[Path]:
  """Writes report.html, table.tex and costs.tex of a results folder.

  Args:
    folder: the results folder, or one that holds some.
    out: where to, a folder that is made; by default into the results folder.
    about: says in a line what the experiment of a name is about.

  Returns:
    The files that were written.

  Raises:
    BadInput: there are no results, a file is missing or damaged, or nothing can be written.
  """
  folder, out = Path(folder), Path(out or folder)
  found = results_folder.read(folder)
  written = {out / PAGE: html_page(found, about(found[0].name))}
  for results in found:
    own = results.folder == folder.resolve().name
    source, place = (folder, out) if own else (folder / results.folder, out / results.folder)
    if results.summary:
      how = {"source": source / metrics.SUMMARY, "finished": results.finished}
      written[place / ACCURACIES] = tables.latex_accuracies(results.summary, **how)
      written[place / COSTS] = tables.latex_costs(results.summary, **how)
  for path, content in written.items():
    with files.writing(path.parent):
      path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, content)
  return [*written]


def html_page(found: Sequence[Results], about: str = "") -> str:
  """Lays results out as a page that stands alone.

  Args:
    found: what the page tells: one part for each.
    about: what the experiment is about.

  Returns:
    HTML with its style and its pictures inside.
  """
  title, shared = found[0].name, _shared_options(found)
  intro = [markup.section(title, markup.paragraph(about, "about") if about else "", level=1)]
  if len(found) == 1:
    (results,) = found
    where = [] if results.folder == title else [markup.paragraph(f"folder {results.folder}", "ran")]
    parts = [_preface(results), *where, *(markup.section(*part) for part in _parts(results))]
  else:
    links = [
      f'<li><a href="#{markup.anchor(results.folder)}">{markup.text(results.folder)}</a>'
      f"{'' if results.finished else ' (unfinished)'}</li>"
      for results in found
    ]
    parts = ['<ul class="parts">\n{}\n</ul>'.format("\n".join(links))]
    parts += [_part(results, shared) for results in found]
  shown = {column for results in found for column in tables.columns(results.summary)}
  if any(results.summary for results in found):
    meanings = {column: told for column, told in tables.MEANINGS.items() if column in shown}
    parts.append(markup.section("Columns", markup.listed(meanings, "meanings")))
  if shared:
    parts.append(markup.section("Options", markup.listed(shared, "options")))
  if environment := found[0].environment:
    parts.append(markup.section("Versions and device", markup.listed(environment, "options")))
  return markup.page(title, "\n".join([*intro, *parts]))


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


def setting(options: Mapping[str, Any]) -> str:
  """Says in one line what was trained on what, as far as it is known.

  >>> setting({"dataset": "mnist", "clients": 5, "partition": "iid", "rounds": 9})
  'mnist · 5 clients, iid · 9 rounds'
  """
  dealt = {
    "by_class": f" of {options.get('classes_per_client')} classes each",
    "dirichlet": f", Dirichlet with alpha {options.get('alpha')}",
  }
  facts = [options.get("dataset")]
  if clients := options.get("clients"):
    kind = str(options.get("partition", ""))
    facts.append(f"{clients} clients{dealt.get(kind, f', {kind}' if kind else '')}")
  if isinstance(options.get("models"), list):
    facts.append(", ".join(map(str, options["models"])))
  if rounds := options.get("rounds"):
    steps, last = options.get("local_steps"), options.get("finetune_rounds")
    facts.append(f"{rounds} rounds{f' of {steps} steps' if steps else ''}")
    facts += [f"the last {last} of fine-tuning"] if last else []
  return " · ".join(str(fact) for fact in facts if fact)


def point(method: str, entry: Mapping[str, Any], methods: Iterable[str]) -> tuple:
  """Makes a method's point of the Pareto picture; see `plots.draw_pareto`.

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


def main(arguments: Sequence[str], about: Callable[[str], str] = lambda name: "") -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""
  if len(arguments) not in (1, 2) or arguments[0].startswith("-"):
    return _fail("usage: quped report FOLDER [OUT], where FOLDER holds results")
  try:
    for path in write_page(*arguments, about=about):
      print(path)
  except BadInput as error:
    return _fail(error)
  return 0


def _fail(message: object) -> int:
  print("error:", " ".join(str(message).split()), file=sys.stderr)
  return 2


# --- several results on one page


def _shared_options(found: Sequence[Results]) -> dict[str, Any]:
  """Returns the options that have the same value in all parts that tell them."""
  told = [results.options for results in found if results.options]
  return {name: v for name, v in (told[0] if told else {}).items()
          if all(name in own and own[name] == v for own in told)}  # fmt: skip


def _part(results: Results, shared: Mapping[str, Any]) -> str:
  own = {name: value for name, value in results.options.items() if name not in shared}
  parts = [*_parts(results), *([("Options", markup.listed(own, "options"))] if own else [])]
  body = "\n".join([_preface(results), *(markup.section(*part, level=3) for part in parts)])
  name = markup.anchor(results.folder)
  return f'<div class="part" id="{name}">\n{markup.section(results.folder, body)}\n</div>'


# --- the parts of the page: title and HTML


def _preface(results: Results) -> str:
  lines = [setting(results.options), ran(results)]
  told = [markup.paragraph(line, "ran") for line in lines if line]
  return "\n".join(told if results.finished else [*told, _unfinished(results)])


def _unfinished(results: Results) -> str:
  """Says how far a study is that was cut off, or is still at work."""
  trained, methods = len(results.summary), results.methods
  of_all = f" of {len(methods)}" if methods else ""
  words = f"Unfinished: {trained}{of_all} methods trained. Nothing here is best, or final."
  return markup.paragraph(words, "unfinished")


def _parts(results: Results) -> Iterator[tuple[str, str]]:
  if results.summary:
    yield "Results", _summary_table(results)
    yield "Comparisons", _comparisons(results)
  for name, (head, *rows) in results.tables.items():
    cells = [[markup.text(cell) for cell in row] for row in rows]
    yield _caption(Path(name).stem), markup.table([*map(markup.text, head)], cells, "texts")
  drawn = dict(_drawn(results))
  yield from drawn.items()
  for name, picture in results.pictures.items():
    caption = _caption(Path(name).stem)
    if name not in ("pareto.png", "gains.png") and caption not in drawn:
      yield caption, markup.png(picture, caption)


def _drawn(results: Results) -> Iterator[tuple[str, str]]:
  """Draws what the numbers tell."""
  rows = results.rows or []
  if any(row.get("accuracy") is not None for row in rows):
    caption = "Mean over seeds, in a band of one standard deviation to either side"
    yield _CAPTIONS["curves"], markup.figure(plots.draw_curves(rows), caption)
  elif "curves.png" not in results.pictures and not results.tables:
    note = f"No {metrics.METRICS} with accuracies: there are no learning curves."
    yield _CAPTIONS["curves"], markup.paragraph(note)
  if plots.has_stationarity(rows):
    caption = "Squared gradient mapping: geometric mean over seeds, in a band of one deviation"
    yield "Stationarity", markup.figure(plots.draw_stationarity(rows), caption)
  if results.summary:
    yield "Gains over local training", _gains(results)
    yield "Accuracy and size", _pareto(results)


def _summary_table(results: Results) -> str:
  best = tables.best_cells(results.summary) if results.finished else set()
  rows = [
    [
      f"<b>{markup.text(cell)}</b>" if (i, j) in best else markup.text(cell)
      for j, cell in enumerate(row)
    ]
    for i, row in enumerate(tables.cells(results.summary))
  ]
  return markup.table([*map(markup.text, tables.columns(results.summary))], rows)


def _comparisons(results: Results) -> str:
  if results.comparisons is None:
    note = f"No {metrics.COMPARISON}: methods were not compared client by client."
    return markup.paragraph(note)
  comparisons, level = results.comparisons
  how = markup.paragraph(
    "Accuracy less the rival's, paired by seed and client, with its t interval over seeds; a win "
    "or a loss where the interval lies off 0. One seed has none, and decides nothing."
  )
  found = (_comparison_table(ours, rivals, level) for ours, rivals in comparisons.items())
  return f'{how}\n<div class="grid">\n{"".join(found)}\n</div>'


def _comparison_table(ours: str, rivals: Mapping[str, Any], level: float) -> str:
  rows = [
    [*map(markup.text, cells), f'<span class="{verdict}">{verdict}</span>']
    for *cells, verdict in tables.comparison_cells(rivals)
  ]
  return markup.table([*map(markup.text, tables.comparison_columns(ours, level))], rows)


def _gains(results: Results) -> str:
  accuracies = results.accuracies or {}
  if "local" not in accuracies or len(accuracies) == 1:
    return markup.paragraph(
      f'No {metrics.ACCURACIES} with "local" and others: what each client gains is not known.'
    )
  caption = "Gain in test accuracy of each client, mean over seeds"
  return markup.figure(plots.draw_gains(accuracies, "local"), caption)


def _pareto(results: Results) -> str:
  methods = results.summary
  points = [point(method, entry, methods) for method, entry in methods.items()]
  points = [one for one in points if None not in one and one[2] > 0]
  if not points:
    return markup.paragraph("No method has both a size and an accuracy: nothing can be drawn.")
  caption = "Mean over seeds and one standard deviation to either side, by size of a shipped model"
  return markup.figure(plots.draw_pareto(points), caption)


def _split_name(method: str) -> tuple[str, str]:
  """Parts the family of a method from its precision.

  >>> _split_name("QuPeD 2 bit"), _split_name("QuPeD mixed"), _split_name("FedAvg")
  (('QuPeD', '2 bit'), ('QuPeD', 'mixed'), ('FedAvg', ''))
  """
  family, precision = re.fullmatch(r"(.+?)(?: (\d+ bit|mixed))?", method, re.DOTALL).groups()
  return family, precision or ""


def _caption(stem: str) -> str:
  """Makes a caption of a file's name.

  >>> _caption("client_drift"), _caption("weights")
  ('Client drift', 'Weights gathering at their centers')
  """
  words = re.sub(r"[_\-\s]+", " ", stem).strip()
  return _CAPTIONS.get(stem, words[:1].upper() + words[1:])
