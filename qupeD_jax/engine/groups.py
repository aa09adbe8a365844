"""Groups of clients that are on the device together: who they are, what is loaded, what is saved.

All of it is on the host, but `current_states`, which the device computes. Several devices share a
group: each has an equal piece of its slots, with their rows of states and their examples.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qupeD_jax.engine import parallel, programs, store
from qupeD_jax.engine.programs import Build, Runs
from qupeD_jax.federation import exchange, tree
from qupeD_jax.types import Array, Cohort, Dataset, PyTree
from qupeD_jax.wrappers import sampling

Stores = tuple[store.Store, ...]  # one per cohort
States = tuple[store.Packed, ...]  # of a group's clients, one per cohort


class Group(NamedTuple):
  """Clients that are on the device together, one entry per cohort."""

  slots: tuple[np.ndarray, ...]  # [R, k] integers below K
  takes_part: tuple[np.ndarray, ...]  # [R, k] bool; the others only fill the group up


class Start(NamedTuple):
  """What a group's clients go on from, one entry per cohort."""

  states: States  # rows [R, k, P] of the stores
  is_new: tuple[Array, ...]  # [R, k] bool, who has no state yet
  last_place: tuple[Array, ...]  # [R, k] int32, the place on its device in the last group, or -1


class Inputs(NamedTuple):
  """What is loaded for a group; all leaves [R, ...]."""

  runs: Runs  # of the group alone: its cohorts, and its states in the setting
  data: Dataset  # its examples alone, those of each device together
  start: Start


# How a group is cut: other than in `loop`, every run has examples of its own.
CUT = parallel.CUT | {Dataset: parallel.CLIENTS, Start: parallel.CLIENTS}


def on_host(runs: Runs, data: Dataset, mesh: Mesh | None) -> tuple[Runs, Dataset]:
  """Lays everything where `load` wants it.

  Returns:
    The runs and the data, on the host; but keys and setting, which no group has for itself, are on
    the devices. What lies in stores stays there.
  """
  is_store = lambda node: isinstance(node, store.Store)
  send = lambda leaf: leaf if is_store(leaf) else parallel.place(leaf, mesh)
  setting = jax.tree.map(send, runs.setting, is_leaf=is_store)
  data, cohorts = jax.tree.map(np.asarray, (data, runs.cohorts))
  return Runs(parallel.place(runs.key, mesh), cohorts, setting), data


