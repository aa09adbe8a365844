"""Trains more clients than the device holds: a group of them at a time, the others on the host.

The way of one group, such as the participants of a round:

    host      stores, data                                                          stores
                   | load: its rows and examples                                       ^ save
    device      Inputs -> current states -> rounds, with the server -> new states -----+
                                ^                                          |
                                +-- the next group's, of clients in both --+

While a group trains, the host saves what the one before left and loads what the next one needs. So
the stores are a group behind, and a client that trains twice in a row starts from the state on the
device. Results equal those of `loop.run` to the bit: who takes part in a round, and all that is
drawn for a client, follow from the round and the client's id. Several devices share each group.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qupeD_jax import checks, rng
from qupeD_jax.engine import groups, loop, parallel, programs, store
from qupeD_jax.engine.groups import Group, Inputs
from qupeD_jax.engine.programs import Build, Runs
from qupeD_jax.engine.reports import Chunk, Report, by_client
from qupeD_jax.types import Array, Cohort, Dataset, FedState, PyTree
from qupeD_jax.wrappers import sampling


class Prepared(NamedTuple):
  """Compiled training, to be driven by hand."""

  state: FedState  # to start from; its clients are stores
  train: Callable[[FedState, int], tuple[FedState, Chunk]]  # number of rounds: at most `every`
  program: Any  # compiled, of what one group trains
  drawing: Any  # compiled, of who takes part; None if all clients do


class Outputs(NamedTuple):
  """What the device gives back of a group that trained; all leaves [R, ...]."""

  state: FedState  # after training; clients are rows [R, k, P], one entry per cohort
  infos: PyTree  # as of `programs.simulate`
  holds_nan: tuple  # [R, k] bool
  sums: Array  # [R, devices], of the server


def run(
  build: Build,
  runs: Runs,
  data: Dataset,
  *,
  fraction: float,
  rounds: int,
  every: int,
  alone: bool = False,
  place: store.Place = store.on_host,
  scored: tuple[Dataset, tuple[Cohort, ...]] | None = None,
  callback: Callable[[Report], None] = lambda report: None,
  state: FedState | None = None,
  mesh: Mesh | None = None,
) -> loop.Result:
  """Trains R runs side by side, a share of the clients at a time.

  Equals `loop.run` of `with_sampling(algorithm, fraction)` or, if `alone`, of the algorithm itself.
  The clients of all states, also of those that are returned and reported, are `store.Store`s, one
  per cohort; `views` shows them as arrays. A client's first state is made when it is needed first.

  Args:
    build: setting (one of `runs.setting`, traced) -> Algorithm, without `with_sampling`.
    runs: R runs. A FedState in the setting may be one that this function returned, `completed`; its
      stores may be of fewer runs, which then serve several each, in turn.
    data: training examples.
    fraction: in (0, 1], the share of each cohort that takes part in a round, and that is on the
      devices at the same time.
    rounds: how many rounds each run has had in the end.
    every: rounds of a chunk.
    alone: all clients take part in every round, and none learns from another: each group goes
      through all rounds of a chunk before the next one does. The server must stay as it is.
    place: where clients' states lie, `store.on_host` or `store.on_disk(folder)`.
    scored: data and cohorts (leaves [R, ...]) to score on after each chunk; None scores nothing.
    callback: called on the host after each chunk.
    state: to go on from; its stores are written to.
    mesh: devices that share each group of clients, whose number need not be a multiple of theirs.
      In which order float32 sums are added follows from the round and the chunk before; None is the
      one device.

  Returns:
    The final state and where the time went.

  Raises:
    NonFinite: as in `loop.run`; NaNs are looked for in the participants of the chunk.
    BadInput: a number is out of range, or the place has no room.
  """
  checks.fraction("fraction", fraction, closed=True)
  loop.check_lengths(rounds, every)
  start = time.perf_counter()
  sizes = {"fraction": fraction, "every": every}
  prepared = prepare(build, runs, data, **sizes, alone=alone, place=place, state=state, mesh=mesh)
  steps = loop.Steps(prepared.train)
  if scored is not None:
    over_groups = _compile_score(build, runs, prepared.state, data, scored, fraction, mesh)
    steps = steps._replace(score=over_groups)
  compile_seconds = time.perf_counter() - start
  lengths = {"rounds": rounds, "every": every, "pause": None}
  driven = loop.drive(steps, prepared.state, runs.cohorts, **lengths, callback=callback)
  return loop.Result(driven.state, compile_seconds, driven.seconds)


def prepare(
  build: Build,
  runs: Runs,
  data: Dataset,
  *,
  fraction: float,
  every: int,
  alone: bool = False,
  place: store.Place = store.on_host,
  state: FedState | None = None,
  mesh: Mesh | None = None,
) -> Prepared:
  """Compiles the training that `run` drives; arguments as there."""
  key = jax.device_put(runs.key)  # one device draws for all
  runs, data = groups.on_host(runs, data, mesh)
  all_groups = groups.all_groups(runs.cohorts, fraction, mesh)
  if state is None:
    state = _first_state(build, runs, data, all_groups[0], place, mesh)
  inputs = groups.load(runs, data, state.clients, all_groups[0], mesh)
  given = build, inputs, _shared(state, mesh)
  program = _compile_train(*given, max_rounds=every if alone else 1, mesh=mesh)
  train = lambda *given: _train(program, runs, data, *given, alone, mesh)
  if alone:
    return Prepared(state, lambda s, length: train(s, all_groups, length), program, None)
  # Of the cohorts a draw needs no rows, which are large.
  ids = jax.device_put(tuple(c._replace(index=None, bits=None) for c in runs.cohorts))
  drawing = _compile_draw(key, ids, fraction, every)
  draw = lambda state: groups.arranged(_draw(drawing, key, ids, state.round), mesh)
  return Prepared(state, lambda s, length: train(s, draw(s)[:length], 1), program, drawing)


def score(
  build: Build,
  runs: Runs,
  state: FedState,
  data: Dataset,
  scored: tuple[Dataset, tuple[Cohort, ...]],
  fraction: float,
  mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
  """Scores all clients on given rows, a share of them at a time; otherwise as `loop.score`."""
  over_groups = _compile_score(build, runs, state, data, scored, fraction, mesh)
  return by_client(over_groups(state), runs.cohorts)


def personal_models(
  build: Build,
  runs: Runs,
  state: FedState,
  data: Dataset,
  fraction: float,
  mesh: Mesh | None = None,
) -> Iterator[tuple[Group, tuple[tuple[PyTree, dict], ...]]]:
  """Yields the personal models, those that `score` scores, a share of the clients at a time.

  Yields:
    Whose they are, and per cohort variables and codebooks ({} at full precision), leaves
    [R, k, ...], on the host.
  """
  runs, data = groups.on_host(runs, data, mesh)
  all_groups = groups.all_groups(runs.cohorts, fraction, mesh)
  load = lambda group: groups.load(runs, data, state.clients, group, mesh)
  shared, look = _shared(state, mesh), programs.show_personal(build)
  show = _compile_look(build, look, mesh, parallel.STATE, load(all_groups[0]), shared)
  models = _fetched(show(load(group), shared).clients for group in all_groups)
  yield from zip(all_groups, models, strict=True)


def completed(
  build: Build,
  runs: Runs,
  state: FedState,
  data: Dataset,
  fraction: float,
  mesh: Mesh | None = None,
) -> FedState:
  """Gives every client that has no state yet its first one; the stores are written to."""
  runs, data = groups.on_host(runs, data, mesh)
  everyone = groups.all_groups(runs.cohorts, fraction, mesh)
  new = [groups.without_state(group, state.clients) for group in everyone]
  new = [group for group in new if any(map(np.any, group.takes_part))]
  if new and any(of_cohort.rows for of_cohort in state.clients):
    load = lambda group: groups.load_part(runs, data, group, mesh)
    first = lambda *part: FedState((), groups.first_states(build, *part), ())
    first = groups.compile_ahead(first, mesh, parallel.STATE, *load(new[0]))
    for group in new:
      groups.save(state.clients, group, first(*load(group)).clients)
  return state


def views(state: FedState) -> FedState:
  """Shows the clients' states as arrays, leaves [R, K, ...]: views of the stores."""
  return state._replace(clients=tuple(map(store.views, state.clients)))


