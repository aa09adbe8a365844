"""Data sets are read as they were written, and what cannot be read is refused in one clear line."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import types
import zlib

import h5py
import numpy as np
import pytest
import requests
from PIL import Image

from qupeD_jax.checks import BadInput
from qupeD_jax.data import catalog, prepare, sources
from qupeD_jax.types import Dataset

# The published mean and standard deviation of the training pixels, in [0, 1].
PUBLISHED = {
  "mnist": ((60000, 28, 28, 1), (0.1307,), (0.3081,)),
  "fashion_mnist": ((60000, 28, 28, 1), (0.2860,), (0.3530,)),
  "cifar10": ((50000, 32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def refusal(function, *args) -> str:
  """Returns the message of the BadInput that a call raises, once it is known to be one line."""
  with pytest.raises(BadInput) as caught:
    function(*args)
  message = str(caught.value)
  assert message
  assert "\n" not in message
  return message


# Small data sets in the formats of the real ones.


def images(count, shape=(28, 28, 1), seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, 10, count, np.int32)


def png(pixels, kind="PNG"):
  buffer = io.BytesIO()
  Image.fromarray(pixels.squeeze()).save(buffer, kind)
  return buffer.getvalue()


def bomb():
  """A PNG that says of itself that it is 2^15 pixels wide and high."""
  content = bytearray(png(np.zeros((28, 28), np.uint8)))
  content[16:24] = struct.pack(">II", 2**15, 2**15)
  content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
  return bytes(content)


def example(image, label):
  from tensorflow_datasets.proto import tf_example_pb2

  found = tf_example_pb2.Example()
  if image is not None:
    found.features.feature["image"].bytes_list.value.append(image)
  if label is not None:
    found.features.feature["label"].int64_list.value.append(label)
  return found.SerializeToString()


def write_shard(path, records):
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def write_prepared(root, name="mnist", version="3.0.1", features=None, **parts):
  """Writes a folder as TFDS prepares it; parts are lists of shards, a shard a list of records."""
  import tensorflow_datasets as tfds

  dataset, _, config = name.partition("/")
  folder = root / name / version
  folder.mkdir(parents=True)
  template = tfds.core.ShardedFileTemplate(
    dataset_name=dataset,
    data_dir=folder,
    filetype_suffix="array_record",
    template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
  )
  for part, shards in parts.items():
    for i, records in enumerate(shards):
      shard = f"{dataset}-{part}.array_record-{i:05}-of-{len(shards):05}"
      write_shard(folder / shard, records)
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features or mnist_features(),
    split_infos=[
      tfds.core.SplitInfo(
        name=part, shard_lengths=[*map(len, shards)], num_bytes=0, filename_template=template
      )
      for part, shards in parts.items()
    ],
    filename_template=template,
    check_data=False,
  )
  if config:
    edit(folder / "dataset_info.json", lambda info: info.update(configName=config))
  return folder


def mnist_features(shape=(28, 28, 1), dtype=np.uint8):
  import tensorflow_datasets as tfds

  label = tfds.features.ClassLabel(num_classes=10)
  image = tfds.features.Image(shape=shape, dtype=dtype)
  return tfds.features.FeaturesDict({"image": image, "label": label})


def records(x, y):
  return [example(png(image), int(label)) for image, label in zip(x, y, strict=True)]


def edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


@pytest.fixture
def small(tmp_path):
  """A prepared mnist of 40 and 10 images."""
  train, test = records(*images(40)), records(*images(10, seed=1))
  return write_prepared(tmp_path, train=[train], test=[test])


# Names.


def test_unknown_name_lists_all_and_the_nearest():
  message = refusal(sources.load, "CIFAR-10")
  assert message.startswith("dataset CIFAR-10: allowed is digits, mnist, ")
  assert all(name in message for name in sources.names())
  assert message.endswith("; the nearest is cifar10")


def test_unknown_name_without_a_near_one_suggests_none():
  assert "nearest" not in refusal(sources.load, "xyzzy")


# Digits.


def test_digits_are_stored_levels_and_split_by_class():
  train, test = sources.load("digits")
  assert train.x.shape == (1437, 8, 8, 1)
  assert test.x.shape == (360, 8, 8, 1)
  assert train.x.dtype == np.uint8
  assert train.x.max() == 16
  assert train.y.dtype == test.y.dtype == np.int32
  shares = np.bincount(test.y) / (np.bincount(train.y) + np.bincount(test.y))
  np.testing.assert_allclose(shares, 0.2, atol=0.01)
  assert sources.num_classes(train, test) == 10


def test_digits_are_all_there_once_and_always_the_same():
  from sklearn.datasets import load_digits

  train, test = sources.load("digits")
  again, _ = sources.load("digits")
  np.testing.assert_array_equal(train.x, again.x)
  found = np.concatenate([train.x, test.x]).reshape(-1, 64)
  expected = load_digits().data.astype(np.uint8)
  np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


# Data sets that TFDS prepared.


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_data(name):
  if catalog.newest(name) is None:
    pytest.skip(f"{name} is not in {catalog.folder()}; run {catalog.make_command(name)}")
  shape, mean, std = PUBLISHED[name]
  train, test = sources.load(name)
  assert train.x.shape == shape
  assert test.x.shape == (10000, *shape[1:])
  assert sources.num_classes(train, test) == 10
  np.testing.assert_array_equal(np.bincount(test.y) > 800, np.ones(10, bool))
  np.testing.assert_allclose(np.array(sources.statistics(train)) / 255, [mean, std], atol=2e-4)


@pytest.mark.parametrize(
  ("name", "shape"),
  [("mnist", (28, 28, 1)), ("cifar100", (32, 32, 3)), ("emnist/letters", (28, 28, 1))],
)
def test_prepared_images_are_read_as_they_were_written(tmp_path, name, shape):
  x, y = images(30, shape)
  test_x, test_y = images(10, shape, seed=1)
  shards = [records(x[:20], y[:20]), records(x[20:], y[20:])]
  features = mnist_features(shape)
  write_prepared(tmp_path, name, features=features, train=shards, test=[records(test_x, test_y)])
  train, test = sources.load(name, tmp_path)
  np.testing.assert_array_equal(train.x, x)
  np.testing.assert_array_equal(train.y, y)
  np.testing.assert_array_equal(test.x, test_x)
  np.testing.assert_array_equal(test.y, test_y)
  assert train.x.dtype == np.uint8
  assert train.y.dtype == np.int32
  assert train.client is None


def test_newest_version_is_read(tmp_path):
  for version, count in (("3.0.9", 3), ("3.0.10", 4), ("3.0.10.incompleteABC", 5)):
    write_prepared(
      tmp_path, version=version, train=[records(*images(count))], test=[records(*images(1))]
    )
  assert len(sources.load("mnist", tmp_path)[0].y) == 4


def test_default_folder_is_that_of_tfds(small, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(small.parents[1]))
  assert len(sources.load("mnist")[0].y) == 40
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert catalog.folder() == catalog.Path.home() / "tensorflow_datasets"


def test_reading_is_silent_and_leaves_tensorflow_alone(small, tmp_path):
  """A TensorFlow that cannot be imported stands for one that would claim the accelerator."""
  fake = tmp_path / "fake"
  fake.mkdir()
  (fake / "tensorflow.py").write_text("raise RuntimeError('TensorFlow was imported')")
  code = "import sys; from qupeD_jax.data import sources; sources.load('mnist', sys.argv[1])"
  path = os.pathsep.join([str(fake), *sys.path])
  done = subprocess.run(
    [sys.executable, "-c", code, str(small.parents[1])],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": path},
    timeout=120,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_not_prepared_says_where_and_how(tmp_path, monkeypatch):
  make = f'run `make data NAME=cifar10 ARGS="--data-dir {tmp_path}"`'
  expected = f"dataset cifar10: not prepared in {tmp_path}; {make}"
  assert refusal(sources.load, "cifar10", tmp_path) == expected
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  expected = f"dataset cifar10: not prepared in {tmp_path}; run `make data NAME=cifar10`"
  assert refusal(sources.load, "cifar10") == expected


SHARD = "mnist-train.array_record-00000-of-00001"


def truncate(length):
  return lambda folder: os.truncate(folder / SHARD, length)


def flip_byte(position):
  def flip(folder):
    content = bytearray((folder / SHARD).read_bytes())
    content[position] ^= 255
    (folder / SHARD).write_bytes(content)

  return flip


def replace_records(make):
  """Writes another record in the place of the second."""

  def replace(folder):
    x, y = images(40)
    good = records(x, y)
    write_shard(folder / SHARD, [good[0], make(x[1], y[1]), *good[2:]])

  return replace


def edit_info(change):
  return lambda folder: edit(folder / "dataset_info.json", change)


def promise(count):
  return edit_info(lambda info: info["splits"][0].update(shardLengths=[str(count)]))


def features(change):
  def rewrite(folder):
    edit(folder / "features.json", lambda content: change(content["featuresDict"]["features"]))

  return rewrite


DAMAGES = {
  "missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: missing"),
  "empty shard": (truncate(0), f"{SHARD}: damaged or cut short"),
  "half a shard": (truncate(70000), f"{SHARD}: damaged or cut short"),
  "cut at a block": (truncate(65536), f"{SHARD}: damaged or cut short"),
  "last byte missing": (truncate(131071), f"{SHARD}: damaged or cut short"),
  "flipped in a record": (flip_byte(5000), f"{SHARD}: damaged or cut short"),
  "flipped in the footer": (flip_byte(65542), f"{SHARD}: damaged or cut short"),
  "garbage": (
    lambda folder: (folder / SHARD).write_bytes(b"garbage " * 20000),
    f"{SHARD}: damaged or cut short",
  ),
  "too few records": (promise(50), f"{SHARD}: holds 40 records instead of 50"),
  "too many records": (promise(30), f"{SHARD}: holds 40 records instead of 30"),
  "no records promised": (promise(0), "its train split is empty"),
  "no info": (
    lambda folder: (folder / "dataset_info.json").unlink(),
    "dataset_info.json: No such file or directory",
  ),
  "no features": (
    lambda folder: (folder / "features.json").unlink(),
    "features.json: No such file or directory",
  ),
  "broken info": (
    lambda folder: (folder / "dataset_info.json").write_text("{"),
    "dataset_info.json: damaged (Expecting property name",
  ),
  "other data set": (edit_info(lambda info: info.update(name="kmnist")), "holds kmnist, not mnist"),
  "no test split": (edit_info(lambda info: info["splits"].pop()), "has no test split"),
  "no image": (features(lambda found: found.pop("image")), "has no feature `image`"),
  "no label": (features(lambda found: found.pop("label")), "has no feature `label`"),
  "image of any size": (
    features(lambda found: found["image"]["image"]["shape"].update(dimensions=["-1", "-1", "1"])),
    "has no feature `image` of a fixed shape",
  ),
  "image of floats": (
    features(lambda found: found["image"]["image"].update(dtype="float32")),
    "has no feature `image` of a fixed shape [H, W, C] in uint8",
  ),
  "not a record": (replace_records(lambda x, y: b"\xff\xff"), "record 1 is no image with a label"),
  "record without image": (
    replace_records(lambda x, y: example(None, 3)),
    "record 1 is no image with a label",
  ),
  "record without label": (
    replace_records(lambda x, y: example(png(x), None)),
    "record 1 is no image with a label",
  ),
  "huge label": (
    replace_records(lambda x, y: example(png(x), 2**40 + 7)),
    "a label [1099511627783], where there are 10 classes",
  ),
  "label of no class": (
    replace_records(lambda x, y: example(png(x), 57)),
    "a label [57], where there are 10 classes",
  ),
  "negative label": (replace_records(lambda x, y: example(png(x), -1)), "a label [-1]"),
  "another format of image": (
    replace_records(lambda x, y: example(png(x, "BMP"), 3)),
    "cannot identify image",
  ),
  "a program for a picture": (
    replace_records(lambda x, y: example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28", 3)),
    "cannot identify image",
  ),
  "a bomb": (replace_records(lambda x, y: example(bomb(), 3)), "decompression bomb"),
  "classes without end": (
    features(lambda found: found["label"]["classLabel"].update(numClasses="99999999999")),
    "declares 99999999999 classes",
  ),
  "strange metadata": (
    edit_info(lambda info: info.update(splits=[None])),
    "no layout that is known in dataset_info.json and features.json",
  ),
  "not an image": (replace_records(lambda x, y: example(b"no image", 3)), "cannot identify image"),
  "half an image": (replace_records(lambda x, y: example(png(x)[:300], 3)), SHARD),
  "smaller image": (
    replace_records(lambda x, y: example(png(x[:14]), 3)),
    "an image of shape (14, 28, 1) and mode L instead of (28, 28, 1)",
  ),
  "turned image": (
    replace_records(lambda x, y: example(png(x.reshape(56, 14)), 3)),
    "an image of shape (56, 14, 1) and mode L instead of (28, 28, 1)",
  ),
  "coloured image": (
    replace_records(lambda x, y: example(png(np.repeat(x, 3, axis=-1)), 3)),
    "an image of shape (28, 28, 3) and mode RGB instead of (28, 28, 1)",
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_foreign_folders_are_refused(small, damage):
  harm, expected = DAMAGES[damage]
  harm(small)
  root = small.parents[1]
  message = refusal(sources.load, "mnist", root)
  assert message.startswith(str(small))
  assert expected in message
  remedy = f'; delete {small} and run `make data NAME=mnist ARGS="--data-dir {root}"`'
  assert message.endswith(remedy)


def test_a_folder_of_another_format_is_not_to_be_deleted(small):
  edit_info(lambda info: info.update(fileFormat="tfrecord"))(small)
  message = refusal(sources.load, "mnist", small.parents[1])
  make = '`make data NAME=mnist ARGS="--data-dir OTHER_FOLDER"`'
  assert message == f"{small}: holds tfrecord files, and array_record is read; run {make}"


def test_nothing_is_imported_that_metadata_name(small, tmp_path, monkeypatch):
  (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  features(lambda found: found.update(extra={"pythonClassName": "stranger.Feature"}))(small)
  assert len(sources.load("mnist", small.parents[1])[0].y) == 40


def test_classes_are_those_that_are_declared(small):
  assert sources.read("mnist", small.parents[1]).num_classes == 10
  edit(small / "features.json", lambda content: content["featuresDict"]["features"]["label"].update(
    classLabel={"numClasses": "47"}))  # fmt: skip
  assert sources.read("mnist", small.parents[1]).num_classes == 47


# FEMNIST.

WRITERS = {"f02": 3, "f00": 2, "f01": 4}  # names are not in order, so that sorting shows


def handwriting(seed=0):
  """Pixels in 0..255 and labels of each writer, digits all of them."""
  rng = np.random.default_rng(seed)
  return {
    name: (rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n))
    for name, n in WRITERS.items()
  }


def write_leaf(folder, written, files=1):
  """Writes LEAF's layout, writers dealt out to files."""
  folder.mkdir(parents=True)
  for i in range(files):
    users = list(written)[i::files]
    data = {
      user: {"x": (x.reshape(-1, 784) / 255).tolist(), "y": y.tolist()}
      for user, (x, y) in written.items()
      if user in users
    }
    counts = [len(data[user]["y"]) for user in users]
    content = {"users": users, "num_samples": counts, "user_data": data}
    (folder / f"all_data_{i}_niid_0_keep_0_train_9.json").write_text(json.dumps(content))


