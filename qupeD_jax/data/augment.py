"""Augmentation of a drawn batch, on the device: random left-right flips and shifted crops."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax import checks
from qupeD_jax.types import Array


def flip_and_crop(padding: int = 4, fill: Sequence[float] | float = 0) -> Callable:
  """Builds the augmentation usual for CIFAR-10 (He et al., "Deep Residual Learning", 2016).

  Each image, by itself, is flipped left-right with probability 1/2 and cropped to its size at a
  random place of its padded self.

  Args:
    padding: pixels on every side, at least 0; offsets from -padding to padding are equally likely.
    fill: of the padding, in pixel values 0 to 255, for all channels or for each; 0 is black. The
      usual recipe pads images after their normalisation with 0: that is the mean color here.

  Returns:
    (key, x [B, H, W, C]) -> x [B, H, W, C], in x's dtype; a pure function, for
    `client.local_round`.

  Raises:
    BadInput: padding or fill is out of range.
  """
  checks.at_least("padding", padding, 0)
  pixels = np.asarray(fill, np.float32)
  checks.require(np.all((pixels >= 0) & (pixels <= 255)), "fill", fill, "from 0 to 255")

  def augment(key, x):
    flip_key, offset_key = jax.random.split(key)
    flips = jax.random.bernoulli(flip_key, shape=(len(x),))
    offsets = jax.random.randint(offset_key, (len(x), 2), -padding, padding + 1)
    outside = jnp.rint(pixels).astype(x.dtype)
    return jax.vmap(lambda *image: _move(*image, outside))(x, flips, offsets)

  return augment


def _move(image: Array, flip: Array, offset: Array, outside: Array) -> Array:
  """Takes the window of an image [H, W, C] at an offset [2] int32, after a flip [] bool or not.

  One gather by computed indices: for 8 clients of 50 CIFAR-10 images 0.3 ms on a CPU, where a slice
  at a traced offset took 0.8 ms and products with one-hot matrices 2.8 ms.
  """
  height, width, _ = image.shape
  rows, columns = jnp.arange(height) + offset[0], jnp.arange(width) + offset[1]
  inside = _within(rows, height)[:, None] & _within(columns, width)
  columns = jnp.where(flip, width - 1 - columns, columns)
  pixels = image.at[rows[:, None], columns].get(mode="clip")
  return jnp.where(inside[..., None], pixels, outside)


def _within(index: Array, size: int) -> Array:
  return (index >= 0) & (index < size)
