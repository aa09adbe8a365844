"""What each group of clients gains, where clients differ in their resources."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qupeD_jax.io import files
from qupeD_jax.results import metrics, statistics, tables

FILE = "groups.md"


def write(folder: Path, groups: Mapping[str, np.ndarray], baselines: Sequence[str]) -> None:
  """Writes groups.md: for each group the accuracy of every method, and its gain over baselines.

  Args:
    folder: the results folder, with accuracies.json.
    groups: name -> client ids.
    baselines: methods that the others are compared with, client by client.
  """
  scores = {name: entry["accuracy"] for name, entry in metrics.read_accuracies(folder).items()}
  header = ("Group", "Method", "Accuracy (%)", *(f"Gain over {name}" for name in baselines))
  rows = [
    (group, method, _percent(scores[method][:, ids]), *_gains(scores, method, ids, baselines))
    for group, ids in groups.items()
    for method in scores
  ]
  files.write(folder / FILE, tables.markdown([header, *rows], texts=2))


def _percent(accuracy: np.ndarray) -> str:
  return f"{100 * np.nanmean(accuracy):.1f}"


def _gains(scores, method: str, ids: np.ndarray, baselines: Sequence[str]) -> list[str]:
  ours = scores[method][:, ids]
  return ["" if name == method else _gain(ours, scores[name][:, ids]) for name in baselines]


def _gain(ours: np.ndarray, theirs: np.ndarray) -> str:
  found = statistics.paired_difference(ours, theirs)
  points = (100 * value for value in (found.difference, found.low, found.high))
  return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
