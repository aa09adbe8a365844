"""Residual networks for small images: He et al., "Deep residual learning", CVPR 2016, section 4.2.

Shortcuts have no parameters (the paper's option A). Convolution kernels start from He's normal
distribution, N(0, 2 / fan in), as in the usual PyTorch implementation; the head as in the other
networks.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from qupeD_jax import checks
from qupeD_jax.models import layers
from qupeD_jax.models.conv import forms
from qupeD_jax.types import Array

EPSILON = 1e-5  # PyTorch's default

_he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Conv(nn.Module):
  """A 3x3 convolution without bias: [B, H, W, C] to [B, ceil(H/s), ceil(W/s), features]."""

  features: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  form: str | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param("kernel", _he_normal, (3, 3, x.shape[-1], self.features))
    x, kernel = (a.astype(self.dtype) for a in (x, kernel))
    return forms.conv(x, kernel, self.form, stride=self.stride)


def batch_norm(x: Array, train: bool, *, name: str, dtype: jnp.dtype) -> Array:
  """Applies batch normalisation inside a compact module, its statistics in float32.

  Momentum is PyTorch's default; it calls 0.1 what is 0.9 here.
  """
  # PyTorch's running variance is that of a sample, divided by n - 1, and flax's is divided by n:
  # next to nothing for n = B H W pixels, and statistics that were imported are used as they are.
  return nn.BatchNorm(not train, momentum=0.9, epsilon=EPSILON, dtype=dtype, name=name)(x)


class Block(nn.Module):
  """Two convolutions around which the input goes by: [B, H, W, C] to [B, H/s, W/s, features]."""

  features: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  form: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    options = {"dtype": self.dtype, "form": self.form}
    y = Conv(self.features, self.stride, name="conv_1", **options)(x)
    y = nn.relu(batch_norm(y, train, name="norm_1", dtype=self.dtype))
    y = Conv(self.features, name="conv_2", **options)(y)
    y = batch_norm(y, train, name="norm_2", dtype=self.dtype)
    return nn.relu(y + shortcut(x, self.features, self.stride))


def shortcut(x: Array, features: int, stride: int) -> Array:
  """Takes every stride-th pixel, with zeros as the channels that x lacks, half of them below.

  >>> shortcut(jnp.arange(8.0).reshape(1, 2, 2, 2), features=4, stride=2).tolist()
  [[[[0.0, 0.0, 1.0, 0.0]]]]
  """
  lacking = features - x.shape[-1]
  below, above = lacking // 2, lacking - lacking // 2
  return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (below, above)))


class ResNet(nn.Module):
  """A "stem", stages of blocks "stage_1_block_0", ..., a mean over pixels, and a "head".

  Each stage but the first halves the image. With b blocks in each of three stages there are 6b + 2
  layers: ResNet-20 has b = 3.
  """

  num_classes: int
  blocks: int = 3  # of each stage
  channels: Sequence[int] = (16, 32, 64)  # of each stage
  dtype: jnp.dtype = jnp.float32  # of the computation; parameters and statistics are float32
  conv_form: str | None = None  # how convolutions are carried out: one of forms.FORMS

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps x [B, H, W, C] to logits [B, num_classes] float32."""
    rising = list(self.channels) == sorted(self.channels)
    checks.require(rising, "channels", self.channels, "in rising order: shortcuts drop none")
    options = {"dtype": self.dtype, "form": self.conv_form}
    x = Conv(self.channels[0], name="stem", **options)(x)
    x = nn.relu(batch_norm(x, train, name="stem_norm", dtype=self.dtype))
    for stage, features in enumerate(self.channels, start=1):
      for block in range(self.blocks):
        stride = 2 if stage > 1 and block == 0 else 1
        name = f"stage_{stage}_block_{block}"
        x = Block(features, stride, name=name, **options)(x, train)
    return layers.head(x.astype(jnp.float32).mean((1, 2)), self.num_classes)
