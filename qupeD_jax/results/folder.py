"""Reads a results folder, or one that holds several: all that is known of a study."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qupeD_jax.checks import BadInput
from qupeD_jax.command_line import nearest
from qupeD_jax.io import files
from qupeD_jax.results import metrics

# Tables for people, beside those that are made anew from JSON.
TABLES = ("groups.md", "tuning.md")


class Results(NamedTuple):
  """All that a folder tells; empty or None for a file that is not there."""

  name: str  # of the experiment
  folder: str  # without what it lies in
  options: dict[str, Any]
  environment: dict[str, Any]
  date: str | None
  methods: list[str]  # that were to be trained
  finished: bool
  summary: dict[str, dict[str, Any]]
  rows: list[dict[str, Any]] | None  # of metrics.jsonl
  accuracies: dict[str, dict[str, Any]] | None
  comparisons: tuple[dict[str, dict], float] | None
  tables: dict[str, list[list[str]]]  # file name -> cells, the head first
  pictures: dict[str, bytes]  # file name -> PNG


def read(folder: Path) -> list[Results]:
  """Reads the results of a folder: its own, and those of the folders in it.

  Args:
    folder: with a config.json, or with folders that have one, such as the topics of an experiment.

  Returns:
    Its own, if there are any, then those in it in the order of their names.

  Raises:
    BadInput: there is no such folder, it holds no results, or a file is missing or damaged.
  """
  if not folder.is_dir():
    raise BadInput(f"{folder}: no such results folder{nearest(folder.name, _neighbours(folder))}")
  with files.on_disk(folder):
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
  found = [path for path in (folder, *inside) if _holds_results(path)]
  if not found:
    raise BadInput(f"{folder}: holds no results: no {metrics.CONFIG}, nor a folder with one")
  return [_read(path) for path in found]


def _holds_results(folder: Path) -> bool:
  return any((folder / name).exists() for name in (metrics.CONFIG, metrics.SUMMARY, *TABLES))


def _read(folder: Path) -> Results:
  found = {name: _cells(folder / name) for name in TABLES if (folder / name).exists()}
  known = (folder / metrics.CONFIG).exists() or (folder / metrics.SUMMARY).exists()
  written = metrics.read_config(folder) if known else {"config": {}, "environment": {}}
  summary = _if_there(metrics.read_summary, folder, metrics.SUMMARY)
  begun_only = summary is None and not found
  return Results(
    name=str(written["config"].get("experiment") or folder.resolve().name),
    folder=folder.resolve().name,
    options=written["config"],
    environment=written["environment"],
    date=written.get("date"),
    methods=written.get("methods", []),
    finished=not begun_only and not (folder / metrics.UNFINISHED).exists(),
    summary=summary or {},
    rows=_if_there(metrics.read_metrics, folder, metrics.METRICS),
    accuracies=_if_there(metrics.read_accuracies, folder, metrics.ACCURACIES),
    comparisons=_if_there(metrics.read_comparisons, folder, metrics.COMPARISON),
    tables=found,
    pictures=_pictures(folder),
  )


def _if_there(read: Callable, folder: Path, name: str) -> Any:
  return read(folder) if (folder / name).exists() else None


def _neighbours(folder: Path) -> list[str]:
  """Lists what lies beside a folder, and with the experiments' own results of that name."""
  beside = (folder.parent, Path("experiments") / folder.parent)
  return sorted({path.name for parent in beside for path in parent.glob("*") if path.is_dir()})


def _pictures(folder: Path) -> dict[str, bytes]:
  with files.on_disk(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def _cells(path: Path) -> list[list[str]]:
  """Reads the cells of a Markdown table, without its rule."""
  with files.on_disk(path):
    lines = path.read_text("utf-8", errors="replace").splitlines()
  rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines if line.startswith("|")]
  cells = [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]
  return [row for row in cells if not all(re.fullmatch(":?-+:?", cell) for cell in row)]
