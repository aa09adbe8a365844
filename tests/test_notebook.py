"""docs/quickstart.ipynb runs from beginning to end, and its pictures are kept in it."""

import os
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


def kinds(notebook) -> list[list[str]]:
  """What each program of a notebook shows: texts and pictures."""
  programs = [cell for cell in notebook.cells if cell.cell_type == "code"]
  return [[kind(output) for output in cell.outputs] for cell in programs]


def kind(output) -> str:
  return "picture" if "image/png" in output.get("data", {}) else output.output_type


def test_it_runs_and_shows_what_is_kept_in_it(monkeypatch):
  monkeypatch.setitem(os.environ, "PYTHONPATH", str(NOTEBOOK.parents[1]))
  kept = nbformat.read(NOTEBOOK, as_version=4)
  notebook = nbformat.from_dict(kept)
  shown = kinds(kept)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = []
  client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
  client.execute()
  assert kinds(notebook) == shown
  assert sum(outputs.count("picture") for outputs in shown) == 5
