"""Runs algorithms: compiled once, rounds scanned on the device, whole runs side by side by vmap.

`simulate` is the pure core, to be used under jit and vmap at will. `run` drives it from the host in
chunks, between which it calls back; on several devices, each has its share of the clients.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qupeD_jax import checks, rng
from qupeD_jax.engine import evaluate, parallel
from qupeD_jax.federation import tree
from qupeD_jax.types import Algorithm, Array, Cohort, Dataset, FedState, PyTree


class NonFinite(FloatingPointError):
  """A training loss that is no longer finite; carries where it happened first."""

  def __init__(self, run: int, round_: int, clients: list[int]):
    self.run, self.round, self.clients = run, round_, clients
    super().__init__(f"run {run}, round {round_}: the loss of clients {clients} is not finite")


class Runs(NamedTuple):
  """Whole runs that train side by side: every leaf has a leading axis of R runs.

  Runs may differ in their seeds, in their clients' data and bits, and in any hyperparameter.
  """

  key: Array  # [R] keys
  cohorts: tuple[Cohort, ...]  # training rows
  setting: PyTree = None  # what `build` makes an algorithm of


class Report(NamedTuple):
  """What `run` hands to its callback after each chunk."""

  state: FedState  # leaves [R, ...]; to be read during the callback only
  rounds: np.ndarray  # [r] int32, the rounds of this chunk, counted from 1
  loss: np.ndarray  # [R, r] float32, mean over the clients that took part; NaN where none did
  clients: np.ndarray  # [R, r] int, how many took part
  dropped: np.ndarray  # [R, r] int, uploads that the server did not take: they were not finite
  seconds: float  # spent on rounds until now, neither on compilation nor on scoring
  scores: dict[str, np.ndarray]  # name -> [R, clients] float32, after the chunk, in client order
  measures: dict[str, np.ndarray]  # likewise, of what else was measured; both {} at a mere pause


class Result(NamedTuple):
  """What is left of a finished run."""

  state: FedState  # leaves [R, ...]
  compile_seconds: float
  train_seconds: float  # rounds alone: neither compilation nor scoring


def simulate(
  algorithm: Algorithm,
  key: Array,
  state: FedState,
  data: Dataset,
  cohorts: tuple[Cohort, ...],
  num_rounds: Array | int,
  max_rounds: int,
) -> tuple[FedState, PyTree]:
  """Runs rounds without leaving the device: a pure function.

  Args:
    algorithm: what a round is.
    key: of the whole run; round r draws from number r of its rounds, wherever a chunk begins.
    state: to start from; its `round` says where in the run this is.
    data: training examples.
    cohorts: clients and their rows.
    num_rounds: how many rounds, at most `max_rounds`; may be traced.
    max_rounds: length of what is returned about the rounds.

  Returns:
    The state after, and the infos of the rounds, leaves [max_rounds, ...], zeros beyond num_rounds.
  """

  def one_round(state):
    return algorithm.round(rng.stream(key, "rounds", state.round), state, data, cohorts)

  def body(i, carry):
    state, infos = carry
    state, info = one_round(state)
    return state, jax.tree.map(lambda all_, new: all_.at[i].set(new), infos, info)

  _, shapes = jax.eval_shape(one_round, state)
  infos = jax.tree.map(lambda s: jnp.zeros((max_rounds, *s.shape), s.dtype), shapes)
  return jax.lax.fori_loop(0, num_rounds, body, (state, infos))


def run(
  build: Callable[[Any], Algorithm],
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
    pause: rounds after which the host is called back as well; a chunk ends at either. The program
      is the same with any, and so is what it computes.
    scored: data and cohorts (leaves [R, ...]) to score on after each chunk; None scores nothing.
    measure: (setting, state, data, cohorts) of one run -> {name: per cohort [K]}, taken after each
      chunk, one run after the other, so that it may look at many rows at once; None for nothing.
    callback: called on the host after each chunk.
    state: to go on from, leaves [R, ...]; its memory is taken over.
    mesh: devices that share the clients (`parallel.make_mesh`), K a multiple of their number; what
      an algorithm does across its clients must go through `exchange`. None is the one device.

  Returns:
    The final state and where the time went.

  Raises:
    NonFinite: a loss was not finite in the chunk just done, or a NaN is in what it left;
      everything before was reported.
    BadInput: rounds or every is not positive.
  """
  checks.at_least("rounds", rounds, 1)
  checks.at_least("every", every, 1)
  pause = every if pause is None else pause
  checks.at_least("pause", pause, 1)
  cohorts = runs.cohorts
  data, runs = _place(data, runs, mesh)
  scored = None if scored is None else parallel.spread(*scored, mesh)
  start = time.perf_counter()
  if state is None:
    init = parallel.over_devices(jax.vmap(initialise(build), (0, None)), mesh, parallel.STATE)
    state = compile_ahead(init, runs, data)(runs, data)
  else:
    state = parallel.place(state, mesh)
  train = compile_chunk(build, every, runs, state, data, mesh)
  score = None if scored is None else _compile_score(build, runs, state, data, scored, mesh)
  take = None if measure is None else _compile_measure(measure, runs, state, data, mesh)
  compile_seconds, train_seconds = time.perf_counter() - start, 0.0

  done = int(np.min(state.round))
  while done < rounds:
    start = time.perf_counter()
    length = min(every - done % every, pause - done % pause, rounds - done)
    state, report = train(runs, state, data, np.int32(length))
    infos, broken, digest = parallel.fetch(report)
    _require_one_server(digest)
    infos = jax.tree.map(lambda leaf: leaf[:, :length], infos)  # noqa: B023
    train_seconds += time.perf_counter() - start
    numbers = done + 1 + np.arange(length)
    require_finite(infos, broken, cohorts, numbers)
    done += length
    scores = measures = {}
    if done % every == 0 or done == rounds:
      scores = {} if score is None else by_client(score(runs, state, data, scored), cohorts)
      measures = {} if take is None else by_client(take(runs, state, data), cohorts)
    of_rounds = numbers, mean_loss(infos), num_clients(infos), num_dropped(infos)
    callback(Report(state, *of_rounds, train_seconds, scores, measures))
  return Result(state, compile_seconds, train_seconds)


