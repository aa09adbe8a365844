"""Runs algorithms over more clients than the device holds.

Clients' states and examples stay on the host (`store`); on the device are those of one group of
clients, such as the participants of a round, and the server. While a group trains, what the next
one needs is read and sent, and what the one before left is written back. Results are those of
`engine.run`: who takes part, and every client's keys, follow from the round and the client's id.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax import checks, engine, store, tree
from qupeD_jax.algorithms import sampling
from qupeD_jax.types import Algorithm, Array, Cohort, Dataset, FedState, PyTree


def run(
  build: Callable[[Any], Algorithm],
  runs: engine.Runs,
  data: Dataset,
  *,
  fraction: float,
  rounds: int,
  every: int,
  alone: bool = False,
  place: store.Place = store.on_host,
  scored: tuple[Dataset, tuple[Cohort, ...]] | None = None,
  callback: Callable[[engine.Report], None] = lambda report: None,
  state: FedState | None = None,
) -> engine.Result:
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
  checks.fraction("--participation", fraction, closed=True)
  checks.at_least("--rounds", rounds, 1)
  checks.at_least("--eval-every", every, 1)
  host, runs = _split(runs, data)
  groups, start = _groups(host.cohorts, fraction), time.perf_counter()
  state = _begin(build, host, runs, groups[0], place) if state is None else state
  given = _fetch(host, state.clients, groups[0], None)
  train = _compile_train(build, host, runs, state, given, every if alone else 1)
  score = None if scored is None else _compile_score(build, host, runs, state, scored, groups)
  draw = None if alone else _compile_draw(host, runs, fraction, every)
  compile_seconds, train_seconds = time.perf_counter() - start, 0.0

  done = int(np.min(state.round))
  while done < rounds:
    start = time.perf_counter()
    length = min(every, rounds - done)
    if alone:
      state, infos, ends = _train(train, host, runs, state, groups, alone=length)
    else:
      state, infos, ends = _train(train, host, runs, state, draw(runs, done)[:length])
    train_seconds += time.perf_counter() - start
    numbers = done + 1 + np.arange(length)
    engine.require_finite(infos, *ends, numbers)
    scores = {} if score is None else engine.by_client(score(state), host.cohorts)
    callback(engine.Report(state, numbers, engine.mean_loss(infos), train_seconds, scores, {}))
    done += length
  return engine.Result(state, compile_seconds, train_seconds)


def score(
  build: Callable[[Any], Algorithm],
  runs: engine.Runs,
  state: FedState,
  data: Dataset,
  scored: tuple[Dataset, tuple[Cohort, ...]],
  fraction: float,
) -> dict[str, np.ndarray]:
  """Scores all clients on given rows, a share of them at a time; as `engine.score` otherwise."""
  host, runs = _split(runs, data)
  groups = _groups(host.cohorts, fraction)
  scores = _compile_score(build, host, runs, state, scored, groups)(state)
  return engine.by_client(scores, host.cohorts)


def completed(
  build: Callable[[Any], Algorithm],
  runs: engine.Runs,
  state: FedState,
  data: Dataset,
  fraction: float,
) -> FedState:
  """Gives every client that has no state yet its first one; the stores are written on."""
  host, runs = _split(runs, data)
  if not any(of.rows for of in state.clients):
    return state
  groups = [_missing(state.clients, group) for group in _groups(host.cohorts, fraction)]
  groups = [group for group in groups if any(map(np.any, group.takes_part))]
  if groups:
    over_runs = jax.vmap(_initialise(build, host))
    fresh = lambda runs, given: tuple(map(jax.vmap(store.pack), over_runs(runs, given).clients))
    given = _fetch(host, (), groups[0], None)
    fresh = engine.compile_ahead(fresh, runs, given)
    for group in groups:
      _put(state.clients, group, fresh(runs, _fetch(host, (), group, None)))
  return state


def is_streamed(state: FedState) -> bool:
  """Tells whether a state's clients lie in stores."""
  return all(isinstance(clients, store.Store) for clients in state.clients)


def views(state: FedState) -> FedState:
  """Shows the clients' states as arrays, leaves [R, K, ...]: views of the stores."""
  return state._replace(clients=tuple(map(store.views, state.clients)))


# --- what is on the host, and what the device gets of it


