"""Chooses hyperparameters: as many configurations for every method, by validation rows alone."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.recipes import comparison, tuned
from experiments.recipes.comparison import Entry
from qupeD_jax.checks import BadInput
from qupeD_jax.engine import loop
from qupeD_jax.io import files
from qupeD_jax.results import metrics, tables, tensorboard
from qupeD_jax.study import federation as fed
from qupeD_jax.study import folders, parts, study, training
from qupeD_jax.study.durability import resume, stopping
from qupeD_jax.study.durability.progress import Bar
from qupeD_jax.study.errors import Diverged
from qupeD_jax.study.federation import Federation
from qupeD_jax.study.jobs import Job, changed, job_name
from qupeD_jax.study.options import Hyperparameters, Options, check, settled, withheld

FILE, TUNED, TABLE = "tuning.json", "tuned.toml", "tuning.md"
SHARED = {"classes_per_client": 4, "centers_rate": 1e-6, "seeds": 1}  # of all searches

# By configuration: the validation accuracy of each seed after the last round, None if it diverged.
Scores = dict[str, list[float] | None]


# What every method that takes it is tried with, and bits, which are those of the method.
TRIED = ("weights_rate", "fedavg_finetune_rate", "lambda_p", "mu", "inner_rate", "penalty", "bits")
# What tests and reports alone would take.
UNSEEN = ("max_test_rows", "delta", "new_clients")


@dataclasses.dataclass(frozen=True)
class Tuning(withheld(Options, *TRIED, *UNSEEN)):
  """A search; the hyperparameters are those that all configurations share."""

  only: tuple[str, ...] = ()
  """Methods to tune; by default those of the tables, without FedRep, FedBN, SCAFFOLD and APFL."""


def run(name: str, options: Tuning) -> study.Outcome:
  """Tries every method's configurations and writes down the best.

  The configurations of a method train side by side. The best has the highest mean, over seeds, of
  the personal accuracy on the clients' validation rows after the last round; the earlier one wins
  a tie. Test rows are never looked at.

  Returns:
    The scores, and the results folder: tuned.toml, tuning.md, tuning.json with the scores, and as
    of any study config.json and metrics.jsonl.

  Raises:
    BadInput: an option is out of range or does not fit the data.
  """
  options = settled(options)
  check(options)
  if options.run.tensorboard:
    tensorboard.require_installed()
  console, entries = Console(), comparison.chosen(options.only)
  federation = fed.load(options)
  jobs = {entry.name: _job(entry, options, federation) for entry in entries}
  keys = [key for job in jobs.values() for key in job.variants]
  folder, say = study.folder_of(name, options), study.sayer(console)
  config = study.config_of(name, options)
  expected = study.expected_rows([*jobs.values()])
  recorded = lambda folder: _finished(folder, expected)
  with folders.held(folder), stopping.listening() as asked:
    if folders.begin(folder, config, keys, recorded, fresh=options.run.fresh, say=say):
      saves, scores = folders.saves(options, asked, say), recorded(folder)
      with tensorboard.opened(folder, options.run.tensorboard) as board:
        scores = _search(jobs, options, folder, console, saves, scores, board)
      left = {key: count for key, count in expected.items() if scores[key]}
      folders.require_whole(folder, left, (FILE, TUNED, TABLE))
      folders.end(folder)
      say(f"results in {folder}")
  return study.Outcome(folder, read_scores(folder))


def _search(
  jobs: dict[str, Job],
  options: Tuning,
  folder: Path,
  console: Console,
  saves: resume.Saves,
  scores: Scores,
  board: tensorboard.Board,
) -> Scores:
  best, tried, chosen, before = {}, {}, set(), 0
  with Bar(sum(phase.rounds for job in jobs.values() for phase in job.phases), console) as bar:
    for method, job in jobs.items():
      bar.start(job_name(job), before)
      before += sum(phase.rounds for phase in job.phases)
      scores = _try(job, folder, bar, saves, scores, board)
      winner = _best(job, scores)
      chosen.add(winner)
      best[method] = _shared(options) | job.variants[winner].changes
      tuned.write(folder / TUNED, tuned.key(options.data.dataset, options.networks.models[0]), best)
      tried |= {key: (v.changes, scores.get(key)) for key, v in job.variants.items()}
      _write_table(folder / TABLE, tried, chosen)
  return scores


def _best(job: Job, scores: Scores) -> str:
  return max(job.variants, key=lambda key: np.mean(scores[key] or -1.0))


def _job(entry: Entry, options: Tuning, federation: Federation) -> Job:
  grid = comparison.configurations(entry.grid)
  numbered = {f"{entry.name} #{i}": changes for i, changes in enumerate(grid)}
  return changed(entry.tune, numbered)(options, federation)


def _shared(options: Tuning) -> dict[str, float]:
  names = [field.name for field in dataclasses.fields(Hyperparameters)]
  return {name: getattr(options.hyper, name) for name in names}


def _try(
  job: Job, folder: Path, bar: Bar, saves: resume.Saves, scores: Scores, board: tensorboard.Board
) -> Scores:
  """Trains the configurations of a method that have no scores yet, and writes down theirs.

  One that diverges is left out, and the others are trained anew without it.
  """
  left = {key: variant for key, variant in job.variants.items() if scores.get(key, ()) is not None}
  if left.keys() <= scores.keys():
    return scores
  job = job._replace(variants=left)

  def record(done: int, chunk: loop.Report) -> None:
    rows = training.rows_of(job, chunk, done)
    metrics.append_metrics(folder, rows)
    board.rows(rows)
    bar.advance(len(chunk.rounds), rows, done + int(chunk.rounds[-1]))

  try:
    training.train(job, record, folders.of_job(saves, job, folder), folder)
  except Diverged as error:
    saves.warn(f"left out: {error}")
    if len(left) == 1:
      raise
    scores = scores | {error.method: None}
    _write(folder, scores)
    return _try(job, folder, bar, saves, scores, board)
  scores = scores | _last(job, metrics.read_metrics(folder))
  _write(folder, scores)
  return scores


def _last(job: Job, rows: list[dict]) -> Scores:
  """Returns each seed's validation accuracy after the last round, by configuration."""
  last = sum(phase.rounds for phase in job.phases)
  at_end = [row for row in rows if row["round"] == last]
  return {key: [row["accuracy"] for row in at_end if row["method"] == key] for key in job.variants}


