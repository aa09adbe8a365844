"""Runs algorithms over more clients than the device holds.

Clients' states and examples stay on the host (`store`); on the device are those of one group of
clients, such as the participants of a round, and the server. While a group trains, what the next
one needs is read and sent, and what the one before left is written back. Results are those of
`engine.run`: who takes part, and every client's keys, follow from the round and the client's id.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax import checks, rng
from qupeD_jax.engine import loop, portions, store
from qupeD_jax.federation import tree
from qupeD_jax.types import Algorithm, Cohort, Dataset, FedState, PyTree
from qupeD_jax.wrappers import sampling


def run(
  build: Callable[[Any], Algorithm],
  runs: loop.Runs,
  data: Dataset,
  *,
  fraction: float,
  rounds: int,
  every: int,
  alone: bool = False,
  place: store.Place = store.on_host,
  scored: tuple[Dataset, tuple[Cohort, ...]] | None = None,
  callback: Callable[[loop.Report], None] = lambda report: None,
  state: FedState | None = None,
) -> loop.Result:
  """Trains R runs side by side, a share of the clients at a time.

  Equals `engine.run` of `with_sampling(algorithm, fraction)` or, if `alone`, of the algorithm
  itself. States, those that are returned and reported among them, have `store.Store`s for their
  clients, one per cohort, of R * K clients, run by run; `views` shows them as arrays. A client's
  first state is made when it is first needed.

  Args:
    build: setting (one of `runs.setting`, traced) -> Algorithm; of the algorithm as it is, since
      the participants are drawn here.
    runs: R runs. A FedState in the setting may be one that this function returned, `completed`; its
      stores may be of fewer runs, which then serve several each, in turn.
    data: training examples.
    fraction: in (0, 1], the share of each cohort that is on the device at the same time, and that
      takes part in a round.
    rounds: how many rounds each run has had in the end.
    every: rounds of a chunk.
    alone: all clients take part in every round, and none learns from another: each group goes
      through all rounds of a chunk before the next. The server must stay as it is.
    place: where clients' states lie, `store.on_host` or `store.on_disk(folder)`.
    scored: data and cohorts (leaves [R, ...]) to score on after each chunk; None scores nothing.
    callback: called on the host after each chunk.
    state: to go on from; its stores are written on.

  Returns:
    The final state and where the time went.

  Raises:
    NonFinite: as in `engine.run`; of NaNs, those that participants of the chunk were left with.
    BadInput: a number is out of range, or the place has no room.
  """
  checks.fraction("fraction", fraction, closed=True)
  checks.at_least("rounds", rounds, 1)
  checks.at_least("every", every, 1)
  start = time.perf_counter()
  prepared = prepare(build, runs, data, fraction, every, alone, place, state)
  state, of_all = prepared.state, None
  if scored is not None:
    host, on_device = portions.split(runs, data)
    groups = portions.all_groups(host.cohorts, fraction)
    of_all = _compile_score(build, host, on_device, state, scored, groups)
  compile_seconds, train_seconds = time.perf_counter() - start, 0.0

  done = int(np.min(state.round))
  while done < rounds:
    start = time.perf_counter()
    length = min(every, rounds - done)
    state, infos, ends = prepared.advance(state, length)
    train_seconds += time.perf_counter() - start
    numbers = done + 1 + np.arange(length)
    loop.require_finite(infos, *ends, numbers)
    scores = {} if of_all is None else loop.by_client(of_all(state), runs.cohorts)
    counts = loop.num_clients(infos), loop.num_dropped(infos)
    of_rounds = numbers, loop.mean_loss(infos), *counts
    callback(loop.Report(state, *of_rounds, train_seconds, scores, {}))
    done += length
  return loop.Result(state, compile_seconds, train_seconds)


class Prepared(NamedTuple):
  """Training that is compiled, to be driven by hand."""

  state: FedState  # to start from; its clients are stores
  advance: Callable  # (state, rounds, at most `every`) -> (state, infos, who was left with a NaN)
  program: Any  # of a round, or of a group's chunk: says what memory it takes
  drawing: Any  # of the participants of a chunk; None if all clients take part


def prepare(
  build: Callable[[Any], Algorithm],
  runs: loop.Runs,
  data: Dataset,
  fraction: float,
  every: int,
  alone: bool = False,
  place: store.Place = store.on_host,
  state: FedState | None = None,
) -> Prepared:
  """Compiles what `run` runs; arguments as there.

  Infos have leaves [R, rounds, k]; who was left with a NaN is told per cohort by [R, n] bool and a
  Cohort of those n.
  """
  host, runs = portions.split(runs, data)
  groups = portions.all_groups(host.cohorts, fraction)
  state = _begin(build, host, runs, groups[0], place) if state is None else state
  given = portions.fetch(host, state.clients, groups[0])
  train = _compile_train(build, host, runs, state, given, every if alone else 1)
  if alone:
    advance = lambda state, length: _train(train, host, runs, state, groups, alone=length)
    return Prepared(state, advance, train, None)
  drawing, draw = _compile_draw(host, runs, fraction, every)
  advance = lambda state, length: _train(train, host, runs, state, draw(state.round)[:length])
  return Prepared(state, advance, train, drawing)


def score(
  build: Callable[[Any], Algorithm],
  runs: loop.Runs,
  state: FedState,
  data: Dataset,
  scored: tuple[Dataset, tuple[Cohort, ...]],
  fraction: float,
) -> dict[str, np.ndarray]:
  """Scores all clients on given rows, a share of them at a time; as `engine.score` otherwise."""
  host, runs = portions.split(runs, data)
  groups = portions.all_groups(host.cohorts, fraction)
  scores = _compile_score(build, host, runs, state, scored, groups)(state)
  return loop.by_client(scores, host.cohorts)


def personal_models(
  build: Callable[[Any], Algorithm],
  runs: loop.Runs,
  state: FedState,
  data: Dataset,
  fraction: float,
) -> Iterator[tuple[portions.Group, tuple[tuple[PyTree, dict], ...]]]:
  """Yields the personal models, those that `score` scores, a share of the clients at a time.

  Yields:
    Who, and per cohort their variables and codebooks ({} at full precision), leaves [R, k, ...], on
    the host.
  """
  host, runs = portions.split(runs, data)
  groups = portions.all_groups(host.cohorts, fraction)
  show = loop.show_personal(build)
  shown = _compile_look(
    build, host, runs, state, groups[0], lambda one, state, data, _: show(one, state, data).clients
  )
  for group in groups:
    yield group, jax.device_get(shown(state, group))


def completed(
  build: Callable[[Any], Algorithm],
  runs: loop.Runs,
  state: FedState,
  data: Dataset,
  fraction: float,
) -> FedState:
  """Gives every client that has no state yet its first one; the stores are written on."""
  host, runs = portions.split(runs, data)
  if not any(of.rows for of in state.clients):
    return state
  groups = [
    portions.missing(state.clients, group) for group in portions.all_groups(host.cohorts, fraction)
  ]
  groups = [group for group in groups if any(map(np.any, group.takes_part))]
  if groups:
    over_runs = jax.vmap(_initialise(build, host))
    fresh = lambda runs, given: tuple(map(jax.vmap(store.pack), over_runs(runs, given).clients))
    given = portions.fetch(host, (), groups[0], None)
    fresh = loop.compile_ahead(fresh, runs, given)
    for group in groups:
      portions.put(state.clients, group, fresh(runs, portions.fetch(host, (), group, None)))
  return state


def views(state: FedState) -> FedState:
  """Shows the clients' states as arrays, leaves [R, K, ...]: views of the stores."""
  return state._replace(clients=tuple(map(store.views, state.clients)))


