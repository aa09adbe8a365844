"""Arithmetic over whole models."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax.federation import tree

RNG = np.random.default_rng(0)
A, B = ({"a": RNG.normal(size=(3, 4)).astype(np.float32), "b": np.float32([i])} for i in (2, 5))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 40.0])
def test_pull_minimises_its_objective(t):
  """At z the slopes of t/2 ||z - anchor||^2 and ||z - params||^2 / 2 cancel."""
  z = tree.pull(A, B, t)
  slopes = jax.tree.map(lambda z, anchor, params: t * (z - anchor) + z - params, z, B, A)
  chex.assert_trees_all_close(slopes, jax.tree.map(np.zeros_like, A), atol=1e-5)


def test_pull_without_a_penalty_and_with_an_infinite_one():
  chex.assert_trees_all_close(tree.pull(A, B, 0.0), A, rtol=1e-6, atol=1e-6)
  chex.assert_trees_all_equal(tree.pull(A, B, np.inf), B)
  chex.assert_trees_all_equal(jax.jit(tree.pull)(A, B, np.inf), B)


def test_weighted_mean_over_two_cohorts():
  first, second = np.float32([[1.0], [2.0]]), np.float32([[5.0]])
  mean = tree.weighted_mean((first, second), (np.float32([1, 2]), np.float32([5])), jnp.zeros(1))
  np.testing.assert_allclose(mean, [(1 * 1 + 2 * 2 + 5 * 5) / 8], rtol=1e-6)


def test_weighted_mean_of_nobody_is_the_default():
  nobody = np.zeros(2, np.float32)
  mean = tree.weighted_mean((np.ones((2, 1), np.float32),), (nobody,), np.float32([7.0]))
  np.testing.assert_array_equal(mean, [7.0])
