"""What a node keeps of its client from one message to the next: one file, whole or not at all.

It holds the client's own state (x, its codebooks, the optimiser's moments), the upload of its last
round, how many rounds it has had, and of which run they were.
"""

import contextlib
import fcntl
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files, tensor_file
from qupeD_jax.types import PyTree

FORMAT = "qupeD_jax federation client 1"


class Kept(NamedTuple):
  """A client between two messages."""

  rounds: int  # had so far
  own: PyTree  # the client's state, leaves [1, ...]
  upload: PyTree | None  # of the last round, leaves [...]
  scores: dict[str, int] | None = None  # of the finished model, once there is one


def path_of(folder: Path, run: int) -> Path:
  """Returns where a run's files lie: every run has a folder of its own in the node's."""
  return folder / f"run-{run:016x}"


@contextlib.contextmanager
def held(folder: Path):
  """Keeps a second process out of a node's folder.

  Raises:
    BadInput: another process is at work there, on an earlier message.
  """
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("w")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BadInput("still at work on an earlier message") from error
    yield


def save(path: Path, kept: Kept, about: dict) -> None:
  """Writes what is kept, and what it is of.

  Args:
    path: a file; its folder is made.
    kept: the client.
    about: what has to be the same when it is read: the options.

  Raises:
    BadInput: the file cannot be written; what was there before stays.
  """
  tensors = _named("own", kept.own) | _named("upload", kept.upload)
  numbers = {"rounds": kept.rounds, "scores": kept.scores, "uploaded": kept.upload is not None}
  header = {"format": FORMAT, "numbers": json.dumps(numbers), "about": _text(about)}
  tensor_file.save(path, tensors, header)


def load(path: Path, like: Kept, about: dict) -> Kept | None:
  """Reads what was kept, None where there is nothing.

  Args:
    path: as of `save`.
    like: arrays or shapes of what is to be read.
    about: as of `save`.

  Raises:
    BadInput: the file is damaged, or of other options.
  """
  if not path.exists():
    return None
  tensors, header = tensor_file.load(path)
  if header.get("format") != FORMAT:
    raise BadInput(f"{path}: not what a node keeps of its client")
  if header["about"] != _text(about):
    before = files.parse(header["about"].encode(), path)
    differ = (name for name in about if before.get(name) != files.plain(about[name]))
    name = next(differ, "version")
    raise BadInput(f"{name}: is not what it was in the rounds before; a run's options stay")
  numbers = files.parse(header["numbers"].encode(), path)
  upload = _tree("upload", like.upload, tensors, path) if numbers["uploaded"] else None
  own = _tree("own", like.own, tensors, path)
  return Kept(numbers["rounds"], own, upload, numbers["scores"])


def _text(about: dict) -> str:
  return files.dump(about)


def _named(room: str, tree: PyTree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {f"{room}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}


def _tree(room: str, like: PyTree, tensors: dict[str, np.ndarray], path: Path) -> PyTree:
  """Puts tensors where those of a like tree stand."""

  def leaf(keys, like):
    name = f"{room}{jax.tree_util.keystr(keys)}"
    found = tensors.get(name)
    if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
      raise BadInput(f"{path}: {name} is not as it was written")
    return found

  return jax.tree_util.tree_map_with_path(leaf, like)