def _initialise(build, host: portions.Host) -> Callable:
  """Returns how a group of one run begins: (run, given) -> state."""
  return lambda one, given: loop.initialise(build)(
    portions.run_of(build, host, one, given), given.data
  )


def _begin(
  build, host: portions.Host, runs: loop.Runs, group: portions.Group, place: store.Place
) -> FedState:
  """Starts the server, and makes room for the clients."""
  given = portions.fetch(host, (), group)
  over_runs = jax.vmap(_initialise(build, host))
  shapes = jax.eval_shape(over_runs, runs, given).clients
  without = lambda runs, given: over_runs(runs, given)._replace(clients=())
  state = loop.compile_ahead(without, runs, given)(runs, given)
  of_run = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
  stores = (
    store.create(store.layout(clients), cohort.size.shape, place)
    for clients, cohort in zip(of_run, host.cohorts, strict=True)
  )
  return state._replace(clients=tuple(stores))


def _current(
  build, host: portions.Host, runs: loop.Runs, given: portions.Given, before
) -> tuple[dict, ...]:
  """Returns a group's rows: those of the group before, else those stored, else initial ones."""
  select = jax.vmap(tree.select)
  rows = given.rows
  if before is not None:
    fresher = map(jax.vmap(tree.take), before, given.source)
    rows = tuple(map(select, (s >= 0 for s in given.source), fresher, rows))
  if not jax.tree.leaves(rows):
    return rows

  def with_initial(rows):
    initial = jax.vmap(_initialise(build, host))(runs, given).clients
    return tuple(map(select, given.is_new, map(jax.vmap(store.pack), initial), rows))

  any_new = functools.reduce(jnp.logical_or, map(jnp.any, given.is_new))
  return jax.lax.cond(any_new, with_initial, lambda rows: rows, rows)


def _compile_train(
  build, host: portions.Host, runs, state: FedState, given: portions.Given, max_rounds: int
):
  """Compiles (runs, server and round, given, rows before, rounds) -> these after, and reports."""
  layouts = [of.layout for of in state.clients]
  chunk = loop.train_chunk(build, max_rounds)

  def of_run(one, state, rows, given, num_rounds):
    one = portions.run_of(build, host, one, given)
    clients = tuple(map(store.unpack, layouts, rows))
    state, infos, broken = chunk(one, state._replace(clients=clients), given.data, num_rounds)
    rows = tuple(map(store.pack, state.clients))
    return state._replace(clients=()), rows, infos, broken, given.cohorts

  def train(runs, state, given, before, num_rounds):
    rows = _current(build, host, runs, given, before)
    return jax.vmap(of_run, (0, 0, 0, 0, None))(runs, state, rows, given, num_rounds)

  without = state._replace(clients=())
  return loop.compile_ahead(train, runs, without, given, given.rows, jnp.int32(0))


