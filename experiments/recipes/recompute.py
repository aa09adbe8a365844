"""Makes the tables of finished runs anew from their accuracies, without training.

python -m experiments.recipes.recompute FOLDER...

FOLDER is a results folder, or holds some.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.recipes import groups
from qupeD_jax.checks import BadInput
from qupeD_jax.io import files
from qupeD_jax.results import metrics


def recompute(folder: Path) -> None:
  """Makes table.md, comparison.json, comparison.md and groups.md anew, those that are there.

  Args:
    folder: of the results; who is compared with whom stays as it was.

  Raises:
    BadInput: a file is missing, damaged or cannot be written.
  """
  summary = metrics.read_summary(folder)
  for entry in summary.values():
    entry["accuracy"]["std"] = metrics.std_over_seeds(entry["accuracy"]["per_seed"])
  metrics.write_summary(folder, summary)
  if (folder / metrics.COMPARISON).exists():
    written = files.read(folder / metrics.COMPARISON)
    pairs = {ours: [*rivals] for ours, rivals in written["comparisons"].items()}
    metrics.write_comparisons(folder, pairs, level=written["level"])
  if (folder / groups.MEMBERS).exists():
    groups.rewrite(folder)


def main(arguments: Sequence[str]) -> int:
  """Recomputes all results folders that are named, or lie in those that are."""
  try:
    for folder in arguments:
      for summary in sorted(Path(folder).rglob(metrics.SUMMARY)):
        recompute(summary.parent)
  except BadInput as error:
    print("error:", error, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
