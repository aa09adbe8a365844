"""Saves of what a run needs to go on, by orbax: each is there whole or not at all."""

from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from qupeD_jax.types import PyTree


class Latest(NamedTuple):
  """The newest save of a folder."""

  number: int
  progress: dict[str, Any]  # JSON-like, what was saved beside the state


def save(folder: Path, number: int, state: PyTree, progress: dict[str, Any], keep: int = 2) -> None:
  """Saves a state; the newest `keep` saves of the folder stay.

  Args:
    folder: of the saves of one run; made if need be.
    number: of the save, larger than those before.
    state: arrays, on a device or not.
    progress: what is to be known before the state is read; JSON-like.
    keep: how many saves to keep.
  """
  with _manager(folder, keep) as manager:
    items = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
    manager.save(number, args=ocp.args.Composite(**items))


def latest(folder: Path) -> Latest | None:
  """Returns what the newest save says about itself; None where there is none."""
  if not folder.is_dir():
    return None
  with _manager(folder) as manager:
    number = manager.latest_step()
    if number is None:
      return None
    items = ocp.args.Composite(progress=ocp.args.JsonRestore())
    return Latest(number, manager.restore(number, args=items).progress)


def restore(folder: Path, number: int, like: PyTree) -> PyTree:
  """Reads the state of a save.

  Args:
    folder, number: of the save.
    like: the state's structure, with shapes and dtypes for leaves, as of `jax.eval_shape`.
  """
  with _manager(folder) as manager:
    items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    return manager.restore(number, args=items).state


def _manager(folder: Path, keep: int | None = None) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
  return ocp.CheckpointManager(folder.absolute(), options=options)