def read_scores(folder: Path) -> Scores:
  path = folder / FILE
  scores = files.read(path).get("scores") if path.exists() else {}
  good = isinstance(scores, dict) and all(map(_are_scores, scores.values()))
  if not good:
    raise BadInput(f"{path}: not the scores of a search")
  return scores


def _finished(folder: Path, expected: Mapping[str, int]) -> Scores:
  """Reads the scores of a search, but of configurations that lack some of their rows."""
  scores = read_scores(folder)
  lost = parts.lacking(metrics.read_metrics(folder) if scores else (), expected)
  return {key: entry for key, entry in scores.items() if entry is None or key not in lost}


def _are_scores(entry: Any) -> bool:
  if not isinstance(entry, list):
    return entry is None
  return bool(entry) and all(isinstance(score, int | float) for score in entry)


def _write(folder: Path, scores: Scores) -> None:
  files.write(folder / FILE, files.dump({"scores": scores}))


def _write_table(path: Path, tried, chosen: set[str]) -> None:
  """Writes all configurations with their validation accuracy, the chosen ones marked."""
  rows = [("Configuration", "Hyperparameters", "Validation accuracy (%)", "Chosen")]
  for key, (changes, scores) in tried.items():
    values = ", ".join(f"{name} {value:g}" for name, value in changes.items())
    accuracy = f"{100 * np.mean(scores):.1f}" if scores else "diverged"
    rows.append((key, values, accuracy, "yes" if key in chosen else ""))
  files.write(path, tables.markdown(rows, texts=2))
