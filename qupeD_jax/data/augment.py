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
    fill: of the padding, in the units of the images, for all channels or for each; 0 is black in
      uint8, which takes 0 to 255. The usual recipe pads images after their normalisation with 0:
      that is the mean color here.

  Returns:
    (key, x [B, H, W, C]) -> x [B, H, W, C], in x's dtype; a pure function, for
    `clients.local_round`.

  Raises:
    BadInput: padding is negative or fill not finite; when called, padding is not below H and W, or
      fill no pixel value of uint8 images.
  """
  checks.at_least("padding", padding, 0)
  pixels = np.asarray(fill, np.float32)
  checks.require(np.isfinite(pixels).all(), "fill", fill, "finite")

  def augment(key, x):
    _require_fit(x, padding, fill)
    flip_key, offset_key = jax.random.split(key)
    flips = jax.random.bernoulli(flip_key, shape=(len(x),))
    offsets = jax.random.randint(offset_key, (len(x), 2), -padding, padding + 1)
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    outside = (jnp.rint(pixels) if whole else jnp.asarray(pixels)).astype(x.dtype)
    return jax.vmap(lambda *image: _move(*image, outside))(x, flips, offsets)

  return augment


def _require_fit(x: Array, padding: int, fill: Sequence[float] | float) -> None:
  """Requires images larger than their shifts, and a fill that their dtype can hold."""
  smallest = min(x.shape[1:3])
  checks.require(padding < smallest, "padding", padding, f"below {smallest}, the size of images")
  held = x.dtype != np.uint8 or (np.min(fill) >= 0 and np.max(fill) <= 255)
  checks.require(held, "fill", fill, "from 0 to 255")


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
