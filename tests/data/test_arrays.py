"""Data of one's own: arrays and files of them, images and rows of features."""

import jax
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.data import arrays, sources
from qupeD_jax.study import federation, study
from qupeD_jax.study.options import Options, replaced
from qupeD_jax.types import Dataset
from tests import mutate

RNG = np.random.default_rng(0)
ROWS = RNG.normal(50, [1, 10, 0.01], (40, 3))
LABELS = np.arange(40) % 2


@pytest.mark.parametrize(
  ("x", "shape", "dtype"),
  [
    (np.zeros((5, 4, 3, 2), np.uint8), (5, 4, 3, 2), np.uint8),
    (np.zeros((5, 4, 3), np.uint8), (5, 4, 3, 1), np.uint8),
    (np.zeros((5, 7)), (5, 1, 1, 7), np.float32),
    (np.zeros((5, 7), np.int64), (5, 1, 1, 7), np.float32),
    (np.zeros((5, 7), bool), (5, 1, 1, 7), np.float32),
  ],
)
@pytest.mark.parametrize("y", [[3, 0, 1, 1, 2], np.array([[3.0], [0], [1], [1], [2]])])
def test_arrays_become_a_data_set(x, shape, dtype, y):
  found = arrays.dataset(x, y, client=[1, 0, 0, 1, 0])
  sources.check(found)
  assert (found.x.shape, found.x.dtype) == (shape, dtype)
  np.testing.assert_array_equal(found.y, [3, 0, 1, 1, 2])


@pytest.mark.parametrize(
  ("x", "y", "message"),
  [
    ([[1], [1, 2]], [0, 1], "data.x: its entries differ in shape"),
    ([["a"], ["b"]], [0, 1], "data.x <U1: allowed is numbers"),
    ([1.0, 2.0], [0, 1], r"data.x \(2,\): allowed is images .* or rows \[M, D\]"),
    ([[1.0], [np.nan]], [0, 1], "data.x: 1 values are NaN or infinite"),
    ([[1.0], [1e300]], [0, 1], "data.x: 1 values are NaN or infinite"),
    ([[1.0], [2.0]], [0], r"data.y \(1,\): allowed is \[2\], one for each example"),
    ([[1.0], [2.0]], [0, 2**32 + 7], r"data.y \[4294967303\]: allowed is whole numbers from 0"),
    ([[1.0], [2.0]], [0, 2**31 - 1], r"data.y \[2147483647\]: allowed is .* below 65536"),
    ([[1.0], [2.0]], [-1, 0], r"data.y \[-1\]: allowed is whole numbers"),
    ([[1.0], [2.0]], [0.5, 0], r"data.y \[0.5\]: allowed is whole numbers"),
    ([[1.0], [2.0]], ["cat", "dog"], "data.y <U3: allowed is whole numbers; np.unique"),
  ],
)
def test_what_is_no_data_set_is_refused(x, y, message):
  with pytest.raises(BadInput, match=f"^{message}"):
    arrays.dataset(x, y)


def saved(path, **changes):
  """Writes a file of rows of features, with arrays changed, or without those that are None."""
  found = {"x_train": ROWS, "y_train": LABELS, "x_test": ROWS[:10], "y_test": LABELS[:10]} | changes
  np.savez(path, **{name: array for name, array in found.items() if array is not None})
  return path


def test_a_file_is_a_data_set_by_its_name(tmp_path):
  path = saved(tmp_path / "rows.npz", y_test=np.full(10, 4), extra=np.zeros(3))
  train, test, num_classes = sources.read(str(path))
  np.testing.assert_array_equal(train.x[:, 0, 0], ROWS.astype(np.float32))
  np.testing.assert_array_equal(train.y, LABELS)
  assert (test.x.shape, num_classes, train.client) == ((10, 1, 1, 3), 5, None)


