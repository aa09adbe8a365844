"""Where the states of clients lie that are too many for the device: on the host or in a file.

A client's state is a row: its leaves laid end to end, those of one dtype together, so that what is
read, written and sent to the device is one array. A client whose state was never put has none yet:
on a host with virtual memory, and in a sparse file, it takes no room.
"""

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
from qupeD_jax.types import Array, PyTree


class Layout(NamedTuple):
  """How the leaves of one client lie in its row."""

  structure: Any  # the treedef
  shapes: tuple[tuple[int, ...], ...]  # of the leaves
  dtypes: tuple[str, ...]


class Rows(NamedTuple):
  """The rows of S clients in one dtype."""

  values: np.ndarray  # [S, P], to be read only
  write: Callable  # (places [k], values [k, P]) -> None; no place twice


class Store(NamedTuple):
  """The states of R times K clients: client k of run r is at place r * K + k."""

  layout: Layout
  rows: dict[str, Rows]  # by dtype, S = R * K
  started: np.ndarray  # [R, K] bool, whether a state was put


Place = Callable[[int, int, str], Rows]  # (S, P, dtype) -> rows, of unspecified values


def layout(states: PyTree) -> Layout:
  """Returns the layout of clients' states.

  Args:
    states: arrays or their shapes, leaves [k, ...].
  """
  leaves, structure = jax.tree.flatten(states)
  shapes = tuple(tuple(leaf.shape[1:]) for leaf in leaves)
  return Layout(structure, shapes, tuple(np.dtype(leaf.dtype).name for leaf in leaves))


def pack(states: PyTree) -> dict[str, Array]:
  """Lays clients' leaves [k, ...] end to end: [k, P] by dtype."""
  by_dtype = {}
  for leaf in jax.tree.leaves(states):
    by_dtype.setdefault(leaf.dtype.name, []).append(leaf.reshape(len(leaf), -1))
  return {dtype: jnp.concatenate(parts, axis=-1) for dtype, parts in by_dtype.items()}


def unpack(layout: Layout, rows: dict[str, Array | np.ndarray]) -> PyTree:
  """Undoes `pack`: rows [..., P] by dtype give leaves [..., *shape], views where they are numpy's.

  >>> states = {"a": np.ones((2, 3), np.int32), "b": np.zeros((2, 2, 2), np.float32)}
  >>> rows = pack(states)
  >>> {dtype: row.shape for dtype, row in rows.items()}
  {'int32': (2, 3), 'float32': (2, 4)}
  >>> jax.tree.map(np.shape, unpack(layout(states), rows))
  {'a': (2, 3), 'b': (2, 2, 2)}
  """
  ends, leaves = dict.fromkeys(rows, 0), []
  for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
    first, ends[dtype] = ends[dtype], ends[dtype] + math.prod(shape)
    part = rows[dtype][..., first : ends[dtype]]
    leaves.append(part.reshape(*part.shape[:-1], *shape))
  return jax.tree.unflatten(layout.structure, leaves)


def row_bytes(layout: Layout) -> int:
  """Weighs one client's row."""
  return sum(width * np.dtype(dtype).itemsize for dtype, width in _widths(layout).items())


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
  """Returns how rows are made in a sparse file without a name, which goes when the process does.

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


def create(layout: Layout, shape: tuple[int, int], place: Place = on_host) -> Store:
  """Makes a store of clients without states; costs next to nothing.

  Args:
    layout: of one client's state.
    shape: R, K.
    place: where the rows lie, `on_host` or `on_disk(folder)`.

  Raises:
    BadInput: the place has not the room, or cannot be written.
  """
  count = math.prod(shape)
  rows = {dtype: place(count, width, dtype) for dtype, width in _widths(layout).items()}
  return Store(layout, rows, np.zeros(shape, bool))


def places(store: Store, slots: np.ndarray) -> np.ndarray:
  """Returns where clients are, [R, k] integers.

  Args:
    store: of as many runs, or of fewer, which then serve several each, in turn.
    slots: [R, k] integers below K.
  """
  num_runs, num_clients = store.started.shape
  return (np.arange(len(slots)) % num_runs)[:, None] * num_clients + slots


def is_started(store: Store, places: np.ndarray) -> np.ndarray:
  """Tells which clients have a state, bool, of the shape of `places`."""
  return store.started.reshape(-1)[places]


def take(store: Store, places: np.ndarray) -> dict[str, np.ndarray]:
  """Reads the rows of clients, zeros for those that have none yet.

  Args:
    store: of R * K clients.
    places: [...] integers below R * K.

  Returns:
    [..., P] by dtype, copies.
  """
  here = is_started(store, places)

  def read(values):
    if here.all():
      return np.take(values, places, axis=0)
    rows = np.zeros((*places.shape, values.shape[1]), values.dtype)
    rows[here] = values[places[here]]  # a hole in a file is better not looked at: it would fill up
    return rows

  return {dtype: read(rows.values) for dtype, rows in store.rows.items()}


def put(store: Store, places: np.ndarray, rows: dict[str, np.ndarray]) -> None:
  """Writes the rows [k, P] of the clients at `places` [k], of which none comes twice.

  Raises:
    BadInput: the disk is full.
  """
  for dtype, values in rows.items():
    store.rows[dtype].write(places, values)
  store.started.reshape(-1)[places] = True


def views(store: Store) -> PyTree:
  """Returns all states as views of the store, leaves [R, K, ...]; zeros where there is none yet."""
  lead = store.started.shape
  rows = {dtype: rows.values.reshape(*lead, -1) for dtype, rows in store.rows.items()}
  return unpack(store.layout, rows)


def _widths(layout: Layout) -> dict[str, int]:
  widths = {}
  for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True):
    widths[dtype] = widths.get(dtype, 0) + math.prod(shape)
  return widths
