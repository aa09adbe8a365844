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
  made = store.create(STATES, (2, 5), place)
  packed = store.pack(STATES)
  assert {dtype: rows.shape for dtype, rows in packed.rows.items()} == {
    "float32": (4, 8), "int32": (4, 1),
  }  # fmt: skip
  slots = np.array([[4, 1], [0, 3]])
  states = jax.tree.map(lambda leaf: leaf.reshape(2, 2, -1), packed)
  store.put(made, slots, slots < 4, states)
  assert made.started.tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 1, 0]]
  store.put(made, slots, slots < 5, states)
  assert made.started.tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]]
  taken = store.unpack(store.take(made, slots))
  jax.tree.map(
    lambda leaf, state: np.testing.assert_array_equal(leaf.reshape(state.shape), state),
    taken, STATES,
  )  # fmt: skip
  shown = store.views(made)
  np.testing.assert_array_equal(shown[0]["kernel"][0, 4], STATES[0]["kernel"][0])
  np.testing.assert_array_equal(shown[1], [[0, 1, 0, 0, 0], [2, 0, 0, 3, 0]])
  assert not store.take(made, np.array([[2]])).rows["float32"].any()


def test_a_store_of_fewer_runs_serves_several_each():
  numbers = np.arange(10, dtype=np.int32).reshape(2, 5)
  slots = np.broadcast_to(np.arange(5), numbers.shape)
  wide = store.create(jax.ShapeDtypeStruct((1, 1), "int32"), numbers.shape)
  store.put(wide, slots, numbers >= 0, store.Packed({"int32": numbers[..., None]}, wide.layout))
  taken = store.unpack(store.take(wide, np.array([[4], [1], [4], [2]])))
  assert taken.ravel().tolist() == [4, 6, 4, 7]


def test_a_million_clients_take_no_room_until_they_train(tmp_path):
  wide = jax.ShapeDtypeStruct((1, 5000), "float32")
  made = store.create(wide, (1, 1_000_000), store.on_disk(tmp_path))
  file = made.rows["float32"].write.args[0]
  blocks = lambda: os.fstat(file.fileno()).st_blocks * 512
  assert os.fstat(file.fileno()).st_size == 20_000_000_000
  assert blocks() < 100_000
  slots = np.array([[999_999, 5]])
  assert not store.take(made, slots).rows["float32"].any()
  ones = store.Packed({"float32": np.ones((1, 2, 5000), np.float32)}, made.layout)
  store.put(made, slots, slots > 0, ones)
  assert 40_000 <= blocks() < 200_000
  assert list(tmp_path.iterdir()) == []  # nothing is left behind, however the run ends


def test_a_full_disk_and_a_missing_folder_are_one_line(tmp_path, monkeypatch):
  with pytest.raises(BadInput, match=r"nowhere: No such file"):
    store.create(STATES, (1, 4), store.on_disk(tmp_path / "nowhere"))
  made = store.create(STATES, (1, 4), store.on_disk(tmp_path))
  one_run = jax.tree.map(lambda leaf: leaf[None], store.pack(STATES))
  calls = []

  def fill_up(file, data, offset, write=os.pwrite):
    calls.append(offset)
    if len(calls) == 4:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(file, data[:20], offset)  # a part, of which the rest has to follow

  monkeypatch.setattr(os, "pwrite", fill_up)
  with pytest.raises(BadInput, match=f"{tmp_path}: No space left on device"):
    store.put(made, np.arange(4)[None], np.ones((1, 4), bool), one_run)
  assert calls[:3] == [0, 20, 32]
  assert not made.started.any()


def test_memory_that_there_is_not_is_refused():
  with pytest.raises(BadInput, match=r"store host: for .*clients of 40,000 bytes"):
    store.on_host(2**44, 10_000, "float32")