def all_groups(cohorts: tuple[Cohort, ...], fraction: float, mesh: Mesh | None) -> list[Group]:
  """Divides all clients, in order, into groups of as many slots as those of a round."""
  sizes = [cohort.size.shape[1] for cohort in cohorts]
  counts = [parallel.slots(sampling.num_participants(size, fraction), mesh) for size in sizes]

  def of_cohort(i: int, cohort: Cohort, count: int):
    num_runs, num_clients = cohort.size.shape
    slots = np.broadcast_to(i * count + np.arange(count), (num_runs, count))
    return np.minimum(slots, num_clients - 1), slots < num_clients

  number = max(-(-size // count) for size, count in zip(sizes, counts, strict=True))
  pairs = list(zip(cohorts, counts, strict=True))
  return [Group(*zip(*(of_cohort(i, *p) for p in pairs), strict=True)) for i in range(number)]


def arranged(drawn: list[Group], mesh: Mesh | None) -> list[Group]:
  """Gives the clients of groups that train one after the other to devices.

  Who is in two groups in a row has the same device in both, where its state is: there is always
  room, as each device has equally many slots of every group. Slots are filled up with others of the
  same clients, who do not take part.
  """
  if mesh is None:
    return drawn
  done = []
  for group in drawn:
    full = _filled(group, mesh)
    done.append(_reordered(full, done[-1], mesh) if done else full)
  return done


def _filled(group: Group, mesh: Mesh) -> Group:
  """Fills slots up to a multiple of the devices."""
  widths = [((0, 0), (0, parallel.slots(s.shape[1], mesh) - s.shape[1])) for s in group.slots]
  more = lambda fields, **how: tuple(map(functools.partial(np.pad, **how), fields, widths))
  return Group(more(group.slots, mode="edge"), more(group.takes_part))


def _reordered(group: Group, last: Group, mesh: Mesh) -> Group:
  """Puts who was in the last group on the device that it had there, and the others in between."""

  def order(places):  # of one run, [k]
    own = len(places) // mesh.size
    device = np.where(places < 0, -1, places // own)
    room = own - np.bincount(device[device >= 0], minlength=mesh.size)
    device[device < 0] = np.repeat(np.arange(mesh.size), room)
    return np.argsort(device, kind="stable")

  orders = [np.stack(list(map(order, places))) for places in map(_places_in, *group, *last)]
  move = lambda fields: tuple(map(functools.partial(np.take_along_axis, axis=1), fields, orders))
  return Group(*map(move, group))


def without_state(group: Group, stores: Stores) -> Group:
  """Lets only those of a group take part who have no state yet."""
  started = map(store.is_started, stores, group.slots)
  new = (part & ~has for part, has in zip(group.takes_part, started, strict=True))
  return group._replace(takes_part=tuple(new))


def load(
  runs: Runs,
  data: Dataset,
  stores: Stores,
  group: Group,
  mesh: Mesh | None,
  last: Group | None = None,
) -> Inputs:
  """Reads what the devices need of a group, and sends it there.

  Args:
    runs, data: of all clients, as of `on_host`.
    stores: of their states.
    group: who is to be loaded.
    mesh: devices that share the group.
    last: the group before, which may still be training: the stores do not have its results yet. Who
      is in both has the same device in both (`arranged`).
  """
  own, part = load_part(runs, data, group, mesh)
  last_place = [np.full(slots.shape, -1, np.int32) for slots in group.slots]
  if last is not None:
    last_place = [_on_device(places, mesh) for places in map(_places_in, *group, *last)]
  known = map(store.is_started, stores, group.slots)
  is_new = (~has & (place < 0) for has, place in zip(known, last_place, strict=True))
  states = tuple(map(store.take, stores, group.slots))
  return place(Inputs(own, part, Start(states, tuple(is_new), tuple(last_place))), mesh)


def load_part(runs: Runs, data: Dataset, group: Group, mesh: Mesh | None) -> tuple[Runs, Dataset]:
  """Does the part of `load` that concerns no store but those in the setting."""
  part, cohorts = examples(data, runs.cohorts, group, mesh)
  take = lambda state: state._replace(clients=tuple(map(store.take, state.clients, group.slots)))
  pick = lambda node: take(node) if store.is_streamed(node) else node
  setting = jax.tree.map(pick, runs.setting, is_leaf=store.is_streamed)
  return place((Runs(runs.key, cohorts, setting), part), mesh)


def examples(
  data: Dataset, cohorts: tuple[Cohort, ...], group: Group, mesh: Mesh | None
) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Takes a group's examples out of a data set, one device and one client after the other.

  Args:
    data: of all clients, on the host.
    cohorts: leaves [R, K, ...], on the host.
    group: whose examples are taken.
    mesh: devices that share the group.

  Returns:
    The examples, leaves [R, n, ...], and the group's cohorts, whose `index` counts among those of
    the client's device. Who does not take part has size 0.
  """
  run_, devices = np.arange(len(group.slots[0]))[:, None], parallel.size(mesh)
  chosen = [
    jax.tree.map(lambda field, s=slots: field[run_, s], cohort)
    for cohort, slots in zip(cohorts, group.slots, strict=True)
  ]
  pieces = [cohort.index.reshape(len(run_), devices, -1) for cohort in chosen]
  rows = np.concatenate(pieces, axis=2).reshape(len(run_), -1)
  part = jax.tree.map(lambda leaf: np.take(leaf, rows, axis=0), data)
  numbered, first = [], 0
  for cohort, piece, takes_part in zip(chosen, pieces, group.takes_part, strict=True):
    count = piece.shape[2]
    of_device = np.broadcast_to(first + np.arange(count, dtype=np.int32), piece.shape)
    index = of_device.reshape(cohort.index.shape)
    numbered.append(cohort._replace(index=index, size=cohort.size * takes_part))
    first += count
  return part, tuple(numbered)


def _places_in(
  slots: np.ndarray, takes_part: np.ndarray, last: np.ndarray, took_part: np.ndarray
) -> np.ndarray:
  """Finds those who take part among those who did in the last group: [R, k] int32, or -1."""
  places = np.full(slots.shape, -1, np.int32)
  now, then = np.where(takes_part, slots, -1), np.where(took_part, last, -2)
  for found, *both in zip(places, now, then, strict=True):
    _, here, there = np.intersect1d(*both, return_indices=True)
    found[here] = there
  return places


def _on_device(places: np.ndarray, mesh: Mesh | None) -> np.ndarray:
  """Turns places in a group, [R, k], into those on the places' own devices; -1 stays."""
  return np.where(places < 0, -1, places % (places.shape[1] // parallel.size(mesh)))


def current_states(build: Build, inputs: Inputs, last: States | None = None) -> States:
  """Returns the states that a group goes on from, on the device: of each, those of its own.

  A client goes on from the state that the last group left it with, if it was there; else from that
  of the store; else from its first one.

  Args:
    build: setting of one run -> Algorithm.
    inputs: what was loaded.
    last: the states that the last group was left with; None if there was none.
  """
  states, new, last_place = inputs.start
  select = jax.vmap(tree.select)
  if last is not None:
    newer = map(jax.vmap(tree.take), last, last_place)
    was_there = [place >= 0 for place in last_place]
    states = tuple(map(select, was_there, newer, states))
  if not jax.tree.leaves(states):
    return states
  first = lambda: first_states(build, inputs.runs, inputs.data)
  any_new = functools.reduce(jnp.logical_or, map(jnp.any, new))
  # Devices go the same way, so that they meet wherever a first state asks them to.
  any_new = exchange.add(jnp.int32(any_new)) > 0
  with_first = lambda states: tuple(map(select, new, first(), states))
  return jax.lax.cond(any_new, with_first, lambda states: states, states)


def first_states(build: Build, runs: Runs, data: Dataset) -> States:
  """Returns the states that a group's clients begin with; arguments as of `load_part`'s result."""
  state = over_runs(programs.initialise(build))(runs, data)
  return pack(state.clients)


def over_runs(fn, in_axes=0):
  """Maps a function of one run over all of them; what is packed among its arguments is unpacked."""
  return jax.vmap(lambda *arguments: fn(*store.unpack(arguments)), in_axes)


def place(tree_: PyTree, mesh: Mesh | None) -> PyTree:
  """Puts on the devices what belongs to a group, cut among them."""
  return parallel.place(tree_, mesh, CUT)


def compile_ahead(fn: Callable, mesh: Mesh | None, out: PyTree, *arguments):
  """Compiles a function that the devices run on a group's pieces; `out` is as of `over_devices`."""
  return programs.compile_ahead(parallel.over_devices(fn, mesh, out, CUT), *arguments)


def pack(clients: tuple) -> States:
  """Packs the states of a group, leaves [R, k, ...], one entry per cohort."""
  return tuple(store.pack(states, axes=2) for states in clients)


def save(stores: Stores, group: Group, states: States) -> None:
  """Writes the states of those who took part, once they are computed; the others stay as stored."""
  for of_cohort in zip(stores, *group, parallel.fetch(states), strict=True):
    store.put(*of_cohort)
