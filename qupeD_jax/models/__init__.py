"""The networks, by name, as `Model`s: pairs of pure functions that take raw images.

A network of one's own needs nothing from here but the pair; `from_linen` makes it of a flax module.
Where a quantiser exempts the first and the last layer, it finds them by their names: call these
"stem" and "head", and parameters "kernel" and "bias".
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from qupeD_jax import checks
from qupeD_jax.models import architecture
from qupeD_jax.models.cnn import CNN
from qupeD_jax.models.conv import forms
from qupeD_jax.models.mlp import MLP
from qupeD_jax.models.resnet import ResNet
from qupeD_jax.types import Array, Model, PyTree

ImageShape = tuple[int, int, int]  # H, W, C
PerChannel = float | Sequence[float]


def _mlp(conv_form: str | None, **fields) -> nn.Module:
  del conv_form  # no convolution to carry out
  return MLP(**fields)


_MODULES: dict[str, Callable[..., nn.Module]] = {
  "mlp": _mlp,
  "mlp2": partial(_mlp, widths=(32, 32)),
  "cnn1": CNN,
  "cnn2": partial(CNN, channels=(32, 32), widths=(192, 96)),
  "cnn3": partial(CNN, channels=(16, 16), widths=(96, 48)),
  "resnet8": partial(ResNet, blocks=1),
  "resnet20": partial(ResNet, blocks=3),
  "resnet32": partial(ResNet, blocks=5),
}
NAMES = tuple(_MODULES)
DTYPES = ("float32", "bfloat16")


def make(
  model: str,
  num_classes: int | None = None,
  image_shape: ImageShape | None = None,
  *,
  mean: PerChannel = 0.0,
  std: PerChannel = 255.0,
  dtype: str = "float32",
  conv_form: str | None = None,
  input: Mapping[str, Any] | None = None,
  client: int | None = None,
  bits: int | None = None,
  seed: int | None = None,
  **options,
) -> Model:
  """Makes a network by name, or anew by what a shipped model's file says: `make(**metadata)`.

  Args:
    model: name of the network, one of NAMES.
    num_classes: logits per example.
    image_shape: (H, W, C).
    mean, std: of the raw images, per channel or for all; inputs become (x - mean) / std.
    dtype: of the computation, one of DTYPES; parameters and logits are float32.
    conv_form: one of forms.FORMS; None is the fastest.
    input: of a file's metadata, what its images are: num_classes, image_shape, mean and std are
      taken from there.
    client, bits, seed: of a file's metadata, whose model it holds; a network is the same for all.
    **options: fields of the module: `widths` of an MLP or a CNN, `channels` of a CNN or a ResNet.

  Returns:
    A Model whose apply takes x [B, H, W, C], uint8 or float.

  Raises:
    BadInput: an unknown name, dtype or form, no classes, or an image shape the network cannot take.

  >>> model = make("cnn1", num_classes=10, image_shape=(28, 28, 1))
  >>> variables = model.init(jax.random.key(0))
  >>> list(variables["params"])
  ['stem', 'conv_1', 'dense_1', 'dense_2', 'head']
  >>> logits, stats = model.apply(variables, jnp.zeros((3, 28, 28, 1), jnp.uint8), False)
  >>> logits.shape, stats
  ((3, 10), {})
  >>> anew = make(**model.about, client=7, bits=2)
  >>> anew.about == model.about
  True
  """
  del client, bits, seed
  if input is not None:
    own = {key: input[key] for key in ("num_classes", "image_shape", "mean", "std") if key in input}
    return make(model, **own, dtype=dtype, conv_form=conv_form, **options)
  checks.require(model in NAMES, "model", model, _known(model))
  checks.require(dtype in DTYPES, "dtype", dtype, " or ".join(DTYPES))
  known = (*forms.FORMS, None)
  checks.require(conv_form in known, "conv_form", conv_form, ", ".join(map(str, known)))
  checks.at_least("num_classes", num_classes, 1)
  checks.require(image_shape is not None, "image_shape", None, "(height, width, channels)")
  fields = {"num_classes": num_classes, "dtype": jnp.dtype(dtype), "conv_form": conv_form}
  made = from_linen(_MODULES[model](**fields, **options), image_shape, mean=mean, std=std)
  jax.eval_shape(made.init, jax.random.key(0))  # an image too small shows now, not at the first use
  if options:  # no file has room for them
    return made
  inputs = {"num_classes": num_classes, "image_shape": image_shape, "mean": mean, "std": std}
  return made._replace(about={"model": model, "input": inputs})


def from_linen(
  module: nn.Module,
  image_shape: ImageShape,
  *,
  mean: PerChannel = 0.0,
  std: PerChannel = 255.0,
) -> Model:
  """Wraps a flax module as a Model that takes raw images.

  In training, examples that do not count stay out of the statistics of every `nn.BatchNorm` in it.

  Args:
    module: called as module(x [B, H, W, C] float32, train), returns logits [B, classes]. Its
      collections besides "params", such as "batch_stats", become the Model's stats.
    image_shape: (H, W, C).
    mean, std: of the raw images, per channel or for all; the module sees (x - mean) / std.

  >>> class Linear(nn.Module):
  ...   @nn.compact
  ...   def __call__(self, x, train):
  ...     return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))
  >>> model = from_linen(Linear(), image_shape=(28, 28, 1))
  >>> model.init(jax.random.key(0))["params"]["head"]["kernel"].shape
  (784, 10)
  """
  normalise = _normaliser(image_shape, mean, std)

  def init(key):
    x = normalise(jnp.zeros((1, *image_shape)))
    stats = dict(module.init(key, x, train=False))
    return {"params": stats.pop("params"), "stats": stats}

  def apply(variables, x, train, mask=None):
    chex.assert_shape(x, (None, *image_shape))
    params, stats = variables["params"], variables["stats"]
    renewed = list(stats) if train else []
    with nn.intercept_methods(partial(_masking, mask)):
      logits, new = module.apply(
        {"params": params, **stats}, normalise(x), train=train, mutable=renewed
      )
    return logits.astype(jnp.float32), {**stats, **new}

  return Model(init, apply)


def from_nnx(
  module: Callable[[nnx.Rngs], nnx.Module],
  image_shape: ImageShape,
  *,
  mean: PerChannel = 0.0,
  std: PerChannel = 255.0,
) -> Model:
  """Wraps a flax.nnx module as a Model that takes raw images.

  Its `nnx.Param`s are trained; what is an `nnx.BatchStat` becomes the Model's stats. Where a client
  has fewer rows than a batch has slots, those that fill it up enter the statistics: nnx's layers
  know no mask.

  Args:
    module: rngs -> the module, called as module(x [B, H, W, C] float32), returns logits
      [B, classes]; its train() and eval() are called before.
    image_shape: (H, W, C).
    mean, std: of the raw images, per channel or for all; the module sees (x - mean) / std.

  Raises:
    BadInput: the module keeps random numbers, as dropout does.

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
  graph, params_like, stats_like, rest = nnx.split(
    module(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...
  )
  if jax.tree.leaves(rest):
    raise checks.BadInput("module: keeps random numbers, as dropout does: allowed is one without")

  def init(key):
    _, params, stats, _ = nnx.split(module(nnx.Rngs(key)), nnx.Param, nnx.BatchStat, ...)
    return {"params": _named(nnx.to_pure_dict(params)), "stats": _named(nnx.to_pure_dict(stats))}

  def apply(variables, x, train, mask=None):
    del mask
    chex.assert_shape(x, (None, *image_shape))
    params = _filled(params_like, variables["params"])
    net = nnx.merge(graph, params, _filled(stats_like, variables["stats"]), rest)
    if train:
      net.train()
    else:
      net.eval()
    logits = net(normalise(x))
    stats = _named(nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)))
    return logits.astype(jnp.float32), stats

  return Model(init, apply)


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


