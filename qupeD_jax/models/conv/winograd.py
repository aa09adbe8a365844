"""Convolutions with fewer products, of one client on a CPU: Winograd's by rows, tiles by columns.

Rows of the result are computed four at a time, from the k + 3 rows of the image under them. Taken
as coefficients, rows of image and kernel are polynomials, and a product of polynomials is known by
its values at k + 3 points: so many products stand for 4 k, 2.5 times fewer for k = 5. This is
F(4, k) of S. Winograd, Arithmetic Complexity of Computations, SIAM 1980, brought to networks by
A. Lavin and S. Gray, arXiv 1509.09308. It rounds about four times as coarsely as a plain
convolution (`tests/test_winograd.py`).

Columns come four at a time too, by a kernel k + 3 wide that holds the k columns four times over,
shifted, as the tiles of `models/conv.py` do. Of what was saved it takes a factor (k + 3) / k back;
but the matrix product is four times as wide then, and its library faster by more than that.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from qupeD_jax.types import Array

TILE = 4  # rows and columns of the result at a time
_POINTS = (0, 1, -1, 2, -2, 1 / 2, -1 / 2)  # and infinity: enough for k = 5


def convolve(x: Array, kernel: Array) -> Array:
  """Convolves with k // 2 zeros on every side.

  Args:
    x: [B, H, W, C] float32.
    kernel: [k, k, C, D] float32, k of 1, 3 or 5.

  Returns:
    [B, H, W, D] float32.
  """
  batch, height, width, _ = x.shape
  size, _, channels, features = kernel.shape
  to_result, of_kernel, _ = _matrices(size)
  kernels = _shifted(_mix(of_kernel, kernel)).reshape(
    -1, size + TILE - 1, channels, TILE * features
  )
  values = _products(_of_image(x, size), kernels, strides=(1, TILE))
  rows, columns = _tiles(height), _tiles(width)
  values = values.reshape(-1, batch, rows, TILE * columns, features)
  tiles = jnp.moveaxis(_mix(to_result, values), 0, 2)
  return tiles.reshape(batch, TILE * rows, TILE * columns, features)[:, :height, :width]


def grad_kernel(x: Array, g: Array, size: int) -> Array:
  """Turns the gradient of `convolve`'s result into that of its kernel.

  Args:
    x: [B, H, W, C] float32.
    g: [B, H, W, D] float32.
    size: k.

  Returns:
    [k, k, C, D] float32.
  """
  batch, height, width, features = g.shape
  to_result, of_kernel, _ = _matrices(size)
  rows, columns = _tiles(height), _tiles(width)
  full = ((0, 0), (0, TILE * rows - height), (0, TILE * columns - width), (0, 0))
  tiles = jnp.pad(g, full).reshape(batch, rows, TILE, columns * TILE, features)
  values = _mix(to_result.T, jnp.moveaxis(tiles, 2, 0))
  values = values.reshape(-1, batch * rows, columns, TILE * features)
  images = _of_image(x, size)
  # Channels in the place of a batch, the batch in that of channels; tiles lie TILE columns apart.
  kernels = _products(images.swapaxes(1, 3), values.swapaxes(1, 2), dilation=(1, TILE))
  kernels = kernels.reshape(*kernels.shape[:3], TILE, features)
  unshifted = sum(kernels[:, :, i : i + size, i] for i in range(TILE))
  return _mix(of_kernel.T, unshifted).swapaxes(1, 2)


def _tiles(length: int) -> int:
  return -(-length // TILE)


def _matrices(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns A^T [TILE, n], G [n, k] and B^T [n, n] of y = A^T ((G kernel) * (B^T x)), n = k + 3.

  V evaluates polynomials at the points. The product of two is V^-1 ((V a) * (V b)), and what is
  wanted here is its transpose in a, since a convolution in networks is a correlation.
  """
  n = size + TILE - 1

  def values(terms):
    finite = np.vander(_POINTS[: n - 1], terms, increasing=True)
    return np.vstack([finite, np.eye(terms)[-1]])

  of_image = np.linalg.inv(values(n)).T
  scale = np.max(np.abs(of_image), axis=1, keepdims=True)  # G and B^T share the burden
  return values(TILE).T, scale * values(size), of_image / scale


def _mix(matrix: np.ndarray, parts: Array) -> Array:
  """Multiplies a small matrix [m, n] by parts [n, ...]: in one pass, as a product would not be."""
  rows = ([(float(a), part) for a, part in zip(row, parts, strict=True) if a] for row in matrix)
  return jnp.stack([sum(a * part for a, part in row) for row in rows])


def _of_image(x: Array, size: int) -> Array:
  """Evaluates the rows under every tile: [B, H, W, C] to [n, B rows, width with its zeros, C]."""
  n, low = size + TILE - 1, size // 2
  rows, columns = _tiles(x.shape[1]), _tiles(x.shape[2])
  high = TILE * rows + low - x.shape[1], TILE * columns + low - x.shape[2]
  padded = jnp.pad(x, ((0, 0), (low, high[0]), (low, high[1]), (0, 0)))
  under = [padded[:, i : i + TILE * (rows - 1) + 1 : TILE] for i in range(n)]
  values = _mix(_matrices(size)[2], under)
  return values.reshape(n, -1, *values.shape[3:])


def _shifted(kernels: Array) -> Array:
  """Lays kernels [n, k, C, D] out for TILE columns: [n, k + TILE - 1, C, TILE, D]."""
  shifts = (((0, 0), (i, TILE - 1 - i), (0, 0), (0, 0)) for i in range(TILE))
  return jnp.stack([jnp.pad(kernels, shift) for shift in shifts], axis=3)


def _products(images: Array, kernels: Array, strides=(1, 1), dilation=(1, 1)) -> Array:
  """Convolves images [n, N, W, C] of one row each with kernels [n, w, C, D], one after another."""

  def product(pair):
    image, kernel = pair
    row = lax.conv_general_dilated(
      image[:, None], kernel[None], strides, "VALID", rhs_dilation=dilation,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return row[:, 0]

  return lax.map(product, (images, kernels))