class _Host(NamedTuple):
  """What stays on the host."""

  data: Dataset
  cohorts: tuple[Cohort, ...]  # [R, K, ...]
  starts: tuple[tuple[store.Store, ...], ...]  # the clients of each FedState in the setting


class _Group(NamedTuple):
  """Clients that are on the device at the same time, one entry per cohort."""

  slots: tuple[np.ndarray, ...]  # [R, k] integers
  takes_part: tuple[np.ndarray, ...]  # [R, k] bool; the others only fill up


class _Given(NamedTuple):
  """What the device gets of a group; all leaves [R, ...], tuples with an entry per cohort."""

  data: Dataset  # their examples alone, one after the other
  cohorts: tuple[Cohort, ...]  # without `index`, which is an enumeration
  starts: tuple[tuple[dict, ...], ...]  # their rows in the states of the setting
  rows: tuple[dict, ...]  # their own, by dtype [R, k, P]
  is_new: tuple[Array, ...]  # [R, k] bool: without a state yet
  source: tuple[Array, ...]  # [R, k] int32: place in the group before, which is fresher; or -1


def _split(runs: engine.Runs, data: Dataset) -> tuple[_Host, engine.Runs]:
  """Tells what stays on the host from what is sent to the device once."""
  found = [leaf for leaf in jax.tree.leaves(runs.setting, is_leaf=_is_state) if _is_state(leaf)]
  setting = _with_clients(runs.setting, [()] * len(found))
  data, cohorts = jax.tree.map(np.asarray, (data, runs.cohorts))
  host = _Host(data, cohorts, tuple(state.clients for state in found))
  return host, jax.device_put(engine.Runs(runs.key, (), setting))


def _is_state(node) -> bool:
  return isinstance(node, FedState)


def _with_clients(setting: PyTree, clients: Sequence[tuple]) -> PyTree:
  """Gives the FedStates in a setting other clients."""
  left = iter(clients)
  replaced = lambda leaf: leaf._replace(clients=next(left)) if _is_state(leaf) else leaf
  return jax.tree.map(replaced, setting, is_leaf=_is_state)


