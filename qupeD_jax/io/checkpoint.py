"""Saves of what a run needs to go on, by orbax: each is there whole or not at all.

Beside the state lies a checksum of it: what a disk has changed is not always seen by itself.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files
from qupeD_jax.types import PyTree


class Save(NamedTuple):
  """What was saved."""

  state: PyTree  # numpy arrays
  progress: dict[str, Any]  # JSON-like, what is to be known before the state is read


def save(folder: Path, save: Save, keep: int = 2) -> None:
  """Saves a state; the newest `keep` saves of the folder stay.

  Raises:
    BadInput: the disk refuses; the saves from before stay.
  """
  about = {"progress": files.plain(save.progress), "checksum": _checksum(save)}
  items = {"state": ocp.args.StandardSave(save.state), "about": ocp.args.JsonSave(about)}
  number = next((int(path.name) + 1 for path in newest_first(folder)), 0)
  with files.writing(folder / str(number)):
    try:
      with _quiet(), _manager(folder, keep) as manager:
        manager.save(number, args=ocp.args.Composite(**items))
    except (ValueError, RuntimeError) as error:  # what orbax stands on has errors of its own
      raise OSError(None, _reason(error)) from error


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
  for path in newest_first(folder):
    try:
      return _read(path, like)
    except BadInput as error:
      aside = path.with_name(path.name + ".damaged")
      shutil.rmtree(aside, ignore_errors=True)
      path.rename(aside)
      warn(f"{error}; the save before it is taken, or the job begins anew")
  return None


def newest_first(folder: Path) -> Iterator[Path]:
  """Yields the saves of a folder."""
  saves = (path for path in folder.glob("*") if path.name.isdecimal())
  yield from sorted(saves, key=lambda path: -int(path.name))


def _read(path: Path, like: Callable[[dict[str, Any]], PyTree]) -> Save:
  try:
    with _quiet(), _manager(path.parent) as manager:
      read = lambda **items: manager.restore(int(path.name), args=ocp.args.Composite(**items))
      about = read(about=ocp.args.JsonRestore()).about
      on_host = lambda leaf: np.empty(leaf.shape, leaf.dtype)
      shapes = jax.tree.map(on_host, like(about["progress"]))
      found = Save(read(state=ocp.args.StandardRestore(shapes)).state, about["progress"])
      whole = about["checksum"] == _checksum(found)
  except BadInput:
    raise
  except Exception as error:  # whatever comes of a file that is not what was written
    raise BadInput(f"{path}: damaged ({_reason(error)})") from error
  if not whole:
    raise BadInput(f"{path}: damaged (its checksum is another)")
  return found


def _checksum(save: Save) -> int:
  """Sums up all bits of a save."""
  total = zlib.crc32(files.dump(save.progress).encode())
  for leaf in jax.tree.leaves(save.state):
    total = zlib.crc32(np.ascontiguousarray(leaf), total)
  return total


def _reason(error: Exception) -> str:
  """Returns the heart of what an error says: why the disk refused, or else how the text begins."""
  refusals = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO))
  found = [refusal for refusal in refusals if refusal in str(error)]
  lines = found or str(error).strip().splitlines() or [type(error).__name__]
  return re.split(r"\. |: <|\[", lines[0])[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps orbax from logging, with its own stack, what is said in one line here."""
  log = logging.getLogger("absl")
  level = log.level
  log.setLevel(logging.CRITICAL + 1)
  try:
    yield
  finally:
    log.setLevel(level)


def _manager(folder: Path, keep: int | None = None) -> ocp.CheckpointManager:
  # Every process of a run has the whole state, and saves it for itself.
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process {own}"
  )
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    cleanup_tmp_directories=True,
    enable_async_checkpointing=False,
    multiprocessing_options=alone,
    create=False,
  )
  folder.mkdir(parents=True, exist_ok=True)
  return ocp.CheckpointManager(folder.absolute(), options=options)
