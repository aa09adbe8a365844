"""Winograd's convolution against windows of NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax.models.conv import forms, serial, winograd

CASES = [  # B, H, W, k, C, D
  (2, 8, 8, 5, 3, 4),
  (3, 5, 10, 3, 4, 2),
  (1, 7, 2, 1, 2, 3),
  (2, 1, 1, 5, 2, 2),
  (10, 16, 16, 5, 64, 64),
]


def operands(case):
  batch, height, width, size, channels, features = case
  shapes = (batch, height, width, channels), (size, size, channels, features)
  shapes += ((batch, height, width, features),)
  rng = np.random.default_rng(sum(case))
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def windows(x, size):
  """Returns the k x k window of every pixel in float64, [B, H, W, C, k, k]."""
  low = size // 2
  padded = np.pad(x.astype(np.float64), ((0, 0), (low, low), (low, low), (0, 0)))
  return np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))


def error(got, want):
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_to_float32(case):
  x, kernel, g = operands(case)
  size = len(kernel)
  value = np.einsum("bhwcij,ijcd->bhwd", windows(x, size), kernel, optimize=True)
  grad = np.einsum("bhwcij,bhwd->ijcd", windows(x, size), g, optimize=True)
  assert error(jax.jit(winograd.convolve)(x, kernel), value) < 1e-5
  assert error(jax.jit(winograd.grad_kernel, static_argnums=2)(x, g, size), grad) < 1e-5


def test_it_rounds_a_few_times_as_coarsely_as_a_plain_convolution():
  x, kernel, _ = operands(CASES[-1])
  value = np.einsum("bhwcij,ijcd->bhwd", windows(x, 5), kernel, optimize=True)
  plain = error(forms.conv(x, kernel, "lax"), value)
  assert 1e-7 < plain < error(winograd.convolve(x, kernel), value) < 8 * plain


@pytest.mark.parametrize(
  ("kernel", "uses"), [((5, 5, 32, 32), True), ((5, 5, 16, 64), False), ((3, 3, 64, 64), False)]
)
def test_serial_takes_it_for_wide_layers_of_5x5_kernels(kernel, uses, monkeypatch):
  used = set()
  for name in ("convolve", "grad_kernel"):
    true = getattr(winograd, name)
    monkeypatch.setattr(winograd, name, lambda *a, f=true, n=name: used.add(n) or f(*a))
  x, kernel, bias = jnp.ones((1, 6, 6, kernel[2])), jnp.ones(kernel), jnp.ones(kernel[3])
  for block in (serial.conv_relu_pool, lambda x, kernel, bias: serial.conv(x, kernel) + bias):
    used.clear()
    value, back = jax.vjp(block, x, kernel, bias)
    assert used == ({"convolve"} if uses else set())
    used.clear()
    back(value)
    assert used == ({"convolve", "grad_kernel"} if uses else set())


def test_clients_side_by_side_get_what_each_gets_alone():
  rng = np.random.default_rng(0)
  x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((3, 2, 6, 7, 32), (3, 5, 5, 32, 32)))
  together = jax.jit(jax.vmap(serial.conv))(x, kernel)
  alone = jax.jit(serial.conv)
  for i in range(3):
    np.testing.assert_array_equal(together[i], alone(x[i], kernel[i]))