def compile_chunk(
  build: Callable[[Any], Algorithm],
  every: int,
  runs: Runs,
  state: FedState,
  data: Dataset,
  mesh: Mesh | None = None,
):
  """Compiles the program that trains: (runs, state, data, rounds) -> (state, what it reports).

  Args as in `run`, but on the devices already; of `state` the shapes are enough. The program takes
  the memory of its state over.
  """
  train = train_chunk(build, every)

  def chunk(one: Runs, state, data, num_rounds):
    state, *report = train(one, state, data, num_rounds)
    return state, (*report, _digest(state.server))

  over_runs = jax.vmap(chunk, (0, 0, None, None))
  over_runs = parallel.over_devices(over_runs, mesh, (parallel.STATE, parallel.REPORT))
  return compile_ahead(over_runs, runs, state, data, np.int32(0), donate=1)


def initial_shapes(build: Callable[[Any], Algorithm], runs: Runs, data: Dataset) -> FedState:
  """Returns the shapes of the state that `run` starts from, as of `jax.eval_shape`."""
  return jax.eval_shape(jax.vmap(initialise(build), (0, None)), runs, data)


def score(
  build: Callable[[Any], Algorithm],
  runs: Runs,
  state: FedState,
  data: Dataset,
  scored: tuple[Dataset, tuple[Cohort, ...]],
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Scores what R runs have to show on given rows, such as the test rows at the end.

  Args and the form of what is returned as in `run` and `Report`: name -> [R, clients] float32.
  """
  cohorts = runs.cohorts
  data, runs = _place(data, runs, mesh)
  state, scored = parallel.place(state, mesh), parallel.spread(*scored, mesh)
  scores = _compile_score(build, runs, state, data, scored, mesh)(runs, state, data, scored)
  return by_client(scores, cohorts)


def personal_models(
  build: Callable[[Any], Algorithm],
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
    return jax.tree.map(lambda leaf: leaf[None], show_personal(build)(*one, data))

  show = compile_ahead(parallel.over_devices(of_run, mesh, parallel.STATE), *given, np.int32(0))
  for r in chosen:
    shown = parallel.fetch(show(*given, np.int32(r)).clients)
    yield jax.tree.map(lambda leaf: leaf[0], shown)


def show_personal(build):
  """Returns what one run ships: (run, state, data) -> FedState, models in the clients' place."""

  def show(one: Runs, state, data):
    key = rng.stream(one.key, "evaluate")  # that of the scores
    shown = build(one.setting).personalize(key, state, data, one.cohorts)["personal"]
    clients = tuple(
      (s.variables if s.stacked else tree.repeat(s.variables, len(c.size)), s.codebooks or {})
      for s, c in zip(shown, one.cohorts, strict=True)
    )
    return FedState((), clients, state.round)

  return show


def _place(data: Dataset, runs: Runs, mesh: Mesh | None) -> tuple[Dataset, Runs]:
  """Puts training rows and runs on the devices."""
  data, cohorts = parallel.spread(data, runs.cohorts, mesh)
  return data, parallel.place(runs._replace(cohorts=()), mesh)._replace(cohorts=cohorts)


def initialise(build):
  """Returns how one run begins: (run, data) -> state."""

  def init(one: Runs, data):
    return build(one.setting).init(rng.stream(one.key, "initialise"), data, one.cohorts)

  return init


def train_chunk(build, max_rounds: int):
  """Returns a chunk of one run: (run, state, data, rounds) -> (state, infos, who holds NaNs)."""

  def chunk(one: Runs, state, data, num_rounds):
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


def _digest(server: PyTree) -> Array:
  """Sums the server's numbers up, [1]: devices that hold the same server find the same sum."""
  return jnp.float32(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(server))).reshape(1)


