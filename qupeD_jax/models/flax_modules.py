"""Networks of one's own: modules of flax, linen's and nnx's, as Models that take raw images."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from qupeD_jax import checks
from qupeD_jax.quantization import ops
from qupeD_jax.types import Array, Model, PyTree

ImageShape = tuple[int, int, int]  # H, W, C
PerChannel = float | Sequence[float]


def from_linen(
  module: nn.Module,
  image_shape: ImageShape,
  *,
  mean: PerChannel = 0.0,
  std: PerChannel = 255.0,
) -> Model:
  """Wraps a flax module as a Model that takes raw images.

  In training, examples that do not count stay out of the statistics of every `nn.BatchNorm` in it,
  and what it draws, as dropout does, has a key by client, round and step.

  Args:
    module: called as module(x [B, H, W, C] float32), with `train` or `deterministic` where it takes
      one of these; returns logits [B, classes]. Its collections besides "params", such as
      "batch_stats", become the Model's stats.
    image_shape: (H, W, C).
    mean, std: of the raw images, per channel or for all; the module sees (x - mean) / std.

  Raises:
    BadInput: layers of the module want to know whether they train, and it cannot be told.

  Warns:
    UserWarning: no layer is called "stem", or "head", so that the first or the last will be
      quantised; a quantizer's `select` says which are.

  >>> class Linear(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x):
  ...     return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))
  >>> model = from_linen(Linear(), image_shape=(28, 28, 1))
  >>> model.init(jax.random.key(0))["params"]["head"]["kernel"].shape
  (784, 10)
  """
  model = wrapped(module, image_shape, mean=mean, std=std)
  model = model._replace(draws=_draws(module, model, image_shape))
  _tell_what_is_quantised(type(module).__name__, model)
  return model


def wrapped(
  module: nn.Module, image_shape: ImageShape, *, mean: PerChannel, std: PerChannel
) -> Model:
  """Wraps a module as `from_linen` does, one that is known to draw nothing."""
  normalise, mode = _normaliser(image_shape, mean, std), _mode(module)

  def init(key):
    x = normalise(jnp.zeros((1, *image_shape)))
    stats = dict(module.init(key, x, **mode(False)))
    return {"params": stats.pop("params"), "stats": stats}

  def apply(variables, x, train, mask=None, key=None):
    chex.assert_shape(x, (None, *image_shape))
    params, stats = variables["params"], variables["stats"]
    renewed = list(stats) if train else []
    rngs = {} if key is None else {"params": key}  # linen draws for all purposes from this one
    with nn.intercept_methods(partial(_masking, mask)):
      logits, new = module.apply(
        {"params": params, **stats}, normalise(x), mutable=renewed, rngs=rngs, **mode(train)
      )
    return logits.astype(jnp.float32), {**stats, **new}

  return Model(init, apply)


def _mode(module: nn.Module) -> Callable[[bool], dict[str, bool]]:
  """Returns how a module is told whether it trains: train -> options of its call."""
  parameters = inspect.signature(type(module).__call__).parameters
  if "train" in parameters:
    return lambda train: {"train": train}
  if "deterministic" in parameters:
    return lambda train: {"deterministic": not train}
  return lambda train: {}


def _draws(module: nn.Module, model: Model, image_shape: ImageShape) -> bool:
  """Tells whether a module draws random numbers in training; nothing is computed for it.

  Raises:
    BadInput: its layers want to know whether they train, and it takes no such argument.
  """
  x = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

  def trace(train):
    variables = jax.eval_shape(model.init, jax.random.key(0))
    jax.eval_shape(lambda v, x: model.apply(v, x, train), variables, x)

  try:
    trace(False)
    trace(True)
  except flax.errors.InvalidRngError:
    if _mode(module)(True):
      return True
    raise _untold(module, "it draws random numbers") from None
  except (ValueError, flax.errors.FlaxError) as error:
    if _mode(module)(True) or isinstance(error, checks.BadInput):
      raise
    raise _untold(module, str(error).splitlines()[0]) from error
  return False


def _untold(module: nn.Module, reason: str) -> checks.BadInput:
  wants = "its __call__ needs an argument `train`, or `deterministic`, for its layers"
  return checks.BadInput(f"module {type(module).__name__}: {wants} ({reason})")


def _tell_what_is_quantised(name: str, model: Model) -> None:
  """Warns where the first or the last layer will be quantised because it has another name."""
  params = jax.eval_shape(model.init, jax.random.key(0))["params"]
  paths = [*ops.flatten(params)]
  layers = {layer for path in paths for layer in path.split("/")[:-1]}
  lacking = [layer for layer in ("stem", "head") if layer not in layers]
  quantised = [path.removesuffix("/kernel") for path in paths if ops.is_quantised(path)]
  if lacking and quantised:
    warnings.warn(
      f"module {name}: quantised will be {', '.join(quantised)}: no layer is called "
      f"{' or '.join(lacking)}, as those that stay at full precision are; `select` of a quantizer "
      "chooses others",
      stacklevel=3,
    )


def _masking(mask: Array | None, call: Callable, args: tuple, options: dict, context) -> Array:
  """Calls a method of a flax module, a batch normalisation's with the examples that count."""
  is_norm = isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"
  if mask is None or not is_norm:
    return call(*args, **options)
  # In a client without rows none counts: then all do, for a mean of nothing would be a NaN.
  counts = (mask > 0) | ~jnp.any(mask > 0)
  per_example = counts.reshape(-1, *(1,) * (args[0].ndim - 1))
  return call(*args, **{"mask": per_example, **options})


