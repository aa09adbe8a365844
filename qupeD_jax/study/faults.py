"""From options to how uploads are combined, which clients fail, and what the noise is worth."""

import inspect
from collections.abc import Callable

import jax

from qupeD_jax import checks
from qupeD_jax.federation import aggregators, corruption
from qupeD_jax.federation.aggregators import Aggregate
from qupeD_jax.study.options import Federated
from qupeD_jax.types import Algorithm
from qupeD_jax.wrappers.faults import with_dropout, with_stragglers
from qupeD_jax.wrappers.sampling import num_participants

AGGREGATES = {
  "mean": lambda options: aggregators.mean(),
  "weighted_mean": lambda options: aggregators.weighted_mean(),
  "median": lambda options: aggregators.median(),
  "trimmed_mean": lambda options: aggregators.trimmed_mean(options.server.trim),
  "clipped_mean": lambda options: aggregators.clipped_mean(
    options.server.clip_norm, options.server.noise_multiplier
  ),
}
CORRUPTIONS = {"nan": corruption.nan, "noise": corruption.noise(), "sign": corruption.sign()}


def aggregate_of(options: Federated, num_clients: int, method: Callable) -> Aggregate:
  """Returns how the server combines uploads, some of them corrupt.

  Args:
    options: of the experiment; within a run its seed is the run's.
    num_clients: of all cohorts together.
    method: builder of the algorithm; how it combines by itself is its default.
  """
  if options.server.aggregate is None:
    combine = inspect.signature(method).parameters["aggregate"].default
  else:
    combine = AGGREGATES[options.server.aggregate](options)
  if _is_off(options.faults.corrupt):
    return combine
  corrupt = corruption.choose(jax.random.key(options.run.seed), num_clients, options.faults.corrupt)
  return corruption.corrupted(combine, corrupt, CORRUPTIONS[options.faults.corruption])


def faulty(build: Callable) -> Callable:
  """Lets clients be slow and be lost, if the options ask for it."""

  def build_faulty(options, trained) -> Algorithm:
    algorithm = build(options, trained)
    if not _is_off(options.faults.stragglers):
      algorithm = with_stragglers(algorithm, options.faults.stragglers, options.work.local_steps)
    if not _is_off(options.faults.dropout):
      algorithm = with_dropout(algorithm, options.faults.dropout)
    return algorithm

  return build_faulty


def privacy_of(options: Federated, group_sizes: list[int], rounds: int) -> dict[str, float] | None:
  """Returns what the noise is worth, or None where there is none or its seed is known.

  Args:
    options: of a method.
    group_sizes: clients of each group; every group draws its own participants, and the one with the
      largest share of them is the one that counts.
    rounds: in which clients send updates.
  """
  server = options.server
  if not rounds or not adds_noise(options) or server.noise_seed is not None:
    return None
  # Its accountant takes seconds to import, and few runs add noise.
  from qupeD_jax.federation import privacy

  delta = sum(group_sizes) ** -1.1 if server.delta is None else server.delta
  bounds = [
    privacy.epsilon(
      server.noise_multiplier,
      clients=size,
      participants=num_participants(size, options.server.participation),
      rounds=rounds,
      delta=delta,
    )
    for size in group_sizes
  ]
  return {"epsilon": max(bounds), "delta": delta}


def adds_noise(options: Federated) -> bool:
  """Tells whether the server adds noise to what it combines."""
  return options.server.aggregate == "clipped_mean" and not _is_off(options.server.noise_multiplier)


def _is_off(value) -> bool:
  """Tells a plain 0; what variants differ in is traced, and never off."""
  return checks.concrete(value) and value == 0
