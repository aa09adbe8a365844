"""Groups of clients that are on the device together: who they are, what is loaded, what is saved.

All of it is on the host, but `current_states`, which the device computes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax.engine import programs, store
from qupeD_jax.engine.programs import Build, Runs
from qupeD_jax.federation import tree
from qupeD_jax.types import Array, Cohort, Dataset
from qupeD_jax.wrappers import sampling

Stores = tuple[store.Store, ...]  # one per cohort
States = tuple[store.Packed, ...]  # of a group's clients, one per cohort


class Group(NamedTuple):
  """Clients that are on the device together, one entry per cohort."""

  slots: tuple[np.ndarray, ...]  # [R, k] integers below K
  takes_part: tuple[np.ndarray, ...]  # [R, k] bool; the others only fill the group up


class Inputs(NamedTuple):
  """What is loaded for a group; all leaves [R, ...], tuples have one entry per cohort."""

  runs: Runs  # of the group alone: its cohorts, and its states in the setting
  data: Dataset  # its examples alone
  clients: States  # rows [R, k, P] of the stores
  is_new: tuple[Array, ...]  # [R, k] bool, who has no state yet
  last_place: tuple[Array, ...]  # [R, k] int32, the client's place in the last group, -1 if absent


def on_host(runs: Runs, data: Dataset) -> tuple[Runs, Dataset]:
  """Lays everything where `load` wants it.

  Returns:
    The runs and the data, on the host; but keys and setting, which no group has for itself, are on
    the device. What lies in stores stays there.
  """
  is_store = lambda node: isinstance(node, store.Store)
  send = lambda leaf: leaf if is_store(leaf) else jax.device_put(leaf)
  setting = jax.tree.map(send, runs.setting, is_leaf=is_store)
  data, cohorts = jax.tree.map(np.asarray, (data, runs.cohorts))
  return Runs(jax.device_put(runs.key), cohorts, setting), data


def all_groups(cohorts: tuple[Cohort, ...], fraction: float) -> list[Group]:
  """Divides all clients, in order, into groups as large as the participants of a round."""
  counts = [sampling.num_participants(cohort.size.shape[1], fraction) for cohort in cohorts]

  def of_cohort(i: int, cohort: Cohort, count: int):
    num_runs, num_clients = cohort.size.shape
    slots = np.broadcast_to(i * count + np.arange(count), (num_runs, count))
    return np.minimum(slots, num_clients - 1), slots < num_clients

  sizes = [-(-c.size.shape[1] // count) for c, count in zip(cohorts, counts, strict=True)]
  pairs = list(zip(cohorts, counts, strict=True))
  return [Group(*zip(*(of_cohort(i, *p) for p in pairs), strict=True)) for i in range(max(sizes))]


def without_state(group: Group, stores: Stores) -> Group:
  """Lets only those of a group take part who have no state yet."""
  started = map(store.is_started, stores, group.slots)
  new = (part & ~has for part, has in zip(group.takes_part, started, strict=True))
  return group._replace(takes_part=tuple(new))


def load(
  runs: Runs, data: Dataset, stores: Stores, group: Group, last: Group | None = None
) -> Inputs:
  """Reads what the device needs of a group, and sends it there.

  Args:
    runs, data: of all clients, as of `on_host`.
    stores: of their states.
    group: who is to be loaded.
    last: the group before, which may still be training: the stores do not have its results yet.
  """
  own, part = load_part(runs, data, group)
  last_place = [np.full(slots.shape, -1, np.int32) for slots in group.slots]
  if last is not None:
    last_place = list(map(_place_in, group.slots, *last))
  known = map(store.is_started, stores, group.slots)
  is_new = (~has & (place < 0) for has, place in zip(known, last_place, strict=True))
  states = tuple(map(store.take, stores, group.slots))
  return jax.device_put(Inputs(own, part, states, tuple(is_new), tuple(last_place)))


def load_part(runs: Runs, data: Dataset, group: Group) -> tuple[Runs, Dataset]:
  """Does the part of `load` that concerns no store but those in the setting."""
  part, cohorts = examples(data, runs.cohorts, group)
  take = lambda state: state._replace(clients=tuple(map(store.take, state.clients, group.slots)))
  pick = lambda node: take(node) if store.is_streamed(node) else node
  setting = jax.tree.map(pick, runs.setting, is_leaf=store.is_streamed)
  return jax.device_put((Runs(runs.key, cohorts, setting), part))


def examples(
  data: Dataset, cohorts: tuple[Cohort, ...], group: Group
) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Takes a group's examples out of a data set, one client after the other.

  Args:
    data: of all clients, on the host.
    cohorts: leaves [R, K, ...], on the host.
    group: whose examples are taken.

  Returns:
    The examples, leaves [R, n, ...], and the group's cohorts, whose `index` counts among them. Who
    does not take part has size 0.
  """
  run_ = np.arange(len(group.slots[0]))[:, None]
  chosen = [
    jax.tree.map(lambda field, s=slots: field[run_, s], cohort)
    for cohort, slots in zip(cohorts, group.slots, strict=True)
  ]
  rows = np.concatenate([cohort.index.reshape(len(run_), -1) for cohort in chosen], axis=1)
  part = jax.tree.map(lambda leaf: np.take(leaf, rows, axis=0), data)
  numbered, first = [], 0
  for cohort, takes_part in zip(chosen, group.takes_part, strict=True):
    of_run = first + np.arange(cohort.index[0].size, dtype=np.int32)
    index = np.broadcast_to(of_run.reshape(cohort.index.shape[1:]), cohort.index.shape)
    numbered.append(cohort._replace(index=index, size=cohort.size * takes_part))
    first += of_run.size
  return part, tuple(numbered)


