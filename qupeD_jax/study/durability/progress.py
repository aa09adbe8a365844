"""The progress bar of an experiment."""

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


class Bar:
  """Shows method, rounds done, loss, accuracy and time left."""

  def __init__(self, total: int, console: Console):
    names = Column(max_width=24, no_wrap=True, overflow="ellipsis")
    self._progress = Progress(
      # Of a long list of methods its beginning is enough: 80 columns have to hold the numbers.
      TextColumn("{task.description}", markup=False, table_column=names),
      BarColumn(bar_width=10),
      MofNCompleteColumn(),
      TextColumn("{task.fields[numbers]}"),
      TimeRemainingColumn(),
      console=console,
    )
    self._task = self._progress.add_task("", total=total, numbers="")

  def __enter__(self):
    self._progress.__enter__()
    return self

  def __exit__(self, *error):
    return self._progress.__exit__(*error)

  def start(self, methods: str) -> None:
    """Says whose program is being compiled."""
    self._progress.update(self._task, description=methods, numbers="compiling")

  def advance(self, rounds: int, rows: list[dict]) -> None:
    """Counts the rounds of a chunk and shows its last numbers, means over methods and seeds."""
    self._progress.update(self._task, advance=rounds)
    evaluated = [row for row in rows if row["accuracy"] is not None]
    if evaluated:
      losses = [row["loss"] for row in evaluated if np.isfinite(row["loss"])]
      loss = f"{np.mean(losses):.3f}" if losses else "-"  # nobody took part in that round
      accuracy = np.mean([row["accuracy"] for row in evaluated])
      self._progress.update(self._task, numbers=f"loss {loss}  accuracy {100 * accuracy:.1f} %")
