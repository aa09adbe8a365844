"""Random streams: those of a simulation, so that a client draws here what it draws there."""

import jax

from qupeD_jax import rng
from qupeD_jax.types import Array


def of_phase(seed: int, phase: int) -> Array:
  """Returns the key of a phase, that of a run in an experiment."""
  return rng.stream(jax.random.key(seed), "phases", phase)


def of_round(seed: int, round_: int) -> Array:
  """Returns the key of a round of the first phase; a client's follows from it by its number."""
  return rng.stream(of_phase(seed, 0), "rounds", round_)
