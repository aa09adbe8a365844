"""Clients that fail in a round, around any algorithm: some are lost, some do less than was asked.

Which ones is drawn anew each round, for each client by itself, by a function of the round's key and
the client's id alone, so that order, padding and sharding change nothing.
"""

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import tree
from qupeD_jax.types import Algorithm, Array, Cohort, FedState

_LOSE, _SLOW = 0xD209, 0x510F


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
    lost = tuple(_drawn(jax.random.fold_in(key, _LOSE), cohort) < share for cohort in cohorts)
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
    slow_key, steps_key = jax.random.split(jax.random.fold_in(key, _SLOW))

    def slowed(cohort):
      fewer = 1 + (_drawn(steps_key, cohort) * (local_steps - 1)).astype(jnp.int32)
      return cohort._replace(
        steps=jnp.where(_drawn(slow_key, cohort) < share, fewer, jnp.int32(local_steps))
      )

    return algorithm.round(key, state, data, tuple(map(slowed, cohorts)))

  return Algorithm(algorithm.init, round_fn, algorithm.personalize)


def _drawn(key: Array, cohort: Cohort) -> Array:
  """Draws a number in [0, 1) for each client, [K]."""
  return jax.vmap(lambda client: jax.random.uniform(jax.random.fold_in(key, client)))(cohort.client)
