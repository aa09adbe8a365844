"""Trains runs on the device: compiled once, rounds looped there, whole runs side by side by vmap.

`run` drives a compiled program from the host in chunks of rounds, and calls back in between. On
several devices, each has its share of the clients. `programs.simulate` is the pure function below.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qupeD_jax import checks
from qupeD_jax.engine import parallel, programs, reports
from qupeD_jax.engine.programs import Build, Runs
from qupeD_jax.engine.reports import Chunk, Report
from qupeD_jax.types import Array, Cohort, Dataset, FedState, PyTree

Scores = dict[str, tuple[Array, ...]]  # name -> per cohort [R, K] float32


class Result(NamedTuple):
  """What is left of a finished run."""

  state: FedState  # leaves [R, ...]
  compile_seconds: float
  train_seconds: float  # rounds alone: neither compilation nor scoring


class Steps(NamedTuple):
  """What happens between two callbacks, as functions that the host calls; see `drive`."""

  train: Callable[[FedState, int], tuple[FedState, Chunk]]  # (state, number of rounds)
  score: Callable[[FedState], Scores] = lambda state: {}
  measure: Callable[[FedState], Scores] = lambda state: {}


class Driven(NamedTuple):
  """What `drive` returns."""

  state: FedState
  seconds: float  # spent on rounds


def run(
  build: Build,
  runs: Runs,
  data: Dataset,
  *,
  rounds: int,
  every: int,
  pause: int | None = None,
  scored: tuple[Dataset, tuple[Cohort, ...]] | None = None,
  measure: Callable | None = None,
  callback: Callable[[Report], None] = lambda report: None,
  state: FedState | None = None,
  mesh: Mesh | None = None,
) -> Result:
  """Trains R runs side by side, from round 0 or from a given state.

  One program is compiled for all chunks, whatever their length; a chunk transfers nothing between
  host and device but its result, and reuses the memory of the state it is given.

  Args:
    build: setting (one of `runs.setting`, traced) -> Algorithm.
    runs: R runs.
    data: training examples, shared by the runs.
    rounds: how many rounds each run has had in the end.
    every: rounds after which runs are scored and measured, and again at the end.
    pause: rounds after which the callback is called as well, without scores; a chunk ends at
      either. It changes neither the program nor what it computes.
    scored: data and cohorts (leaves [R, ...]) to score on; None scores nothing.
    measure: (setting, state, data, cohorts) of one run -> {name: per cohort [K]}; called for one
      run after the other, so that it may look at many rows at once. None measures nothing.
    callback: called on the host after each chunk.
    state: to go on from, leaves [R, ...]; its memory is taken over.
    mesh: devices that share the clients (`parallel.make_mesh`), K a multiple of their number; what
      an algorithm does across its clients must go through `exchange`. None is the one device.

  Returns:
    The final state and where the time went.

  Raises:
    NonFinite: a loss of the last chunk was not finite, or a client was left with a NaN; the chunks
      before were reported.
    BadInput: rounds, every or pause is not positive.
  """
  check_lengths(rounds, every, pause)
  cohorts = runs.cohorts
  data, runs = _place(data, runs, mesh)
  scored = None if scored is None else parallel.spread(*scored, mesh)
  start = time.perf_counter()
  if state is None:
    over_runs = jax.vmap(programs.initialise(build), (0, None))
    init = parallel.over_devices(over_runs, mesh, parallel.STATE)
    state = programs.compile_ahead(init, runs, data)(runs, data)
  else:
    state = parallel.place(state, mesh)
  program = compile_chunk(build, every, runs, state, data, mesh)
  steps = Steps(lambda state, length: _train(program, runs, state, data, length, cohorts))
  if scored is not None:
    score = _compile_score(build, runs, state, data, scored, mesh)
    steps = steps._replace(score=lambda state: score(runs, state, data, scored))
  if measure is not None:
    take = _compile_measure(measure, runs, state, data, mesh)
    steps = steps._replace(measure=lambda state: take(runs, state, data))
  compile_seconds = time.perf_counter() - start
  lengths = {"rounds": rounds, "every": every, "pause": pause}
  driven = drive(steps, state, cohorts, **lengths, callback=callback)
  return Result(driven.state, compile_seconds, driven.seconds)


def drive(
  steps: Steps,
  state: FedState,
  cohorts: tuple[Cohort, ...],
  *,
  rounds: int,
  every: int,
  pause: int | None,
  callback: Callable[[Report], None],
) -> Driven:
  """Trains chunk after chunk, and scores, measures and reports in between.

  Args:
    steps: how.
    state: to start from.
    cohorts: leaves [R, K, ...], whose clients are scored.
    rounds, every, pause, callback: as in `run`.

  Raises:
    NonFinite: as in `run`.
  """
  done, seconds, pause = int(np.min(state.round)), 0.0, pause or every
  while done < rounds:
    start = time.perf_counter()
    length = min(every - done % every, pause - done % pause, rounds - done)
    state, chunk = steps.train(state, length)
    seconds += time.perf_counter() - start
    numbers = done + 1 + np.arange(length)
    reports.require_finite(chunk, numbers)
    done += length
    scores = measures = {}
    if done % every == 0 or done == rounds:
      scores = reports.by_client(steps.score(state), cohorts)
      measures = reports.by_client(steps.measure(state), cohorts)
    report = Report(
      state=state,
      rounds=numbers,
      loss=reports.mean_loss(chunk.infos),
      clients=reports.num_clients(chunk.infos),
      dropped=reports.num_dropped(chunk.infos),
      seconds=seconds,
      scores=scores,
      measures=measures,
    )
    callback(report)
  return Driven(state, seconds)


def check_lengths(rounds: int, every: int, pause: int | None = None) -> None:
  """Raises BadInput if rounds, every or pause is not positive."""
  checks.at_least("rounds", rounds, 1)
  checks.at_least("every", every, 1)
  if pause is not None:
    checks.at_least("pause", pause, 1)


def compile_chunk(
  build: Build,
  every: int,
  runs: Runs,
  state: FedState,
  data: Dataset,
  mesh: Mesh | None = None,
):
  """Compiles the program that trains for a chunk of rounds.

  Args:
    every: most rounds of a chunk.
    build, runs, state, data, mesh: as in `run`, but on the devices already; shapes are enough.

  Returns:
    (runs, state, data, number of rounds) -> (state, (infos, who holds a NaN, sums of the servers)).
    The program takes the memory of its state over.
  """
  train = programs.train_chunk(build, every)

  def chunk(one: Runs, state, data, num_rounds):
    state, *report = train(one, state, data, num_rounds)
    return state, (*report, parallel.sum_of(state.server))

  over_runs = jax.vmap(chunk, (0, 0, None, None))
  over_runs = parallel.over_devices(over_runs, mesh, (parallel.STATE, parallel.REPORT))
  return programs.compile_ahead(over_runs, runs, state, data, np.int32(0), donate=1)


def initial_shapes(build: Build, runs: Runs, data: Dataset) -> FedState:
  """Returns the shapes of the state that `run` starts from, as of `jax.eval_shape`."""
  return jax.eval_shape(jax.vmap(programs.initialise(build), (0, None)), runs, data)


def score(
  build: Build,
  runs: Runs,
  state: FedState,
  data: Dataset,
  scored: tuple[Dataset, tuple[Cohort, ...]],
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Scores the models of R runs on given rows, such as the test rows at the end.

  Args and the form of what is returned as in `run` and `Report`: name -> [R, clients] float32.
  """
  cohorts = runs.cohorts
  data, runs = _place(data, runs, mesh)
  state, scored = parallel.place(state, mesh), parallel.spread(*scored, mesh)
  scores = _compile_score(build, runs, state, data, scored, mesh)(runs, state, data, scored)
  return reports.by_client(scores, cohorts)


