"""Stores of clients' states: in memory and in a file, full disks, and room that nobody needs."""

import errno
import os

import jax
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.engine import store

WEIGHTS = {"kernel": np.arange(24.0, dtype=np.float32).reshape(4, 2, 3), "bias": np.ones((4, 2))}
STATES = (
  WEIGHTS | {"bias": np.float32([[1, 2], [3, 4], [5, 6], [7, 8]])},
  np.arange(4, dtype="i4"),
)


@pytest.fixture(params=["host", "disk"])
def place(request, tmp_path):
  return store.on_host if request.param == "host" else store.on_disk(tmp_path)


def test_what_was_put_is_taken_again(place):
  made = store.create(store.layout(STATES), (2, 5), place)
  packed = jax.device_get(store.pack(STATES))
  assert {dtype: rows.shape for dtype, rows in packed.items()} == {
    "float32": (4, 8), "int32": (4, 1),
  }  # fmt: skip
  places = store.places(made, np.array([[4, 1], [0, 3]]))
  store.put(made, places.ravel(), packed)
  assert made.started.tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]]
  taken = store.unpack(made.layout, store.take(made, places))
  jax.tree.map(
    lambda leaf, state: np.testing.assert_array_equal(leaf.reshape(state.shape), state),
    taken, STATES,
  )  # fmt: skip
  shown = store.views(made)
  np.testing.assert_array_equal(shown[0]["kernel"][0, 4], STATES[0]["kernel"][0])
  np.testing.assert_array_equal(shown[1], [[0, 1, 0, 0, 0], [2, 0, 0, 3, 0]])
  assert not store.take(made, np.array([2]))["float32"].any()


def test_a_store_of_fewer_runs_serves_several_each():
  made = store.create(store.layout(STATES), (2, 5))
  places = store.places(made, np.array([[4], [1], [4], [2]]))
  assert places.tolist() == [[4], [6], [4], [7]]


def test_a_million_clients_take_no_room_until_they_train(tmp_path):
  wide = jax.ShapeDtypeStruct((1, 5000), "float32")
  made = store.create(store.layout(wide), (1, 1_000_000), store.on_disk(tmp_path))
  file = made.rows["float32"].write.args[0]
  blocks = lambda: os.fstat(file.fileno()).st_blocks * 512
  assert os.fstat(file.fileno()).st_size == 20_000_000_000
  assert blocks() < 100_000
  places = np.array([999_999, 5])
  assert not store.take(made, places)["float32"].any()
  store.put(made, places, {"float32": np.ones((2, 5000), np.float32)})
  assert 40_000 <= blocks() < 200_000
  assert list(tmp_path.iterdir()) == []  # nothing is left behind, however the run ends


def test_a_full_disk_and_a_missing_folder_are_one_line(tmp_path, monkeypatch):
  with pytest.raises(BadInput, match=r"nowhere: No such file"):
    store.create(store.layout(STATES), (1, 4), store.on_disk(tmp_path / "nowhere"))
  made = store.create(store.layout(STATES), (1, 4), store.on_disk(tmp_path))
  calls = []

  def fill_up(file, data, offset, write=os.pwrite):
    calls.append(offset)
    if len(calls) == 4:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(file, data[:20], offset)  # a part, of which the rest has to follow

  monkeypatch.setattr(os, "pwrite", fill_up)
  with pytest.raises(BadInput, match=f"{tmp_path}: No space left on device"):
    store.put(made, np.arange(4), jax.device_get(store.pack(STATES)))
  assert calls[:3] == [0, 20, 32]
  assert not made.started.any()


def test_memory_that_there_is_not_is_refused():
  with pytest.raises(BadInput, match=r"store host: for .*clients of 40,000 bytes"):
    store.on_host(2**44, 10_000, "float32")
