"""Trains a job: its variants and seeds side by side, phase after phase."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments.common import federation as fed
from experiments.common.errors import Diverged
from experiments.common.jobs import Job, Phase
from experiments.common.options import Federated, Options
from qupeD_jax import engine
from qupeD_jax.types import Algorithm, FedState


class Trained(NamedTuple):
  """What is left of a job's training."""

  build: Callable  # of the last phase, as the engine takes it
  runs: engine.Runs
  state: FedState
  seconds: float  # spent on rounds


def train(job: Job, record: Callable[[int, engine.Report], None]) -> Trained:
  """Trains through all phases of a job, each from what the one before left.

  Args:
    job: what is trained.
    record: called with the rounds done before the phase, and a chunk of it.

  Raises:
    Diverged: a loss is no longer finite.
  """
  options, federation = job.options, job.federation
  cohorts = _over_variants(job, lambda bits: fed.training(federation, bits, federation.groups))
  methods = methods_of_runs(job)
  validation = scored_rows(job, fed.validation(federation, federation.groups))
  keys = jax.vmap(jax.random.key)(np.array([seed for _, seed in methods], np.uint32))
  changes = _changes(job)
  state, seconds, done = None, 0.0, 0
  for i, phase in enumerate(job.phases):
    runs = engine.Runs(jax.vmap(jax.random.fold_in, (0, None))(keys, i), cohorts, (changes, state))
    build = functools.partial(_build, job.options, phase)
    try:
      result = engine.run(
        build,
        runs,
        federation.train,
        rounds=phase.rounds,
        every=min(options.eval_every, phase.rounds),
        scored=validation,
        callback=functools.partial(record, done),
      )
    except engine.NonFinite as error:
      method, seed = methods[error.run]
      raise Diverged(
        method,
        f"{method}, seed {seed}, round {done + error.round}: the loss or the model of clients "
        f"{error.clients} is not finite; smaller rates may help; what was written before it stays",
      ) from error
    state, seconds, done = result.state, seconds + result.train_seconds, done + phase.rounds
  return Trained(build, runs, state, seconds)


def _build(options: Options, phase: Phase, setting) -> Algorithm:
  """Builds a phase's algorithm for one run: its changes to the options, and where it starts."""
  changes, trained = setting
  return phase.build(dataclasses.replace(options, **changes), trained)


def _changes(job: Job) -> dict[str, np.ndarray]:
  """Returns the values of the hyperparameters in which variants differ, [variants * seeds]."""
  names = {name for variant in job.variants.values() for name in variant.changes}
  return {
    name: np.repeat(
      np.float32([v.changes.get(name, getattr(job.options, name)) for v in job.variants.values()]),
      job.options.seeds,
    )
    for name in sorted(names)
  }


def runs_of(variant: int, options: Federated) -> slice:
  """Returns which runs are those of a job's variant, counted from 0: all its seeds."""
  return slice(variant * options.seeds, (variant + 1) * options.seeds)


def methods_of_runs(job: Job) -> list[tuple[str, int]]:
  """Returns method and seed of every run of a job, in their order."""
  return [(method, seed) for method in job.variants for seed in fed.seeds(job.options)]


def _over_variants(job: Job, cohorts_of: Callable) -> tuple:
  """Joins the runs of all variants: cohorts [variants * seeds, K, ...]."""
  parts = [cohorts_of(variant.bits) for variant in job.variants.values()]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def scored_rows(job: Job, scored):
  """Repeats data and cohorts [seeds, ...] to score on for the runs of all variants."""
  data, cohorts = scored
  return data, _over_variants(job, lambda bits: cohorts)


def rows_of(methods: list[tuple[str, int]], chunk: engine.Report, first: int) -> list[dict]:
  """Writes a chunk as rows of metrics.jsonl; its last round was evaluated."""
  rows = []
  for (run_, (method, seed)), (j, round_) in itertools.product(
    enumerate(methods), enumerate(chunk.rounds)
  ):
    row = {"method": method, "seed": seed, "round": first + int(round_)}
    row |= {"loss": float(chunk.loss[run_, j]), "accuracy": None, "global_accuracy": None}
    if j == len(chunk.rounds) - 1:
      row["accuracy"] = float(np.mean(chunk.scores["personal"][run_]))
      if "global" in chunk.scores:
        row["global_accuracy"] = float(np.mean(chunk.scores["global"][run_]))
    rows.append(row)
  return rows
