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

# Up to here all borders are compared with, in one pass that XLA fuses with what uses it.
_FEW = 16
_FEWER = 8  # up to here a sum for each center beats adding entry by entry on a CPU
_STRIDE = 8  # beyond, every so many are, and the rest is a binary search: a power of 2


def is_used(centers: Array) -> Array:
  """Tells whether a codebook [m] holds any center at all, [] bool."""
  return jnp.isfinite(centers[0])


def midpoints(centers: Array) -> Array:
  """Returns the borders between neighbouring centers, [m - 1]: what is above belongs to the upper.

  Between two that float32 has no number between, a mean would round up to the upper one, and take
  its own entries from it: the border is the lower one then.
  """
  lower, upper = centers[:-1], centers[1:]
  middle = (lower + upper) / 2
  return jnp.where((middle >= upper) & jnp.isfinite(upper), lower, middle)


def assign(x: Array, centers: Array) -> Array:
  """Finds the nearest center of every entry; a tie goes to the lower one.

  Args:
    x: any shape, float32.
    centers: [m] float32, sorted.

  Returns:
    Index of the nearest center, x's shape, int32.
  """
  chex.assert_rank(centers, 1)
  borders = midpoints(centers)
  if len(centers) <= _FEW:
    return _count_below(x, borders)
  index = _STRIDE * _count_below(x, borders[_STRIDE - 1 :: _STRIDE])
  borders = jnp.concatenate([borders, jnp.full(_STRIDE, jnp.inf)])
  half = _STRIDE // 2
  while half:
    index += half * (x > borders[index + half - 1]).astype(jnp.int32)
    half //= 2
  return index


def _count_below(x: Array, borders: Array) -> Array:
  return sum(((x > border).astype(jnp.int32) for border in borders), jnp.zeros(x.shape, jnp.int32))


def nearest(x: Array, centers: Array) -> Array:
  """Replaces every entry of x by its nearest center, or by itself if there is none."""
  if len(centers) > _FEW:
    return jnp.where(is_used(centers), centers[assign(x, centers)], x)
  near = jnp.where(is_used(centers), centers[0], x)
  for border, center in zip(midpoints(centers), centers[1:], strict=True):
    near = jnp.where(x > border, center, near)
  return near


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
  values, index = values.ravel(), index.ravel()
  # A scatter is good where it runs in order, as on a CPU; in parallel its additions would collide
  # on a few addresses, and in an order that changes from run to run.
  serial = _sums_one_by_one if num_centers <= _FEWER else _sums_by_scatter
  parallel = _sums_in_one_pass if num_centers <= _FEW else _sums_by_product
  forms = {"cpu": serial, "default": parallel}
  forms = {name: functools.partial(form, num_centers=num_centers) for name, form in forms.items()}
  return jax.lax.platform_dependent(values, index, **forms)


def _sums_one_by_one(values: Array, index: Array, *, num_centers: int) -> Array:
  """Sums what each center owns by itself: sums that a CPU makes many entries at a time."""
  own = (jnp.where(index == center, values, 0.0) for center in range(num_centers))
  return jnp.stack([jnp.sum(part) for part in own])


def _sums_in_one_pass(values: Array, index: Array, *, num_centers: int) -> Array:
  """Reduces to all sums at once: entries are read once, owners found once, nothing is written."""
  own = tuple(jnp.where(index == center, values, 0.0) for center in range(num_centers))
  add = lambda sums, more: tuple(a + b for a, b in zip(sums, more, strict=True))
  zeros = (jnp.zeros((), values.dtype),) * num_centers
  return jnp.stack(jax.lax.reduce(own, zeros, add, (0,)))


def _sums_by_scatter(values: Array, index: Array, *, num_centers: int) -> Array:
  return jnp.zeros(num_centers, values.dtype).at[index].add(values)


def _sums_by_product(values: Array, index: Array, *, num_centers: int) -> Array:
  """Splits the index into two digits: narrow one-hot factors whose product holds the sums."""
  high = (index // _FEW)[:, None] == jnp.arange(-(-num_centers // _FEW))
  low = jnp.where((index % _FEW)[:, None] == jnp.arange(_FEW), values[:, None], 0.0)
  sums = jnp.einsum("nh,nl->hl", high.astype(values.dtype), low, precision="highest")
  return sums.ravel()[:num_centers]
