"""A small convolutional network; its defaults are CNN1 of QuPeD's experiments, arXiv 2107.13892."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from qupeD_jax import checks
from qupeD_jax.models import layers
from qupeD_jax.models.conv import forms
from qupeD_jax.types import Array


class ConvReluPool(nn.Module):
  """A convolution with bias, ReLU and 2x2 max-pooling: [B, H, W, C] to [B, H/2, W/2, features]."""

  features: int
  size: int = 5
  dtype: jnp.dtype = jnp.float32
  form: str | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    init = layers.fan_in_uniform(self.size**2 * x.shape[-1])
    kernel = self.param("kernel", init, shape)
    bias = self.param("bias", init, shape[-1:])
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    return forms.conv_relu_pool(x, kernel, bias, self.form)


class CNN(nn.Module):
  """Convolution blocks "stem", "conv_1", ..., then dense layers "dense_1", ..., "head"."""

  num_classes: int
  channels: Sequence[int] = (64, 64)
  widths: Sequence[int] = (384, 192)
  dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32
  conv_form: str | None = None  # how convolutions are carried out: one of forms.FORMS

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps x [B, H, W, C] to logits [B, num_classes] float32."""
    del train  # nothing here behaves differently
    low = 2 ** len(self.channels)
    checks.require(min(x.shape[1:3]) >= low, "image shape", x.shape[1:], f"{low}x{low} or larger")
    for i, features in enumerate(self.channels):
      name = f"conv_{i}" if i else "stem"
      x = ConvReluPool(features, dtype=self.dtype, form=self.conv_form, name=name)(x)
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.widths, start=1):
      x = nn.relu(layers.dense(x, width, name=f"dense_{i}", dtype=self.dtype))
    return layers.head(x, self.num_classes)
