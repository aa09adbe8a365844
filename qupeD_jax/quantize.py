"""Quantisation of one tensor by its codebook, and of a whole model: the Quantizers.

Q_c(x) replaces every entry by its nearest center; soft Q blends the steps between centers with
sigmoids (Ozkara et al., "QuPeD", NeurIPS 2021, section 2). Codebooks are as in codebook.py.
"""

from collections.abc import Callable

import chex
import flax.traverse_util
import jax
import jax.numpy as jnp

from qupeD_jax import checks, codebook, prox
from qupeD_jax.types import FULL_PRECISION, Array, PyTree, Quantizer

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
  sides = jnp.stack([_mean_where(x, x < 0, low), _mean_where(x, x >= 0, high)])
  sides = jnp.pad(sides, (0, len(slots) - 2))
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

  Lloyd's iterations: every entry joins its nearest center, every center becomes the mean of its
  entries, or stays where it is without any. Args and Returns as in `init_centers`.
  """

  def lloyd(_, centers):
    index = codebook.assign(x, centers)
    total = codebook.sums_per_center(x, index, len(centers))
    count = codebook.sums_per_center(jnp.ones_like(x), index, len(centers))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), centers)

  first = quantile_centers(x, num_centers, max_centers)
  return jnp.sort(jax.lax.fori_loop(0, iterations, lloyd, first))


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
  return jnp.where(codebook.is_used(centers), safe[0] + steps @ gaps, x)


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


def none() -> Quantizer:
  """Builds the quantiser that does nothing: every client at full precision, without codebooks."""
  return Quantizer(
    init=lambda params, bits: {},
    project=lambda params, codebooks: params,
    prox=lambda params, codebooks, t: params,
    update=lambda codebooks, params, grads, rate, t: codebooks,
  )


def learned_codebook(
  *,
  max_bits: int = 8,
  init: Callable = init_centers,
  norm: str = "l1",
  sharpness: Array | float | None = None,
  clip: Array | float | None = None,
  select: Callable = is_quantised,
) -> Quantizer:
  """Builds QuPeD's quantiser: centers learned by alternating proximal gradient steps.

  Args:
    max_bits: the largest precision among the clients that is not 32; sets the codebooks' width.
    init: `init_centers`, `quantile_centers` or `kmeans_centers`.
    norm: of the regulariser, "l1" or "l2".
    sharpness: P of soft Q in the projection; None for its limit, hard Q.
    clip: bound of every center's gradient; None for no bound.
    select: path -> bool, which tensors are quantised.

  Returns:
    A Quantizer; bits of 32 give a client codebooks without a finite center.

  Raises:
    BadInput: max_bits is not 1 to 8, norm unknown, sharpness or clip not positive.
  """
  checks.require(max_bits in range(1, 9), "max_bits", max_bits, "1 to 8")
  checks.require(norm in ("l1", "l2"), "norm", repr(norm), "'l1' or 'l2'")
  for name, value in (("sharpness", sharpness), ("clip", clip)):
    if value is not None:
      checks.positive(name, value)

  def quantize(x, centers):
    if sharpness is None:
      return hard_quantize(x, centers)
    return soft_quantize(x, centers, sharpness)

  def init_codebooks(params, bits):
    def centers_of(tensor):
      num_centers = 2 ** jnp.minimum(bits, max_bits)
      centers = init(tensor, num_centers, 2**max_bits)
      return jnp.where(bits == FULL_PRECISION, jnp.inf, centers)

    return {path: centers_of(x) for path, x in sorted(flatten(params).items()) if select(path)}

  def project(params, codebooks):
    return map_quantised(quantize, codebooks, params)

  def prox_params(params, codebooks, t):
    return map_quantised(lambda x, c: prox.prox_weights(x, c, t, norm), codebooks, params)

  def update(codebooks, params, grads, rate, t):
    xs, gs = flatten(params), flatten(grads)

    def step(path, centers):
      x = xs[path]
      (slope,) = jax.vjp(lambda c: quantize(x, c), centers)[1](gs[path])
      slope = slope if clip is None else jnp.clip(slope, -clip, clip)
      return prox.prox_centers(centers - rate * slope, x, t, norm, before=centers)

    return {path: step(path, centers) for path, centers in codebooks.items()}

  return Quantizer(init_codebooks, project, prox_params, update)


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