def _groups(cohorts: tuple[Cohort, ...], fraction: float) -> list[_Group]:
  """Goes through all clients in order, in groups of as many as take part in a round."""
  counts = [sampling.most(cohort.size.shape[1], fraction) for cohort in cohorts]
  pairs = list(zip(cohorts, counts, strict=True))

  def group(i):
    slots = [np.broadcast_to(i * n + np.arange(n), (len(c.size), n)) for c, n in pairs]
    return _Group(
      tuple(np.minimum(s, c.size.shape[1] - 1) for s, c in zip(slots, cohorts, strict=True)),
      tuple(s < c.size.shape[1] for s, c in zip(slots, cohorts, strict=True)),
    )

  return [group(i) for i in range(max(-(-c.size.shape[1] // n) for c, n in pairs))]


def _missing(stores: tuple[store.Store, ...], group: _Group) -> _Group:
  """Lets only those of a group take part who have no state."""

  def missing(of, slots, takes_part):
    return takes_part & ~store.is_started(of, store.places(of, slots))

  return group._replace(takes_part=tuple(map(missing, stores, *group)))


def _fetch(
  host: _Host, stores: tuple[store.Store, ...], group: _Group, before: _Group | None = None
) -> _Given:
  """Reads what the device needs of a group, and sends it.

  Args:
    host: of all clients.
    stores: their states; () where they are not needed.
    group: who is to be on the device.
    before: the group that trains there now, and whose states the stores have yet to get.
  """
  source = [np.full(slots.shape, -1, np.int32) for slots in group.slots]
  if before is not None:
    source = list(map(_source, group.slots, *before))
  places = list(map(store.places, stores, group.slots))
  known = [store.is_started(*pair) for pair in zip(stores, places, strict=True)]
  given = _Given(
    *_examples(host.data, host.cohorts, group),
    starts=tuple(
      tuple(store.take(s, store.places(s, slots)) for s, slots in zip(of, group.slots, strict=True))
      for of in host.starts
    ),
    rows=tuple(map(store.take, stores, places)),
    is_new=tuple(~started & (s < 0) for started, s in zip(known, source, strict=False)),
    source=tuple(source),
  )
  return jax.device_put(given)


def _examples(
  data: Dataset, cohorts: tuple[Cohort, ...], group: _Group
) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Takes a group's examples out of a data set, and its part of the cohorts without `index`."""
  run_ = np.arange(len(group.slots[0]))[:, None]
  chosen = [Cohort(*(f[run_, s] for f in c)) for c, s in zip(cohorts, group.slots, strict=True)]
  rows = np.concatenate([cohort.index.reshape(len(run_), -1) for cohort in chosen], axis=1)
  part = jax.tree.map(lambda leaf: np.take(leaf, rows, axis=0), data)
  return part, tuple(
    cohort._replace(index=None, size=cohort.size * takes_part)
    for cohort, takes_part in zip(chosen, group.takes_part, strict=True)
  )


def _source(slots: np.ndarray, before: np.ndarray, took_part: np.ndarray) -> np.ndarray:
  """Finds clients in the group before: places [R, k] int32 in it, -1 for those that are not."""
  source = np.full(slots.shape, -1, np.int32)
  for found, now, old in zip(source, slots, np.where(took_part, before, -1), strict=True):
    _, here, there = np.intersect1d(now, old, return_indices=True)
    found[here] = there
  return source


def _put(stores: tuple[store.Store, ...], group: _Group, rows: tuple[dict, ...]) -> None:
  """Writes the states of those who took part, once they are computed."""
  for of, slots, takes_part, new in zip(stores, *group, rows, strict=True):
    some = slice(None) if takes_part.all() else takes_part.ravel()
    flat = lambda leaf: np.asarray(leaf).reshape(-1, leaf.shape[-1])[some]  # noqa: B023
    store.put(of, store.places(of, slots).ravel()[some], jax.tree.map(flat, new))


# --- what the device does


def _open(build, host: _Host, one: engine.Runs, given: _Given) -> engine.Runs:
  """Makes a run of a group alone: what there is of it in the setting, its rows by enumeration."""
  clients = [
    tuple(store.unpack(s.layout, rows) for s, rows in zip(of, group, strict=True))
    for of, group in zip(host.starts, given.starts, strict=True)
  ]
  cohorts = _enumerated(given.cohorts, host.cohorts)
  return engine.Runs(one.key, cohorts, _with_clients(one.setting, clients))


def _enumerated(chosen: tuple[Cohort, ...], cohorts: tuple[Cohort, ...]) -> tuple[Cohort, ...]:
  """Gives a group the rows of its own data set, in which they follow one another."""
  first, numbered = 0, []
  for part, whole in zip(chosen, cohorts, strict=True):
    shape = len(part.size), whole.index.shape[-1]
    index = first + jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)
    numbered.append(part._replace(index=index))
    first += index.size
  return tuple(numbered)


def _initialise(build, host: _Host) -> Callable:
  """Returns how a group of one run begins: (run, given) -> state."""
  return lambda one, given: engine.initialise(build)(_open(build, host, one, given), given.data)


def _begin(build, host: _Host, runs: engine.Runs, group: _Group, place: store.Place) -> FedState:
  """Starts the server, and makes room for the clients."""
  given = _fetch(host, (), group)
  over_runs = jax.vmap(_initialise(build, host))
  shapes = jax.eval_shape(over_runs, runs, given).clients
  without = lambda runs, given: over_runs(runs, given)._replace(clients=())
  state = engine.compile_ahead(without, runs, given)(runs, given)
  of_run = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
  stores = (
    store.create(store.layout(clients), cohort.size.shape, place)
    for clients, cohort in zip(of_run, host.cohorts, strict=True)
  )
  return state._replace(clients=tuple(stores))


def _current(build, host: _Host, runs: engine.Runs, given: _Given, before) -> tuple[dict, ...]:
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

  any_new = jnp.any(jnp.array([jnp.any(new) for new in given.is_new]))
  return jax.lax.cond(any_new, with_initial, lambda rows: rows, rows)


def _compile_train(build, host: _Host, runs, state: FedState, given: _Given, max_rounds: int):
  """Compiles (runs, server and round, given, rows before, rounds) -> these after, and reports."""
  layouts = [of.layout for of in state.clients]
  chunk = engine.train_chunk(build, max_rounds)

  def of_run(one, state, rows, given, num_rounds):
    one = _open(build, host, one, given)
    clients = tuple(map(store.unpack, layouts, rows))
    state, infos, broken = chunk(one, state._replace(clients=clients), given.data, num_rounds)
    rows = tuple(map(store.pack, state.clients))
    return state._replace(clients=()), rows, infos, broken, given.cohorts

  def train(runs, state, given, before, num_rounds):
    rows = _current(build, host, runs, given, before)
    return jax.vmap(of_run, (0, 0, 0, 0, None))(runs, state, rows, given, num_rounds)

  without = state._replace(clients=())
  return engine.compile_ahead(train, runs, without, given, given.rows, jnp.int32(0))


def _compile_draw(host: _Host, runs, fraction: float, every: int) -> Callable:
  """Returns (runs, rounds done) -> the participants of each round of a chunk."""
  who = jax.device_put(tuple(c._replace(index=None, bits=None) for c in host.cohorts))

  def draw(keys, who, done):
    def of_run(key, cohorts, round_):
      key = jax.random.fold_in(jax.random.fold_in(key, 1), round_)
      return sampling.participants(key, cohorts, fraction)

    over_runs = jax.vmap(of_run, (0, 0, None))
    return jax.lax.map(lambda r: over_runs(keys, who, r), done + jnp.arange(every))

  compiled = engine.compile_ahead(draw, runs.key, who, jnp.int32(0))

  def drawn(runs, done):
    cohorts = jax.device_get(compiled(runs.key, who, jnp.int32(done)))
    return [_Group(*zip(*((s[i], t[i]) for s, t in cohorts), strict=True)) for i in range(every)]

  return drawn


def _train(train, host: _Host, runs, state: FedState, groups: list[_Group], *, alone: int = 0):
  """Trains a round of each group, one after the other; or so many of each, all from one server.

  Returns:
    The state after, infos [R, rounds, k], and who was left with a NaN: per cohort [R, n] bool, and
    the clients [R, n].
  """
  shared, stores, reports = state._replace(clients=()), state.clients, []
  given, before = _fetch(host, stores, groups[0]), None
  rows = given.rows  # of the group before; of these, none is looked at
  for group, following in zip(groups, [*groups[1:], None], strict=True):
    after, new, *report = train(runs, shared, given, rows, jnp.int32(alone or 1))
    # From here on the device is at work, and the host has time for what is next and what was.
    if before is not None:
      _put(stores, before, rows)
    if following is not None:
      given = _fetch(host, stores, following, group)
    before, rows, shared = group, new, shared if alone else after
    reports.append(report)
  _put(stores, before, rows)
  infos, broken, who = zip(*jax.device_get(reports), strict=True)
  infos = jax.tree.map(lambda leaf: leaf[:, : alone or 1], infos)
  ends = _joined(broken, axis=1), _joined(who, axis=1)
  return after._replace(clients=stores), _joined(infos, axis=2 if alone else 1), ends


def _joined(trees: Sequence[PyTree], axis: int) -> PyTree:
  return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=axis), *trees)


def _compile_score(build, host: _Host, runs, state: FedState, scored, groups) -> Callable:
  """Returns state -> scores: by name, per cohort [R, K] float32."""
  data, cohorts = jax.tree.map(np.asarray, scored)
  layouts = [of.layout for of in state.clients]

  def of_run(one, state, rows, given, shown):
    state = state._replace(clients=tuple(map(store.unpack, layouts, rows)))
    one = _open(build, host, one, given)
    shown_data, shown_cohorts = shown[0], _enumerated(shown[1], cohorts)
    return engine.score_run(build)(one, state, given.data, shown_data, shown_cohorts)

  def score(runs, state, given, shown):
    rows = _current(build, host, runs, given, None)
    return jax.vmap(of_run)(runs, state, rows, given, shown)

  def fetch(state, group):
    shown = jax.device_put(_examples(data, cohorts, group))
    return runs, state._replace(clients=()), _fetch(host, state.clients, group), shown

  compiled = engine.compile_ahead(score, *fetch(state, groups[0]))

  def over_groups(state):
    parts, given = [], fetch(state, groups[0])
    for following in [*groups[1:], None]:
      scores = compiled(*given)
      given = None if following is None else fetch(state, following)
      parts.append(jax.device_get(scores))
    ends = [cohort.size.shape[1] for cohort in cohorts]
    return {
      name: tuple(scores[:, :end] for scores, end in zip(of_cohorts, ends, strict=True))
      for name, of_cohorts in _joined(parts, axis=1).items()
    }

  return over_groups
