"""Losses against scalar definitions, and where their gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax.federation import losses

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 5, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 0], np.int32)
MASK = np.array([1, 1, 0, 1, 0], np.float32)


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def scalar_kl(p_logits, q_logits, temperature):
  p, q = softmax(p_logits / temperature), softmax(q_logits / temperature)
  per_row = np.sum(p * np.log(p / q), axis=-1)
  return temperature**2 * np.sum(per_row * MASK) / MASK.sum()


def wide_kl(p_logits, q_logits, temperature):
  """`kl` by its definition, in float64."""
  log_p, log_q = (jax.nn.log_softmax(logits / temperature) for logits in (p_logits, q_logits))
  per_row = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  return temperature**2 * jnp.sum(per_row * MASK) / MASK.sum()


def test_cross_entropy_counts_only_what_the_mask_holds():
  expected = -np.log(softmax(A)[np.arange(5), LABELS])[MASK == 1].mean()
  np.testing.assert_allclose(losses.cross_entropy(A, LABELS, MASK), expected, rtol=1e-6)
  disturbed = A.copy()
  disturbed[MASK == 0] = 1e3
  np.testing.assert_allclose(losses.cross_entropy(disturbed, LABELS, MASK), expected, rtol=1e-6)


def test_an_empty_batch_costs_nothing():
  nothing = np.zeros(5, np.float32)
  loss = lambda a: losses.cross_entropy(a, LABELS, nothing) + losses.kl(a, B, 2.0, nothing)
  value, grads = jax.value_and_grad(loss)(A)
  assert value == 0
  np.testing.assert_array_equal(grads, np.zeros_like(A))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_sums_over_classes_and_means_over_examples(temperature):
  expected = scalar_kl(B, A, temperature)
  actual = losses.distillation(A, B, temperature, MASK)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("temperature", "gap"),
  [(1.0, 1e-3), (1.0, 10.0), (0.1, 100.0), (1e2, 0.3), (1e4, 0.3), (1e5, 10.0)],
)
def test_nearly_equal_distributions_do_not_cancel(temperature, gap):
  """Neither in the divergence nor in its gradients, against float64."""
  p, q = A, A + np.float32(gap) * B
  value, grads = jax.value_and_grad(losses.kl, (0, 1))(p, q, temperature, MASK)
  with jax.enable_x64(True):
    wide = [logits.astype(np.float64) for logits in (p, q)]
    by_definition = lambda p, q: wide_kl(p, q, temperature)
    expected, slopes = jax.value_and_grad(by_definition, (0, 1))(*wide)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for actual, slope in zip(grads, slopes, strict=True):
    np.testing.assert_allclose(actual, slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())


@pytest.mark.parametrize(("temperature", "gap"), [(0.5, 3.0), (4.0, 0.1), (4.0, 10.0)])
def test_the_slope_in_the_temperature_is_that_of_the_definition(temperature, gap):
  p, q = A, A + np.float32(gap) * B
  actual = jax.grad(losses.kl, 2)(p, q, temperature, MASK)
  with jax.enable_x64(True):
    wide = [logits.astype(np.float64) for logits in (p, q)]
    expected = jax.grad(wide_kl, 2)(*wide, temperature)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_at_an_infinite_temperature_half_the_variance_of_the_gaps_is_left():
  expected = np.var(A - B, axis=-1) / 2 @ MASK / MASK.sum()
  np.testing.assert_allclose(losses.kl(A, B, 1e9, MASK), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_gradient_for_the_student_is_the_gap_of_the_softmaxes(temperature):
  grads = jax.grad(losses.distillation)(A, B, temperature, MASK)
  gap = softmax(A / temperature) - softmax(B / temperature)
  expected = temperature * gap * MASK[:, None] / MASK.sum()
  np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_stopped():
  grads = jax.grad(losses.distillation, argnums=1)(A, B, 2.0, MASK)
  np.testing.assert_array_equal(grads, np.zeros_like(B))
  assert np.any(jax.grad(losses.kl)(B, A, 2.0, MASK))


def test_accuracy():
  logits = np.eye(3, dtype=np.float32)[[0, 2, 2, 0, 0]]
  np.testing.assert_allclose(losses.accuracy(logits, LABELS, MASK), 2 / 3, rtol=1e-6)


def test_vmapped_equals_plain():
  stacked = jax.vmap(losses.distillation, (0, 0, None, None))(
    jnp.stack([A, B]), jnp.stack([B, A]), 3.0, MASK
  )
  plain = [losses.distillation(A, B, 3.0, MASK), losses.distillation(B, A, 3.0, MASK)]
  np.testing.assert_allclose(stacked, plain, rtol=1e-6)


def test_reverse_kl_exchanges_the_sides():
  np.testing.assert_allclose(losses.reverse_kl(A, B, 2.0, MASK), scalar_kl(B, A, 2.0), rtol=1e-5)
  grads = jax.grad(losses.reverse_kl)(A, B, 2.0, MASK)
  gap = softmax(A / 2.0) - softmax(B / 2.0)
  np.testing.assert_allclose(grads, 2.0 * gap * MASK[:, None] / MASK.sum(), rtol=1e-4, atol=1e-6)


DIVERGENCES = [losses.kl, losses.reverse_kl, losses.distillation]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


def between_restricted(divergence, classes, temperature=2.0):
  """The divergence as a function of both sides' logits."""
  restrict = lambda logits: losses.restrict(logits, classes)
  return lambda a, b: divergence(restrict(a), restrict(b), temperature, MASK)


@every_divergence
@pytest.mark.parametrize("temperature", [0.1, 2.0, 10.0])
def test_restricted_divergence_is_that_of_the_classes_left(divergence, temperature):
  loss = between_restricted(divergence, np.array([True, False, True]), temperature)
  fewer = lambda a, b: divergence(a, b, temperature, MASK)
  both = lambda fn: jax.grad(fn, (0, 1))
  a, b = A[:, [0, 2]], B[:, [0, 2]]
  np.testing.assert_allclose(loss(A, B), fewer(a, b), rtol=1e-5)
  for actual, expected in zip(both(loss)(A, B), both(fewer)(a, b), strict=True):
    np.testing.assert_array_equal(actual[:, 1], 0)
    np.testing.assert_allclose(actual[:, [0, 2]], expected, rtol=1e-4, atol=1e-6)


@every_divergence
@pytest.mark.parametrize("classes", [[1, 1, 1], [0, 1, 0], [0, 0, 0]], ids=str)
def test_restricted_divergence_is_finite_for_any_classes_and_logits(divergence, classes):
  loss = between_restricted(divergence, np.array(classes, bool))
  for scale in (1.0, 1e4):
    value, grads = jax.value_and_grad(loss, (0, 1))(scale * A, scale * B)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grads))
    if sum(classes) < 2:
      np.testing.assert_allclose(value, 0, atol=1e-6)  # nothing to differ in
      np.testing.assert_allclose(grads, 0, atol=1e-6)


def test_no_restriction_returns_the_logits():
  assert losses.restrict(A, None) is A
  np.testing.assert_array_equal(losses.restrict(A, np.ones(3, bool)), A)
