"""What models weigh and what rounds send, in bytes, from shapes alone.

Every function takes arrays or their `jax.ShapeDtypeStruct`s, so `jax.eval_shape` is enough to
weigh a network that was never initialised.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from qupeD_jax import checks
from qupeD_jax.types import FULL_PRECISION, PyTree

_FLOAT32 = 4  # bytes: what is not quantised ships and travels in float32


class Traffic(NamedTuple):
  """Bytes of one round, over all clients that take part."""

  up: int  # from the clients to the server
  down: int  # from the server to the clients


def tree_bytes(tree: PyTree) -> int:
  """Weighs a pytree in memory, every leaf in its own dtype.

  Args:
    tree: any pytree of arrays or ShapeDtypeStructs.

  Returns:
    Bytes.

  >>> tree_bytes({"kernel": jax.ShapeDtypeStruct((3, 4), "bfloat16"), "codes": np.zeros(5, "u1")})
  29
  """
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def model_bytes(
  params: PyTree, quantised_paths: Collection[str], bits: int, stats: PyTree = ()
) -> int:
  """Weighs a personal model as `packing.pack` ships it.

  A quantised tensor of n entries takes ceil(n * bits / 8) bytes of codes and 2^bits centers of 4
  bytes; every other tensor, and at 32 bits all of them, takes 4 bytes an entry.

  Args:
    params: nested dicts of arrays or ShapeDtypeStructs, without a client axis.
    quantised_paths: the tensors that have a codebook, as "conv_2/kernel".
    bits: the client's precision, 1 to 8 or 32.
    stats: running statistics that ship along.

  Returns:
    Bytes.

  Raises:
    BadInput: the bits are not allowed, or a path names no tensor.

  >>> params = {"dense": {"kernel": np.zeros((10, 10)), "bias": np.zeros(10)}}
  >>> model_bytes(params, ["dense/kernel"], bits=2)  # 25 of codes, 16 of centers, 40 of biases
  81
  >>> model_bytes(params, ["dense/kernel"], bits=32)
  440
  """
  checks.bits("bits", [bits])
  flat = flatten_dict(params, sep="/")
  for path in quantised_paths:
    checks.require(path in flat, "quantised path", path, "one of " + ", ".join(flat))
  if bits == FULL_PRECISION:
    return _float32_bytes((params, stats))
  codes = sum(math.ceil(math.prod(flat[path].shape) * bits / 8) for path in quantised_paths)
  centers = len(quantised_paths) * 2**bits * _FLOAT32
  kept = [tensor for path, tensor in flat.items() if path not in quantised_paths]
  return codes + centers + _float32_bytes((kept, stats))


def round_bytes(server: PyTree, participants: int = 1) -> Traffic:
  """Counts what one round sends: the server's model down to and up from each client, float32.

  Args:
    server: what travels, as arrays or ShapeDtypeStructs; () where nothing does.
    participants: how many clients take part in the round.

  Returns:
    Bytes up and down, over all participants.

  Raises:
    BadInput: participants is not a whole number of at least 0.

  >>> round_bytes({"kernel": np.zeros((10, 10), "float32")}, participants=50)
  Traffic(up=20000, down=20000)
  """
  checks.at_least("participants", participants, 0)
  one_way = participants * _float32_bytes(server)
  return Traffic(up=one_way, down=one_way)


def _float32_bytes(tree: PyTree) -> int:
  return _FLOAT32 * sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