def _place_in(slots: np.ndarray, last: np.ndarray, took_part: np.ndarray) -> np.ndarray:
  """Finds clients among those of the last group that took part: places [R, k] int32, or -1."""
  places = np.full(slots.shape, -1, np.int32)
  for found, now, then in zip(places, slots, np.where(took_part, last, -1), strict=True):
    _, here, there = np.intersect1d(now, then, return_indices=True)
    found[here] = there
  return places


def current_states(build: Build, inputs: Inputs, last: States | None = None) -> States:
  """Returns the states that a group goes on from, on the device.

  A client goes on from the state that the last group left it with, if it was there; else from that
  of the store; else from its first one.

  Args:
    build: setting of one run -> Algorithm.
    inputs: what was loaded.
    last: the states that the last group was left with; None if there was none.
  """
  select, states = jax.vmap(tree.select), inputs.clients
  if last is not None:
    newer = map(jax.vmap(tree.take), last, inputs.last_place)
    was_there = [place >= 0 for place in inputs.last_place]
    states = tuple(map(select, was_there, newer, states))
  if not jax.tree.leaves(states):
    return states
  first = lambda: first_states(build, inputs.runs, inputs.data)
  any_new = functools.reduce(jnp.logical_or, map(jnp.any, inputs.is_new))
  with_first = lambda states: tuple(map(select, inputs.is_new, first(), states))
  return jax.lax.cond(any_new, with_first, lambda states: states, states)


def first_states(build: Build, runs: Runs, data: Dataset) -> States:
  """Returns the states that a group's clients begin with; arguments as of `load_part`'s result."""
  state = over_runs(programs.initialise(build))(runs, data)
  return pack(state.clients)


def over_runs(fn, in_axes=0):
  """Maps a function of one run over all of them; what is packed among its arguments is unpacked."""
  return jax.vmap(lambda *arguments: fn(*store.unpack(arguments)), in_axes)


def pack(clients: tuple) -> States:
  """Packs the states of a group, leaves [R, k, ...], one entry per cohort."""
  return tuple(store.pack(states, axes=2) for states in clients)


def save(stores: Stores, group: Group, states: States) -> None:
  """Writes the states of those who took part, once they are computed; the others stay as stored."""
  for of_cohort in zip(stores, *group, states, strict=True):
    store.put(*of_cohort)
