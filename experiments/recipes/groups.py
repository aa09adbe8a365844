"""What each group of clients gains, where clients differ in their resources."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qupeD_jax.io import files
from qupeD_jax.results import metrics, statistics, tables

FILE = "groups.md"
MEMBERS = "groups.json"  # who is in them, and who they are compared with


def write(folder: Path, groups: Mapping[str, np.ndarray], baselines: Sequence[str]) -> None:
  """Writes groups.md, for each group the accuracy of every method and its gain over baselines.

  groups.json has the groups and the baselines, so that the table can be made anew.

  Args:
    folder: the results folder, with accuracies.json.
    groups: name -> client ids.
    baselines: methods that the others are compared with, client by client.
  """
  members = {"groups": groups, "baselines": [*baselines]}
  files.write(folder / MEMBERS, files.dump(members))
  scores = {name: entry["accuracy"] for name, entry in metrics.read_accuracies(folder).items()}
  header = ("Group", "Method", "Accuracy (%)", *(f"Gain over {name}" for name in baselines))
  rows = [
    (group, method, _percent(scores[method][:, ids]), *_gains(scores, method, ids, baselines))
    for group, ids in groups.items()
    for method in scores
  ]
  files.write(folder / FILE, tables.markdown([header, *rows], texts=2))


def rewrite(folder: Path) -> None:
  """Writes groups.md anew from groups.json and accuracies.json."""
  written = files.read(folder / MEMBERS)
  groups = {name: np.array(ids, int) for name, ids in written["groups"].items()}
  write(folder, groups, written["baselines"])


def _percent(accuracy: np.ndarray) -> str:
  return f"{100 * np.nanmean(accuracy):.1f}"


def _gains(scores, method: str, ids: np.ndarray, baselines: Sequence[str]) -> list[str]:
  ours = scores[method][:, ids]
  return ["" if name == method else _gain(ours, scores[name][:, ids]) for name in baselines]


def _gain(ours: np.ndarray, theirs: np.ndarray) -> str:
  found = statistics.paired_difference(ours, theirs)
  return f"{tables.points(found.difference)} {tables.spread(found)}"
