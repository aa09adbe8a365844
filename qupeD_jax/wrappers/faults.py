"""Clients that fail in a round, around any algorithm: some are lost, some do less than was asked.

Which ones is drawn anew each round, for each client by itself, by a function of the round's key and
the client's id alone, so that order, padding and sharding change nothing.
"""

import jax.numpy as jnp

from qupeD_jax import checks, rng
from qupeD_jax.federation import tree
from qupeD_jax.types import Algorithm, FedState


def with_dropout(algorithm: Algorithm, share: float) -> Algorithm:
  """Loses clients in the midst of a round: what they did leaves no trace, here or at the server.

  A lost client keeps its state to the bit, its upload never comes, and it is not in what the round
  reports. If all are lost, the server keeps what it had.

  Args:
    algorithm: any.
    share: probability, in [0, 1), that a client is lost in a round.

  Returns:
    An Algorithm with the same state.

  Raises:
    BadInput: share is out of range.
  """
  checks.fraction("share", share, closed=False)

  def round_fn(key, state, data, cohorts):
    lost = tuple(rng.client_uniforms(key, "dropout", c.client) < share for c in cohorts)
    left = tuple(
      cohort._replace(size=jnp.where(gone, 0, cohort.size))
      for cohort, gone in zip(cohorts, lost, strict=True)
    )
    after, info = algorithm.round(key, state, data, left)
    clients = tuple(map(tree.select, lost, state.clients, after.clients))
    return FedState(after.server, clients, after.round), info

  return Algorithm(algorithm.init, round_fn, algorithm.personalize)


def with_stragglers(algorithm: Algorithm, share: float, local_steps: int) -> Algorithm:
  """Lets some clients do fewer local steps than the others: any number from 1 to tau - 1.

  Args:
    algorithm: any.
    share: probability, in [0, 1], that a client is slow in a round.
    local_steps: tau, the steps of the algorithm's round, at least 2.

  Returns:
    An Algorithm with the same state.

  Raises:
    BadInput: an argument is out of range.
  """
  checks.share("share", share)
  checks.at_least("local_steps", local_steps, 2)

  def round_fn(key, state, data, cohorts):
    def slowed(cohort):
      is_slow = rng.client_uniforms(key, "stragglers", cohort.client) < share
      steps = rng.client_uniforms(key, "steps", cohort.client) * (local_steps - 1)
      fewer = 1 + steps.astype(jnp.int32)
      return cohort._replace(steps=jnp.where(is_slow, fewer, jnp.int32(local_steps)))

    return algorithm.round(key, state, data, tuple(map(slowed, cohorts)))

  return Algorithm(algorithm.init, round_fn, algorithm.personalize)
