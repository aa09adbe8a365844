"""What travels: variables as named arrays, and whole numbers; nothing else, and nothing pickled.

A message to a node holds "counts", with the number of the run and of the round, and "w", the
server's variables, where the method has any. A reply holds "counts" and, of a round, "w" as the
client has trained it.
"""

import numbers
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from qupeD_jax.checks import BadInput
from qupeD_jax.types import PyTree

VARIABLES, COUNTS = "w", "counts"
TRAIN, FINISH = "train", "evaluate"  # Flower's types of a message: a round, and the end
_MOST = 2**62


class Content(NamedTuple):
  """A message, read and checked."""

  counts: dict[str, int]
  variables: PyTree | None  # numpy arrays


def write(counts: Mapping[str, int], variables: PyTree | None = None) -> RecordDict:
  """Makes a message's content.

  Args:
    counts: whole numbers by name.
    variables: {"params": ..., "stats": ...}, leaves of any shape; None sends none.
  """
  records = {COUNTS: MetricRecord({name: int(value) for name, value in counts.items()})}
  if variables is not None:
    arrays = {path: Array(np.asarray(leaf)) for path, leaf in _named(variables).items()}
    records[VARIABLES] = ArrayRecord(arrays)
  return RecordDict(records)


def read(content: RecordDict, names: tuple[str, ...], like: PyTree | None = None) -> Content:
  """Reads a message's content.

  Args:
    content: as it came.
    names: of the counts that have to be in it.
    like: the variables that have to be in it, arrays or their shapes; None where there are none.

  Raises:
    BadInput: something is missing, foreign, of another shape or type, or cannot be read.
  """
  due = {COUNTS} if like is None else {COUNTS, VARIABLES}
  if set(content) != due:
    raise BadInput(f"records {', '.join(content) or 'none'}: allowed is {', '.join(sorted(due))}")
  return Content(_counts(content, names), None if like is None else _variables(content, like))


def _counts(content: RecordDict, names: tuple[str, ...]) -> dict[str, int]:
  found = content.metric_records.get(COUNTS, {})
  if set(found) != set(names):
    raise BadInput(f"counts {', '.join(found) or 'none'}: allowed is {', '.join(names)}")
  for name, value in found.items():
    if not isinstance(value, numbers.Integral) or not 0 <= value < _MOST:
      raise BadInput(f"{name} {value}: allowed is a whole number from 0")
  return {name: int(value) for name, value in found.items()}


def _variables(content: RecordDict, like: PyTree) -> PyTree:
  arrays, due = content.array_records.get(VARIABLES, {}), _named(like)
  if set(arrays) != set(due):
    odd = min(set(arrays) ^ set(due))
    raise BadInput(f"{odd}: {'missing' if odd in due else 'belongs to no tensor of the model'}")
  return unflatten_dict({path: _array(path, arrays[path], due[path]) for path in due}, sep="/") | {
    kind: {} for kind, tree in like.items() if not jax.tree.leaves(tree)
  }


def _array(path: str, sent: Array, like) -> np.ndarray:
  try:
    array = sent.numpy()  # numpy's own format, read without pickle
  except Exception as error:  # whatever bytes may bring about
    raise BadInput(f"{path}: cannot be read") from error
  due = (np.dtype(like.dtype), tuple(like.shape))
  if (array.dtype, array.shape) != due:
    found = f"{array.dtype} {list(array.shape)}"
    raise BadInput(f"{path}: {found} where {due[0]} {list(due[1])} is due")
  return array


def _named(variables: PyTree) -> dict[str, np.ndarray]:
  return flatten_dict(variables, sep="/")