def _shared(state: FedState, mesh: Mesh | None) -> FedState:
  """Returns what all devices have of a state: the server and the round."""
  return groups.place(state._replace(clients=()), mesh)


def _first_state(
  build: Build,
  runs: Runs,
  data: Dataset,
  group: Group,
  place: store.Place,
  mesh: Mesh | None,
) -> FedState:
  """Starts the server, and makes stores in which no client has a state yet.

  Args:
    group: any one; neither the server nor the shapes of states depend on who it is.
  """
  part = groups.load_part(runs, data, group, mesh)
  init = groups.over_runs(programs.initialise(build))
  shapes = jax.eval_shape(init, *part).clients
  of_run = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
  without_clients = lambda *part: init(*part)._replace(clients=())
  state = groups.compile_ahead(without_clients, mesh, parallel.STATE, *part)(*part)
  stores = (
    store.create(states, cohort.size.shape, place)
    for states, cohort in zip(of_run, runs.cohorts, strict=True)
  )
  return state._replace(clients=tuple(stores))


# --- training


def _compile_train(
  build: Build, inputs: Inputs, shared: FedState, max_rounds: int, mesh: Mesh | None
):
  """Compiles what a group trains: (inputs, state that the last group left, rounds) -> Outputs.

  Args:
    build: setting of one run -> Algorithm.
    inputs, shared: of the shapes to compile for, on the devices; `shared` is without clients.
    max_rounds: how many there are at most.
    mesh: devices that share the group.
  """
  chunk = groups.over_runs(programs.train_chunk(build, max_rounds), (0, 0, 0, None))

  def train(inputs, last, num_rounds):
    state = last._replace(clients=groups.current_states(build, inputs, last.clients))
    state, infos, holds_nan = chunk(inputs.runs, state, inputs.data, num_rounds)
    state = state._replace(clients=groups.pack(state.clients))
    sums = jax.vmap(parallel.sum_of, axis_size=len(inputs.runs.key))(state.server)
    return Outputs(state, infos, holds_nan, sums)

  out = Outputs(parallel.STATE, parallel.REPORT, parallel.REPORT, parallel.REPORT)
  last = shared._replace(clients=inputs.start.states)
  return groups.compile_ahead(train, mesh, out, inputs, last, np.int32(0))


