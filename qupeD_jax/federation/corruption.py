"""Clients that send something else than they should, around any aggregate.

They train as the others do and keep what they learned; only their uploads are spoiled, by a
function of one client,

  (key, upload, the server's variables before the round) -> upload
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import rng
from qupeD_jax.federation import tree
from qupeD_jax.federation.aggregators import Aggregate
from qupeD_jax.types import Array, PyTree


def corrupted(aggregate: Aggregate, corrupt: Array, spoil: Callable) -> Aggregate:
  """Wraps an aggregate so that the same clients send it spoiled uploads in every round.

  Args:
    aggregate: any.
    corrupt: [clients] bool, by id; see `choose`.
    spoil: `nan`, `noise()`, `sign()` or another.

  Returns:
    An Aggregate.
  """

  def combine(key, uploads, cohorts, before):
    def sent(upload, cohort):
      keys = rng.client_keys(key, "spoil", cohort.client)
      spoiled = jax.vmap(spoil, (0, 0, None))(keys, upload, before)
      return tree.select(corrupt[cohort.client], spoiled, upload)

    return aggregate(key, tuple(map(sent, uploads, cohorts)), cohorts, before)

  return combine


def choose(key: Array, num_clients: int, count: Array | int) -> Array:
  """Chooses the corrupt clients of a run: those with the smallest random numbers.

  Args:
    key: of the run.
    num_clients: of all cohorts together; ids count from 0.
    count: how many are corrupt.

  Returns:
    [clients] bool, by id.
  """
  numbers = rng.client_uniforms(key, "corruption", jnp.arange(num_clients))
  return jnp.argsort(jnp.argsort(numbers)) < count


def nan(key: Array, upload: PyTree, before: PyTree) -> PyTree:
  """Sends nothing but NaN, as a client does whose training diverged."""
  del key, before
  return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), upload)


def noise(std: float = 1.0) -> Callable:
  """Sends the server's model with Gaussian noise on it, of a size that no training step has."""

  def spoil(key, upload, before):
    del upload
    return tree.with_noise(key, before, std)

  return spoil


def sign(scale: float = 4.0) -> Callable:
  """Sends the opposite of the update that was asked for, so many times.

  At 4 times, a fifth of the clients takes back what all the others do, if they are averaged.
  """

  def spoil(key, upload, before):
    del key
    return jax.tree.map(lambda new, old: old - scale * (new - old), upload, before)

  return spoil
