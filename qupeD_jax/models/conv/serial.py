"""Convolutions of one client after the other, for CPUs.

There XLA's own convolution runs at the speed of a matrix product and lays no windows out in memory,
but only where it belongs to one client, since vmap makes a grouped one of it, and only in the order
of dimensions that its library takes, [B, H, W, C] by [k, k, C, D]. The gradients that JAX derives
have other orders. XLA mends that outside of loops and not inside, where it falls back to code 10 to
150 times slower. So vmap is told to loop over clients here, and the gradients are written out. Wide
layers of 5x5 kernels take a form with fewer products, `winograd.py`; narrow ones on images of few
channels, with which the library is slow, are a matrix product, `products.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qupeD_jax.models.conv import products, winograd
from qupeD_jax.types import Array, PyTree


@jax.custom_vjp
def conv(x: Array, kernel: Array) -> Array:
  """Convolves with k // 2 zeros on every side; as `models.conv.conv` for stride 1."""
  return _one_by_one(_convolve)(x, kernel)


def _conv_forward(x: Array, kernel: Array):
  return conv(x, kernel), (x, kernel)


def _conv_backward(residuals, g: Array):
  x, kernel = residuals
  return _one_by_one(_grad_x)(g, kernel), _one_by_one(_grad_kernel)(x, g, kernel)


conv.defvjp(_conv_forward, _conv_backward)


@jax.custom_vjp
def conv_relu_pool(x: Array, kernel: Array, bias: Array) -> Array:
  """Convolves, adds a bias, applies ReLU and pools; as `models.conv.conv_relu_pool`."""
  return _one_by_one(_block)(x, kernel, bias)[0]


def _block_forward(x: Array, kernel: Array, bias: Array):
  y, shares = _one_by_one(_block)(x, kernel, bias)
  return y, (x, kernel, y, shares)


def _block_backward(residuals, g: Array):
  x, kernel, y, shares = residuals
  to_x = lambda g, shares, x, kernel: _grad_x(_unpool(g, shares, x), kernel)
  to_kernel = lambda g, shares, x, kernel: _grad_kernel(x, _unpool(g, shares, x), kernel)
  # Two loops: the one whose gradient nothing needs, as that of a network's input, is dropped.
  grads = (_one_by_one(fn)(g, shares, x, kernel) for fn in (to_x, to_kernel))
  return *grads, jnp.sum(jnp.where(y > 0, g, 0), axis=(0, 1, 2))


conv_relu_pool.defvjp(_block_forward, _block_backward)


# --- pooling


def _block(x: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
  """Returns the block's value, [B, h, w, D], and what `_unpool` needs to know, likewise uint8.

  A pixel's share of its block's gradient is halved where it ties with its neighbour, and where its
  row of the two ties with the other. In units of a quarter it is 0, 1, 2 or 4, and is kept as 0, 1,
  2 or 3, two bits for each of the four pixels.
  """
  pixels = _pixels(x, kernel)
  rows = [jnp.maximum(*pair) for pair in pixels]
  y = jax.nn.relu(jnp.maximum(*rows) + bias)
  shares = jnp.zeros(y.shape, jnp.int32)
  for i, j in np.ndindex(2, 2):
    within = _halves(pixels[i][j], pixels[i][1 - j])
    quarters = within * _halves(rows[i], rows[1 - i])
    shares |= jnp.minimum(quarters, 3) << (4 * i + 2 * j)
  # Computed on its own, in parallel, and not within the write that ends a step of the loop.
  return lax.optimization_barrier((y, jnp.where(y > 0, shares, 0).astype(jnp.uint8)))


def _halves(x: Array, other: Array) -> Array:
  """Returns 2 where x is the larger, 1 where they are equal, else 0."""
  return jnp.where(x > other, 2, jnp.where(x == other, 1, 0))


def _unpool(g: Array, shares: Array, x: Array) -> Array:
  """Hands the gradient [B, h, w, D] down to the pixels of x [B, H, W, C]: [B, H, W, D]."""
  bit = 4 * jnp.arange(2)[:, None, None, None] + 2 * jnp.arange(2)[:, None]
  kept = (shares.astype(jnp.int32)[:, :, None, :, None] >> bit) & 3
  quarters = jnp.where(kept == 3, 4, kept).astype(g.dtype)
  spread = quarters * (0.25 * g)[:, :, None, :, None]
  batch, rows, columns, channels = g.shape
  flat = spread.reshape(batch, 2 * rows, 2 * columns, channels)
  odd = x.shape[1] - 2 * rows, x.shape[2] - 2 * columns
  return jnp.pad(flat, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)))