def personal_models(
  build: Build,
  runs: Runs,
  state: FedState,
  data: Dataset,
  chosen: Sequence[int],
  mesh: Mesh | None = None,
) -> Iterator[tuple[tuple[PyTree, dict], ...]]:
  """Yields the personal models of some runs, those that `score` scores.

  Args:
    build, runs, state, data, mesh: as in `score`.
    chosen: numbers of the runs, counted from 0.

  Yields:
    Of each of them, per cohort: variables and codebooks ({} at full precision), leaves [K, ...], on
    the host.
  """
  data, runs = _place(data, runs, mesh)
  given = runs, parallel.place(state, mesh), data

  def of_run(runs, state, data, r):
    one = jax.tree.map(lambda leaf: leaf[r], (runs, state))
    shown = programs.show_personal(build)(*one, data)
    return jax.tree.map(lambda leaf: leaf[None], shown)

  over_devices = parallel.over_devices(of_run, mesh, parallel.STATE)
  show = programs.compile_ahead(over_devices, *given, np.int32(0))
  for r in chosen:
    shown = parallel.fetch(show(*given, np.int32(r)).clients)
    yield jax.tree.map(lambda leaf: leaf[0], shown)


def _place(data: Dataset, runs: Runs, mesh: Mesh | None) -> tuple[Dataset, Runs]:
  """Puts training rows and runs on the devices."""
  data, cohorts = parallel.spread(data, runs.cohorts, mesh)
  return data, parallel.place(runs._replace(cohorts=()), mesh)._replace(cohorts=cohorts)


def _train(
  program, runs: Runs, state: FedState, data: Dataset, length: int, cohorts: tuple[Cohort, ...]
) -> tuple[FedState, Chunk]:
  """Trains for a chunk by the program of `compile_chunk`, and waits for it."""
  state, report = program(runs, state, data, np.int32(length))
  infos, nan, sums = parallel.fetch(report)
  parallel.require_one_server(sums)
  infos = jax.tree.map(lambda leaf: leaf[:, :length], infos)
  return state, Chunk(infos, tuple(np.asarray(cohort.client) for cohort in cohorts), nan)


def _compile_score(build, runs, state, data, scored, mesh):
  """Compiles (runs, state, data, scored) -> Scores."""
  over_runs = jax.vmap(programs.score_run(build), (0, 0, None, None, 0))
  fn = lambda runs, state, data, scored: over_runs(runs, state, data, *scored)
  over_devices = parallel.over_devices(fn, mesh, parallel.REPORT)
  return programs.compile_ahead(over_devices, runs, state, data, scored)


def _compile_measure(measure, runs, state, data, mesh):
  """Compiles (runs, state, data) -> Scores, by a measure of one run."""

  def over_runs(runs, state, data):
    of_run = lambda one: measure(one[0].setting, one[1], data, one[0].cohorts)
    return jax.lax.map(of_run, (runs, state))

  over_devices = parallel.over_devices(over_runs, mesh, parallel.REPORT)
  return programs.compile_ahead(over_devices, runs, state, data)
