"""Convolutions as matrix products: a window of the image is a row, the kernel a matrix.

With k // 2 zeros on every side, for kernels of odd size k; `forms.py` says which is good for what.
"""

import jax.numpy as jnp
from jax import lax

from qupeD_jax.types import Array


def im2col(x: Array, kernel: Array, stride: int = 1) -> Array:
  """Multiplies the window of every stride-th pixel by the kernel.

  Args:
    x: [B, H, W, C], float.
    kernel: [k, k, C, D] of x's dtype.
    stride: at least 1.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), D] of x's dtype.
  """
  size, _, _, features = kernel.shape
  padded = _pad(x, size // 2, x.shape[1] + size - 1, x.shape[2] + size - 1)
  return _matmul(_windows(padded, size, stride), kernel.reshape(-1, features))


def tiles(x: Array, kernel: Array) -> Array:
  """Multiplies the windows of 2x2 pixels by the kernel, shifted for each; as `im2col`, stride 1."""
  batch, height, width, _ = x.shape
  rows, columns = -(-height // 2), -(-width // 2)
  pixels = blocks(x, kernel, rows, columns).swapaxes(2, 3)
  return pixels.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]


def blocks(x: Array, kernel: Array, rows: int, columns: int) -> Array:
  """Convolves into so many blocks of 2x2 pixels, from the upper left on.

  Args:
    x: [B, H, W, C], float.
    kernel: [k, k, C, D] of x's dtype.
    rows, columns: of blocks.

  Returns:
    [B, rows, columns, 2, 2, D] of x's dtype.
  """
  size, _, _, features = kernel.shape
  padded = _pad(x, size // 2, 2 * rows + size - 1, 2 * columns + size - 1)
  windows = _windows(_space_to_depth(padded), (size + 1) // 2)
  return _matmul(windows, _tile_kernel(kernel)).reshape(-1, rows, columns, 2, 2, features)


def _tile_kernel(kernel: Array) -> Array:
  """Lays a kernel [k, k, C, D] out for tiles: [(k+1)^2 C, 4 D], a column per pixel and feature."""
  shifts = [((down, 1 - down), (right, 1 - right)) for down in (0, 1) for right in (0, 1)]
  shifted = [jnp.pad(kernel, (*shift, (0, 0), (0, 0))) for shift in shifts]
  size, _, channels, features = kernel.shape
  # Treated as an image, so that its rows come in the order of the windows' columns.
  image = jnp.stack(shifted, axis=3).reshape(size + 1, size + 1, channels * 4 * features)
  return _space_to_depth(image).reshape(-1, 4 * features)


def _space_to_depth(x: Array) -> Array:
  """Moves blocks of 2x2 pixels into channels: [..., 2h, 2w, C] to [..., h, w, 4C]."""
  *lead, height, width, channels = x.shape
  apart = x.reshape(*lead, height // 2, 2, width // 2, 2, channels).swapaxes(-4, -3)
  return apart.reshape(*lead, height // 2, width // 2, 4 * channels)


def _windows(x: Array, size: int, stride: int = 1) -> Array:
  """Lays full windows out as rows: [B, H, W, C] to [B, rows, columns, size^2 C].

  With stride 1 there are H-size+1 rows and W-size+1 columns of them; else every stride-th is taken.
  """
  rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
  shifts = [(down, right) for down in range(size) for right in range(size)]
  shifted = [x[:, d : d + rows : stride, r : r + columns : stride] for d, r in shifts]
  return jnp.concatenate(shifted, axis=-1)


def _matmul(windows: Array, matrix: Array) -> Array:
  """Multiplies rows [B, H, W, N] by [N, M]; on a CPU faster flat than with axes apart."""
  flat = windows.reshape(-1, windows.shape[-1]) @ matrix
  return flat.reshape(*windows.shape[:-1], matrix.shape[1])


def _pad(x: Array, low: int, height: int, width: int) -> Array:
  """Pads with `low` zeros at the top and left, and pads or crops the rest to [height, width]."""
  high = height - low - x.shape[1], width - low - x.shape[2]
  edges = ((0, 0, 0), (low, high[0], 0), (low, high[1], 0), (0, 0, 0))
  return lax.pad(x, jnp.zeros((), x.dtype), edges)
