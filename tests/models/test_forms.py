"""The forms of a convolution are one function: values and gradients, however it is transformed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from qupeD_jax import checks
from qupeD_jax.models.conv import forms
from tests.models.loops import loop_convolution

PRODUCTS = ("im2col", "tiles")  # forms without a convolution
FAST_FORMS = (*PRODUCTS, "serial")
CASES = [  # H, W, k, C, D
  (2, 3, 5, 1, 2),
  (5, 4, 3, 3, 4),
  (6, 8, 1, 2, 3),
  (9, 7, 5, 2, 3),
  (7, 6, 3, 5, 6),  # too many channels for serial to take tiles
]
CLIENTS = 3

# Sums of up to k^2 C = 75 products of order 1 in float32, in another order.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Relative to the norm: what is computed is rounded to 8 bits, 2^-9 each, a few times over.
BFLOAT16 = 0.02


def reference(x, kernel, bias):
  """The block in XLA's own words, ReLU before the pooling."""
  numbers = ("NHWC", "HWIO", "NHWC")
  y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
  y = jax.nn.relu(y + bias)
  lowest = np.array(-np.inf, y.dtype)
  return lax.reduce_window(y, lowest, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def operands(case, lead=(), dtype=jnp.float32):
  height, width, size, channels, features = case
  shapes = [(2, height, width, channels), (size, size, channels, features), (features,)]
  keys = jax.random.split(jax.random.key(sum(case)), 3)
  return tuple(
    jax.random.normal(key, (*lead, *shape)).astype(dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )


def value_and_grads(block):
  """Maps (x, kernel, bias) to the block's value and the gradients of a generic loss of it."""

  def loss(x, kernel, bias):
    y = block(x, kernel, bias)
    return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

  def transformed(*args):
    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)
    return y, *grads

  return transformed


def form_of(form):
  return lambda x, kernel, bias: forms.conv_relu_pool(x, kernel, bias, form)


def relative_error(got, want):
  got, want = (np.asarray(a, np.float32) for a in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@functools.cache
def wanted(case, dtype=jnp.float32):
  """The reference in float32, per client, for operands that `dtype` can hold."""
  args = [a.astype(jnp.float32) for a in operands(case, (CLIENTS,), dtype)]
  return jax.jit(jax.vmap(value_and_grads(reference)))(*args)


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_equals_lax_under_vmap_and_jit(case, form):
  args, want = operands(case, (CLIENTS,)), wanted(case)
  got = jax.jit(jax.vmap(value_and_grads(form_of(form))))(*args)
  chex.assert_trees_all_close(got, want, **FLOAT32)


@pytest.mark.parametrize("form", forms.FORMS)
def test_block_equals_lax_without_jit(form):
  args = operands((5, 6, 3, 2, 3))
  chex.assert_trees_all_close(form_of(form)(*args), reference(*args), **FLOAT32)


@pytest.mark.parametrize("form", FAST_FORMS)
def test_block_in_scan_and_nested_vmap(form):
  """Clients under seeds under the steps of a scan, as an engine runs them."""
  case = CASES[0]
  step = jax.vmap(jax.vmap(value_and_grads(form_of(form))))
  args = jax.tree.map(lambda a: a[None, None], operands(case, (CLIENTS,)))
  _, got = jax.jit(lambda args: lax.scan(lambda _, one: (None, step(*one)), None, args))(args)
  chex.assert_trees_all_close(got, jax.tree.map(lambda a: a[None, None], wanted(case)), **FLOAT32)


@pytest.mark.parametrize("form", forms.FORMS)
def test_block_in_bfloat16_is_close_to_float32(form):
  case = (8, 8, 5, 3, 4)
  args, want = operands(case, (CLIENTS,), jnp.bfloat16), wanted(case, jnp.bfloat16)
  got = jax.jit(jax.vmap(value_and_grads(form_of(form))))(*args)
  for ours, exact in zip(got, want, strict=True):
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours, exact) < BFLOAT16


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("case", [(1, 1, 3, 2, 3), (5, 4, 3, 3, 4), (9, 7, 5, 2, 3)], ids=str)
def test_convolution_equals_a_scalar_loop(case, form, stride):
  x, kernel, _ = operands(case)
  got = jax.jit(lambda x, kernel: forms.conv(x, kernel, form, stride=stride))(x, kernel)
  np.testing.assert_allclose(got, loop_convolution(x, kernel)[:, ::stride, ::stride], **FLOAT32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", FAST_FORMS)
@pytest.mark.parametrize("case", [(7, 6, 3, 2, 3), (8, 5, 1, 2, 3)], ids=str)
def test_convolution_gradients_equal_lax(case, form, stride):
  x, kernel, _ = operands(case, (CLIENTS,))

  def grads(form):
    loss = lambda x, kernel: jnp.sin(forms.conv(x, kernel, form, stride=stride)).sum()
    return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(x, kernel)

  chex.assert_trees_all_close(grads(form), grads("lax"), **FLOAT32)


@pytest.mark.parametrize("form", FAST_FORMS)
def test_all_forms_share_a_tie_alike(form):
  """On a constant image all four neighbours tie above zero."""
  x = jnp.ones((1, 4, 4, 1))
  args = x, jnp.ones((1, 1, 1, 1)), jnp.zeros(1)
  dx, *_ = jax.grad(lambda *args: form_of(form)(*args).sum(), argnums=(0, 1, 2))(*args)
  np.testing.assert_array_equal(dx, jnp.full_like(x, 0.25))
  lax_dx = jax.grad(lambda *args: form_of("lax")(*args).sum())(*args)
  np.testing.assert_array_equal(dx, lax_dx)


def test_dead_units_pass_no_gradient():
  """ReLU after the max gives ties at zero the gradient of ReLU before it: none."""
  args = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), jnp.array([-9.0])
  for block in (reference, *map(form_of, forms.FORMS)):
    _, *grads = jax.jit(value_and_grads(block))(*args)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.mark.parametrize(
  ("backend", "batch", "channels", "pooled", "form"),
  [
    ("gpu", 99, 3, False, "tiles"),
    ("tpu", 99, 64, False, "im2col"),
    ("gpu", 99, 64, True, "tiles"),
    ("cpu", 99, 64, False, "serial"),
    ("cpu", 99, 64, True, "serial"),
    ("cpu", 1, 3, True, "tiles"),  # next to no work
    ("cpu", 1, 64, False, "im2col"),
  ],
)
def test_form_is_chosen_by_backend_and_size(backend, batch, channels, pooled, form):
  images, kernel = (batch, 12, 12, channels), (3, 3, channels, 16)
  assert forms.choose(images, kernel, pooled=pooled, backend=backend) == form


def test_without_a_form_the_chosen_one_is_used(monkeypatch):
  x, kernel, bias = operands((6, 6, 3, 3, 2))
  chosen = lambda: jax.make_jaxpr(lambda *args: forms.conv_relu_pool(*args))(x, kernel, bias)
  assert str(chosen()) == str(jax.make_jaxpr(form_of("tiles"))(x, kernel, bias))
  monkeypatch.setattr(forms, "_WORTH_STARTING", 0)
  np.testing.assert_array_equal(forms.conv(x, kernel), forms.conv(x, kernel, "serial"))
  assert str(chosen()) == str(jax.make_jaxpr(form_of("serial"))(x, kernel, bias))


@pytest.mark.parametrize("form", PRODUCTS)
def test_products_contain_no_convolution(form):
  x, kernel, bias = operands((6, 6, 3, 3, 2))
  strided = lambda x, kernel, bias: forms.conv(x, kernel, form, stride=2) + bias
  for block in (form_of(form), strided):
    traced = str(jax.make_jaxpr(value_and_grads(block))(x, kernel, bias))
    assert "dot_general" in traced
    assert "conv_general_dilated" not in traced


@pytest.mark.parametrize(("channels", "count"), [(5, 3), (3, 2)])
@pytest.mark.parametrize("pooled", [False, True])
def test_serial_convolutions_are_those_that_a_cpu_is_fast_at(pooled, channels, count):
  """Also under vmaps of vmaps: not grouped, not dilated, dimensions in the library's order.

  There are three, forward, and back to x and to the kernel; forward from few channels is a product.
  """

  def block(x, kernel, bias):
    return form_of("serial")(x, kernel, bias) if pooled else forms.conv(x, kernel, "serial") + bias

  args = operands((6, 6, 3, channels, 6), (2, CLIENTS))
  jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(value_and_grads(block))))(*args)
  found = list(convolutions(jaxpr.jaxpr))
  assert len(found) == count
  for equation in found:
    assert equation.params["feature_group_count"] == equation.params["batch_group_count"] == 1
    assert equation.params["lhs_dilation"] == equation.params["rhs_dilation"] == (1, 1)
    spec = equation.params["dimension_numbers"]
    assert spec == lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolutions(jaxpr):
  """Yields the convolutions of a jaxpr and of all within it."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "conv_general_dilated":
      yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from convolutions(inner)


@pytest.mark.parametrize("shared", [0, 1])
def test_serial_with_an_operand_that_clients_share(shared):
  args = [a[0] if i == shared else a for i, a in enumerate(operands(CASES[1], (CLIENTS,)))]
  axes = [None if i == shared else 0 for i in range(3)]
  got = jax.jit(jax.vmap(value_and_grads(form_of("serial")), axes))(*args)
  want = jax.jit(jax.vmap(value_and_grads(reference), axes))(*args)
  chex.assert_trees_all_close(got, want, **FLOAT32)


def test_even_kernels_are_refused():
  x, kernel, _ = operands((6, 6, 2, 3, 2))
  with pytest.raises(checks.BadInput, match="kernel size 2: allowed is odd"):
    forms.conv(x, kernel)


def test_strides_below_one_are_refused():
  x, kernel, _ = operands((6, 6, 3, 3, 2))
  with pytest.raises(checks.BadInput, match="stride 0: allowed is a whole number of at least 1"):
    forms.conv(x, kernel, stride=0)
