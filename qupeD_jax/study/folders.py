"""The results folder of a run: whose it is, what it holds from before, what a new run removes."""

import collections
import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qupeD_jax.checks import BadInput
from qupeD_jax.io import checkpoint, files
from qupeD_jax.results import metrics, tensorboard
from qupeD_jax.study import parts, portrait, training
from qupeD_jax.study.durability import resume
from qupeD_jax.study.errors import Incomplete
from qupeD_jax.study.jobs import Job, job_name
from qupeD_jax.study.options import Federated

OTHERS = ("summary.json", "table.md", "accuracies.json", "comparison.json", "comparison.md")
OTHERS += ("report.html", "table.tex", "costs.tex", "tuning.json", "tuning.md", "groups.md")
CHECKPOINTS = metrics.UNFINISHED
PICTURES = ("clients.png", "curves.png", "stationarity.png", *portrait.PICTURES)

_LOCK = ".lock"
_MODELS = "models"
_OF_CLIENTS = f"{_MODELS}/*/client_*.safetensors"
_OWN = (_LOCK, metrics.CONFIG, metrics.METRICS, *OTHERS, *PICTURES)
_OWN += (_MODELS, portrait.FOLDER, CHECKPOINTS, tensorboard.FOLDER)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
  """Holds a folder, made if need be, for one process; whoever holds it lets go when it dies.

  Raises:
    BadInput: another process holds it, it cannot be made, or links lead out of it.
  """
  path = folder / _LOCK
  with files.on_disk(folder):
    files.require_no_link(folder, _OWN)
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Whoever held it may have removed the file since it was opened here.
      alone = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
      alone = False
    except OSError:  # a file system without locks
      alone = True
    if not alone:
      raise BadInput(f"{folder}: another run is at work there; --out names another folder")
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


def begin(
  folder: Path,
  config: dict[str, Any],
  methods: Sequence[str],
  recorded: Callable[[Path], Collection[str]],
  *,
  fresh: bool,
  say: Callable[[str], None],
) -> bool:
  """Opens a folder that is held: goes on with the run that it has, or begins anew.

  A finished run with other options is replaced; one that is not finished is not.

  Args:
    folder: of the results.
    config: the experiment's name and options.
    methods: all that are to be trained.
    recorded: folder -> the methods that a run had finished there.
    fresh: begin anew in any case.
    say: called with one line if there is something to be said.

  Returns:
    Whether there is anything left to do.

  Raises:
    BadInput: an unfinished run with other options is there, or the folder cannot be written.
  """
  before = None if fresh else _before(folder, config, methods, recorded, say)
  if before is None:
    # The options last: what an older run left must at no moment pass for this one's.
    remove_results(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    metrics.open_results(folder, config, methods)
  elif not _unfinished(folder) and set(before) >= set(methods):
    say(f"{folder}: finished already, with the same options; --fresh runs it anew")
    return False
  else:
    metrics.open_results(folder, config, methods, resume=True)
    metrics.keep_rows(folder, lambda row: row["method"] in methods)
    say(f"{folder}: goes on with the run that was cut off there")
  with files.writing(folder):
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
  return True


def models(folder: Path) -> set[str]:
  """Lists the clients' models in a folder, by their paths in it."""
  return {str(path.relative_to(folder)) for path in folder.glob(_OF_CLIENTS)}


def require_whole(folder: Path, expected: Mapping[str, int], names: Iterable[str]) -> None:
  """Raises Incomplete if anything of a run's results has gone while it was at work.

  Args:
    folder: of the results.
    expected: how many rows of metrics.jsonl each method has.
    names: of files in the folder, beside its options and rows.
  """
  names = (metrics.CONFIG, metrics.METRICS, *sorted(names))
  missing = [name for name in names if not (folder / name).is_file()]
  rows = [] if metrics.METRICS in missing else metrics.read_metrics(folder)
  lacking = parts.lacking(rows, expected).items()
  missing += [f"{count} of {expected[method]} rows of {method}" for method, count in lacking]
  if missing:
    more = f" and {len(missing) - 9} more" if len(missing) > 9 else ""
    raise Incomplete(
      f"{folder}: missing at the end are {', '.join(missing[:9])}{more}; --fresh begins anew"
    )


def end(folder: Path) -> None:
  """Removes what only an unfinished run needs; what says that it is unfinished goes last."""
  shutil.rmtree(folder / portrait.FOLDER, ignore_errors=True)
  shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def saves(options: Federated, asked: Callable, say: Callable) -> resume.Saves:
  """Returns when the jobs of an experiment are saved; `of_job` says where."""
  pace = resume.Pace(options.run.checkpoint_every)
  return resume.Saves(
    pace=pace, deadline=resume.deadline(options.run.minutes), asked=asked, warn=say
  )


def of_job(
  when: resume.Saves, job: Job, folder: Path, sitter: portrait.Portrait | None = None
) -> resume.Saves:
  """Adds where a job is saved, and what of the results folder belongs to its saves."""

  def written():
    rows = (row for row in metrics.read_metrics(folder) if row["method"] in job.variants)
    counts = collections.Counter((row["method"], row["seed"]) for row in rows)
    return min(counts[run] for run in training.methods_of_runs(job))

  def cut_back(rounds):
    later = lambda row: row["method"] in job.variants and row["round"] > rounds
    metrics.keep_rows(folder, lambda row: not later(row))
    if sitter:
      sitter.cut_back(rounds)

  # More clients than the device holds are more than can be saved every few minutes.
  resident = job.options.hardware.store == "device"
  own = folder / CHECKPOINTS / files.name_of(job_name(job)) if resident else None
  return when._replace(folder=own, written=written, cut_back=cut_back)


def remove_results(folder: Path) -> None:
  """Removes what an earlier run left, and nothing else: it must not pass for this run's."""
  of_jobs = (_OF_CLIENTS, f"{portrait.FOLDER}/*/*.npz")
  for pattern in (*OTHERS, *PICTURES, *of_jobs, *tensorboard.EVENTS):
    for path in filter(Path.is_file, folder.glob(pattern)):
      path.unlink()


def _before(
  folder: Path,
  config: dict[str, Any],
  methods: Sequence[str],
  recorded: Callable[[Path], Collection[str]],
  say: Callable[[str], None],
) -> Collection[str] | None:
  """Returns what a run with the same options had finished; None where nothing is to be kept."""
  saved = any(any(checkpoint.newest_first(of_job)) for of_job in (folder / CHECKPOINTS).glob("*"))
  try:
    kept = recorded(folder)
    if not kept and not saved:
      return None
    differs = parts.differences(folder, config)
  except BadInput as error:
    if _unfinished(folder):
      raise BadInput(f"{error}; --fresh begins anew") from error
    return None
  if foreign := sorted(set(kept) - set(methods)):
    differs.append(f"methods that are not trained here, {', '.join(foreign)}")
  if not differs:
    return kept
  if _unfinished(folder):
    raise BadInput(
      f"{folder}: holds an unfinished run with {'; '.join(differs)}; the same options go on from "
      "there, --fresh begins anew"
    )
  say(f"{folder}: replaces a finished run with {'; '.join(differs)}")
  return None


def _unfinished(folder: Path) -> bool:
  return (folder / CHECKPOINTS).is_dir()
