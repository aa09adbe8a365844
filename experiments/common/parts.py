"""Takes over what other runs of the same experiment have trained: a table in pieces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.jobs import Job
from qupeD_jax import files, metrics
from qupeD_jax.checks import BadInput

OWN = ("out", "only", "parts", "minutes")  # options in which pieces of one table may differ


class Part(NamedTuple):
  """What a results folder holds."""

  summary: dict[str, dict]  # by method
  accuracies: dict[str, dict]  # by method
  rows: list[dict]  # of metrics.jsonl


def read(folders: Sequence[str], config: dict[str, Any]) -> list[Part]:
  """Reads results folders of the same experiment.

  Args:
    folders: of finished runs.
    config: the experiment's name and options.

  Raises:
    BadInput: a folder cannot be read, or was made with other options.
  """
  for folder in folders:
    _check(Path(folder), config, f"--parts {folder}")
  return [_read(Path(folder)) for folder in folders]


def unfinished(folder: Path, config: dict[str, Any]) -> Part:
  """Reads what a stopped run with the same options had finished.

  Raises:
    BadInput: its options were others.
  """
  _check(folder, config, f"{folder}: holds a run that was stopped")
  return _read(folder) if (folder / metrics.SUMMARY).exists() else Part({}, {}, [])


def _check(folder: Path, config: dict[str, Any], where: str) -> None:
  theirs, ours = metrics.read_config(folder)["config"], files.plain(config)
  for name in ours.keys() - set(OWN):
    if theirs.get(name) != ours[name]:
      made = f"{where}: made with {name} {theirs.get(name)}"
      raise BadInput(f"{made}; allowed is {ours[name]}, as here")


def _read(folder: Path) -> Part:
  found = metrics.read_summary(folder), metrics.read_accuracies(folder)
  return Part(*found, metrics.read_metrics(folder))


def of_job(job: Job, parts: Sequence[Part]) -> Part | None:
  """Returns what there is of a job, if one of the parts has all its methods."""
  for part in parts:
    if job.variants.keys() <= part.summary.keys():
      summary, accuracies = (
        {method: of_all[method] for method in job.variants} for of_all in part[:2]
      )
      return Part(summary, accuracies, [r for r in part.rows if r["method"] in job.variants])
  return None
