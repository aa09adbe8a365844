"""Partial participation around any algorithm: a random share of the clients trains each round."""

import math

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import exchange, tree
from qupeD_jax.types import Algorithm, Array, Cohort, FedState

_DRAW = 0x5A3D


def with_sampling(algorithm: Algorithm, fraction: float) -> Algorithm:
  """Lets a share of every cohort take part in a round; the others keep their state to the bit.

  The clients that take part are the round(fraction * K) of K with the smallest random numbers, each
  a function of the round and the client's id alone, so that order and padding change nothing. Only
  they are computed; where devices share the clients, each computes as many as may be its own.

  Args:
    algorithm: any.
    fraction: in (0, 1]; at least one client of each cohort takes part.

  Returns:
    An Algorithm with the same state.

  Raises:
    BadInput: fraction is out of range.
  """
  checks.fraction("fraction", fraction, closed=True)

  def round_fn(key, state, data, cohorts):
    # The algorithm gets the round's own key, so that a share of 1 changes nothing.
    slots = participants(key, cohorts, fraction)
    chosen = tuple(
      tree.take(cohort, index)._replace(size=jnp.where(takes_part, cohort.size[index], 0))
      for cohort, (index, takes_part) in zip(cohorts, slots, strict=True)
    )
    before = tuple(tree.take(c, index) for c, (index, _) in zip(state.clients, slots, strict=True))
    after, info = algorithm.round(key, state._replace(clients=before), data, chosen)
    clients = tuple(
      tree.put(all_clients, index, tree.select(takes_part, new, old))
      for all_clients, (index, takes_part), new, old in zip(
        state.clients, slots, after.clients, before, strict=True
      )
    )
    return FedState(after.server, clients, after.round), info

  return Algorithm(algorithm.init, round_fn, algorithm.personalize)


def participants(
  key: Array, cohorts: tuple[Cohort, ...], fraction: float
) -> tuple[tuple[Array, Array], ...]:
  """Draws who takes part in a round, per cohort as in `draw_slots`.

  Args:
    key: of the round.
    cohorts: of whom size and client are looked at.
    fraction: as there.
  """
  draw_key = jax.random.fold_in(key, _DRAW)
  return tuple(draw_slots(draw_key, cohort, fraction) for cohort in cohorts)


def most(num_slots: int, fraction: float) -> int:
  """Returns how many slots of so many are drawn at most."""
  return max(1, math.ceil(fraction * num_slots))


def draw_slots(key: Array, cohort: Cohort, fraction: float) -> tuple[Array, Array]:
  """Draws the slots of a cohort that take part in a round.

  Args:
    key: of the round.
    cohort: K slots, padding among them: those of one device.
    fraction: in (0, 1].

  Returns:
    Slots [k] int32, and [k] bool: False for those beyond the share of the true clients.
  """
  number = lambda client: jax.random.uniform(jax.random.fold_in(key, client))
  own = jnp.where(cohort.size > 0, jax.vmap(number)(cohort.client), jnp.inf)
  every, first = exchange.gather(own), exchange.rank() * len(own)
  share = jnp.maximum(1, jnp.round(fraction * jnp.sum(jnp.isfinite(every))))
  chosen = jax.lax.top_k(-every, most(len(every), fraction))[1]
  takes_part = jnp.zeros(len(every), bool).at[chosen].set(jnp.arange(len(chosen)) < share)
  slots = jax.lax.top_k(-own, min(len(own), len(chosen)))[1]
  return slots, takes_part[first + slots] & (cohort.size[slots] > 0)
