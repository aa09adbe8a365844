"""How a server combines what its clients send: means, and others that withstand faulty clients.

An aggregate is a pure function of a round,

  (key, uploads, cohorts, before) -> (variables, kept)

uploads: what the clients send, one pytree per cohort, leaves [K, ...]; cohorts: who sends, a client
of size 0 sends nothing; before: the server's variables, leaves [...], which stay if nothing came
that counts; kept: per cohort [K] bool, whose upload counted. An upload that holds a NaN or an
infinity never does.

Where devices share the clients (`exchange`), all of them return the same variables, and each what
was kept of its own clients.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks, rng, shares
from qupeD_jax.federation import exchange, tree
from qupeD_jax.types import Aggregate, Array, Cohort, PyTree


def uniform(cohort: Cohort) -> Array:
  """Weighs every client equally, [K] float32, and padding not at all."""
  return (cohort.size > 0).astype(jnp.float32)


def by_size(cohort: Cohort) -> Array:
  """Weighs every client by its number of training rows, [K] float32."""
  return cohort.size.astype(jnp.float32)


def mean() -> Aggregate:
  """Builds the mean in which all clients weigh the same."""
  return weighted_mean(uniform)


def weighted_mean(weigh: Callable = by_size) -> Aggregate:
  """Builds a weighted mean, by default by the clients' training rows.

  Args:
    weigh: cohort -> weights [K] float32, at least 0.
  """

  def combine(key, uploads, cohorts, before):
    del key
    kept = tuple(map(usable, uploads, cohorts))
    weights = tuple(jnp.where(k, weigh(c), 0.0) for k, c in zip(kept, cohorts, strict=True))
    sound = tuple(map(_without_others, uploads, kept))
    return tree.weighted_mean(sound, weights, before), kept

  return combine


def median() -> Aggregate:
  """Builds the median of every coordinate, over the clients that sent something.

  Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
  Statistical Rates", ICML 2018. Of an even number it is the mean of the two in the middle.
  """

  def middle(leaf, number):
    return (leaf[(number - 1) // 2] + leaf[number // 2]) / 2

  return _of_sorted(middle)


def trimmed_mean(share: Array | float = 0.1) -> Aggregate:
  """Builds the mean of every coordinate without its largest and its smallest values.

  Yin, Chen, Ramchandran, Bartlett, ICML 2018, Definition 2.

  Args:
    share: of the clients, in [0, 0.5), that is left out at either end, rounded down (`shares`).

  Raises:
    BadInput: the share is out of range.
  """
  if checks.concrete(share):
    checks.require(0 <= share < 0.5, "share", share, "in [0, 0.5)")

  def trimmed(leaf, number):
    cut = _left_out(share, number, len(leaf))
    place = jnp.arange(len(leaf)).reshape(-1, *(1,) * (leaf.ndim - 1))
    inner = (place >= cut) & (place < number - cut)
    return jnp.sum(jnp.where(inner, leaf, 0.0), axis=0) / jnp.maximum(number - 2 * cut, 1)

  return _of_sorted(trimmed)


def _left_out(share: Array | float, number: Array, most: int) -> Array:
  """Counts a share of `number` [] clients, of whom there are so many at most, rounded down."""
  if checks.concrete(share):
    return jnp.array([shares.rounded_down(share, n) for n in range(most + 1)])[number]
  # A traced share is known to float32's precision: what is that close to a whole number is one.
  return jnp.floor(share * number * (1 + 2**-22)).astype(number.dtype)


def clipped_mean(bound: Array | float, noise_multiplier: Array | float = 0.0) -> Aggregate:
  """Builds the mean of clipped updates with Gaussian noise, DP-FedAvg's.

  McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR
  2018. With n clients and their updates u_i = w_i - w,

    w <- w + (sum_i u_i min(1, S / ||u_i||) + N(0, (z S)^2)) / n

  all variables that travel, running statistics included, make one u_i. An update that is not finite
  is taken for 0, and still counts in n: n must not tell of what a client's data are.

  The noise follows from the key alone, equal on all devices: who knows the key can take it away.

  Args:
    bound: S, above 0, the L2 norm that no update exceeds.
    noise_multiplier: z, at least 0; see `privacy.epsilon` for what it is worth.

  Raises:
    BadInput: an argument is out of range.
  """
  checks.positive("bound", bound)
  checks.non_negative("noise_multiplier", noise_multiplier)

  def combine(key, uploads, cohorts, before):
    updates = tuple(jax.tree.map(jnp.subtract, upload, before) for upload in uploads)
    kept = tuple(map(usable, updates, cohorts))
    updates = tuple(map(_without_others, updates, kept))
    scales = (jnp.where(k, _shrinking(u, bound), 0.0) for u, k in zip(updates, kept, strict=True))
    sums = map(tree.weighted_sum, updates, scales)
    total = exchange.add(jax.tree.map(lambda *leaves: sum(leaves), *sums))
    number = exchange.add(sum(jnp.sum(cohort.size > 0) for cohort in cohorts))
    if not (checks.concrete(noise_multiplier) and noise_multiplier == 0):
      total = tree.with_noise(rng.stream(key, "noise"), total, noise_multiplier * bound)
    moved = jax.tree.map(lambda b, t: b + t / jnp.maximum(number, 1), before, total)
    return _unless_nobody(number, moved, before), kept

  return combine


def usable(upload: PyTree, cohort: Cohort) -> Array:
  """Tells which clients sent something, and nothing but finite numbers: [K] bool."""
  finite = [
    jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(upload)
  ]
  return functools.reduce(jnp.logical_and, finite, cohort.size > 0)


def _without_others(upload: PyTree, kept: Array) -> PyTree:
  """Sets to 0 what does not count: a weight of 0 times a NaN would still be a NaN."""
  return tree.select(kept, upload, jax.tree.map(jnp.zeros_like, upload))


def _unless_nobody(number: Array, after: PyTree, before: PyTree) -> PyTree:
  return jax.tree.map(lambda a, b: jnp.where(number > 0, a, b).astype(b.dtype), after, before)


def _of_sorted(take: Callable) -> Aggregate:
  """Builds an aggregate coordinate by coordinate.

  Args:
    take: (leaf [n, ...], number [] int32) -> [...]: of every coordinate's values the first `number`
      count, in ascending order; infinities follow.
  """

  def combine(key, uploads, cohorts, before):
    del key
    kept = tuple(map(usable, uploads, cohorts))
    number = exchange.add(sum(jnp.sum(k) for k in kept))

    def of_leaf(*leaves):
      masked = [
        jnp.where(k.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.inf)
        for k, leaf in zip(kept, leaves, strict=True)
      ]
      everyone = exchange.gather(jnp.concatenate(masked))
      return take(jnp.sort(everyone, axis=0), number)

    return _unless_nobody(number, jax.tree.map(of_leaf, *uploads), before), kept

  return combine


def _shrinking(updates: PyTree, bound: Array | float) -> Array:
  """Returns the factors, [K], that bring updates, leaves [K, ...], to an L2 norm within bound."""
  squares = [jnp.sum(u**2, axis=tuple(range(1, u.ndim))) for u in jax.tree.leaves(updates)]
  norm = jnp.sqrt(sum(squares))
  return bound / jnp.maximum(norm, bound)