def _normaliser(image_shape: ImageShape, mean: PerChannel, std: PerChannel) -> Callable:
  """Returns x -> (x - mean) / std, float32, for images of this shape."""
  for size in image_shape:
    checks.at_least("image shape", size, 1)
  mean = _per_channel("mean", mean, image_shape[-1])
  std = _per_channel("std", std, image_shape[-1])
  checks.require((np.isfinite(std) & (std > 0)).all(), "std", std, "finite and above 0")
  return lambda x: (x.astype(jnp.float32) - mean) / std


def _masking(mask: Array | None, call: Callable, args: tuple, options: dict, context) -> Array:
  """Calls a method of a flax module, a batch normalisation's with the examples that count."""
  is_norm = isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"
  if mask is None or not is_norm:
    return call(*args, **options)
  # In a client without rows none counts: then all do, for a mean of nothing would be a NaN.
  counts = (mask > 0) | ~jnp.any(mask > 0)
  per_example = counts.reshape(-1, *(1,) * (args[0].ndim - 1))
  return call(*args, **{"mask": per_example, **options})


def layers(name: str) -> architecture.Layers:
  """Lists what a network is made of, in order.

  Args:
    name: one of NAMES.

  Raises:
    BadInput: an unknown name.

  >>> layers("cnn1")[:3]
  (Conv(name='stem', stride=1, has_bias=True), Relu(), MaxPool())
  """
  checks.require(name in NAMES, "model", name, _known(name))
  return architecture.layers(_MODULES[name](num_classes=1, dtype=jnp.float32, conv_form=None))


def same_outputs(models: Mapping[str, Model], image_shape: ImageShape) -> int:
  """Checks that networks which teach one another have equally many logits, and returns how many.

  Nothing is computed: shapes alone are traced.

  Args:
    models: by the name to blame them under.
    image_shape: (H, W, C) that all of them take.

  Raises:
    BadInput: their numbers of logits differ.

  >>> shape = (8, 8, 1)
  >>> same_outputs({"server": make("mlp", 10, shape), "clients": make("cnn2", 10, shape)}, shape)
  10
  """
  sizes = {name: _num_outputs(model, image_shape) for name, model in models.items()}
  if len(set(sizes.values())) != 1:
    listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise checks.BadInput(f"unequal model output sizes: {listed}")
  return next(iter(sizes.values()))


def _num_outputs(model: Model, image_shape: ImageShape) -> int:
  def logits(key, x):
    return model.apply(model.init(key), x, False)[0]

  x = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
  return jax.eval_shape(logits, jax.random.key(0), x).shape[-1]


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


def _known(name: str) -> str:
  nearest = max(NAMES, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())
  return f"{', '.join(NAMES)} (nearest: {nearest})"
