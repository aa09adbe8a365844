"""Portions of the clients: what the device gets of those that lie on the host, and gives back."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax.engine import loop, store
from qupeD_jax.types import Array, Cohort, Dataset, FedState, PyTree
from qupeD_jax.wrappers import sampling


class Host(NamedTuple):
  """What stays on the host."""

  data: Dataset
  cohorts: tuple[Cohort, ...]  # [R, K, ...]
  starts: tuple[tuple[store.Store, ...], ...]  # the clients of each streamed state in the setting


class Group(NamedTuple):
  """Clients that are on the device at the same time, one entry per cohort."""

  slots: tuple[np.ndarray, ...]  # [R, k] integers
  takes_part: tuple[np.ndarray, ...]  # [R, k] bool; the others only fill up


class Given(NamedTuple):
  """What the device gets of a group; all leaves [R, ...], tuples with an entry per cohort."""

  data: Dataset  # their examples alone, one after the other
  cohorts: tuple[Cohort, ...]  # without `index`, which is an enumeration
  starts: tuple[tuple[dict, ...], ...]  # their rows in the states of the setting
  rows: tuple[dict, ...]  # their own, by dtype [R, k, P]
  is_new: tuple[Array, ...]  # [R, k] bool: without a state yet
  source: tuple[Array, ...]  # [R, k] int32: place in the group before, which is fresher; or -1


def split(runs: loop.Runs, data: Dataset) -> tuple[Host, loop.Runs]:
  """Tells what stays on the host from what is sent to the device once."""
  leaves = jax.tree.leaves(runs.setting, is_leaf=is_streamed)
  found = [leaf for leaf in leaves if is_streamed(leaf)]
  setting = _with_clients(runs.setting, [()] * len(found))
  data, cohorts = jax.tree.map(np.asarray, (data, runs.cohorts))
  host = Host(data, cohorts, tuple(state.clients for state in found))
  return host, jax.device_put(loop.Runs(runs.key, (), setting))


def is_streamed(node) -> bool:
  """Tells whether something is a state whose clients lie in stores."""
  return isinstance(node, FedState) and all(isinstance(c, store.Store) for c in node.clients)


def _with_clients(setting: PyTree, clients: Sequence[tuple]) -> PyTree:
  """Gives the streamed states in a setting other clients."""
  left = iter(clients)
  replaced = lambda leaf: leaf._replace(clients=next(left)) if is_streamed(leaf) else leaf
  return jax.tree.map(replaced, setting, is_leaf=is_streamed)


def all_groups(cohorts: tuple[Cohort, ...], fraction: float) -> list[Group]:
  """Goes through all clients in order, in groups of as many as take part in a round."""
  counts = [sampling.num_participants(cohort.size.shape[1], fraction) for cohort in cohorts]
  pairs = list(zip(cohorts, counts, strict=True))

  def group(i):
    slots = [np.broadcast_to(i * n + np.arange(n), (len(c.size), n)) for c, n in pairs]
    return Group(
      tuple(np.minimum(s, c.size.shape[1] - 1) for s, c in zip(slots, cohorts, strict=True)),
      tuple(s < c.size.shape[1] for s, c in zip(slots, cohorts, strict=True)),
    )

  return [group(i) for i in range(max(-(-c.size.shape[1] // n) for c, n in pairs))]


def missing(stores: tuple[store.Store, ...], group: Group) -> Group:
  """Lets only those of a group take part who have no state."""

  def of_cohort(of, slots, takes_part):
    return takes_part & ~store.is_started(of, store.places(of, slots))

  return group._replace(takes_part=tuple(map(of_cohort, stores, *group)))


def fetch(
  host: Host, stores: tuple[store.Store, ...], group: Group, before: Group | None = None
) -> Given:
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
  given = Given(
    *examples(host.data, host.cohorts, group),
    starts=tuple(
      tuple(store.take(s, store.places(s, slots)) for s, slots in zip(of, group.slots, strict=True))
      for of in host.starts
    ),
    rows=tuple(map(store.take, stores, places)),
    is_new=tuple(~started & (s < 0) for started, s in zip(known, source, strict=False)),
    source=tuple(source),
  )
  return jax.device_put(given)


def examples(
  data: Dataset, cohorts: tuple[Cohort, ...], group: Group
) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Takes a group's examples out of a data set, and its part of the cohorts without `index`."""
  run_ = np.arange(len(group.slots[0]))[:, None]
  chosen = [
    jax.tree.map(lambda field, s=slots: field[run_, s], cohort)
    for cohort, slots in zip(cohorts, group.slots, strict=True)
  ]
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


def put(stores: tuple[store.Store, ...], group: Group, rows: tuple[dict, ...]) -> None:
  """Writes the states of those who took part, once they are computed."""
  for of, slots, takes_part, new in zip(stores, *group, rows, strict=True):
    some = slice(None) if takes_part.all() else takes_part.ravel()
    flat = lambda leaf: np.asarray(leaf).reshape(-1, leaf.shape[-1])[some]  # noqa: B023
    store.put(of, store.places(of, slots).ravel()[some], jax.tree.map(flat, new))


def run_of(build, host: Host, one: loop.Runs, given: Given) -> loop.Runs:
  """Makes a run of a group alone: what there is of it in the setting, its rows by enumeration."""
  clients = [
    tuple(store.unpack(s.layout, rows) for s, rows in zip(of, group, strict=True))
    for of, group in zip(host.starts, given.starts, strict=True)
  ]
  cohorts = enumerated(given.cohorts, host.cohorts)
  return loop.Runs(one.key, cohorts, _with_clients(one.setting, clients))


def enumerated(chosen: tuple[Cohort, ...], cohorts: tuple[Cohort, ...]) -> tuple[Cohort, ...]:
  """Gives a group the rows of its own data set, in which they follow one another."""
  first, numbered = 0, []
  for part, whole in zip(chosen, cohorts, strict=True):
    shape = len(part.size), whole.index.shape[-1]
    index = first + jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape)
    numbered.append(part._replace(index=index))
    first += index.size
  return tuple(numbered)
