"""docs/quickstart.ipynb runs from beginning to end, and its pictures are kept in it.

What it shows is looked at, not the numbers: it trains for fewer rounds here.
"""

import os
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
FEWER = {"rounds=60": "rounds=3", "30, 30)": "3, 3)"}


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
  whole = "".join(cell.source for cell in notebook.cells)
  assert all(rounds in whole for rounds in FEWER)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = []
      for rounds, fewer in FEWER.items():
        cell.source = cell.source.replace(rounds, fewer)
  client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
  client.execute()
  assert kinds(notebook) == shown
  assert sum(outputs.count("picture") for outputs in shown) == 5