def write_hdf5(path, written):
  """Writes TensorFlow Federated's layout."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with h5py.File(path, "w") as file:
    for user, (x, y) in written.items():
      group = file.create_group(f"examples/{user}")
      group["pixels"] = (x / 255).astype(np.float32)
      group["label"] = y.astype(np.int32)


def write_femnist(root, layout, train, test):
  if layout == "leaf":
    write_leaf(root / "train", train, files=min(2, len(train)))
    write_leaf(root / "test", test)
  else:
    write_hdf5(root / f"{layout}_train.h5", train)
    write_hdf5(root / f"{layout}_test.h5", test)


def assert_written(dataset, written, numbers):
  for user, (x, y) in written.items():
    rows = dataset.client == numbers[user]
    np.testing.assert_array_equal(dataset.x[rows, ..., 0], x)
    np.testing.assert_array_equal(dataset.y[rows], y)
  assert len(dataset.y) == sum(len(y) for _, y in written.values())


@pytest.mark.parametrize("layout", ["leaf", "fed_emnist", "fed_emnist_digitsonly"])
@pytest.mark.parametrize("inside", ["femnist", ".", "femnist/data"])
def test_femnist_keeps_pixels_and_writers(tmp_path, layout, inside):
  train, test = handwriting(0), handwriting(1)
  write_femnist(tmp_path / inside, layout, train, test)
  found = sources.load("femnist", tmp_path)
  numbers = {"f00": 0, "f01": 1, "f02": 2}
  assert_written(found[0], train, numbers)
  assert_written(found[1], test, numbers)
  assert found[0].x.shape[1:] == (28, 28, 1)
  assert [field.dtype for field in found[0]] == [np.uint8, np.int32, np.int32]
  classes = 10 if layout == "fed_emnist_digitsonly" else 62
  assert sources.read("femnist", tmp_path).num_classes == classes


def test_femnist_rounds_to_the_nearest_level(tmp_path):
  between = np.full((1, 28, 28), 3.0)
  between[0, 0, :2] = 2.6, 3.4
  written = {"f00": (between, np.array([7]))}
  write_femnist(tmp_path, "leaf", written, written)
  np.testing.assert_array_equal(sources.load("femnist", tmp_path)[0].x, np.full((1, 28, 28, 1), 3))


def test_femnist_numbers_writers_of_one_part_only(tmp_path):
  train, test = handwriting(0), handwriting(1)
  del train["f01"], test["f00"]
  write_femnist(tmp_path, "leaf", train, test)
  found = sources.load("femnist", tmp_path)
  assert set(found[0].client) == {0, 2}
  assert set(found[1].client) == {1, 2}


def test_femnist_without_files_says_which_go_where(tmp_path):
  message = refusal(sources.load, "femnist", tmp_path)
  assert message.startswith(f"dataset femnist: nothing in {tmp_path / 'femnist'}; put there ")
  assert "all_data_*.json" in message
  assert "fed_emnist_train.h5" in message


def test_femnist_with_half_the_files_names_the_other_half(tmp_path):
  write_leaf(tmp_path / "train", handwriting())
  message = refusal(sources.load, "femnist", tmp_path)
  assert message == f"{tmp_path / 'test'}: no all_data_*.json in it"
  write_hdf5(tmp_path / "femnist" / "fed_emnist_train.h5", handwriting())
  message = refusal(sources.load, "femnist", tmp_path)
  assert message.startswith(f"{tmp_path / 'femnist' / 'fed_emnist_test.h5'}: not readable as HDF5")


def change_user(**fields):
  return lambda content: content["user_data"]["f00"].update(fields)


LEAF_DAMAGES = {
  "NaN": (change_user(x=[[float("nan")] * 784] * 2), "user f00: x outside [0, 1] or NaN"),
  "too bright": (change_user(x=[[1.5] * 784] * 2), "user f00: x outside [0, 1] or NaN"),
  "too dark": (change_user(x=[[-0.1] * 784] * 2), "user f00: x outside [0, 1] or NaN"),
  "short image": (change_user(x=[[0.5] * 783] * 2), "x of shape (2, 783), not 784 pixels each"),
  "ragged": (change_user(x=[[0.5] * 784, [0.5]]), "user f00: no x of equal length and y"),
  "text": (change_user(x="white"), "user f00: no x of equal length and y, all of numbers"),
  "label missing": (change_user(y=[1]), "user f00: 2 x but y of shape (1,)"),
  "label negative": (change_user(y=[1, -1]), "y that are not whole numbers below 62"),
  "label fraction": (change_user(y=[1, 0.5]), "y that are not whole numbers below 62"),
  "label of no class": (change_user(y=[1, 2**32 + 7]), "y that are not whole numbers below 62"),
  "label null": (change_user(y=None), "2 x but y of shape ()"),
  "null": (change_user(x=None), "x of shape (), not 784 pixels each"),
  "huge": (change_user(x=[[10**400] * 784] * 2), "user f00: no x of equal length and y"),
  "user twice": (
    lambda content: content["users"].append("f00"),
    "user f00 is in all_data_0_niid_0_keep_0_train_9.json already",
  ),
  "user unhashable": (lambda content: content["users"].insert(0, []), "users that are not texts"),
  "user of half a character": (
    lambda content: content["users"].insert(0, "\ud800"),
    "users that are not texts",
  ),
  "no y": (lambda content: content["user_data"]["f00"].pop("y"), "user f00: no x of equal length"),
  "empty user": (change_user(x=[], y=[]), "user f00: no examples"),
  "user missing": (lambda content: content["user_data"].pop("f00"), "user f00 is not in user_data"),
  "no users": (lambda content: content.update(users=[]), "no users in it"),
  "other layout": (lambda content: content.pop("user_data"), "not in LEAF's layout"),
}


@pytest.mark.parametrize("damage", LEAF_DAMAGES)
def test_damaged_leaf_files_are_refused(tmp_path, damage):
  write_femnist(tmp_path, "leaf", handwriting(0), handwriting(1))
  (file,) = (tmp_path / "test").iterdir()
  change, expected = LEAF_DAMAGES[damage]
  edit(file, change)
  message = refusal(sources.load, "femnist", tmp_path)
  assert message.startswith(f"{file}: ")
  assert expected in message


def test_cut_json_is_refused(tmp_path):
  write_femnist(tmp_path, "leaf", handwriting(0), handwriting(1))
  (file,) = (tmp_path / "test").iterdir()
  os.truncate(file, file.stat().st_size // 2)
  message = refusal(sources.load, "femnist", tmp_path)
  assert message.startswith(f"{file}: damaged (")


def test_a_shard_that_lies_there_twice_is_refused(tmp_path):
  write_femnist(tmp_path, "leaf", handwriting(0), handwriting(1))
  file, *_ = sorted((tmp_path / "train").iterdir())
  again = file.with_stem(f"{file.stem} (1)")
  shutil.copy(file, again)
  message = refusal(sources.load, "femnist", tmp_path)
  assert message == f"{file}: user f02 is in {again.name} already"


def replace(name, value):
  def change(file):
    del file[f"examples/f00/{name}"]
    if value is not None:
      file[f"examples/f00/{name}"] = value

  return change


def promise_pixels(file):
  """Declares images that are nowhere stored."""
  del file["examples/f00/pixels"]
  shape = (2_000_000, 28, 28)
  file.create_dataset("examples/f00/pixels", shape, np.float32, chunks=(1000, 28, 28))


HDF5_DAMAGES = {
  "NaN": (
    replace("pixels", np.full((2, 28, 28), np.nan)),
    "user f00: pixels outside [0, 1] or NaN",
  ),
  "bytes": (replace("pixels", np.full((2, 28, 28), 255)), "user f00: pixels outside [0, 1] or NaN"),
  "small": (replace("pixels", np.zeros((2, 14, 14))), "user f00: pixels of shape (2, 14, 14)"),
  "no pixels": (replace("pixels", None), "user f00: no pixels of equal length and label"),
  "no label": (replace("label", None), "user f00: no pixels of equal length and label"),
  "one label": (replace("label", np.array([1])), "user f00: 2 pixels but label of shape (1,)"),
  "no client": (lambda file: file.move("examples", "samples"), "no clients in a group `examples`"),
  "a link": (
    lambda file: file.__setitem__("examples/e", h5py.SoftLink("/nowhere")),
    "user e: no pixels of equal length and label",
  ),
  "a number for a client": (
    lambda file: file.__setitem__("examples/e", 3.0),
    "user e: no pixels of equal length and label",
  ),
  "a group for an array": (
    lambda file: file.create_group("examples/e/pixels"),
    "user e: no pixels of equal length and label",
  ),
  "promises": (promise_pixels, "user f00: pixels of shape (2000000, 28, 28), more than the file"),
}


@pytest.mark.parametrize("damage", HDF5_DAMAGES)
def test_damaged_hdf5_files_are_refused(tmp_path, damage):
  write_femnist(tmp_path, "fed_emnist", handwriting(0), handwriting(1))
  path = tmp_path / "fed_emnist_test.h5"
  change, expected = HDF5_DAMAGES[damage]
  with h5py.File(path, "r+") as file:
    change(file)
  message = refusal(sources.load, "femnist", tmp_path)
  assert message.startswith(f"{path}: ")
  assert expected in message


def test_images_of_one_channel_and_labels_of_floats_are_read(tmp_path):
  written = handwriting()
  write_femnist(tmp_path, "fed_emnist", written, written)
  for part in ("train", "test"):
    with h5py.File(tmp_path / f"fed_emnist_{part}.h5", "r+") as file:
      for user in WRITERS:
        pixels, label = (file[f"examples/{user}/{name}"][()] for name in ("pixels", "label"))
        del file[f"examples/{user}"]
        file[f"examples/{user}/pixels"] = pixels[..., None]
        file[f"examples/{user}/label"] = label.astype(np.float64)
  assert_written(sources.load("femnist", tmp_path)[0], written, {"f00": 0, "f01": 1, "f02": 2})


def test_cut_hdf5_is_refused(tmp_path):
  write_femnist(tmp_path, "fed_emnist", handwriting(0), handwriting(1))
  path = tmp_path / "fed_emnist_train.h5"
  os.truncate(path, path.stat().st_size // 2)
  assert refusal(sources.load, "femnist", tmp_path).startswith(f"{path}: not readable as HDF5")


# Datasets, wherever they come from.


def dataset(**fields):
  x, y = images(6)
  return Dataset(x, y)._replace(**fields)


def nan_images():
  x = np.zeros((6, 28, 28, 1), np.float32)
  x[0, 0, 0, 0], x[1, 0, 0, 0] = np.nan, np.inf
  return x


BAD_FIELDS = {
  "NaN": ({"x": nan_images()}, "data.x: 2 values are NaN or infinite"),
  "doubles": (
    {"x": np.zeros((6, 28, 28, 1))},
    "data.x float64: allowed is uint8, pixels from 0 to 255, or float32",
  ),
  "rank": (
    {"x": np.zeros((6, 28, 28), np.uint8)},
    "data.x (6, 28, 28): allowed is images [M, H, W, C], at least one",
  ),
  "empty": (
    {"x": np.zeros((0, 28, 28, 1), np.uint8)},
    "data.x (0, 28, 28, 1): allowed is images [M, H, W, C], at least one",
  ),
  "ragged": ({"x": [[1], [1, 2]]}, "data.x: its entries differ in shape"),
  "labels int64": ({"y": np.zeros(6, np.int64)}, "data.y int64: allowed is int32"),
  "labels few": (
    {"y": np.zeros(5, np.int32)},
    "data.y (5,): allowed is [6], one for each image",
  ),
  "labels negative": ({"y": np.full(6, -2, np.int32)}, "data.y -2: allowed is at least 0"),
  "clients few": (
    {"client": np.zeros(5, np.int32)},
    "data.client (5,): allowed is [6], one for each image",
  ),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_fields_are_refused(case):
  fields, expected = BAD_FIELDS[case]
  assert refusal(sources.check, dataset(**fields)) == expected


def test_good_fields_pass():
  sources.check(dataset())
  sources.check(dataset(client=np.zeros(6, np.int32)))


def test_parts_must_go_together():
  small = dataset(x=np.zeros((6, 8, 8, 1), np.uint8))
  expected = "test.x (6, 8, 8, 1): allowed is images of the shape of train.x, (28, 28, 1)"
  assert refusal(sources.check_pair, dataset(), small) == expected
  owned = dataset(client=np.zeros(6, np.int32))
  assert "test.client" in refusal(sources.check_pair, owned, dataset())
  assert refusal(sources.check_pair, dataset(), dataset(y=np.zeros(6))).startswith("test.y float64")


def test_statistics_are_those_of_numpy():
  x, y = images(5000, (3, 5, 3))  # more than a block
  x[..., 2] = 9
  mean, std = sources.statistics(Dataset(x, y))
  np.testing.assert_allclose(mean, x.mean((0, 1, 2)))
  np.testing.assert_allclose(std, [*x.std((0, 1, 2))[:2], 1.0])
  assert all(type(value) is float for value in (*mean, *std))


def test_classes_are_counted_in_both_parts():
  low, high = dataset(y=np.zeros(6, np.int32)), dataset(y=np.full(6, 4, np.int32))
  assert sources.num_classes(low, high) == sources.num_classes(high, low) == 5


# Preparing.


def test_prepare_has_nothing_to_do_for_digits(capsys):
  assert prepare.main(["digits"]) == 0
  assert capsys.readouterr().out == "digits comes with scikit-learn: nothing to prepare\n"


def test_prepare_says_where_femnist_goes(capsys, tmp_path):
  assert prepare.main(["femnist", "--data-dir", str(tmp_path)]) == 2
  message = capsys.readouterr().err
  assert message.startswith("femnist: TensorFlow Datasets cannot download it; put LEAF's folders")
  assert message.endswith(f"into {tmp_path / 'femnist'}\n")


def test_prepare_refuses_unknown_names(capsys):
  assert prepare.main(["minst"]) == 2
  assert capsys.readouterr().err.endswith("; the nearest is mnist\n")


def test_prepare_needs_tensorflow(capsys, monkeypatch):
  monkeypatch.setattr(prepare, "NEEDS", ("a_tensorflow_that_nobody_has",))
  assert prepare.main(["cifar10"]) == 2
  message = capsys.readouterr().err
  assert message.startswith("a_tensorflow_that_nobody_has is not installed")
  assert message.endswith("run `make data NAME=cifar10`\n")


URLS = {"https://a.org/x": None, "https://b.org/z": None, "https://a.org/y": None}


@pytest.fixture
def tensorflow(monkeypatch):
  """A TensorFlow that notes which devices it may see."""
  from tensorflow_datasets.core.download import downloader

  fake = types.ModuleType("tensorflow")
  fake.hidden = []
  hide = lambda devices, kind: fake.hidden.append((devices, kind))
  fake.config = types.SimpleNamespace(set_visible_devices=hide)
  monkeypatch.setitem(sys.modules, "tensorflow", fake)
  monkeypatch.setattr(prepare, "NEEDS", ())
  monkeypatch.setattr(downloader, "MAX_RETRIES", downloader.MAX_RETRIES)  # as it was, afterwards
  return fake


def test_prepare_downloads_array_records(capsys, monkeypatch, tensorflow, tmp_path):
  import tensorflow_datasets as tfds

  asked = []

  def builder(name, **options):
    def download_and_prepare():
      asked.append((name, options))
      (tmp_path / name / "3.0.1").mkdir(parents=True)

    return types.SimpleNamespace(download_and_prepare=download_and_prepare, url_infos=URLS)

  reached = []
  monkeypatch.setattr(requests, "head", lambda url, timeout: reached.append(url))
  monkeypatch.setattr(tfds, "builder", builder)
  assert prepare.main(["mnist", "--data-dir", str(tmp_path)]) == 0
  assert reached == ["https://a.org/x", "https://b.org/z"]
  assert asked == [("mnist", {"data_dir": tmp_path, "file_format": "array_record"})]
  assert tensorflow.hidden == [([], "GPU")]
  assert capsys.readouterr().out == f"mnist is in {tmp_path / 'mnist' / '3.0.1'}\n"


@pytest.mark.parametrize("archives", [False, True])
def test_prepare_without_a_network_ends_in_one_line_unless_archives_are_there(
  archives, capsys, monkeypatch, tensorflow, tmp_path
):
  import tensorflow_datasets as tfds

  def away(url, timeout):
    raise requests.ConnectTimeout("no route\nto host")

  asked = []
  found = types.SimpleNamespace(download_and_prepare=lambda: asked.append(1), url_infos=URLS)
  monkeypatch.setattr(requests, "head", away)
  monkeypatch.setattr(tfds, "builder", lambda name, **options: found)
  if archives:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "x").touch()
  assert prepare.main(["cifar100", "--data-dir", str(tmp_path)]) == (0 if archives else 1)
  expected = f"cifar100: not prepared in {tmp_path}: ConnectionError: a.org cannot be reached\n"
  assert (capsys.readouterr().err, len(asked)) == (("", 1) if archives else (expected, 0))


def test_prepare_tells_a_failed_download(capsys, monkeypatch, tensorflow, tmp_path):
  import tensorflow_datasets as tfds

  def builder(name, **options):
    raise ConnectionError("no route\nto host")

  monkeypatch.setattr(tfds, "builder", builder)
  assert prepare.main(["mnist", "--data-dir", str(tmp_path)]) == 1
  expected = f"mnist: not prepared in {tmp_path}: ConnectionError: no route\n"
  assert capsys.readouterr().err == expected


# --- smaller images


def test_downsampling_averages_squares():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 6, 4, 2), dtype=np.uint8)
  small = sources.downsample(Dataset(images, np.arange(3, dtype=np.int32)), 2)
  assert small.x.shape == (3, 3, 2, 2)
  assert small.x.dtype == np.uint8
  for m, i, j, c in np.ndindex(small.x.shape):
    mean = images[m, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c].mean()
    assert abs(int(small.x[m, i, j, c]) - mean) <= 0.5


def test_downsampling_by_one_changes_nothing():
  dataset = Dataset(np.zeros((1, 3, 3, 1), np.uint8), np.zeros(1, np.int32))
  assert sources.downsample(dataset, 1) is dataset


@pytest.mark.parametrize("factor", [0, -2, 3])
def test_downsampling_by_what_does_not_divide_is_refused(factor):
  dataset = Dataset(np.zeros((1, 4, 4, 1), np.uint8), np.zeros(1, np.int32))
  with pytest.raises(BadInput, match=f"^factor {factor}"):
    sources.downsample(dataset, factor)