def _compile_draw(host: portions.Host, runs, fraction: float, every: int):
  """Returns a program, and rounds done [R] -> the participants of each round of a chunk."""
  who = jax.device_put(tuple(c._replace(index=None, bits=None) for c in host.cohorts))

  def draw(keys, who, done):
    def of_run(key, cohorts, round_):
      return sampling.participants(rng.stream(key, "rounds", round_), cohorts, fraction)

    over_runs = jax.vmap(of_run, (0, 0, None))
    return jax.lax.map(lambda r: over_runs(keys, who, r), done + jnp.arange(every))

  compiled = loop.compile_ahead(draw, runs.key, who, jnp.int32(0))

  def drawn(rounds):
    done = jnp.int32(np.min(rounds))
    cohorts = jax.device_get(compiled(runs.key, who, done))
    return [
      portions.Group(*zip(*((s[i], t[i]) for s, t in cohorts), strict=True)) for i in range(every)
    ]

  return compiled, drawn


def _train(
  train, host: portions.Host, runs, state: FedState, groups: list[portions.Group], *, alone: int = 0
):
  """Trains a round of each group, one after the other; or so many of each, all from one server.

  Returns:
    The state after, infos [R, rounds, k], and who was left with a NaN: per cohort [R, n] bool, and
    the clients [R, n].
  """
  shared, stores, reports = state._replace(clients=()), state.clients, []
  given, before = portions.fetch(host, stores, groups[0]), None
  rows = given.rows  # of the group before; of these, none is looked at
  for group, following in zip(groups, [*groups[1:], None], strict=True):
    after, new, *report = train(runs, shared, given, rows, jnp.int32(alone or 1))
    # From here on the device is at work, and the host has time for what is next and what was.
    if before is not None:
      portions.put(stores, before, rows)
    if following is not None:
      given = portions.fetch(host, stores, following, group)
    before, rows, shared = group, new, shared if alone else after
    reports.append(report)
  portions.put(stores, before, rows)
  infos, broken, who = zip(*jax.device_get(reports), strict=True)
  infos = jax.tree.map(lambda leaf: leaf[:, : alone or 1], infos)
  ends = _joined(broken, axis=1), _joined(who, axis=1)
  return after._replace(clients=stores), _joined(infos, axis=2 if alone else 1), ends


def _joined(trees: Sequence[PyTree], axis: int) -> PyTree:
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=axis), *trees)


def _compile_look(
  build,
  host: portions.Host,
  runs,
  state: FedState,
  group: portions.Group,
  look: Callable,
  sent: Callable = lambda group: (),
) -> Callable:
  """Compiles a look at groups like the given one.

  Args:
    look: (run, state, data, what was sent) of one run and group -> anything.
    sent: group -> what `look` needs besides, leaves [R, ...].

  Returns:
    (state, group) -> what `look` returned, leaves [R, ...], on the device.
  """
  layouts = [of.layout for of in state.clients]

  def of_run(one, state, rows, given, more):
    state = state._replace(clients=tuple(map(store.unpack, layouts, rows)))
    return look(portions.run_of(build, host, one, given), state, given.data, more)

  def over_runs(runs, state, given, more):
    rows = _current(build, host, runs, given, None)
    return jax.vmap(of_run)(runs, state, rows, given, more)

  def fetch(state, group):
    given = portions.fetch(host, state.clients, group)
    return runs, state._replace(clients=()), given, jax.device_put(sent(group))

  compiled = loop.compile_ahead(over_runs, *fetch(state, group))
  return lambda state, group: compiled(*fetch(state, group))


def _compile_score(build, host: portions.Host, runs, state: FedState, scored, groups) -> Callable:
  """Returns state -> scores: by name, per cohort [R, K] float32."""
  data, cohorts = jax.tree.map(np.asarray, scored)
  of_run = loop.score_run(build)
  look = lambda one, state, own, shown: of_run(
    one, state, own, shown[0], portions.enumerated(shown[1], cohorts)
  )
  sent = lambda group: portions.examples(data, cohorts, group)
  compiled = _compile_look(build, host, runs, state, groups[0], look, sent)
  ends = [cohort.size.shape[1] for cohort in cohorts]

  def over_groups(state):
    parts, running = [], None
    for group in groups:
      # What the next group needs is sent while the one before is scored.
      before, running = running, compiled(state, group)
      if before is not None:
        parts.append(jax.device_get(before))
    joined = _joined([*parts, jax.device_get(running)], axis=1)
    return {
      name: tuple(scores[:, :end] for scores, end in zip(of_cohorts, ends, strict=True))
      for name, of_cohorts in joined.items()
    }

  return over_groups
