"""How a convolution is carried out: four forms of one function.

Clients that train side by side bring a kernel each, and a convolution vmapped over kernels becomes
a grouped one: slow on a GPU, and on a CPU inside `scan` slower by far. A matrix product vmapped
over matrices stays a matrix product. Hence, for NHWC images and HWIO kernels of odd size k, with
k // 2 zeros on every side of the image:

  lax     XLA's own convolution.
  im2col  the k x k window of every pixel as a row, times the kernel as a matrix; with a stride, of
          every stride-th pixel.
  tiles   the same for 2x2 pixels at a time. Space-to-depth makes of a k x k convolution one of
          (k+1)/2 x (k+1)/2, with four times the channels in and out, on a quarter of the pixels;
          its kernel holds the k x k kernel four times, shifted. This moves 4 k^2 / (k+1)^2 times
          fewer window bytes (2.8 for k = 5) for (k+1)^2 / k^2 times the products (1.44), and 2x2
          max-pooling becomes a max within a row. With a stride, neighbours share next to nothing,
          and tiles is im2col.
  serial  XLA's own convolution again, but client after client, for CPUs (`models/serial.py`), and
          with fewer products where that pays (`models/winograd.py`); with a stride it is im2col.

`python -m benchmarks.conv --forms tiles im2col --repeats 3` (2 cores, AMD EPYC, float32, CNN1's
shapes for 4 clients of 50 images): im2col takes 1.33 times as long as tiles in a scan, 1.37 plain.
`--forms serial tiles --repeats 3`, there too: tiles takes 1.77 times as long as serial in a scan,
1.75 plain.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax import lax

from qupeD_jax import checks
from qupeD_jax.models.conv import products, serial
from qupeD_jax.types import Array

FORMS = ("lax", "im2col", "tiles", "serial")
_WORTH_STARTING = 8_000_000  # multiplications of one client's convolution


def choose(images: tuple[int, ...], kernel: tuple[int, ...], *, pooled: bool, backend: str) -> str:
  """Names the fastest form, as measured on a CPU and, for all accelerators, on an H100.

  On a CPU, serial, unless a client has so little to do that starting the library costs more than
  it gains. Else, without pooling, few channels make the windows' bytes the cost, and tiles moves
  fewer; many make it the products, and im2col has fewer. For 3x3 kernels they are even near 32
  channels on a CPU, and between 32 and 64 on the GPU.

  Args:
    images: B, H, W, C of a client.
    kernel: k, k, C, D.
    pooled: whether ReLU and 2x2 max-pooling follow.
    backend: of JAX.

  >>> choose((50, 16, 16, 64), (5, 5, 64, 64), pooled=True, backend="cpu")
  'serial'
  >>> choose((5, 8, 8, 16), (5, 5, 16, 16), pooled=True, backend="cpu")
  'tiles'
  >>> choose((50, 16, 16, 64), (5, 5, 64, 64), pooled=False, backend="gpu")
  'im2col'
  """
  if backend == "cpu" and math.prod(images) * math.prod(kernel) // kernel[2] >= _WORTH_STARTING:
    return "serial"
  return "tiles" if pooled or kernel[2] < 64 else "im2col"


def conv(x: Array, kernel: Array, form: str | None = None, *, stride: int = 1) -> Array:
  """Convolves with k // 2 zeros on every side.

  For a stride above 1 this is PyTorch's padding=k//2, and not XLA's SAME, which puts the odd zero
  at the end: the result is every stride-th pixel, from the first on, of that for stride 1.

  Products are summed in float32 inside a matrix product or convolution, whatever the dtype; only
  the result is rounded to it.

  Args:
    x: [B, H, W, C], float.
    kernel: [k, k, C, D] of x's dtype, k odd.
    form: one of FORMS, which differ by rounding only; None is the fastest.
    stride: s, at least 1.

  Returns:
    [B, ceil(H / s), ceil(W / s), D] of x's dtype.

  >>> x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
  >>> conv(x, kernel)[0, :, :, 0].astype(int).tolist()
  [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]
  >>> conv(x, kernel, stride=2)[0, :, :, 0].astype(int).tolist()
  [[4, 6], [6, 9]]
  """
  _check(x, kernel)
  checks.at_least("stride", stride, 1)
  form = form or _chosen(x, kernel, pooled=False)
  if form == "lax":
    return _conv_lax(x, kernel, stride)
  if form == "serial" and stride == 1:
    return serial.conv(x, kernel)
  if form == "im2col" or stride > 1:
    return products.im2col(x, kernel, stride)
  return products.tiles(x, kernel)


def conv_relu_pool(x: Array, kernel: Array, bias: Array, form: str | None = None) -> Array:
  """Convolves, adds a bias, applies ReLU and max-pools 2x2; an odd last row or column is dropped.

  Bias and ReLU are monotone, so they come after the max: the same value for a quarter of the work.
  The gradient is the same too, but for neighbours that tie above zero, where the max is kinked: it
  goes to the tied ones in halves, here in all forms, and to the first one in `lax.reduce_window`.
  Ties at or below zero pass nothing in either order, since ReLU's slope at 0 is taken as 0.

  Args:
    x: [B, H, W, C], float, H and W at least 2.
    kernel: [k, k, C, D] of x's dtype, k odd.
    bias: [D] of x's dtype.
    form: one of FORMS, which differ by rounding only; None is the fastest.

  Returns:
    [B, H // 2, W // 2, D] of x's dtype.

  >>> x, kernel = jnp.arange(16.0).reshape(1, 4, 4, 1), jnp.ones((1, 1, 1, 1))
  >>> conv_relu_pool(x, kernel, jnp.array([-6.0]))[0, :, :, 0].tolist()
  [[0.0, 1.0], [7.0, 9.0]]
  """
  _check(x, kernel)
  chex.assert_shape(bias, kernel.shape[-1:])
  form = form or _chosen(x, kernel, pooled=True)
  if form == "serial":
    return serial.conv_relu_pool(x, kernel, bias)
  if form == "tiles":
    blocks = products.blocks(x, kernel, x.shape[1] // 2, x.shape[2] // 2)
    pooled = _max_of_pair(_max_of_pair(blocks, 3), 3)
  else:
    pooled = max_pool(conv(x, kernel, form))
  return jax.nn.relu(pooled + bias)


def max_pool(x: Array) -> Array:
  """Takes the max over 2x2 pixels; an odd last row or column is dropped.

  Args:
    x: [B, H, W, C].

  Returns:
    [B, H // 2, W // 2, C].

  >>> max_pool(jnp.arange(15).reshape(1, 3, 5, 1))[0, :, :, 0].tolist()
  [[6, 8]]
  """
  chex.assert_rank(x, 4)
  batch, height, width, channels = x.shape
  rows, columns = height // 2, width // 2
  pairs = x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)
  return _max_of_pair(_max_of_pair(pairs, 2), 3)


def _chosen(x: Array, kernel: Array, *, pooled: bool) -> str:
  return choose(x.shape, kernel.shape, pooled=pooled, backend=jax.default_backend())


def _check(x: Array, kernel: Array) -> None:
  size = kernel.shape[0]
  chex.assert_rank(x, 4)
  chex.assert_shape(kernel, (size, size, x.shape[-1], None))
  chex.assert_trees_all_equal_dtypes(x, kernel)
  checks.require(size % 2 == 1, "kernel size", size, "odd, for the padding to be symmetric")


def _conv_lax(x: Array, kernel: Array, stride: int) -> Array:
  pad = kernel.shape[0] // 2
  numbers = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=numbers
  )


def _max_of_pair(x: Array, axis: int) -> Array:
  """Takes the larger of an axis' two entries; its gradient is cheaper than that of `jnp.max`.

  The axis goes last, so that XLA knows two passes through the same pooling for one.
  """
  first, second = (lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, 1))
  return lax.squeeze(jnp.maximum(first, second), (axis,))
