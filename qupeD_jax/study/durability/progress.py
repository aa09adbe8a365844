"""How far an experiment is: a bar on a terminal, elsewhere one line for each evaluation."""

import datetime

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_LONG = 3600.0  # seconds of the past that the time left is estimated from


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
      speed_estimate_period=_LONG,
      disable=not console.is_terminal,
    )
    self._console, self._before, self._methods = console, 0, ""
    self._task = self._progress.add_task("", total=total, numbers="")

  def __enter__(self):
    self._progress.__enter__()
    return self

  def __exit__(self, *error):
    return self._progress.__exit__(*error)

  def start(self, methods: str, before: int) -> None:
    """Says whose program is being compiled, after so many rounds of other jobs."""
    self._methods, self._before = methods, before
    self._progress.update(self._task, description=methods, numbers="compiling")

  def advance(self, rounds: int, rows: list[dict], done: int) -> None:
    """Counts the rounds of a chunk and shows its last numbers, means over methods and seeds.

    Args:
      rounds: of the chunk.
      rows: of metrics.jsonl.
      done: rounds of the job until now, those of an earlier start among them.
    """
    (task,) = self._progress.tasks
    count = self._before + done
    if task.completed != count - rounds:  # done by an earlier start: it says nothing of the speed
      self._progress.reset(task.id, completed=count - rounds, numbers=task.fields["numbers"])
    self._progress.update(self._task, completed=count)
    evaluated = [row for row in rows if row["accuracy"] is not None]
    if evaluated:
      losses = [row["loss"] for row in evaluated if np.isfinite(row["loss"])]
      loss = f"{np.mean(losses):.3f}" if losses else "-"  # nobody took part in that round
      accuracy = np.mean([row["accuracy"] for row in evaluated])
      numbers = f"loss {loss}  accuracy {100 * accuracy:.1f} %"
      self._progress.update(self._task, numbers=numbers)
      if self._progress.disable:
        self._print(f"{self._methods}: round {done}, {numbers.replace('  ', ', ')}")

  def _print(self, text: str) -> None:
    (task,) = self._progress.tasks
    left = task.time_remaining
    known = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
    line = f"{text}; {task.completed:g} of {task.total:g}{known}"
    self._console.print(line, soft_wrap=True, highlight=False, markup=False)
