"""The regulariser of QuPeD and its two proximal maps, for one tensor and its codebook.

R(x, c) = sum_k min_j |x_k - c_j|     (norm="l1")
R(x, c) = sum_k min_j (x_k - c_j)^2   (norm="l2")

Ozkara et al., "QuPeD", NeurIPS 2021, sections 2 and 3; its factor 1/2 is left to lambda here. In
the maps, t is a step size times lambda. Codebooks are as in codebook.py; where one has no finite
center, R is 0 and both maps return what they got.
"""

import chex
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.quantization import codebook
from qupeD_jax.types import Array


def regularizer(x: Array, centers: Array, norm: str = "l1") -> Array:
  """Measures how far a tensor is from its codebook: R(x, c) above.

  Args:
    x: any shape, float32.
    centers: [m] float32, sorted.
    norm: "l1" or "l2".

  Returns:
    [] float32.
  """
  distance = jnp.abs(x - codebook.nearest(x, centers))
  return jnp.sum(distance if _is_l1(norm) else distance**2)


def prox_weights(y: Array, centers: Array, t: Array | float, norm: str = "l1") -> Array:
  """Minimises t R(z, c) + ||z - y||^2 / 2 over z, exactly.

  The minimum over z and the minimum over the centers commute, and what the best z for one center
  costs grows with that center's distance from y, so only the nearest center q matters:
  q + sign(y - q) max(|y - q| - t, 0) for l1, (y + 2 t q) / (1 + 2 t) for l2.

  Args:
    y: any shape, float32.
    centers: [m] float32, sorted.
    t: at least 0; +inf snaps every entry to its center.
    norm: "l1" or "l2".

  Returns:
    The minimiser z, y's shape.
  """
  q = codebook.nearest(y, centers)
  gap = y - q
  if _is_l1(norm):
    return q + jnp.sign(gap) * jnp.maximum(jnp.abs(gap) - t, 0.0)
  return q + gap / (1.0 + 2.0 * t)


def prox_centers(
  centers: Array, x: Array, t: Array | float, norm: str = "l1", *, before: Array | None = None
) -> Array:
  """Moves centers toward the entries they own, the entries and their owners held fixed.

  l1: c_j + t (#{k in j: x_k > b_j} - #{k in j: x_k < b_j}), the step of a subgradient of R;
  l2: (c_j + 2 t sum_{k in j} x_k) / (1 + 2 t n_j), the exact minimiser.

  Args:
    centers: [m] float32, the point c the map is taken at (after a gradient step, if there is one).
    x: any shape, float32.
    t: at least 0, finite.
    norm: "l1" or "l2".
    before: [m] float32, sorted, the centers b that own the entries: those before the gradient step.
      Without it, `centers`.

  Returns:
    New centers, [m], sorted. One that owns no entry keeps its value, as an unused slot does.
  """
  chex.assert_rank(centers, 1)
  before = centers if before is None else before
  index = codebook.assign(x, before)
  per_center = lambda values: codebook.sums_per_center(values, index, len(centers))
  if _is_l1(norm):
    side = jnp.sign(x - codebook.nearest(x, before))
    return jnp.sort(centers + t * per_center(side))
  count = per_center(jnp.ones_like(x))
  return jnp.sort((centers + 2 * t * per_center(x)) / (1 + 2 * t * count))


def _is_l1(norm: str) -> bool:
  checks.require(norm in ("l1", "l2"), "norm", repr(norm), "'l1' or 'l2'")
  return norm == "l1"
