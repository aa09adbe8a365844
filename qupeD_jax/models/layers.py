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
  multiply = _multiply_on_cpu if jax.default_backend() == "cpu" else jnp.matmul
  product = lambda x, kernel, dimensions, precision: multiply(x, kernel)
  return nn.Dense(
    features, dtype=dtype, kernel_init=init, bias_init=init, dot_general=product, name=name
  )(x)


@jax.custom_vjp
def _multiply_on_cpu(x: Array, kernel: Array) -> Array:
  """Multiplies [B, C] by [C, D], with gradients in forms and an order that suit a CPU.

  Its quick products sum over the last axis on the left, so the kernel's gradient gets x turned
  around, in memory. It comes last, as the kernel's update must wait until x's gradient is computed.
  """
  return x @ kernel


def _multiply_forward(x: Array, kernel: Array):
  return x @ kernel, (x, kernel)


def _multiply_backward(residuals, g: Array):
  x, kernel = residuals
  turned, grad_x = jax.lax.optimization_barrier((x.T, g @ kernel.T))
  return grad_x, turned @ g


_multiply_on_cpu.defvjp(_multiply_forward, _multiply_backward)


def head(x: Array, num_classes: int) -> Array:
  """Applies the classifier inside a compact module: x [B, C] to logits [B, num_classes].

  Always in float32: next to nothing of the cost, and the losses of nearly equal logits need the
  digits.
  """
  return dense(x.astype(jnp.float32), num_classes, name="head", dtype=jnp.float32)
