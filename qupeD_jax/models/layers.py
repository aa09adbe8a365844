"""What the networks share: dense layers and their initial values."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from qupeD_jax.types import Array


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
  """Draws kernels and biases alike from U(-b, b), b = 1 / sqrt(fan_in), PyTorch's default.

  >>> values = fan_in_uniform(25)(jax.random.key(0), (1000,))
  >>> bool(abs(values).max() <= 0.2)
  True
  """
  bound = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(x: Array, features: int, *, name: str, dtype: jnp.dtype) -> Array:
  """Applies a dense layer inside a compact module: x [B, C] to [B, features] of `dtype`."""
  init = fan_in_uniform(x.shape[-1])
  product = lambda x, kernel, dimensions, precision: _product(x, kernel)
  return nn.Dense(
    features, dtype=dtype, kernel_init=init, bias_init=init, dot_general=product, name=name
  )(x)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
  """Multiplies [B, C] by [C, D], with the kernel's gradient laid out as the kernel is."""
  return x @ kernel


def _product_forward(x: Array, kernel: Array):
  return x @ kernel, (x, kernel)


def _product_backward(residuals, g: Array):
  x, kernel = residuals
  over = lambda left, right, axis: jax.lax.dot_general(left, right, (((axis,), (axis,)), ((), ())))
  # JAX would compute the transpose of the latter, and a CPU would turn it around in memory.
  return over(g, kernel, 1), over(x, g, 0)


_product.defvjp(_product_forward, _product_backward)


def head(x: Array, num_classes: int) -> Array:
  """Applies the classifier inside a compact module: x [B, C] to logits [B, num_classes].

  Always in float32: next to nothing of the cost, and the losses of nearly equal logits need the
  digits.
  """
  return dense(x.astype(jnp.float32), num_classes, name="head", dtype=jnp.float32)
