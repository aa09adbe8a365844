"""The networks, by name, as `Model`s: pairs of pure functions that take raw images.

A network of one's own needs nothing from here but the pair; `from_linen` and `from_nnx` make it of
a flax module. Where a quantiser exempts the first and the last layer, it finds them by their names:
call these "stem" and "head", and parameters "kernel" and "bias".
"""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qupeD_jax import checks
from qupeD_jax.models import architecture
from qupeD_jax.models.cnn import CNN
from qupeD_jax.models.conv import forms
from qupeD_jax.models.flax_modules import ImageShape, PerChannel, wrapped
from qupeD_jax.models.flax_modules import from_linen as from_linen
from qupeD_jax.models.flax_modules import from_nnx as from_nnx
from qupeD_jax.models.mlp import MLP
from qupeD_jax.models.resnet import ResNet
from qupeD_jax.types import Model


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
  made = wrapped(_MODULES[model](**fields, **options), image_shape, mean=mean, std=std)
  jax.eval_shape(made.init, jax.random.key(0))  # an image too small shows now, not at the first use
  if options:  # no file has room for them
    return made
  inputs = {"num_classes": num_classes, "image_shape": image_shape, "mean": mean, "std": std}
  return made._replace(about={"model": model, "input": inputs})


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


def _known(name: str) -> str:
  nearest = max(NAMES, key=lambda known: difflib.SequenceMatcher(None, name, known).ratio())
  return f"{', '.join(NAMES)} (nearest: {nearest})"
