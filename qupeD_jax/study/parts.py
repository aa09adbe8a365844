"""Takes over what other runs of the same experiment have trained: a table in pieces."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qupeD_jax.checks import place, refusal
from qupeD_jax.command_line import flag
from qupeD_jax.io import files
from qupeD_jax.results import metrics
from qupeD_jax.study.jobs import Job

# Options in which one run may differ from its continuation, and pieces of one table.
PASSING = (
  "out", "parts", "minutes", "checkpoint_every", "fresh", "tensorboard", "coordinator", "process",
  "join_timeout",
)  # fmt: skip
OWN = (*PASSING, "only", "bits")


class Part(NamedTuple):
  """What a results folder holds."""

  summary: dict[str, dict]  # by method
  accuracies: dict[str, dict]  # by method
  rows: list[dict]  # of metrics.jsonl


NOTHING = Part({}, {}, [])


def lacking(rows: Iterable[Mapping[str, Any]], expected: Mapping[str, int]) -> dict[str, int]:
  """Counts how many rows are missing, by method; methods with all of theirs are left out.

  Args:
    rows: of metrics.jsonl.
    expected: how many rows each method has.
  """
  counts = collections.Counter(row["method"] for row in rows)
  return {m: count - counts[m] for m, count in expected.items() if counts[m] < count}


def read(folders: Sequence[str], config: dict[str, Any], expected: Mapping[str, int]) -> list[Part]:
  """Reads results folders of the same experiment.

  Args:
    folders: of finished runs.
    config: the experiment's name and options.
    expected: how many rows of metrics.jsonl each method has.

  Raises:
    BadInput: a folder cannot be read, was made with other options, or lacks rows.
  """
  found = [place("parts", folder) for folder in folders]
  for folder in found:
    _check(folder, config)
  read = [_read(folder) for folder in found]
  for folder, part in zip(found, read, strict=True):
    own = {method: count for method, count in expected.items() if method in part.summary}
    for method, count in lacking(part.rows, own).items():
      raise refusal("parts", folder, f"{count} of {own[method]} rows of {method} are missing there")
  return read


def finished(folder: Path, expected: Mapping[str, int]) -> Part:
  """Reads what a run had finished when it ended, or was cut off.

  Methods that lack some of their `expected` rows are left out, and so trained again.
  """
  if not (folder / metrics.SUMMARY).exists():
    return NOTHING
  part = _read(folder)
  lost = lacking(part.rows, expected)
  summary, accuracies = (
    {method: entry for method, entry in of_all.items() if method not in lost} for of_all in part[:2]
  )
  return Part(summary, accuracies, part.rows)


def differences(folder: Path, config: dict[str, Any]) -> list[str]:
  """Says in which options a run differs from the one of a folder: "--rounds 20, here 30"."""
  differs = _differing(folder, config, (*PASSING, "seed_list"))
  shown = lambda value: " ".join(map(str, value)) if isinstance(value, list) else value
  return [f"{flag(k)} {shown(theirs)}, here {shown(ours)}" for k, theirs, ours in differs]


def _check(folder: Path, config: dict[str, Any]) -> None:
  for name, theirs, ours in _differing(folder, config, OWN):
    reason = f"made with `{name}` {theirs}; allowed is {ours}, as here"
    raise refusal("parts", folder, reason)


def _differing(
  folder: Path, config: dict[str, Any], own: Sequence[str]
) -> list[tuple[str, Any, Any]]:
  """Lists the options, but `own`, whose values are others in a folder: name, theirs, ours."""
  theirs, ours = metrics.read_config(folder)["config"], files.plain(config)
  compared = [name for name in ours if name not in own]
  return [(n, theirs.get(n), ours[n]) for n in compared if theirs.get(n) != ours[n]]


def _read(folder: Path) -> Part:
  found = metrics.read_summary(folder), metrics.read_accuracies(folder)
  return Part(*found, metrics.read_metrics(folder))


def of_job(job: Job, parts: Sequence[Part]) -> Part | None:
  """Returns what there is of a job, if one of the parts has all its methods."""
  for part in parts:
    if job.variants.keys() <= part.summary.keys() & part.accuracies.keys():
      summary, accuracies = (
        {method: of_all[method] for method in job.variants} for of_all in part[:2]
      )
      return Part(summary, accuracies, [r for r in part.rows if r["method"] in job.variants])
  return None
