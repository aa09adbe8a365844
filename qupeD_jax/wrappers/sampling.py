"""Partial participation around any algorithm: a random share of the clients trains each round."""

import jax
import jax.numpy as jnp

from qupeD_jax import checks, rng, shares
from qupeD_jax.federation import exchange, tree
from qupeD_jax.types import Algorithm, Array, Cohort, FedState


def with_sampling(algorithm: Algorithm, fraction: float) -> Algorithm:
  """Lets a share of every cohort take part in a round; the others keep their state to the bit.

  Those that take part are `num_participants` of each cohort, the ones with the smallest random
  numbers, each a function of the round and the client's id alone, so that order and padding change
  nothing. Only they are computed; where devices share the clients, each computes as many as may be
  its own.

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
  return tuple(draw_slots(key, cohort, fraction) for cohort in cohorts)


def num_participants(num_clients: int, fraction: float) -> int:
  """Counts the clients of a cohort that take part in a round: the nearest number, at least one.

  What is drawn, what is accounted for and what travels follow from this one number.
  """
  return max(1, shares.rounded(fraction, num_clients))


def draw_slots(key: Array, cohort: Cohort, fraction: float) -> tuple[Array, Array]:
  """Draws the slots of a cohort that take part in a round.

  Args:
    key: of the round.
    cohort: K slots, padding among them: those of one device.
    fraction: in (0, 1].

  Returns:
    Slots [k] int32, and [k] bool: False for those beyond the share of the true clients.
  """
  number = rng.client_uniforms(key, "sampling", cohort.client)
  own = jnp.where(cohort.size > 0, number, jnp.inf)
  every, first = exchange.gather(own), exchange.rank() * len(own)
  # Padding is known on the device alone, where no share is computed.
  counts = [num_participants(clients, fraction) for clients in range(len(every) + 1)]
  count = jnp.array(counts)[jnp.sum(jnp.isfinite(every))]
  chosen = jax.lax.top_k(-every, counts[-1])[1]
  takes_part = jnp.zeros(len(every), bool).at[chosen].set(jnp.arange(len(chosen)) < count)
  slots = jax.lax.top_k(-own, min(len(own), len(chosen)))[1]
  return slots, takes_part[first + slots] & (cohort.size[slots] > 0)