def _require_one_server(digest: np.ndarray) -> None:
  """Raises ValueError if the servers of the devices, [R, devices], drift apart."""
  if not np.array_equal(digest, np.broadcast_to(digest[:, :1], digest.shape), equal_nan=True):
    raise ValueError(
      "the devices' servers differ: what crosses clients must go through federation.exchange"
    )


def compile_ahead(fn, *arguments, donate=()):
  """Compiles ahead of time: a call that would need a second compilation is an error."""
  lowered = jax.jit(fn, donate_argnums=donate).lower(*arguments)
  # On a CPU the work is in library calls: LLVM's higher levels take much longer to compile
  # and gain nothing.
  low_effort = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
  return lowered.compile(compiler_options=low_effort)


def score_run(build):
  """Returns how one run is scored: (run, state, data, scored data, scored cohorts) -> scores."""

  def score(one: Runs, state, data, scored_data, scored_cohorts):
    key = rng.stream(one.key, "evaluate")
    return evaluate.accuracies(
      build(one.setting), key, state, data, one.cohorts, scored_data, scored_cohorts
    )

  return score


def _compile_score(build, runs, state, data, scored, mesh):
  over_runs = jax.vmap(score_run(build), (0, 0, None, None, 0))
  fn = lambda runs, state, data, scored: over_runs(runs, state, data, *scored)
  return compile_ahead(parallel.over_devices(fn, mesh, parallel.REPORT), runs, state, data, scored)


def _compile_measure(measure, runs, state, data, mesh):
  def over_runs(runs, state, data):
    of_run = lambda one: measure(one[0].setting, one[1], data, one[0].cohorts)
    return jax.lax.map(of_run, (runs, state))

  return compile_ahead(parallel.over_devices(over_runs, mesh, parallel.REPORT), runs, state, data)


def require_finite(infos, broken, cohorts, rounds: np.ndarray) -> None:
  """Raises NonFinite for the first round with a loss that is not finite, or a NaN at the end."""
  bad = np.concatenate([~np.isfinite(info.loss) & (info.size > 0) for info in infos], axis=-1)
  client = np.concatenate([info.client for info in infos], axis=-1)  # both [R, r, k]
  if not bad.any():  # no loss has shown yet what the last update did
    client = np.concatenate([cohort.client for cohort in cohorts], axis=-1)[:, None]
    bad = np.concatenate(broken, axis=-1)[:, None] & (client >= 0)
    rounds = rounds[-1:]
  if bad.any():
    round_ = int(bad.any(axis=(0, 2)).argmax())
    run_ = int(bad[:, round_].any(axis=-1).argmax())
    clients = sorted(set(client[run_, round_][bad[run_, round_]].tolist()))
    raise NonFinite(run_, int(rounds[round_]), clients)


def mean_loss(infos) -> np.ndarray:
  """Averages over the clients that took part, all cohorts together: [R, r], NaN where none did."""
  total = sum(np.sum(np.where(info.size > 0, info.loss, 0.0), axis=-1) for info in infos)
  count = num_clients(infos)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def num_clients(infos) -> np.ndarray:
  """Counts the clients that took part, all cohorts together: [R, r]."""
  return sum(np.sum(info.size > 0, axis=-1) for info in infos)


def num_dropped(infos) -> np.ndarray:
  """Counts the uploads that servers did not take, all cohorts together: [R, r]."""
  return sum(np.sum(info.dropped, axis=-1) for info in infos)


def by_client(
  per_cohort: dict[str, tuple[Array, ...]], cohorts: tuple[Cohort, ...]
) -> dict[str, np.ndarray]:
  """Puts per-cohort results [R, K] into the order of client ids, padding dropped: [R, clients]."""
  client = np.concatenate([np.asarray(cohort.client)[0] for cohort in cohorts])
  order = np.argsort(client, kind="stable")[np.sum(client < 0) :]
  return {
    name: np.concatenate(parts, axis=1)[:, order]
    for name, parts in parallel.fetch(per_cohort).items()
  }
