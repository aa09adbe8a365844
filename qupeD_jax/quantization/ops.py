"""Quantisation of one tensor by its codebook, and of a whole model.

Q_c(x) replaces every entry by its nearest center; soft Q blends the steps between centers with
sigmoids (Ozkara et al., "QuPeD", NeurIPS 2021, section 2). Codebooks are as in codebook.py.
"""

from collections.abc import Callable

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp

from qupeD_jax.quantization import codebook
from qupeD_jax.types import Array, PyTree

# --- one tensor


def init_centers(x: Array, num_centers: Array | int, max_centers: int | None = None) -> Array:
  """Places the first centers of a tensor.

  Two centers: the mean of the negative entries and the mean of the others. More: evenly spaced from
  the smallest entry to the largest.

  Args:
    x: any shape, float32.
    num_centers: m, at least 2; may be traced if `max_centers` is given.
    max_centers: slots of the codebook; without it m.

  Returns:
    [max_centers] float32, sorted; slots beyond m hold +inf.
  """
  slots = _slots(num_centers, max_centers)
  low, high = jnp.min(x), jnp.max(x)
  centers = low + (high - low) * slots / (num_centers - 1)
  sides = jnp.where(slots == 0, _mean_where(x, x < 0, low), _mean_where(x, x >= 0, high))
  centers = jnp.where(num_centers == 2, sides, centers)
  # Sorted once more: where entries are nearly equal, rounding can swap two centers.
  return jnp.sort(jnp.where(slots < num_centers, centers, jnp.inf))


def quantile_centers(x: Array, num_centers: Array | int, max_centers: int | None = None) -> Array:
  """Places the first centers of a tensor so that each owns about as many entries.

  Center j of m is the (j + 1/2) / m quantile. Args and Returns as in `init_centers`.
  """
  slots = _slots(num_centers, max_centers)
  centers = jnp.quantile(x, jnp.clip((slots + 0.5) / num_centers, 0.0, 1.0))
  return jnp.where(slots < num_centers, centers, jnp.inf)


def kmeans_centers(
  x: Array, num_centers: Array | int, max_centers: int | None = None, iterations: int = 30
) -> Array:
  """Places the first centers of a tensor by k-means, from its quantiles on.

  Takes Lloyd's steps (`codebook.lloyd`). Args and Returns as in `init_centers`.
  """
  first = quantile_centers(x, num_centers, max_centers)
  step = lambda _, centers: codebook.lloyd(x, centers)
  return jnp.sort(jax.lax.fori_loop(0, iterations, step, first))


def even_levels(num_centers: Array | int, max_centers: int | None = None) -> Array:
  """Returns m evenly spaced levels from -1 to 1, [max_centers], +inf beyond them.

  >>> even_levels(3, max_centers=4).tolist()
  [-1.0, 0.0, 1.0, inf]
  """
  slots = _slots(num_centers, max_centers)
  return jnp.where(slots < num_centers, 2 * slots / (num_centers - 1) - 1, jnp.inf)


def fixed_centers(x: Array, num_centers: Array | int, max_centers: int | None = None) -> Array:
  """Places the centers evenly from -1 to 1, whatever the tensor: -1 and 1 for m = 2.

  Args and Returns as in `init_centers`.
  """
  del x
  return even_levels(num_centers, max_centers)


def scaled_centers(
  x: Array, num_centers: Array | int, max_centers: int | None = None, iterations: int = 10
) -> Array:
  """Places the first centers of a tensor evenly from -s to s, s chosen to fit its entries.

  Approaches the s that minimises ||x - Q(x)||^2 by turns: entries join their nearest center, s is
  fitted to them by least squares. Two centers: s is the mean of |x|, which is exact. Args and
  Returns as in `init_centers`.
  """
  levels = even_levels(num_centers, max_centers)
  tiny = jnp.finfo(x.dtype).tiny  # s stays above 0, also for a tensor of zeros

  def fit(_, scale):
    level = levels[codebook.assign(x, scale * levels)]
    return jnp.maximum(jnp.sum(level * x) / jnp.sum(level**2), tiny)

  # Within a tenth of what is best for 2 to 8 bits of normal entries; for 1 bit any start will do.
  first = jnp.maximum(jnp.mean(jnp.abs(x)) * (1 + jnp.log2(num_centers) / 2), tiny)
  return jax.lax.fori_loop(0, iterations, fit, first) * levels


def _slots(num_centers: Array | int, max_centers: int | None) -> Array:
  return jnp.arange(num_centers if max_centers is None else max_centers, dtype=jnp.float32)


def _mean_where(x: Array, mask: Array, default: Array) -> Array:
  count = jnp.sum(mask)
  return jnp.where(count > 0, jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(count, 1), default)


