"""Partial participation around any algorithm: a random share of the clients trains each round."""

import jax
import jax.numpy as jnp

from qupeD_jax import checks, rng, shares
from qupeD_jax.federation import exchange, tree
from qupeD_jax.types import Algorithm, Array, Cohort, Dataset, FedState, PyTree

_NOBODY = jnp.iinfo(jnp.int32).max  # a slot beyond all clients


def with_sampling(algorithm: Algorithm, fraction: float) -> Algorithm:
  """Lets a share of every cohort take part in a round; the others keep their state to the bit.

  Those that take part are `num_participants` of each cohort, the ones with the smallest random
  numbers, each a function of the round and the client's id alone, so that order and padding change
  nothing. Only they are computed. Where devices share the clients, each computes an equal part of
  those that take part, whosever they are: their states and examples go there, their states back.

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
    drawn = participants(key, cohorts, fraction)
    slots, takes_part = zip(*drawn, strict=True)
    counts = [len(cohort.size) for cohort in cohorts]
    before = tuple(map(_handed_out, state.clients, slots, counts))
    chosen = tuple(map(_handed_out, cohorts, slots, counts))
    if exchange.is_shared():
      data, chosen = _with_rows(data, cohorts, slots, chosen)
    chosen = tuple(map(_without_others, chosen, takes_part))
    after, info = algorithm.round(key, state._replace(clients=before), data, chosen)
    to = (jnp.where(*part, _NOBODY) for part in zip(takes_part, slots, strict=True))
    clients = tuple(map(exchange.hand_back, state.clients, to, after.clients))
    return FedState(after.server, clients, after.round), info

  return Algorithm(algorithm.init, round_fn, algorithm.personalize)


def _handed_out(clients: PyTree, slots: Array, count: int) -> PyTree:
  """Returns this device's part of those at `slots`; given are all its own, leaves [count, ...]."""
  return exchange.hand_out(lambda own: tree.take(clients, own), slots, count)


def _without_others(cohort: Cohort, takes_part: Array) -> Cohort:
  """Empties the slots of this device's part that only fill it up."""
  return cohort._replace(size=jnp.where(exchange.part(takes_part), cohort.size, 0))


def _with_rows(
  data: Dataset, cohorts: tuple[Cohort, ...], slots: tuple[Array, ...], chosen: tuple[Cohort, ...]
) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Returns the examples of this device's part, client by client, and it with their rows."""
  examples, numbered, first = [], [], 0
  for cohort, of_cohort, part in zip(cohorts, slots, chosen, strict=True):
    pick = lambda own, index=cohort.index: tree.take(data, index[own])
    rows = exchange.hand_out(pick, of_cohort, len(cohort.size))
    examples.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows))
    count = part.index.size
    index = first + jnp.arange(count, dtype=jnp.int32).reshape(part.index.shape)
    numbered.append(part._replace(index=index))
    first += count
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *examples), tuple(numbered)


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
    Slots [k] int32, counted over all devices, and [k] bool: False for those that only fill up, as
    k is for clients in all slots, and a multiple of the number of devices.
  """
  number = rng.client_uniforms(key, "sampling", cohort.client)
  every = exchange.gather(jnp.where(cohort.size > 0, number, jnp.inf))
  # Padding is known on the device alone, where no share is computed.
  counts = [num_participants(clients, fraction) for clients in range(len(every) + 1)]
  count = jnp.array(counts)[jnp.sum(jnp.isfinite(every))]
  slots = jax.lax.top_k(-every, counts[-1])[1]
  slots = jnp.pad(slots, (0, -len(slots) % exchange.size()))
  return slots, (jnp.arange(len(slots)) < count) & jnp.isfinite(every[slots])
