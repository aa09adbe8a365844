"""Stores of clients' states that are too many for the device: in the host's memory or in a file.

The leaves of a client's state are laid end to end, one row for each dtype, so that a read, a write
or a transfer moves one array and not dozens. A client has no state until one is put; so long it
takes no room, neither in virtual memory nor in a sparse file.
"""

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax.checks import refusal
from qupeD_jax.io import files
from qupeD_jax.types import Array, FedState, PyTree


class Layout(NamedTuple):
  """How the leaves of one client's state lie in its rows."""

  structure: Any  # the treedef
  shapes: tuple[tuple[int, ...], ...]  # of the leaves
  dtypes: tuple[str, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Packed:
  """Clients' states as rows: a pytree whose leaves are the rows."""

  rows: dict[str, Array | np.ndarray]  # by dtype, [..., P]: P numbers for each client
  layout: Layout


class Rows(NamedTuple):
  """Where the rows of S clients lie, in one dtype."""

  values: np.ndarray  # [S, P], to be read only
  write: Callable  # (places [k], values [k, P]) -> None; no place twice


class Store(NamedTuple):
  """The states of R runs' K clients: client k of run r has row r * K + k."""

  layout: Layout
  rows: dict[str, Rows]  # by dtype, S = R * K
  started: np.ndarray  # [R, K] bool, whether there is a state


Place = Callable[[int, int, str], Rows]  # (S, P, dtype) -> rows, of unspecified values


# --- states as rows


def pack(states: PyTree, axes: int = 1) -> Packed:
  """Lays the leaves of clients' states end to end to rows.

  Args:
    states: leaves [k, ...], or [R, k, ...] with two leading axes.
    axes: number of the leading axes, which the rows have as well: [k, P] or [R, k, P].
  """
  by_dtype = {}
  for leaf in jax.tree.leaves(states):
    by_dtype.setdefault(leaf.dtype.name, []).append(leaf.reshape(*leaf.shape[:axes], -1))
  rows = {dtype: jnp.concatenate(parts, axis=-1) for dtype, parts in by_dtype.items()}
  return Packed(rows, _layout(states, axes))


def unpack(tree: PyTree) -> PyTree:
  """Replaces what is packed in a pytree by the states: leaves [..., *shape] of rows [..., P].

  Of numpy's rows they are views.

  >>> states = {"a": np.ones((2, 3), np.int32), "b": np.zeros((2, 2, 2), np.float32)}
  >>> packed = pack(states)
  >>> {dtype: row.shape for dtype, row in packed.rows.items()}
  {'int32': (2, 3), 'float32': (2, 4)}
  >>> jax.tree.map(np.shape, unpack(packed))
  {'a': (2, 3), 'b': (2, 2, 2)}
  """
  is_packed = lambda node: isinstance(node, Packed)
  show = lambda node: _states(node) if is_packed(node) else node
  return jax.tree.map(show, tree, is_leaf=is_packed)


def _states(packed: Packed) -> PyTree:
  rows, (structure, *kinds) = packed.rows, packed.layout
  ends, leaves = dict.fromkeys(rows, 0), []
  for shape, dtype in zip(*kinds, strict=True):
    first, ends[dtype] = ends[dtype], ends[dtype] + math.prod(shape)
    part = rows[dtype][..., first : ends[dtype]]
    leaves.append(part.reshape(*part.shape[:-1], *shape))
  return jax.tree.unflatten(structure, leaves)


def _layout(states: PyTree, axes: int) -> Layout:
  """Returns the layout of one client's state; leaves with leading axes, arrays or their shapes."""
  leaves, structure = jax.tree.flatten(states)
  shapes = tuple(tuple(leaf.shape[axes:]) for leaf in leaves)
  return Layout(structure, shapes, tuple(np.dtype(leaf.dtype).name for leaf in leaves))


# --- places


def on_host(count: int, width: int, dtype: str) -> Rows:
  """Makes rows in the host's memory.

  Raises:
    BadInput: there is not as much memory.
  """
  try:
    values = np.zeros((count, width), dtype)
  except MemoryError:
    needed = f"{count} clients of {width * np.dtype(dtype).itemsize:,} bytes"
    allowed = "what the host's memory holds; a file may hold more (store disk)"
    raise refusal("store", "host", f"for {needed}: allowed is {allowed}") from None
  return Rows(values, functools.partial(_write, values))


def on_disk(folder: Path) -> Place:
  """Returns a function that makes rows in a sparse file without a name, gone when the process is.

  Rows are read from a memory map, but written by calls: of a full disk a call says so, where a
  write to a map would end the process.

  Args:
    folder: that exists; its disk holds the file.
  """

  def make(count: int, width: int, dtype: str) -> Rows:
    size = width * np.dtype(dtype).itemsize
    with files.on_disk(folder):
      folder.stat()  # what is missing is the folder, not the file in it
      file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
      file.truncate(count * size)
      values = np.memmap(file, dtype, mode="r", shape=(count, width))
    return Rows(np.asarray(values), functools.partial(_write_file, file, folder, size))

  return make


def _write(values: np.ndarray, places: np.ndarray, new: np.ndarray) -> None:
  values[places] = new


def _write_file(file, folder: Path, size: int, places: np.ndarray, new: np.ndarray) -> None:
  rows = np.ascontiguousarray(new).view(np.uint8)
  with files.on_disk(folder):
    for place, row in zip(places.tolist(), rows, strict=True):
      done = 0
      while done < size:  # a disk that fills up takes a part, and refuses the next
        done += os.pwrite(file.fileno(), row[done:], place * size + done)


# --- stores


def create(states: PyTree, shape: tuple[int, int], place: Place = on_host) -> Store:
  """Makes a store in which no client has a state yet; costs next to nothing.

  Args:
    states: such as those to be stored, leaves [k, ...]: arrays or their shapes.
    shape: R, K.
    place: where the rows lie, `on_host` or `on_disk(folder)`.

  Raises:
    BadInput: the place has not the room, or cannot be written.
  """
  layout, widths = _layout(states, axes=1), {}
  for leaf, dtype in zip(layout.shapes, layout.dtypes, strict=True):
    widths[dtype] = widths.get(dtype, 0) + math.prod(leaf)
  rows = {dtype: place(math.prod(shape), width, dtype) for dtype, width in widths.items()}
  return Store(layout, rows, np.zeros(shape, bool))


def is_streamed(node) -> bool:
  """Tells whether something is a FedState whose clients lie in stores."""
  return isinstance(node, FedState) and all(isinstance(c, Store) for c in node.clients)


def is_started(store: Store, slots: np.ndarray) -> np.ndarray:
  """Tells which clients have a state, [R, k] bool; arguments as of `take`."""
  return store.started.reshape(-1)[_places(store, slots)]


def take(store: Store, slots: np.ndarray) -> Packed:
  """Reads clients' states, zeros for those that have none yet: copies, rows [R, k, P].

  Args:
    store: of R runs, or of fewer, which then serve several each, in turn.
    slots: [R, k] integers below K.
  """
  places, here = _places(store, slots), is_started(store, slots)

  def read(values):
    if here.all():
      return np.take(values, places, axis=0)
    rows = np.zeros((*places.shape, values.shape[1]), values.dtype)
    rows[here] = values[places[here]]  # a hole in a file is better not looked at: it would fill up
    return rows

  return Packed({dtype: read(rows.values) for dtype, rows in store.rows.items()}, store.layout)


def put(store: Store, slots: np.ndarray, chosen: np.ndarray, states: Packed) -> None:
  """Writes clients' states, once they are computed.

  Args:
    store: of R runs.
    slots: [R, k] integers below K.
    chosen: [R, k] bool, whose states are written; of these none comes twice.
    states: rows [R, k, P].

  Raises:
    BadInput: the disk is full.
  """
  some = slice(None) if chosen.all() else chosen.ravel()
  places = _places(store, slots).ravel()[some]
  for dtype, rows in states.rows.items():
    store.rows[dtype].write(places, np.asarray(rows).reshape(-1, rows.shape[-1])[some])
  store.started.reshape(-1)[places] = True


def views(store: Store) -> PyTree:
  """Returns all states as views of the store, leaves [R, K, ...]; zeros where there is none yet."""
  lead = store.started.shape
  rows = {dtype: rows.values.reshape(*lead, -1) for dtype, rows in store.rows.items()}
  return unpack(Packed(rows, store.layout))


def _places(store: Store, slots: np.ndarray) -> np.ndarray:
  """Returns the numbers of clients' rows, [R, k]."""
  num_runs, num_clients = store.started.shape
  return (np.arange(len(slots)) % num_runs)[:, None] * num_clients + slots