@jax.custom_vjp
def hard_quantize(x: Array, centers: Array) -> Array:
  """Replaces every entry by its nearest center: Q_c(x), the limit of soft Q for sharpness = inf.

  Its derivatives are the limits of soft Q's: 0 in x, and in a center the sum over the entries it
  owns.

  Args:
    x: any shape, float32.
    centers: [m] float32, sorted; without a finite center x is returned.

  Returns:
    Quantised x, x's shape.
  """
  chex.assert_rank(centers, 1)
  return codebook.nearest(x, centers)


def _hard_quantize_forward(x: Array, centers: Array):
  return hard_quantize(x, centers), (x, centers)


def _hard_quantize_backward(residuals, cotangent: Array):
  x, centers = residuals
  sums = codebook.sums_per_center(cotangent, codebook.assign(x, centers), len(centers))
  return jnp.zeros_like(x), jnp.where(jnp.isfinite(centers), sums, 0.0)


hard_quantize.defvjp(_hard_quantize_forward, _hard_quantize_backward)


def soft_quantize(x: Array, centers: Array, sharpness: Array | float) -> Array:
  """Quantises smoothly: c_1 + sum_{j>=2} (c_j - c_{j-1}) sigmoid(P (x - (c_j + c_{j-1}) / 2)).

  Args:
    x: any shape, float32.
    centers: [m] float32, sorted; without a finite center x is returned.
    sharpness: P > 0 and finite; `hard_quantize` is its limit.

  Returns:
    Softly quantised x, x's shape.
  """
  chex.assert_rank(centers, 1)
  # Zeros instead of the unused slots' infinities, also in the branch that is not taken: an infinity
  # there would turn the gradient into NaN.
  finite = jnp.isfinite(centers)
  safe = jnp.where(finite, centers, 0.0)
  gaps = jnp.where(finite[1:], safe[1:] - safe[:-1], 0.0)
  steps = jax.nn.sigmoid(sharpness * (x[..., None] - codebook.midpoints(safe)))
  risen = jnp.matmul(steps, gaps, precision="highest")
  return jnp.where(codebook.is_used(centers), safe[0] + risen, x)


# --- a whole model


def is_quantised(path: str) -> bool:
  """Tells by its path whether a tensor is quantised: the one place that says which are exempt.

  Exempt, as in the paper's experiments, are the first layer ("stem"), the classifier ("head"), and
  whatever is not a kernel: biases and normalisation parameters.

  >>> is_quantised("conv_1/kernel"), is_quantised("head/kernel"), is_quantised("conv_1/bias")
  (True, False, False)
  """
  *modules, name = path.split("/")
  return name == "kernel" and not {"stem", "head"} & set(modules)


def flatten(params: PyTree) -> dict[str, Array]:
  """Returns a model's parameters by path, as in {"conv_1/kernel": ...}."""
  return flax.traverse_util.flatten_dict(params, sep="/")


def replace(params: PyTree, tensors: dict[str, Array]) -> PyTree:
  """Returns the parameters with the tensors at the given paths replaced."""
  return flax.traverse_util.unflatten_dict(flatten(params) | tensors, sep="/")


def map_quantised(fn: Callable, codebooks: dict[str, Array], params: PyTree) -> PyTree:
  """Applies fn(tensor, centers) to every tensor that has a codebook; the others stay."""
  flat = flatten(params)
  return replace(params, {path: fn(flat[path], centers) for path, centers in codebooks.items()})


def is_active(codebooks: dict[str, Array]) -> Array:
  """Tells whether a client's model is quantised at all: [] float32, 0 for full precision or 1."""
  return codebook.is_used(next(iter(codebooks.values()))).astype(jnp.float32)


def harden(params: PyTree, codebooks: dict[str, Array]) -> PyTree:
  """Puts every entry on its nearest center: the model that a client ships."""
  return map_quantised(hard_quantize, codebooks, params)


def follow(params: PyTree, before: dict[str, Array], after: dict[str, Array]) -> dict[str, Array]:
  """Moves every entry to where its center went; centers that crossed have exchanged theirs.

  Args:
    params: hardened with the codebooks `before`.
    before, after: centers by path, [m].

  Returns:
    The moved tensors by path; meaningless where a codebook has no finite center.
  """
  flat = flatten(params)
  return {path: after[path][codebook.assign(flat[path], c)] for path, c in before.items()}


def freeze(params: PyTree, frozen: dict[str, Array], codebooks: dict[str, Array]) -> PyTree:
  """Returns the parameters with the `frozen` tensors, by path, where a codebook is in use."""
  flat = flatten(params)
  kept = {
    path: jnp.where(codebook.is_used(codebooks[path]), tensor, flat[path])
    for path, tensor in frozen.items()
  }
  return replace(params, kept)
