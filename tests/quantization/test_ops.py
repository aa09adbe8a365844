"""Quantisation of one tensor and of a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from qupeD_jax.io import packing
from qupeD_jax.quantization import codebook, ops
from tests import oracle
from tests.quantization.tensors import PARAMS, normal

finite = st.floats(-4, 4, width=32, allow_subnormal=False)
sizes = st.sampled_from([1, 2, 5, 12])  # few, since each is compiled
tensors = hnp.arrays(np.float32, sizes, elements=finite)
codebooks = st.lists(finite, min_size=1, max_size=8).map(sorted)


def pad(centers, slots=8):
  return np.array([*centers, *[np.inf] * (slots - len(centers))], np.float32)


@given(tensors, codebooks)
def test_hard_quantize_takes_a_nearest_center(x, centers):
  q = np.asarray(ops.hard_quantize(x, pad(centers)))
  distances = np.abs(x[:, None] - np.asarray(centers, np.float32))
  np.testing.assert_allclose(np.abs(x - q), distances.min(axis=1), rtol=1e-5, atol=1e-6)
  assert set(q.tolist()) <= set(np.asarray(centers, np.float32).tolist())


@pytest.mark.parametrize("used", [2, 16, 17, 256])
@pytest.mark.parametrize("unused", [0, 9])
def test_assign_is_the_same_for_few_and_many_centers(used, unused):
  centers = np.sort(normal(1, used))
  slots = pad(centers, used + unused)
  borders = np.asarray(codebook.midpoints(slots))[: used - 1]  # on which the lower center wins
  x = np.concatenate([normal(0, 300), borders, centers])
  expected = np.searchsorted(borders, x, side="left")
  np.testing.assert_array_equal(codebook.assign(x, slots), expected)
  np.testing.assert_array_equal(codebook.nearest(x, slots), centers[expected])


def test_a_tie_goes_to_the_lower_center():
  centers = np.array([-1.0, 1.0], np.float32)
  assert ops.hard_quantize(np.zeros(1, np.float32), centers) == -1.0


@pytest.mark.parametrize("count", [4, 64])  # each form of the search
def test_an_entry_that_equals_a_center_goes_to_it(count):
  """Also where its neighbour is the next number of float32, and none lies between them."""
  first = normal(0, 1)
  after = lambda x: np.nextafter(x, np.float32(np.inf))
  centers = np.array([first := after(first) for _ in range(count)], np.float32).ravel()
  slots = pad(centers, count + 1)
  np.testing.assert_array_equal(ops.hard_quantize(centers, slots), centers)
  np.testing.assert_array_equal(codebook.assign(centers, slots), np.arange(count))
  moved = ops.follow({"kernel": centers}, {"kernel": slots}, {"kernel": slots + 1})
  np.testing.assert_array_equal(moved["kernel"], centers + 1)
  variables = {"params": {"kernel": centers}, "stats": {}}
  shipped = packing.unpack(packing.pack(variables, {"kernel": slots}))
  np.testing.assert_array_equal(shipped["params"]["kernel"], centers)


@pytest.mark.parametrize("size", [3, 512, 1100])
@pytest.mark.parametrize("num_centers", [2, 4, 16, 17, 256])
def test_all_forms_of_the_sums_per_center_equal_bincount(num_centers, size):
  index = np.random.default_rng(0).integers(0, num_centers, size).astype(np.int32)
  values = normal(1, size)
  expected = np.bincount(index, values, num_centers)
  forms = (codebook._sums_by_scatter, codebook._sums_by_product)
  few = (codebook._sums_one_by_one, codebook._sums_in_one_pass)
  forms += few if num_centers <= 17 else ()
  for form in forms:
    actual = form(values, index, num_centers=num_centers)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    codebook.sums_per_center(values, index, num_centers), expected, rtol=1e-4, atol=1e-5
  )


def test_sums_in_one_pass_write_nothing_of_the_entries_size():
  x, g = normal(0, 20_000).reshape(4, -1), normal(1, 20_000).reshape(4, -1)
  centers = np.sort(normal(2, 16).reshape(4, -1))
  sums = lambda x, g, c: codebook._sums_in_one_pass(g, codebook.assign(x, c), num_centers=4)
  compiled = jax.jit(jax.vmap(sums)).lower(x, g, centers).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 8


def test_gradients_of_hard_quantize():
  x, centers, g = normal(0, 40), pad([-1.0, 0.2, 1.5]), normal(1, 40)
  _, pullback = jax.vjp(ops.hard_quantize, x, centers)
  in_x, in_centers = pullback(g)
  np.testing.assert_array_equal(in_x, np.zeros(40))
  owner = np.argmin(np.abs(x[:, None] - centers[:3]), axis=1)
  expected = [g[owner == j].sum() for j in range(3)] + [0.0] * 5
  np.testing.assert_allclose(in_centers, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
def test_gradients_of_soft_quantize_equal_numerical_ones(sharpness):
  x = normal(0, 10)
  for centers in (np.sort(normal(1, 4)), np.sort(normal(2, 2))):
    fn = lambda x, c: ops.soft_quantize(x, c, sharpness)
    check_grads(fn, (x, centers), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_unused_slots_do_not_disturb_soft_quantize():
  x, centers = normal(0, 10), np.sort(normal(1, 3))
  fn = lambda x, c: ops.soft_quantize(x, c, 3.0)
  np.testing.assert_allclose(fn(x, pad(centers)), fn(x, centers), rtol=1e-6)
  padded = jax.grad(lambda x, c: fn(x, c).sum(), (0, 1))(x, pad(centers))
  plain = jax.grad(lambda x, c: fn(x, c).sum(), (0, 1))(x, centers)
  np.testing.assert_allclose(padded[0], plain[0], rtol=1e-5)
  np.testing.assert_allclose(padded[1], [*plain[1], *[0.0] * 5], rtol=1e-5, atol=1e-6)


def test_soft_quantize_tends_to_hard_quantize():
  centers = np.sort(normal(1, 4))
  x = normal(0, 200)
  borders = np.asarray(codebook.midpoints(centers))
  x = x[np.min(np.abs(x[:, None] - borders), axis=1) > 0.02]
  g = normal(2, len(x))
  soft, soft_pull = jax.vjp(lambda x, c: ops.soft_quantize(x, c, 2e3), x, centers)
  hard, hard_pull = jax.vjp(ops.hard_quantize, x, centers)
  np.testing.assert_allclose(soft, hard, atol=1e-5)
  for soft_g, hard_g in zip(soft_pull(g), hard_pull(g), strict=True):
    np.testing.assert_allclose(soft_g, hard_g, atol=1e-4)


@given(tensors, st.sampled_from([2, 4, 8]))
def test_init_centers_with_a_traced_number(x, num_centers):
  plain = np.asarray(ops.init_centers(x, num_centers))
  traced = jax.jit(ops.init_centers, static_argnums=2)(x, num_centers, 8)
  np.testing.assert_allclose(np.asarray(traced)[:num_centers], plain, rtol=1e-5, atol=1e-6)
  assert np.all(np.isinf(np.asarray(traced)[num_centers:]))
  assert np.all(np.diff(plain) >= 0)


def test_two_centers_are_the_means_of_both_signs():
  x = np.array([-3.0, -1.0, 0.0, 5.0], np.float32)
  np.testing.assert_allclose(ops.init_centers(x, 2), [-2.0, 2.5])
  one_sided = np.asarray(ops.init_centers(np.array([1.0, 3.0], np.float32), 2))
  np.testing.assert_allclose(one_sided, [1.0, 2.0])


def test_quantile_centers_share_the_entries_out():
  x = normal(0, 4000) ** 3
  centers = ops.quantile_centers(x, 8)
  counts = np.bincount(np.searchsorted(np.quantile(x, np.arange(1, 8) / 8), np.sort(x)))
  np.testing.assert_allclose(counts, 500, atol=2)
  expected = np.quantile(x, (np.arange(8) + 0.5) / 8)
  np.testing.assert_allclose(centers, expected, rtol=1e-4, atol=1e-5)


def distortion(x, centers):
  x, centers = np.asarray(x, np.float64), np.asarray(centers, np.float64)
  return np.min(np.abs(x[:, None] - centers), axis=1) @ np.min(np.abs(x[:, None] - centers), axis=1)


@pytest.mark.parametrize("num_centers", [2, 4, 32])
def test_kmeans_centers_equal_a_loop(num_centers):
  x = normal(3, 500)
  expected = oracle.kmeans(x.astype(np.float64), num_centers)
  np.testing.assert_allclose(ops.kmeans_centers(x, num_centers), expected, rtol=1e-4, atol=1e-5)


def test_kmeans_centers_stop_after_the_given_iterations():
  x = normal(3, 500)
  once = ops.kmeans_centers(x, 4, iterations=1)
  expected = oracle.kmeans(x.astype(np.float64), 4, iterations=1)
  np.testing.assert_allclose(once, expected, rtol=1e-4, atol=1e-5)
  none = ops.kmeans_centers(x, 4, iterations=0)
  np.testing.assert_array_equal(none, ops.quantile_centers(x, 4))


@given(tensors, st.sampled_from([2, 4, 8]))
def test_kmeans_centers_are_no_worse_than_quantiles(x, num_centers):
  """Few entries, often equal ones: also with more centers than there are distinct entries."""
  centers = np.asarray(ops.kmeans_centers(x, num_centers, 8))
  assert np.all(np.diff(centers[:num_centers]) >= 0)
  assert np.all(np.isfinite(centers[:num_centers]))
  np.testing.assert_array_equal(centers[num_centers:], np.inf)
  before = distortion(x, ops.quantile_centers(x, num_centers))
  # Centers are rounded to float32: entries of size 4 are then off by up to 5e-7.
  assert distortion(x, centers[:num_centers]) <= before * (1 + 1e-5) + 1e-10


def test_kmeans_centers_with_a_traced_number():
  x = normal(4, 60)
  traced = jax.jit(ops.kmeans_centers, static_argnums=2)
  for num_centers in (2, 4, 8):
    plain = np.pad(ops.kmeans_centers(x, num_centers), (0, 8 - num_centers), "constant")
    plain[num_centers:] = np.inf
    np.testing.assert_allclose(traced(x, jnp.int32(num_centers), 8), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_kmeans_centers_of_a_constant_are_that_constant(value):
  x = np.full((7, 11), value, np.float32)
  np.testing.assert_allclose(ops.kmeans_centers(x, 4), value, rtol=1e-6)


def test_kmeans_centers_hit_every_entry_where_there_are_enough_of_them():
  x = np.repeat(np.float32([-2.0, 0.5, 3.0]), [4, 3, 5])
  centers = ops.kmeans_centers(x, 8)
  np.testing.assert_allclose(ops.hard_quantize(x, centers), x, rtol=1e-6)


def test_fixed_centers_are_even_whatever_the_tensor():
  np.testing.assert_array_equal(ops.fixed_centers(normal(0, 5), 2), [-1.0, 1.0])
  padded = ops.fixed_centers(normal(0, 5), 4, 8)
  np.testing.assert_allclose(padded, pad([-1, -1 / 3, 1 / 3, 1]), rtol=1e-6)


@pytest.mark.parametrize("num_centers", [2, 4, 8, 16])
def test_scaled_centers_are_nearly_the_best_even_ones(num_centers):
  """A search over scales finds none that is better by more than a hundredth."""
  x = normal(5, 2000)
  grid = np.linspace(-1, 1, num_centers)
  centers = ops.scaled_centers(x, num_centers)
  np.testing.assert_allclose(centers, centers[-1] * grid, rtol=1e-5, atol=1e-6)
  best = min(distortion(x, scale * grid) for scale in np.linspace(0.3, 5, 500))
  assert distortion(x, centers) <= 1.01 * best
  if num_centers == 2:
    np.testing.assert_allclose(centers[-1], np.abs(x).mean(), rtol=1e-5)


def test_scaled_centers_with_a_traced_number():
  x, traced = normal(4, 60), jax.jit(ops.scaled_centers, static_argnums=2)
  for num_centers in (2, 4, 8):
    plain = pad(ops.scaled_centers(x, num_centers))
    np.testing.assert_allclose(traced(x, jnp.int32(num_centers), 8), plain, rtol=1e-5, atol=1e-6)


def test_scaled_centers_of_zeros_keep_a_scale():
  centers = np.asarray(ops.scaled_centers(np.zeros(9, np.float32), 4, 8))
  assert np.all(np.isfinite(centers[:4]))
  assert centers[3] > 0
  np.testing.assert_array_equal(centers[4:], np.inf)


# --- whole models


def test_only_inner_kernels_are_quantised():
  flat = ops.flatten(PARAMS)
  assert [path for path in flat if ops.is_quantised(path)] == ["dense_1/kernel"]


@given(hnp.arrays(np.float32, (6,), elements=finite), codebooks)
def test_follow_keeps_every_entry_with_its_center(x, centers):
  assume(len(set(centers)) == len(centers))
  before = {"a/kernel": pad(centers)}
  after = {"a/kernel": pad(np.asarray(centers) * 2 + 1)}
  hard = ops.harden({"a": {"kernel": x}}, before)
  owner = np.asarray(codebook.assign(x, before["a/kernel"]))
  moved = ops.follow(hard, before, after)["a/kernel"]
  np.testing.assert_array_equal(moved, after["a/kernel"][owner])
