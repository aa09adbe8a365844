"""What the server keeps between two starts: w, the rounds done and the number of the run."""

import secrets
from pathlib import Path
from typing import NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files, tensor_file
from qupeD_jax.types import PyTree

FORMAT = "qupeD_jax federation server 1"
NAME = "checkpoint.safetensors"


class Checkpoint(NamedTuple):
  """A run between two rounds."""

  run: int  # its number, which nodes keep their clients by
  rounds: int  # done
  variables: PyTree | None  # w, numpy arrays; None in a method without a server


def begin(variables: PyTree | None) -> Checkpoint:
  """Begins a run, under a number that no other has."""
  return Checkpoint(secrets.randbits(61), 0, variables)


def save(folder: Path, checkpoint: Checkpoint, about: dict) -> None:
  """Writes a checkpoint, all of it or nothing.

  Args:
    folder: the server's, made where it is missing.
    checkpoint: what to write.
    about: the options that must not change while the run lasts.

  Raises:
    BadInput: it cannot be written; what was there before stays.
  """
  numbers = {"run": checkpoint.run, "rounds": checkpoint.rounds}
  header = {"format": FORMAT, "numbers": files.dump(numbers), "about": files.dump(about)}
  tensor_file.save(folder / NAME, flatten_dict(checkpoint.variables or {}, sep="/"), header)


def load(folder: Path, about: dict) -> Checkpoint | None:
  """Reads the checkpoint in a folder, None where there is none.

  Raises:
    BadInput: it is damaged, or of other options.
  """
  path = folder / NAME
  if not path.exists():
    return None
  tensors, header = tensor_file.load(path)
  if header.get("format") != FORMAT:
    raise BadInput(f"{path}: not a checkpoint of a federation")
  before, now = files.parse(header["about"].encode(), path), files.plain(about)
  for name in now:
    if before.get(name) != now[name]:
      reason = f"was {before.get(name)} when the run in {folder} began; fresh=true begins anew"
      raise BadInput(f"{name} {now[name]}: {reason}", name)
  numbers = files.parse(header["numbers"].encode(), path)
  variables = {"params": {}, "stats": {}} | unflatten_dict(tensors, sep="/") if tensors else None
  return Checkpoint(numbers["run"], numbers["rounds"], variables)