def _train(
  program,
  runs: Runs,
  data: Dataset,
  state: FedState,
  parts: Sequence[Group],
  num_rounds: int,
  alone: bool,
  mesh: Mesh | None,
) -> tuple[FedState, Chunk]:
  """Trains one group after the other.

  Args:
    program: of `_compile_train`.
    runs, data: of all clients, as of `groups.on_host`.
    state: to start from.
    parts: the groups.
    num_rounds: of each group.
    alone: every group starts from the server of `state`; else from that which the last one left.
    mesh: as there.
  """
  shared, stores, told = _shared(state, mesh), state.clients, []
  inputs = groups.load(runs, data, stores, parts[0], mesh)
  left = shared._replace(clients=inputs.start.states)  # nobody was in a last group
  for last, group, following in zip([None, *parts[:-1]], parts, [*parts[1:], None], strict=True):
    out = program(inputs, left, np.int32(num_rounds))
    # From here on the devices are at work, and the host has time for the groups before and after.
    if last is not None:
      groups.save(stores, last, left.clients)
    if following is not None:
      inputs = groups.load(runs, data, stores, following, mesh, last=group)
    left = shared._replace(clients=out.state.clients) if alone else out.state
    told.append(out[1:])
  groups.save(stores, parts[-1], left.clients)
  chunk = _joined_chunk(runs, parts, parallel.fetch(told), alone, num_rounds)
  return out.state._replace(clients=stores), chunk


