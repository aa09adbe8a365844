"""The geometry of one codebook: which center an entry belongs to, and sums per center.

A codebook is a vector of centers, [m] float32, sorted, the slots that are not used holding +inf.
That value needs no mask beside it: the midpoint next to an unused slot is +inf too, so no entry
ever reaches it. A codebook without any finite center stands for full precision.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from qupeD_jax.types import Array

# Up to here comparing with every border, which XLA fuses into one pass, beats a binary search.
_FEW = 16


def is_used(centers: Array) -> Array:
  """Tells whether a codebook [m] holds any center at all, [] bool."""
  return jnp.isfinite(centers[0])


def midpoints(centers: Array) -> Array:
  """Returns the borders between neighbouring centers, [m - 1]."""
  return (centers[:-1] + centers[1:]) / 2


def assign(x: Array, centers: Array) -> Array:
  """Finds the nearest center of every entry; a tie goes to the lower one.

  Args:
    x: any shape, float32.
    centers: [m] float32, sorted.

  Returns:
    Index of the nearest center, x's shape, int32.
  """
  chex.assert_rank(centers, 1)
  method = "compare_all" if len(centers) <= _FEW else "scan_unrolled"
  return jnp.searchsorted(midpoints(centers), x, method=method).astype(jnp.int32)


def nearest(x: Array, centers: Array) -> Array:
  """Replaces every entry of x by its nearest center, or by itself if there is none."""
  return jnp.where(is_used(centers), centers[assign(x, centers)], x)


def lloyd(x: Array, centers: Array) -> Array:
  """Moves every center to the mean of the entries it owns; one that owns none keeps its value.

  Of all centers with the same owners these are the nearest to x: one step of Lloyd's algorithm.

  Args:
    x: any shape, float32.
    centers: [m] float32, sorted.

  Returns:
    New centers, [m], in their old order up to rounding.
  """
  index = assign(x, centers)
  total = sums_per_center(x, index, len(centers))
  count = sums_per_center(jnp.ones_like(x), index, len(centers))
  moved = jnp.where(count > 0, total / jnp.maximum(count, 1), centers)
  return jnp.where(is_used(centers), moved, centers)


def sums_per_center(values: Array, index: Array, num_centers: int) -> Array:
  """Adds up the values assigned to each center.

  Args:
    values: any shape, float32.
    index: values' shape, int32 in [0, num_centers).
    num_centers: m, static.

  Returns:
    [m] float32; 0 for a center that owns nothing.
  """
  chex.assert_equal_shape([values, index])
  form = functools.partial(_sums_by_product, num_centers=num_centers)
  scatter = functools.partial(_sums_by_scatter, num_centers=num_centers)
  # A scatter is best where it runs in order, as on a CPU; in parallel its additions would collide
  # on a few addresses, and in an order that changes from run to run.
  return jax.lax.platform_dependent(values.ravel(), index.ravel(), cpu=scatter, default=form)


def _sums_by_scatter(values: Array, index: Array, *, num_centers: int) -> Array:
  return jnp.zeros(num_centers, values.dtype).at[index].add(values)


def _sums_by_product(values: Array, index: Array, *, num_centers: int) -> Array:
  """Splits the index into two digits: narrow one-hot factors whose product holds the sums."""
  if num_centers <= _FEW:
    hit = index[:, None] == jnp.arange(num_centers)
    return jnp.sum(jnp.where(hit, values[:, None], 0.0), axis=0)
  high = (index // _FEW)[:, None] == jnp.arange(-(-num_centers // _FEW))
  low = jnp.where((index % _FEW)[:, None] == jnp.arange(_FEW), values[:, None], 0.0)
  sums = jnp.einsum("nh,nl->hl", high.astype(values.dtype), low, precision="highest")
  return sums.ravel()[:num_centers]
