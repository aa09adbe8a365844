"""The Quantizers: how a model's precision is lowered while it trains.

    quantizer         f is taken at    pull toward the centers    centers
    full_precision    x                -                          -
    learned_codebook  x and Q          growing                    learned by gradients and pulled
    proxquant         x                growing                    fixed
    binary_relax      relaxed Q        -                          means of their entries
    ste               Q                -                          even, one learned scale

All keep codebooks of the form of codebook.py, so that clients of 1 to 8 and of 32 bits train in one
cohort and that `ops.harden` ships, and `finetune` fine-tunes, what any of them trained.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.quantization import codebook, ops, prox
from qupeD_jax.types import FULL_PRECISION, Array, PyTree, Quantizer


def full_precision() -> Quantizer:
  """Builds the quantiser that does nothing: every client at full precision, without codebooks."""
  return Quantizer(
    init=lambda params, bits: {},
    project=lambda params, codebooks, step: params,
    prox=lambda params, codebooks, t: params,
    update=_keep,
    at_q=False,
    learned=False,
  )


def learned_codebook(
  *,
  max_bits: int = 8,
  init: Callable = ops.init_centers,
  norm: str = "l1",
  sharpness: Array | float | None = None,
  clip: Array | float | None = None,
  clip_weights: Array | float | None = None,
  select: Callable = ops.is_quantised,
) -> Quantizer:
  """Builds QuPeD's quantiser: centers learned by alternating proximal gradient steps.

  Ozkara et al., "QuPeD", NeurIPS 2021, Algorithm 1: f(x) + f(Q_c(x)) + lambda R(x, c) in x and c.

  Args:
    max_bits: the largest precision among the clients that is not 32; sets the codebooks' width.
    init: (tensor, m, slots) -> centers [slots], such as `ops.init_centers` and its neighbours.
    norm: of the regulariser, "l1" or "l2".
    sharpness: P of soft Q in the projection; None for its limit, hard Q.
    clip: bound of every center's gradient; None for no bound.
    clip_weights: bound of the quantised weights after every step; None for no bound. The authors'
      code has 1.
    select: path -> bool, which tensors are quantised.

  Returns:
    A Quantizer; bits of 32 give a client codebooks without a finite center.

  Raises:
    BadInput: max_bits is not 1 to 8, norm unknown, sharpness, clip or clip_weights not positive.
  """
  checks.require(norm in ("l1", "l2"), "norm", repr(norm), "'l1' or 'l2'")
  _check_positive(sharpness=sharpness, clip=clip, clip_weights=clip_weights)

  def quantise(x, centers):
    if sharpness is None:
      return ops.hard_quantize(x, centers)
    return ops.soft_quantize(x, centers, sharpness)

  def project(params, codebooks, step):
    del step
    return ops.map_quantised(quantise, codebooks, params)

  def prox_params(params, codebooks, t):
    near = lambda x, centers: prox.prox_weights(x, centers, t, norm)
    return _clipped(ops.map_quantised(near, codebooks, params), codebooks, clip_weights)

  def update(codebooks, params, slopes, rate, t):
    def step(centers, x, slope):
      slope = slope if clip is None else jnp.clip(slope, -clip, clip)
      return prox.prox_centers(centers - rate * slope, x, t, norm, before=centers)

    return _map_codebooks(step, codebooks, params, slopes)

  return Quantizer(_init_codebooks(max_bits, init, select), project, prox_params, update)


def proxquant(
  *,
  max_bits: int = 8,
  init: Callable = ops.init_centers,
  norm: str = "l1",
  clip_weights: Array | float | None = None,
  select: Callable = ops.is_quantised,
) -> Quantizer:
  """Builds ProxQuant: weights train at full precision, pulled harder and harder onto fixed centers.

  Bai, Wang, Liberty, "ProxQuant: Quantized Neural Networks via Proximal Operators", ICLR 2019:
  x <- prox_{eta lambda R(., c)}(x - eta grad f(x)) with a lambda that grows, to be followed by hard
  quantisation and fine-tuning. The paper's binary weights are those of `ops.fixed_centers`.

  Args:
    max_bits, norm, clip_weights, select: as in `learned_codebook`.
    init: (tensor, m, slots) -> centers [slots], which stay as they are.

  Returns:
    A Quantizer.

  Raises:
    BadInput: max_bits is not 1 to 8, norm unknown, or clip_weights not positive.
  """
  learned = learned_codebook(
    max_bits=max_bits, init=init, norm=norm, clip_weights=clip_weights, select=select
  )
  project = lambda params, codebooks, step: params
  return learned._replace(project=project, update=_keep, at_q=False, learned=False)


def binary_relax(
  *,
  relaxation: Array | float | Callable,
  max_bits: int = 8,
  init: Callable = ops.init_centers,
  select: Callable = ops.is_quantised,
) -> Quantizer:
  """Builds BinaryRelax: the network computes with weights on their way to the quantised ones.

  Yin, Zhang, Lyu, Osher, Qi, Xin, "BinaryRelax: A Relaxation Approach for Training Deep Neural
  Networks with Quantized Weights", SIAM Journal on Imaging Sciences 11(4), 2018:
  y <- y - eta grad f((lambda Q_c(y) + y) / (lambda + 1)) with a lambda that grows, and c the
  minimiser of ||y - Q_c(y)||^2 for the entries that each center owns.

  Args:
    relaxation: lambda, at least 0: a number or a schedule of the local step. At +inf the forward
      pass is quantised: the paper's second phase.
    max_bits, init, select: as in `learned_codebook`.

  Returns:
    A Quantizer.

  Raises:
    BadInput: max_bits is not 1 to 8, or relaxation is negative.
  """
  checks.non_negative("relaxation", relaxation)
  schedule = relaxation if callable(relaxation) else lambda step: relaxation

  def project(params, codebooks, step):
    share = 1.0 / (1.0 + schedule(step))  # of y in the mean of y and Q(y); 0 at +inf

    def relaxed(y, centers):
      q = codebook.nearest(y, centers)
      return _straight_through(y, jax.lax.stop_gradient(q + share * (y - q)))

    return ops.map_quantised(relaxed, codebooks, params)

  def update(codebooks, params, slopes, rate, t):
    del slopes, rate, t
    return _map_codebooks(lambda c, y: jnp.sort(codebook.lloyd(y, c)), codebooks, params)

  init_codebooks = _init_codebooks(max_bits, init, select)
  prox_params = lambda params, codebooks, t: params
  return Quantizer(init_codebooks, project, prox_params, update, at_x=False, learned=False)


def ste(
  *,
  max_bits: int = 8,
  init: Callable = ops.scaled_centers,
  clip_weights: Array | float | None = None,
  select: Callable = ops.is_quantised,
) -> Quantizer:
  """Builds the straight-through quantiser: the network computes with Q(y), y gets its gradient.

  Courbariaux, Bengio, David, "BinaryConnect", NeurIPS 2015; the scale learned as in Esser et al.,
  "Learned Step Size Quantization", ICLR 2020. A tensor's centers are s times m evenly spaced levels
  from -1 to 1, and s follows its gradient, sum_j level_j * slope_j, slope_j being the sum of the
  gradients of the entries at center j. Here s moves at the new y, as centers do in Algorithm 1.

  Args:
    max_bits, select: as in `learned_codebook`.
    init: (tensor, m, slots) -> centers [slots], evenly spaced from -s to s with s above 0:
      `ops.scaled_centers` or `ops.fixed_centers`.
    clip_weights: bound of the weights y after every step, BinaryConnect's being 1; None for none.

  Returns:
    A Quantizer.

  Raises:
    BadInput: max_bits is not 1 to 8, or clip_weights not positive.
  """
  _check_positive(clip_weights=clip_weights)

  def project(params, codebooks, step):
    del step
    through = lambda y, centers: _straight_through(y, ops.hard_quantize(y, centers))
    return ops.map_quantised(through, codebooks, params)

  def update(codebooks, params, slopes, rate, t):
    del params, t

    def step(centers, slope):
      levels = ops.even_levels(jnp.sum(jnp.isfinite(centers)), len(centers))
      used = jnp.isfinite(levels)
      scale = -centers[0]
      moved = scale - rate * jnp.sum(jnp.where(used, levels * slope, 0.0))
      # At most half of the scale goes in one step: it stays above 0.
      return jnp.where(used, jnp.maximum(moved, scale / 2) * levels, jnp.inf)

    return _map_codebooks(step, codebooks, slopes)

  prox_params = lambda params, codebooks, t: _clipped(params, codebooks, clip_weights)
  return Quantizer(
    _init_codebooks(max_bits, init, select), project, prox_params, update, at_x=False
  )


# --- what they share


def _init_codebooks(max_bits: int, init: Callable, select: Callable) -> Callable:
  """Returns (params, bits) -> codebooks [2^max_bits] of the selected tensors."""
  checks.require(max_bits in range(1, 9), "max_bits", max_bits, "1 to 8")

  def init_codebooks(params, bits):
    if checks.concrete(bits):
      allowed = f"1 to max_bits ({max_bits}), or {FULL_PRECISION} for full precision"
      checks.require(bits in (*range(1, max_bits + 1), FULL_PRECISION), "bits", bits, allowed)

    def centers_of(tensor):
      num_centers = 2 ** jnp.minimum(bits, max_bits)
      centers = init(tensor, num_centers, 2**max_bits)
      # What does not fit and was traced cannot be refused here, but must not train either.
      centers = jnp.where(bits <= max_bits, centers, jnp.nan)
      return jnp.where(bits == FULL_PRECISION, jnp.inf, centers)

    flat = sorted(ops.flatten(params).items())
    return {path: centers_of(x) for path, x in flat if select(path)}

  return init_codebooks


def _keep(codebooks, params, slopes, rate, t):
  """The `update` of centers that stay where they are."""
  del params, slopes, rate, t
  return codebooks


def _map_codebooks(step: Callable, codebooks: dict[str, Array], *trees: PyTree) -> dict[str, Array]:
  """Applies step(centers, tensor of each tree) to every codebook."""
  flat = [ops.flatten(tree) for tree in trees]
  return {path: step(centers, *(f[path] for f in flat)) for path, centers in codebooks.items()}


def _straight_through(y: Array, value: Array) -> Array:
  """Returns `value`, whose derivative in y is 0, with one of 1."""
  return value + (y - jax.lax.stop_gradient(y))  # the bracket is exactly 0


def _clipped(params: PyTree, codebooks: dict[str, Array], bound: Array | float | None) -> PyTree:
  """Clips the tensors with a codebook in use to [-bound, bound]; without a bound none."""
  if bound is None:
    return params
  clip = lambda x, c: jnp.where(codebook.is_used(c), jnp.clip(x, -bound, bound), x)
  return ops.map_quantised(clip, codebooks, params)


def _check_positive(**options: Array | float | None) -> None:
  """Requires every option that is given to be positive."""
  for name, value in options.items():
    if value is not None:
      checks.positive(name, value)
