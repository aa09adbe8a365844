"""Results that come with the repository: their tables are those of their own accuracies."""

import re
import shutil
from pathlib import Path

import pytest

from experiments.recipes import recompute
from qupeD_jax.results import metrics

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.rglob(metrics.SUMMARY))
MADE = ("comparison.json", "comparison.md", "groups.json", "groups.md", "summary.json", "table.md")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_tables_are_made_of_the_accuracies_beside_them(folder, tmp_path):
  copy = Path(shutil.copytree(folder, tmp_path / "copy"))
  for name in MADE:
    if name.endswith(".md") and (copy / name).exists():
      (copy / name).write_text("")
  assert recompute.main([str(copy)]) == 0
  there = [name for name in MADE if (folder / name).exists()]
  assert {name: (copy / name).read_text("utf-8") for name in there} == {
    name: (folder / name).read_text("utf-8") for name in there
  }


def test_documents_tell_differences_that_were_found():
  """Rows of README and docs with a verdict are rows of a comparison."""
  found = {line for path in RESULTS.rglob("comparison.md") for line in cells(path.read_text())}
  for document in ("README.md", "docs/reproduction.md"):
    told = cells((ROOT / document).read_text("utf-8"))
    assert set(told) <= found
  assert len(told) > 100


def cells(text):
  """Returns the cells of the rows that tell a difference, its interval and a verdict."""
  rows = (tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines())
  return [row for row in rows if len(row) == 4 and re.fullmatch("win|loss|-", row[3])]
