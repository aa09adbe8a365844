"""Random streams: a key is never used by two consumers, and every purpose has a stream of its own.

Whoever is handed a key derives from it, by `stream`, the keys of what it is used for; client ids,
round numbers and the like are folded in within a stream. What is drawn thus depends on the purpose
and the client's id alone, never on how many clients there are, on their order or their devices.
"""

import hashlib
import secrets
import zlib
from typing import Literal, get_args

import jax
import numpy as np

from qupeD_jax.types import Array

Purpose = Literal[
  # of a run
  "phases",  # by number
  "initialise",
  "rounds",  # by number
  "evaluate",
  "corruption",  # who is corrupt
  # of a round
  "federations",  # by place: those that train side by side, each with a server of its own
  "clients",  # by id
  "sampling",
  "dropout",
  "stragglers",  # who is slow
  "steps",  # how many a slow client takes
  "statistics",
  "aggregate",
  # of an aggregate
  "spoil",
  "noise",
  # of a client
  "batches",  # by number
  # of a batch
  "rows",
  "augment",  # by local step
  "layers",  # by local step: what networks draw, such as dropout
]

TAGS = {purpose: zlib.crc32(purpose.encode()) for purpose in get_args(Purpose)}


def stream(key: Array, purpose: Purpose, number: Array | int | None = None) -> Array:
  """Derives the key of one purpose from a key.

  Args:
    key: [], of a run, a round, a client or whatever else has several consumers.
    purpose: what the stream is for.
    number: [] or a whole number, one key of a stream that has many; None for the stream's own.

  Raises:
    KeyError: there is no such purpose.

  >>> one, other = stream(jax.random.key(0), "noise"), stream(jax.random.key(0), "sampling")
  >>> bool(one == other)
  False
  """
  key = jax.random.fold_in(key, np.uint32(TAGS[purpose]))
  return key if number is None else jax.random.fold_in(key, number)


def client_keys(key: Array, purpose: Purpose, client: Array) -> Array:
  """Derives a key for each client, [K] keys, from a key [] and the clients' ids [K] int32."""
  return jax.vmap(jax.random.fold_in, (None, 0))(stream(key, purpose), client)


def client_uniforms(key: Array, purpose: Purpose, client: Array) -> Array:
  """Draws a number in [0, 1) for each client, [K] float32; arguments as of `client_keys`."""
  return jax.vmap(jax.random.uniform)(client_keys(key, purpose, client))


def secret() -> int:
  """Draws 256 bits from the operating system, which nobody can guess."""
  return secrets.randbits(256)


def derived_seed(secret: int, *names: str | int) -> np.ndarray:
  """Derives the words of a key from a secret and the names of what the key is for.

  Args:
    secret: as of `secret`, or a known number where the same keys are wanted again.
    names: such as a method and a seed; other names give other keys, which tell nothing of these.

  Returns:
    [2] uint32, for `jax.random.wrap_key_data`.

  >>> derived_seed(0, "FedAvg", 1)
  array([ 660759251, 2577668518], dtype=uint32)
  """
  digest = hashlib.sha256(repr((secret, *names)).encode()).digest()
  return np.frombuffer(digest[:8], np.uint32).copy()
