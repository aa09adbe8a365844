"""Losses of one batch, in which masked-out examples count for nothing."""

import math

import chex
import jax
import jax.numpy as jnp
import optax

from qupeD_jax.types import Array

_SMALL = 0.5  # gaps of logits below which e^d - 1 - d would cancel
_NEVER = -1e9  # a finite logit of probability 0: differences of infinities would be NaN


def _masked_mean(values: Array, mask: Array) -> Array:
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def cross_entropy(logits: Array, labels: Array, mask: Array) -> Array:
  """Averages the cross-entropy over the examples that count.

  Args:
    logits: [B, classes] float32.
    labels: [B] int32, in [0, classes).
    mask: [B] float32, 1 for an example that counts and 0 for padding.

  Returns:
    [] float32; 0 if nothing counts.
  """
  chex.assert_rank([logits, labels, mask], [2, 1, 1])
  return _masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), mask)


def kl(p_logits: Array, q_logits: Array, temperature: Array | float, mask: Array) -> Array:
  """Averages T^2 KL(softmax(p/T) || softmax(q/T)): summed over classes, meaned over examples.

  The factor T^2 keeps the gradient's size when T changes (Hinton et al., 2015). Gradients flow to
  both sides: the caller stops the one that is its target.

  Args:
    p_logits: [B, classes] float32, the distribution the expectation is taken under.
    q_logits: [B, classes] float32.
    temperature: above 0.
    mask: [B] float32, 1 for an example that counts.

  Returns:
    [] float32, at least 0 up to rounding.
  """
  chex.assert_equal_shape([p_logits, q_logits])
  chex.assert_rank([p_logits, mask], [2, 1])
  temperature = jnp.asarray(temperature, p_logits.dtype)
  return temperature**2 * _masked_mean(_divergence(p_logits, q_logits, temperature), mask)


@jax.custom_vjp
def _divergence(p_logits: Array, q_logits: Array, temperature: Array | float) -> Array:
  """Returns KL(softmax(p/T) || softmax(q/T)) of every example, [B].

  With d = (q - p) / T, less its mean under softmax(p/T), it is log sum p e^d. Where distributions
  are nearly equal, as all are at a high temperature, that is the logarithm of nearly 1, and taken
  as log(1 + sum p (e^d - 1 - d)), in which no term is negative.

  The slopes are written out, which is cheaper than to derive either form, and as exact: -p d / T in
  the logits of p, and (q - p) / T = p (e^d / sum p e^d - 1) / T in those of q.
  """
  return _divergence_and_slopes(p_logits, q_logits, temperature)[0]


def _divergence_and_slopes(p_logits, q_logits, temperature):
  log_p = jax.nn.log_softmax(p_logits / temperature)
  p = jnp.exp(log_p)
  gaps = (q_logits - p_logits) / temperature
  gaps -= jnp.sum(p * gaps, axis=-1, keepdims=True)
  moved = log_p + gaps  # log(p e^d), which overflows in no example that is near
  divergence = jax.nn.logsumexp(moved, axis=-1, keepdims=True)
  near, small = divergence < 1, jnp.abs(gaps) < _SMALL
  d = jnp.where(small, gaps, 0.0)
  rises = jnp.where(small, p * jnp.expm1(d), jnp.exp(moved) - p)  # p (e^d - 1)
  above_tangent = jnp.where(small, p * _above_tangent(d), rises - p * gaps)
  exact = jnp.log1p(jnp.sum(above_tangent, axis=-1, keepdims=True))
  value = jnp.where(near, exact, divergence)
  risen = jnp.sum(rises, axis=-1, keepdims=True)
  in_p = -p * gaps / temperature
  in_q = jnp.where(near, (rises - p * risen) / (1 + risen), jax.nn.softmax(moved) - p)
  return value[..., 0], (in_p, in_q / temperature, log_p, gaps)


def _pull_slopes(kept, slope):
  in_p, in_q, log_p, gaps = kept
  in_p, in_q = slope[..., None] * in_p, slope[..., None] * in_q
  in_temperature = -jnp.sum((in_p + in_q) * log_p + in_q * gaps)
  return in_p, in_q, in_temperature


_divergence.defvjp(_divergence_and_slopes, _pull_slopes)


def _above_tangent(x: Array) -> Array:
  """Returns e^x - 1 - x for |x| <= 1/2 by its series, to float32's precision also near 0."""
  series = 0.0
  for n in range(8, 1, -1):
    series = 1 / math.factorial(n) + x * series
  return x**2 * series


def reverse_kl(p_logits: Array, q_logits: Array, temperature: Array | float, mask: Array) -> Array:
  """Averages T^2 KL(softmax(q/T) || softmax(p/T)): `kl` with its sides exchanged."""
  return kl(q_logits, p_logits, temperature, mask)


def restrict(logits: Array, classes: Array | None) -> Array:
  """Leaves no probability to the classes outside `classes` [classes] bool; None restricts nothing.

  Two restricted distributions differ on the classes left alone, so their divergence is that of the
  softmax over these.
  """
  return logits if classes is None else jnp.where(classes, logits, _NEVER)


def distillation(
  student_logits: Array, teacher_logits: Array, temperature: Array | float, mask: Array
) -> Array:
  """Pulls a student's outputs toward a teacher's: `kl(teacher || student)`, teacher stopped.

  This is KD_i of QuPeD (Ozkara et al., 2021) as a personal model sees it. Shapes as in `kl`.
  """
  return kl(jax.lax.stop_gradient(teacher_logits), student_logits, temperature, mask)


def accuracy(logits: Array, labels: Array, mask: Array) -> Array:
  """Returns the share of counted examples whose largest logit is their label, [] float32."""
  chex.assert_rank([logits, labels, mask], [2, 1, 1])
  return _masked_mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32), mask)
