"""Cohorts that know nothing of each other: each is a federation of its own."""

import jax.numpy as jnp

from qupeD_jax import rng
from qupeD_jax.types import Algorithm, FedState


def separate(algorithms: tuple[Algorithm, ...]) -> Algorithm:
  """Runs one algorithm per cohort, side by side, each with a server of its own.

  Args:
    algorithms: one per cohort, each built for that cohort alone.

  Those of one architecture start from the same weights; what is drawn after that follows from each
  one's place among them.

  Returns:
    An Algorithm whose server state is the tuple of theirs; scored is what all of them show.
  """

  def init(key, data, cohorts):
    pairs = zip(algorithms, cohorts, strict=True)
    states = tuple(algorithm.init(key, data, (cohort,)) for algorithm, cohort in pairs)
    clients = tuple(state.clients[0] for state in states)
    return FedState(tuple(state.server for state in states), clients, jnp.int32(0))

  def round_fn(key, state, data, cohorts):
    parts = zip(algorithms, part(state), cohorts, strict=True)
    results = [
      algorithm.round(rng.stream(key, "federations", i), s, data, (cohort,))
      for i, (algorithm, s, cohort) in enumerate(parts)
    ]
    servers = tuple(after.server for after, _ in results)
    clients = tuple(after.clients[0] for after, _ in results)
    return FedState(servers, clients, state.round + 1), tuple(info for _, (info,) in results)

  def personalize(key, state, data, cohorts):
    parts = zip(algorithms, part(state), cohorts, strict=True)
    shown = [
      algorithm.personalize(rng.stream(key, "federations", i), s, data, (cohort,))
      for i, (algorithm, s, cohort) in enumerate(parts)
    ]
    common = [name for name in shown[0] if all(name in models for models in shown)]
    return {name: tuple(models[name][0] for models in shown) for name in common}

  return Algorithm(init, round_fn, personalize)


def part(state: FedState) -> tuple[FedState, ...]:
  """Splits the state of separate federations into one state per cohort."""
  pairs = zip(state.server, state.clients, strict=True)
  return tuple(FedState(server, (clients,), state.round) for server, clients in pairs)