def _joined_chunk(
  runs: Runs, parts: Sequence[Group], told: list, alone: bool, num_rounds: int
) -> Chunk:
  """Joins what groups told of their rounds: the same ones if `alone`, else one after the other."""
  infos, holds_nan, sums = zip(*told, strict=True)
  parallel.require_one_server(np.concatenate(sums))
  infos = jax.tree.map(lambda leaf: leaf[:, :num_rounds], infos)
  ids = [
    tuple(
      np.take_along_axis(cohort.client, slots, axis=1)
      for cohort, slots in zip(runs.cohorts, group.slots, strict=True)
    )
    for group in parts
  ]
  return Chunk(_joined(infos, axis=2 if alone else 1), _joined(ids, 1), _joined(holds_nan, 1))


def _joined(trees: Sequence[PyTree], axis: int) -> PyTree:
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=axis), *trees)


# --- who takes part


def _compile_draw(key: Array, cohorts: tuple[Cohort, ...], fraction: float, every: int):
  """Compiles the draw of who takes part: (key [R], cohorts, rounds done) -> slots and takes_part.

  Both are per cohort, of the next `every` rounds: leaves [every, R, k].
  """

  def draw(keys, cohorts, done):
    def of_run(key, cohorts, round_):
      return sampling.participants(rng.stream(key, "rounds", round_), cohorts, fraction)

    over_runs = jax.vmap(of_run, (0, 0, None))
    return jax.lax.map(lambda r: over_runs(keys, cohorts, r), done + jnp.arange(every))

  return programs.compile_ahead(draw, key, cohorts, np.int32(0))


def _draw(drawing, key: Array, cohorts: tuple[Cohort, ...], done: Array) -> list[Group]:
  """Returns who takes part in each of the next rounds.

  Args:
    drawing, key, cohorts: the program of `_compile_draw`, and what it was compiled for.
    done: [R] int32, rounds done.
  """
  drawn = jax.device_get(drawing(key, cohorts, np.int32(np.asarray(done).min())))
  slots, takes_part = zip(*drawn, strict=True)
  rounds = range(len(slots[0]))
  return [Group(tuple(s[i] for s in slots), tuple(t[i] for t in takes_part)) for i in rounds]


# --- looking at all clients


def _compile_look(build: Build, look: Callable, mesh: Mesh | None, out: PyTree, *arguments):
  """Compiles a look at a group: (inputs, state without clients, *more) -> leaves [R, ...].

  Args:
    build: setting of one run -> Algorithm.
    look: (run, state, data, *more) of one run -> anything.
    mesh: devices that share the group.
    out: what the look returns, as of `parallel.over_devices`.
    arguments: of the shapes to compile for; all leaves are [R, ...].
  """

  def of_group(inputs, shared, *more):
    state = shared._replace(clients=groups.current_states(build, inputs))
    return groups.over_runs(look)(inputs.runs, state, inputs.data, *more)

  return groups.compile_ahead(of_group, mesh, out, *arguments)


def _compile_score(
  build: Build, runs: Runs, state: FedState, data: Dataset, scored, fraction, mesh
):
  """Compiles the scores of all clients: returns state -> {name: per cohort [R, K] float32}."""
  runs, data = groups.on_host(runs, data, mesh)
  all_groups = groups.all_groups(runs.cohorts, fraction, mesh)
  scored_data, scored_cohorts = jax.tree.map(np.asarray, scored)

  def arguments(state, group):
    rows = groups.place(groups.examples(scored_data, scored_cohorts, group, mesh), mesh)
    inputs = groups.load(runs, data, state.clients, group, mesh)
    return inputs, _shared(state, mesh), *rows

  given = mesh, parallel.REPORT, *arguments(state, all_groups[0])
  look = _compile_look(build, programs.score_run(build), *given)

  def over_groups(state):
    parts = list(_fetched(look(*arguments(state, group)) for group in all_groups))
    ends = [cohort.size.shape[1] for cohort in scored_cohorts]
    cut = lambda scores: tuple(s[:, :end] for s, end in zip(scores, ends, strict=True))
    return {name: cut(scores) for name, scores in _joined(parts, axis=1).items()}

  return over_groups


def _fetched(results: Iterator[PyTree]) -> Iterator[PyTree]:
  """Reads results back from the device, each of them while the next one is computed."""
  before = next(results)
  for result in results:
    yield parallel.fetch(before)
    before = result
  yield parallel.fetch(before)
