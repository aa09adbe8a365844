"""Arithmetic over whole pytrees, and moves along the client axis (the leading one)."""

import functools

import jax
import jax.numpy as jnp

from qupeD_jax.federation import exchange
from qupeD_jax.types import Array, PyTree


def weighted_sum(tree: PyTree, weights: Array) -> PyTree:
  """Sums over the client axis: leaves [K, ...] and weights [K] float32 give leaves [...]."""
  # By default an accelerator rounds the factors of a product, here the uploads, to a few bits.
  dot = functools.partial(jnp.tensordot, axes=1, precision="highest")
  return jax.tree.map(lambda leaf: dot(weights, leaf), tree)


def weighted_mean(trees: tuple[PyTree, ...], weights: tuple[Array, ...], default: PyTree) -> PyTree:
  """Averages over the clients of all cohorts, on all devices.

  Args:
    trees: one pytree per cohort, leaves [K, ...].
    weights: one array per cohort, [K] float32, at least 0.
    default: what is returned if every weight is 0, leaves [...].

  Returns:
    The mean, leaves [...], in the dtypes of `default`.
  """
  total = sum(jnp.sum(w) for w in weights)
  sums = jax.tree.map(lambda *leaves: sum(leaves), *map(weighted_sum, trees, weights))
  # Both in one message: what devices wait for is each other, more than the bytes.
  total, sums = exchange.add((total, sums))
  mean = jax.tree.map(lambda leaf: leaf / jnp.where(total > 0, total, 1.0), sums)
  return jax.tree.map(lambda m, d: jnp.where(total > 0, m, d).astype(d.dtype), mean, default)


def with_noise(key: Array, tree: PyTree, std: Array | float) -> PyTree:
  """Adds Gaussian noise of a standard deviation to every entry."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  pairs = zip(keys, leaves, strict=True)
  noisy = [leaf + std * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in pairs]
  return jax.tree.unflatten(structure, noisy)


def squared_distance(a: PyTree, b: PyTree) -> Array:
  """Returns ||a - b||^2 over all leaves, [] float32."""
  return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), a, b)))


def inner(a: PyTree, b: PyTree) -> Array:
  """Returns the inner product <a, b> over all leaves, [] float32."""
  return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))


def descend(params: PyTree, direction: PyTree, rate: Array | float) -> PyTree:
  """Returns params - rate * direction."""
  return jax.tree.map(lambda p, d: p - rate * d, params, direction)


def pull(params: PyTree, anchor: PyTree, t: Array | float) -> PyTree:
  """Minimises t/2 ||z - anchor||^2 + ||z - params||^2 / 2 over z: `anchor` itself for t = inf."""
  share = 1.0 / (1.0 + t)
  return jax.tree.map(lambda p, a: a + share * (p - a), params, anchor)


def select(mask: Array, chosen: PyTree, other: PyTree) -> PyTree:
  """Picks per client: leaves [K, ...] of `chosen` where mask [K] bool holds, else of `other`."""

  def pick(a, b):
    return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(pick, chosen, other)


def take(tree: PyTree, slots: Array) -> PyTree:
  """Gathers the clients at `slots` [k] int32: leaves [K, ...] become [k, ...]."""
  return jax.tree.map(lambda leaf: leaf[slots], tree)


def put(tree: PyTree, slots: Array, part: PyTree) -> PyTree:
  """Writes the clients of `part` (leaves [k, ...]) back into `slots` [k] of `tree`."""
  return jax.tree.map(lambda leaf, new: leaf.at[slots].set(new), tree, part)


def repeat(tree: PyTree, count: int) -> PyTree:
  """Gives every leaf a leading client axis of `count` equal entries."""
  return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)