def _pixels(x: Array, kernel: Array) -> list[list[Array]]:
  """Convolves, the pixels of 2x2 blocks apart: those at row i, column j of all, [B, h, w, D]."""
  batch, height, width, _ = x.shape
  rows, columns = height // 2, width // 2
  if _is_worth_tiles(kernel):
    blocks = products.blocks(*_wide(x, kernel), rows, columns).astype(x.dtype)
  else:
    image = _convolve(x, kernel)[:, : 2 * rows, : 2 * columns]
    blocks = image.reshape(batch, rows, 2, columns, 2, -1).swapaxes(2, 3)
  return [[blocks[:, :, :, i, j] for j in range(2)] for i in range(2)]


# --- one client; sums are float32, whatever the dtype


def _convolve(x: Array, kernel: Array) -> Array:
  form = _plain
  if _is_worth_winograd(kernel):
    form = winograd.convolve
  elif _is_worth_tiles(kernel):
    form = products.tiles
  return form(*_wide(x, kernel)).astype(x.dtype)


def _grad_x(g: Array, kernel: Array) -> Array:
  """Turns the result's gradient into that of the image: a convolution, the kernel flipped."""
  return _convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _grad_kernel(x: Array, g: Array, kernel: Array) -> Array:
  """Turns it into that of the kernel: images by gradients, batch and channels exchanged."""
  x, g = _wide(x, g)
  if _is_worth_winograd(kernel):
    grad = winograd.grad_kernel(x, g, kernel.shape[0])
  else:
    by_channel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    grad = _plain(*by_channel, pad=kernel.shape[0] // 2).transpose(1, 2, 0, 3)
  return grad.astype(kernel.dtype)


def _is_worth_winograd(kernel: Array) -> bool:
  """Tells where fewer products gain more than what is laid out for them costs, as measured."""
  size, _, channels, features = kernel.shape
  return size == 5 and min(channels, features) >= 32


def _is_worth_tiles(kernel: Array) -> bool:
  """Tells where the library is slower than a matrix product of windows, as measured."""
  _, _, channels, features = kernel.shape
  return channels <= 4 and features <= 32


def _plain(x: Array, kernel: Array, pad: int | None = None) -> Array:
  """Convolves with `pad` zeros on every side, by default k // 2."""
  pad = kernel.shape[0] // 2 if pad is None else pad
  numbers = ("NHWC", "HWIO", "NHWC")
  edges = ((pad, pad), (pad, pad))
  return lax.conv_general_dilated(x, kernel, (1, 1), edges, dimension_numbers=numbers)


def _wide(*arrays: Array) -> tuple[Array, ...]:
  return tuple(a.astype(jnp.float32) for a in arrays)


# --- all clients


def _one_by_one(fn: Callable) -> Callable:
  """Returns fn, for arrays, with vmaps carried out as one loop, of all their axes together."""

  @jax.custom_batching.custom_vmap
  def over(args: PyTree) -> PyTree:
    return lax.map(lambda one: fn(*one), args)

  @over.def_vmap
  def _(axis_size, in_batched, args):
    def merge(leaf, is_batched):
      if not is_batched:
        leaf = jnp.broadcast_to(leaf, (axis_size, *leaf.shape))
      return leaf.reshape(-1, *leaf.shape[2:])

    out = over(jax.tree.map(merge, args, in_batched[0]))
    apart = lambda leaf: leaf.reshape(axis_size, -1, *leaf.shape[1:])
    return jax.tree.map(apart, out), jax.tree.map(lambda _: True, out)

  def alone(*args):
    out = over(tuple(arg[None] for arg in args))
    return jax.tree.map(lambda leaf: leaf[0], out)

  return alone