# --- nnx


def from_nnx(
  module: Callable[[nnx.Rngs], nnx.Module],
  image_shape: ImageShape,
  *,
  mean: PerChannel = 0.0,
  std: PerChannel = 255.0,
) -> Model:
  """Wraps a flax.nnx module as a Model that takes raw images.

  Its `nnx.Param`s are trained; what is an `nnx.BatchStat` becomes the Model's stats, and what it
  draws in training, as dropout does, has a key by client, round and step. Where a client has fewer
  rows than a batch has slots, those that fill it up enter the statistics: nnx's layers know no
  mask.

  Args:
    module: rngs -> the module, called as module(x [B, H, W, C] float32), returns logits
      [B, classes]; its train() and eval() are called before.
    image_shape: (H, W, C).
    mean, std: of the raw images, per channel or for all; the module sees (x - mean) / std.

  Raises:
    BadInput: the module keeps variables of another kind.

  Warns:
    UserWarning: as of `from_linen`.

  >>> class Linear(nnx.Module):
  ...   def __init__(self, rngs):
  ...     self.head = nnx.Linear(784, 10, rngs=rngs)
  ...   def __call__(self, x):
  ...     return self.head(x.reshape(len(x), -1))
  >>> model = from_nnx(Linear, image_shape=(28, 28, 1))
  >>> model.init(jax.random.key(0))["params"]["head"]["kernel"].shape
  (784, 10)
  """
  normalise = _normaliser(image_shape, mean, std)
  kinds = nnx.Param, nnx.BatchStat, nnx.RngState, ...
  first = module(nnx.Rngs(0))
  graph, params_like, stats_like, draws_like, rest = nnx.split(first, *kinds)
  for _, variable in nnx.to_flat_state(rest):
    kept, allowed = type(variable).__name__, "Param, BatchStat and random numbers alone"
    raise checks.BadInput(f"module {type(first).__name__}: keeps {kept}: allowed is {allowed}")

  def init(key):
    _, params, stats, *_ = nnx.split(module(nnx.Rngs(key)), *kinds)
    return {"params": _named(nnx.to_pure_dict(params)), "stats": _named(nnx.to_pure_dict(stats))}

  def apply(variables, x, train, mask=None, key=None):
    del mask
    chex.assert_shape(x, (None, *image_shape))
    params = _filled(params_like, variables["params"])
    stats = _filled(stats_like, variables["stats"])
    draws = draws_like if key is None else _reseeded(draws_like, key)
    net = nnx.merge(graph, params, stats, draws, rest)
    if train:
      net.train()
    else:
      net.eval()
    logits = net(normalise(x))
    stats = _named(nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)))
    return logits.astype(jnp.float32), stats

  model = Model(init, apply, draws=bool(jax.tree.leaves(draws_like)))
  _tell_what_is_quantised(type(first).__name__, model)
  return model


def _reseeded(draws: nnx.State, key: Array) -> nnx.State:
  """Gives every stream of random numbers a key of its own and lets it count from 0."""

  def anew(number: int, leaf: Any) -> Array:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.fold_in(key, number) if is_key else jnp.zeros_like(leaf)

  leaves, structure = jax.tree.flatten(draws)
  return jax.tree.unflatten(structure, [anew(i, leaf) for i, leaf in enumerate(leaves)])


def _named(tree: PyTree) -> PyTree:
  """Turns the numbers of layers in lists into names."""
  return {str(k): _named(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _filled(like: nnx.State, named: PyTree) -> nnx.State:
  """Puts arrays by name into a state of the same layers."""

  def leaves(like, named):
    if not isinstance(like, dict):
      return [named]
    return [leaf for k, v in sorted(like.items()) for leaf in leaves(v, named[str(k)])]

  return jax.tree.unflatten(jax.tree.structure(like), leaves(nnx.to_pure_dict(like), named))


# --- both


def _normaliser(image_shape: ImageShape, mean: PerChannel, std: PerChannel) -> Callable:
  """Returns x -> (x - mean) / std, float32, for images of this shape."""
  for size in image_shape:
    checks.at_least("image shape", size, 1)
  mean = _per_channel("mean", mean, image_shape[-1])
  std = _per_channel("std", std, image_shape[-1])
  checks.require((np.isfinite(std) & (std > 0)).all(), "std", std, "finite and above 0")
  return lambda x: (x.astype(jnp.float32) - mean) / std


def _per_channel(name: str, value: PerChannel, channels: int) -> np.ndarray:
  """Broadcasts a normalisation constant to [C] float32."""
  value = np.asarray(value, np.float32)
  checks.require(
    value.shape in ((), (channels,)),
    name,
    value,
    f"one number, or one for each of {channels} channels",
  )
  return np.broadcast_to(value, (channels,))