def test_clients_of_a_file_may_have_names(tmp_path):
  who = np.array(["zoe", "ann"])
  owners = {"client_train": who[LABELS], "client_test": np.repeat(["bob", "ann"], 5)}
  train, test = sources.load(str(saved(tmp_path / "rows.npz", **owners)))
  assert train.client.tolist() == [2, 0] * 20
  assert test.client.tolist() == [1] * 5 + [0] * 5


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"y_test": None}, "has no y_test; needed are x_train, y_train, x_test, y_test, in it are"),
    ({"x_train": np.array([None] * 40)}, "not a file of arrays, as np.savez writes it"),
    ({"y_train": LABELS - 1}, r"train.y \[-1\]: allowed is whole numbers"),
    ({"client_train": LABELS}, "client_test missing: needed are both"),
    ({"client_train": LABELS, "client_test": LABELS[:3]}, r"test.client \(3,\): allowed is \[10\]"),
  ],
)
def test_a_file_that_is_no_data_set_is_refused(tmp_path, changes, message):
  path = saved(tmp_path / "rows.npz", **changes)
  with pytest.raises(BadInput, match=f"^{path}: {message}"):
    sources.load(str(path))


def test_parts_must_go_together(tmp_path):
  with pytest.raises(BadInput, match=r"test.x \(10, 1, 1, 2\): allowed is images of the shape"):
    sources.load(str(saved(tmp_path / "rows.npz", x_test=ROWS[:10, :2])))
  with pytest.raises(BadInput, match=r"test.x uint8: allowed is float32, as train.x"):
    sources.load(str(saved(tmp_path / "rows.npz", x_test=ROWS[:10].astype(np.uint8))))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x93NUMPY"])
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path, content):
  path = tmp_path / "rows.npz"
  assert not mutate.reads_or_refuses(lambda: sources.load(str(path)), path)
  path.write_bytes(content)
  assert not mutate.reads_or_refuses(lambda: sources.load(str(path)), path)
  assert not mutate.reads_or_refuses(
    lambda: sources.load(str(saved(path).parent) + "/.npz"), path.parent
  )


def test_statistics_of_floats_are_those_of_numpy():
  x = ROWS.astype(np.float32).reshape(-1, 1, 1, 3)
  x = np.concatenate(
    [np.tile(x, (200, 1, 1, 1)), np.full((8000, 1, 1, 1), 0.1, np.float32)], axis=3
  )
  mean, std = sources.statistics(Dataset(x, np.zeros(len(x), np.int32)))
  np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 1, 2)))
  np.testing.assert_allclose(std, [*x[..., :3].astype(np.float64).std((0, 1, 2)), 1.0])


def test_float_images_are_averaged_without_rounding():
  x = RNG.normal(size=(2, 4, 4, 1)).astype(np.float32)
  small = sources.downsample(Dataset(x, np.zeros(2, np.int32)), 2).x
  assert small.dtype == np.float32
  np.testing.assert_allclose(small[0, 0, 1], x[0, :2, 2:].mean((0, 1)), rtol=1e-6)


def test_networks_see_each_feature_normalised(tmp_path):
  options = replaced(Options(), dataset=str(saved(tmp_path / "rows.npz")), clients=2)
  found = federation.load(
    replaced(options, classes_per_client=2, seeds=1, batch_size=4, validation=0.2)
  )
  np.testing.assert_allclose(found.mean, ROWS.mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(found.std, ROWS.std(axis=0), rtol=1e-2)
  variables = found.models[0].init(jax.random.key(0))
  logits, _ = found.models[0].apply(variables, found.train.x, False)
  assert logits.shape == (40, 2)


def test_writers_without_test_rows_are_left_out_and_counted(tmp_path):
  owners = {"client_train": np.repeat([4, 7], 20), "client_test": np.full(10, 7)}
  path = str(saved(tmp_path / "rows.npz", **owners))
  options = replaced(Options(), dataset=path, partition="natural")
  options = replaced(options, clients=1, seeds=1, batch_size=4, min_test_rows=5)
  found = federation.load(options)
  np.testing.assert_array_equal(np.sort(found.splits[0].test.rows), np.arange(10))
  assert "1 of 2 writers left out, with fewer than 5 test rows" in study.describe(options, found)
