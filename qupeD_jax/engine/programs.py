"""What one run computes on the device: its first state, its rounds, its scores, its models.

Each function here is written for one run. `loop` and `streaming` vmap it over runs and compile it.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qupeD_jax import rng
from qupeD_jax.engine import evaluate
from qupeD_jax.federation import tree
from qupeD_jax.types import Algorithm, Array, Cohort, Dataset, FedState, PyTree

Build = Callable[[Any], Algorithm]  # setting of one run, traced -> its algorithm


class Runs(NamedTuple):
  """R runs that train side by side: every leaf has a leading axis of R.

  Runs may differ in their seeds, in their clients' data and bits, and in any hyperparameter. Mapped
  over, this is one run, without that axis.
  """

  key: Array  # [R] keys
  cohorts: tuple[Cohort, ...]  # training rows
  setting: PyTree = None  # what the algorithm is built from, such as hyperparameters


def initialise(build: Build) -> Callable:
  """Returns the function that makes the first state of a run: (run, data) -> FedState."""

  def init(one: Runs, data: Dataset):
    return build(one.setting).init(rng.stream(one.key, "initialise"), data, one.cohorts)

  return init


def simulate(
  algorithm: Algorithm,
  key: Array,
  state: FedState,
  data: Dataset,
  cohorts: tuple[Cohort, ...],
  num_rounds: Array | int,
  max_rounds: int,
) -> tuple[FedState, PyTree]:
  """Runs rounds without leaving the device: a pure function, to be jitted and vmapped at will.

  Args:
    algorithm: what a round is.
    key: of the whole run; that of a round is derived from it and from the round's number alone.
    state: to start from; its `round` says how many rounds are done.
    data: training examples.
    cohorts: clients and their rows.
    num_rounds: how many rounds to run, at most `max_rounds`; may be traced.
    max_rounds: length of what is returned about the rounds.

  Returns:
    The state after, and the infos of the rounds, leaves [max_rounds, ...], zeros beyond num_rounds.
  """

  @jax.jit  # traced once, for the shapes and for the loop
  def one_round(state):
    return algorithm.round(rng.stream(key, "rounds", state.round), state, data, cohorts)

  def body(i, carry):
    state, infos = carry
    state, info = one_round(state)
    return state, jax.tree.map(lambda all_, new: all_.at[i].set(new), infos, info)

  _, shapes = jax.eval_shape(one_round, state)
  infos = jax.tree.map(lambda s: jnp.zeros((max_rounds, *s.shape), s.dtype), shapes)
  return jax.lax.fori_loop(0, num_rounds, body, (state, infos))


def train_chunk(build: Build, max_rounds: int) -> Callable:
  """Returns the function that trains a run for a chunk of rounds.

  Returns:
    (run, state, data, number of rounds) -> (state after, infos as of `simulate`, and per cohort
    which clients hold a NaN then, [K] bool).
  """

  def chunk(one: Runs, state: FedState, data: Dataset, num_rounds):
    algorithm = build(one.setting)
    state, infos = simulate(algorithm, one.key, state, data, one.cohorts, num_rounds, max_rounds)
    return state, infos, holds_nan(state, one.cohorts)

  return chunk


def holds_nan(state: FedState, cohorts: tuple[Cohort, ...]) -> tuple[Array, ...]:
  """Tells per cohort which clients hold a NaN, or all of them if the server does: [K] bool."""

  def has_nan(tree):  # codebooks hold infinities on purpose
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    # Not a stack of them: where devices share clients, jax 0.11.2 crashes on one.
    return functools.reduce(jnp.logical_or, (jnp.any(jnp.isnan(leaf)) for leaf in floats), False)

  return tuple(
    jax.vmap(has_nan, axis_size=len(cohort.size))(clients) | has_nan(state.server)
    for clients, cohort in zip(state.clients, cohorts, strict=True)
  )


def score_run(build: Build) -> Callable:
  """Returns the function that scores a run.

  Returns:
    (run, state, data, data to score on, cohorts to score on) -> {name: per cohort [K] float32}.
  """

  def score(one: Runs, state: FedState, data: Dataset, scored_data, scored_cohorts):
    key = rng.stream(one.key, "evaluate")
    return evaluate.accuracies(
      build(one.setting), key, state, data, one.cohorts, scored_data, scored_cohorts
    )

  return score


def show_personal(build: Build) -> Callable:
  """Returns the function that makes a run's personal models, those that `score_run` scores.

  Returns:
    (run, state, data) -> FedState with a model in the place of each client: its variables and its
    codebooks ({} at full precision), leaves [K, ...]. The server is ().
  """

  def show(one: Runs, state: FedState, data: Dataset):
    key = rng.stream(one.key, "evaluate")  # that of the scores
    shown = build(one.setting).personalize(key, state, data, one.cohorts)["personal"]
    clients = tuple(
      (s.variables if s.stacked else tree.repeat(s.variables, len(c.size)), s.codebooks or {})
      for s, c in zip(shown, one.cohorts, strict=True)
    )
    return FedState((), clients, state.round)

  return show


def compile_ahead(fn: Callable, *arguments, donate=()):
  """Compiles a function ahead of time, for arguments of these shapes and no others."""
  lowered = jax.jit(fn, donate_argnums=donate).lower(*arguments)
  # On a CPU the work is in library calls: LLVM's higher levels take much longer to compile
  # and gain nothing. Whoever asks for a level gets it.
  level = "xla_backend_optimization_level"
  asked = level in os.environ.get("XLA_FLAGS", "")
  low_effort = {level: 1} if jax.default_backend() == "cpu" and not asked else {}
  return lowered.compile(compiler_options=low_effort)
