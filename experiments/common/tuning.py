"""Chooses hyperparameters: as many configurations for every method, by validation rows alone."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.common import comparison, study, training, tuned
from experiments.common import federation as fed
from experiments.common.comparison import Entry
from experiments.common.errors import Diverged
from experiments.common.federation import Federation
from experiments.common.jobs import Job, changed
from experiments.common.options import Hyperparameters, Options, check
from experiments.common.progress import Bar
from qupeD_jax import checks, engine, files, metrics, tables

SHARED = {"classes_per_client": 4, "centers_rate": 1e-6, "seeds": 1}  # of all searches


@dataclasses.dataclass(frozen=True)
class Tuning(Options):
  """A search; the hyperparameters are those that all configurations share."""

  only: tuple[str, ...] = ()
  """Methods to tune; by default all."""


def run(name: str, options: Tuning) -> Path:
  """Tries every method's configurations and writes down the best.

  The configurations of a method train side by side. The best has the highest mean, over seeds, of
  the personal accuracy on the clients' validation rows after the last round; the earlier one wins
  a tie. Test rows are never looked at.

  Returns:
    The results folder: tuned.toml, tuning.md and, as of any study, config.json and metrics.jsonl.

  Raises:
    BadInput: an option is out of range or does not fit the data.
  """
  check(options)
  checks.require(options.minutes is None, "--minutes", options.minutes, "None in a search")
  console, entries = Console(), comparison.chosen(options.only)
  federation = fed.load(options)
  jobs = {entry.name: _job(entry, options, federation) for entry in entries}
  folder, _ = study.open_folder(name, options)
  best, tried, chosen = {}, {}, set()
  with Bar(sum(phase.rounds for job in jobs.values() for phase in job.phases), console) as bar:
    for method, job in jobs.items():
      scores = _scores(job, folder, bar, console)
      tried |= {key: (v.changes, scores.get(key)) for key, v in job.variants.items()}
      winner = max(scores, key=lambda key, scores=scores: np.mean(scores[key]))
      chosen.add(winner)
      best[method] = _shared(options) | job.variants[winner].changes
      tuned.write(folder / "tuned.toml", tuned.key(options.dataset, options.models[0]), best)
      _write_table(folder / "tuning.md", tried, chosen)
  console.print(f"results in {folder}")
  return folder


def _job(entry: Entry, options: Tuning, federation: Federation) -> Job:
  grid = comparison.configurations(entry.grid)
  numbered = {f"{entry.name} #{i}": changes for i, changes in enumerate(grid)}
  return changed(entry.tune, numbered)(options, federation)


def _shared(options: Tuning) -> dict[str, float]:
  names = [field.name for field in dataclasses.fields(Hyperparameters)]
  return {name: getattr(options, name) for name in names}


def _scores(job: Job, folder: Path, bar: Bar, console: Console) -> dict[str, list[float]]:
  """Trains the configurations of a method: validation accuracy of each seed after the last round.

  One that diverges is left out, and the others are trained anew without it.
  """
  bar.start(study.job_name(job))
  last, scores = sum(phase.rounds for phase in job.phases), {}

  def record(done: int, chunk: engine.Report) -> None:
    rows = training.rows_of(job, chunk, done)
    metrics.append_metrics(folder, rows)
    bar.advance(len(chunk.rounds), rows)
    for row in rows:
      if row["round"] == last:
        scores.setdefault(row["method"], []).append(row["accuracy"])

  try:
    training.train(job, record, folder=folder)
  except Diverged as error:
    console.print(f"left out: {error}", highlight=False)
    left = {key: variant for key, variant in job.variants.items() if key != error.method}
    if not left:
      raise
    return _scores(job._replace(variants=left), folder, bar, console)
  return scores


def _write_table(path: Path, tried, chosen: set[str]) -> None:
  """Writes all configurations with their validation accuracy, the chosen ones marked."""
  rows = [("Configuration", "Hyperparameters", "Validation accuracy (%)", "Chosen")]
  for key, (changes, scores) in tried.items():
    values = ", ".join(f"{name} {value:g}" for name, value in changes.items())
    accuracy = f"{100 * np.mean(scores):.1f}" if scores else "diverged"
    rows.append((key, values, accuracy, "yes" if key in chosen else ""))
  files.write(path, tables.markdown(rows, texts=2))
