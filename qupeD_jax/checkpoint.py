"""Saves of what a run needs to go on: each is there whole or not at all, and carries a checksum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qupeD_jax import files, tensor_file
from qupeD_jax.checks import BadInput
from qupeD_jax.types import PyTree


class Save(NamedTuple):
  """What was saved."""

  state: PyTree
  progress: dict[str, Any]  # JSON-like, what is to be known before the state is read


def save(folder: Path, save: Save, keep: int = 2) -> None:
  """Saves a state, of arrays on a device or not; the newest `keep` saves of the folder stay.

  Raises:
    BadInput: the disk refuses; the saves from before stay.
  """
  before = _newest_first(folder)
  number = int(before[0].stem) + 1 if before else 0
  leaves = jax.device_get(jax.tree.leaves(save.state))
  tensors = {str(i): np.asarray(leaf, order="C") for i, leaf in enumerate(leaves)}
  header = {"progress": files.dump(save.progress)}
  tensor_file.save(folder / f"{number:06d}.safetensors", tensors, header)
  for path in before[keep - 1 :]:
    path.unlink()


def restore(
  folder: Path, like: Callable[[dict[str, Any]], PyTree], warn: Callable[[str], None]
) -> Save | None:
  """Reads the newest save that can be read; one that cannot is put aside.

  Args:
    folder: of the saves of one run.
    like: progress -> the state's structure, with shapes and dtypes for leaves, as of
      `jax.eval_shape`.
    warn: called with one line for every save that is put aside.

  Returns:
    None where there is none.
  """
  for path in _newest_first(folder):
    try:
      return _read(path, like)
    except BadInput as error:
      path.rename(path.with_name(path.name + ".damaged"))
      warn(f"{error}; the save before it is taken, or the job begins anew")
  return None


def _newest_first(folder: Path) -> list[Path]:
  return sorted(folder.glob("*.safetensors"), reverse=True)


def _read(path: Path, like: Callable[[dict[str, Any]], PyTree]) -> Save:
  tensors, header = tensor_file.load(path)
  progress = json.loads(header["progress"])
  shapes, structure = jax.tree.flatten(like(progress))
  leaves = [tensors.get(str(i)) for i in range(len(tensors))]
  form = lambda leaf: (leaf.shape, leaf.dtype)
  if list(map(form, leaves)) != list(map(form, shapes)):
    raise BadInput(f"{path}: holds another state than this program's")
  return Save(jax.tree.unflatten(structure, leaves), progress)
