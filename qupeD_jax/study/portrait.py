"""One client's tensors and centers over the rounds, for weights.png and centers.png.

They lie on the disk while a study runs, so that one that was stopped draws what it would have drawn
in one go.
"""

import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qupeD_jax.checks import BadInput
from qupeD_jax.engine import parallel
from qupeD_jax.io import files
from qupeD_jax.quantization import ops
from qupeD_jax.results import plots
from qupeD_jax.study.jobs import Job
from qupeD_jax.types import FULL_PRECISION, FedState

FOLDER = "snapshots"  # in the results folder, until the study is done
PICTURES = ("weights.png", "centers.png")

_NOTHING = ".none"  # suffix of a moment without codebooks
_MOMENTS = 5  # at which weights are kept; centers always are


class Snapshot(NamedTuple):
  """What is kept of one moment, by the paths of the tensors."""

  round: int
  weights: dict[str, np.ndarray]  # the largest quantised tensor, [N]; empty between the moments
  centers: dict[str, np.ndarray]  # of every quantised tensor, [m]


class Portrait(NamedTuple):
  """Of whom snapshots are taken: the first seed of one quantised client of a job."""

  method: str
  run: int  # of the job's
  client: int  # its id
  slot: int  # in the first cohort
  rounds: int  # of the job
  folder: Path

  def take(self, state: FedState, done: int) -> None:
    """Keeps what there is to be seen after an evaluation.

    Args:
      state: of all runs, leaves [R, ...].
      done: rounds of the job until now.
    """
    books = getattr(state.clients[0], "codebooks", {})
    with files.writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
    if not books:  # so that one that is missing shows
      return files.write(self.folder / f"{done:09d}{_NOTHING}", "")
    of_client = lambda leaf: parallel.fetch(leaf[self.run, self.slot])
    centers = {path: of_client(book) for path, book in books.items()}
    kept = {f"centers/{path}": book[np.isfinite(book)] for path, book in centers.items()}
    if self._is_moment(done):
      flat = ops.flatten(state.clients[0].variables["params"])
      path = max(books, key=lambda path: flat[path].size)
      kept[f"weights/{path}"] = of_client(flat[path]).ravel()
    with files.whole(self.folder / f"{done:09d}.npz") as file:
      np.savez(file, **kept)
    return None

  def cut_back(self, rounds: int) -> None:
    """Forgets what was taken after so many rounds."""
    for path in _snapshots(self.folder) + _snapshots(self.folder, _NOTHING):
      if int(path.stem) > rounds:
        path.unlink()

  def draw(self, folder: Path, evaluated: Collection[int], say: Callable[[str], None]) -> None:
    """Draws what was kept, if anything, into the results folder.

    Args:
      folder: of the results.
      evaluated: rounds after which a snapshot was taken.
      say: called with one line where snapshots are missing or damaged: there is no picture then.
    """
    taken = _snapshots(self.folder)
    there = {int(path.stem) for path in taken + _snapshots(self.folder, _NOTHING)}
    try:
      if missing := set(evaluated) - there:
        raise BadInput(f"{self.folder}: {len(missing)} of {len(evaluated)} snapshots are missing")
      snapshots = list(map(_read, taken))
    except BadInput as error:
      say(f"{error}; {' and '.join(PICTURES)} are left out")
      return
    if not snapshots:
      return
    who = f"{self.method}, client {self.client}"
    kept = [(s.round, s.weights[path], s.centers[path]) for s in snapshots for path in s.weights]
    ((path, _),) = snapshots[0].weights.items()
    plots.weights(kept, folder / "weights.png", f"{who}: {path}")
    rounds, centers = [s.round for s in snapshots], [s.centers for s in snapshots]
    by_tensor = {path: np.stack([c[path] for c in centers]) for path in centers[0]}
    plots.centers(rounds, by_tensor, folder / "centers.png", who)

  def _is_moment(self, done: int) -> bool:
    """Tells whether weights are to be kept: at the first snapshot, and evenly over the rounds."""
    before = max((int(path.stem) for path in _snapshots(self.folder)), default=None)
    moments = (round(self.rounds * i / (_MOMENTS - 1)) for i in range(_MOMENTS))
    return before is None or any(before < moment <= done for moment in moments)


def of_job(job: Job, folder: Path, method: str | None = None) -> Portrait | None:
  """Chooses who is drawn: the first method, and its first client, that is quantised.

  Args:
    job: that is about to be trained.
    folder: for the snapshots of this job.
    method: the only one that may be drawn; None for any.

  Returns:
    None where there is none.
  """
  rounds = sum(phase.rounds for phase in job.phases)
  for i, (name, variant) in enumerate(job.variants.items()):
    if method in (None, name):
      for slot, client in enumerate(job.federation.groups[0]):
        if variant.bits[client] != FULL_PRECISION:
          return Portrait(name, i * job.options.run.seeds, int(client), slot, rounds, folder)
  return None


def _snapshots(folder: Path, suffix: str = ".npz") -> list[Path]:
  """Returns the files of a portrait, in order; others may lie beside them."""
  return sorted(path for path in folder.glob(f"*{suffix}") if path.stem.isdecimal())


def _read(path: Path) -> Snapshot:
  weights, centers = {}, {}
  try:
    with np.load(path) as kept:
      for name in kept.files:
        kind, _, tensor = name.partition("/")
        (weights if kind == "weights" else centers)[tensor] = kept[name]
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise BadInput(f"{path}: damaged") from error
  return Snapshot(int(path.stem), weights, centers)
