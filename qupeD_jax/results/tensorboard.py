"""Training as TensorBoard events, beside metrics.jsonl.

  tensorboard/METHOD/seed_0/   what metrics.jsonl tells of a run, and histograms of its weights
  tensorboard/                 the pictures of the results folder

A run that is cut off and goes on tells TensorBoard to forget what it had not saved.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.image
import numpy as np

from qupeD_jax import checks
from qupeD_jax.io import files

FOLDER = "tensorboard"
EVENTS = (f"{FOLDER}/events.out.*", f"{FOLDER}/*/*/events.out.*")

_NAMES = ("method", "seed", "round")  # of a row of metrics.jsonl: whose it is


class Weights(NamedTuple):
  """The tensors of one model of a run."""

  method: str
  seed: int
  tensors: Mapping[str, Any]  # by path


class Board(NamedTuple):
  """Where events go."""

  rows: Callable[[Sequence[Mapping[str, Any]]], None]  # rows of metrics.jsonl
  # Rounds done, and a function that returns the weights: nobody fetches them for nothing.
  weights: Callable[[int, Callable[[], Iterable[Weights]]], None]
  pictures: Callable[[], None]  # those of the results folder


NOBODY = Board(lambda rows: None, lambda done, weights: None, lambda: None)


@contextlib.contextmanager
def opened(folder: Path, wanted: bool) -> Iterator[Board]:
  """Opens the events of a results folder.

  Args:
    folder: the results folder.
    wanted: whether anything is to be written.

  Raises:
    BadInput: nothing can be written.
  """
  if not wanted:
    yield NOBODY
    return
  with contextlib.ExitStack() as stack:
    writers, last = {}, {}

    def writer(name, step):
      if name not in writers or step < last[name]:
        tensorboardx = importlib.import_module("tensorboardX")
        path = folder / FOLDER / name
        with files.writing(path):
          writers[name] = tensorboardx.SummaryWriter(str(path), purge_step=step)
        stack.callback(writers[name].close)
      last[name] = step
      return writers[name]

    def of_run(method, seed, step):
      return writer(f"{files.name_of(method)}/seed_{seed}", step)

    def rows(rows):
      for row in rows:
        for name in row.keys() - {*_NAMES}:
          if row[name] is not None:
            of_run(*(row[of] for of in _NAMES)).add_scalar(name, row[name], row["round"])

    def weights(done, weights):
      for method, seed, tensors in weights():
        for path, tensor in tensors.items():
          if np.all(np.isfinite(tensor)):
            of_run(method, seed, done).add_histogram(path, np.ravel(tensor), done)

    def pictures():
      for path in sorted(folder.glob("*.png")):
        image = matplotlib.image.imread(path)[..., :3]
        writer("", 0).add_image(path.stem, image, 0, dataformats="HWC")

    yield Board(rows, weights, pictures)


def require_installed() -> None:
  """Raises BadInput unless events can be written."""
  if importlib.util.find_spec("tensorboardX") is None:
    reason = "needs tensorboardX: pip install tensorboardX, or this package with [tracking]"
    raise checks.refusal("tensorboard", True, reason)
