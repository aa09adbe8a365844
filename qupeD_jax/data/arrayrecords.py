"""Reads image data sets that TensorFlow Datasets prepared as array_record files.

Preparing needs TensorFlow (see prepare.py), reading does not: TFDS itself reads only the folder's
metadata here, and never imports TensorFlow for that. The records are then read shard by shard
rather than through `tfds.data_source`: that takes half the time, and a shard that was cut short
or does not hold what the metadata promises is found before its first record is used.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from qupeD_jax.checks import BadInput, refusal
from qupeD_jax.data import catalog

PARTS = ("train", "test")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # how PIL calls an image of so many 8-bit channels


class _Prepared(NamedTuple):
  """What the metadata of a prepared data set says."""

  shape: tuple[int, int, int]  # H, W, C
  shards: dict[str, list[tuple[Path, int]]]  # part -> files and their numbers of records


def read(
  name: str, data_dir: str | os.PathLike | None = None
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
  """Reads the training and the test part of a prepared data set.

  Args:
    name: one of catalog.TFDS.
    data_dir: the folder that holds the data sets; None for the one that TFDS uses.

  Returns:
    (x [M, H, W, C] uint8, y [M] int32) of the training part and of the test part.

  Raises:
    BadInput: if the data set is not there, or is damaged, or is something else.
  """
  folder = catalog.newest(name, data_dir)
  if folder is None:
    where = catalog.folder(data_dir)
    make = catalog.make_command(name, data_dir)
    raise refusal("dataset", name, f"not prepared in {where}; run {make}")
  try:
    prepared = _metadata(folder, name)
    return tuple(_read_part(prepared.shards[part], prepared.shape) for part in PARTS)
  except _Unusable as error:
    # TFDS takes any folder it finds for a finished one, hence the deletion.
    remedy = f"delete {folder} and run {catalog.make_command(name, data_dir)}"
    raise BadInput(f"{error}; {remedy}") from error


class _Unusable(Exception):
  """What is wrong with which file, in one line."""


def _metadata(folder: Path, name: str) -> _Prepared:
  """Returns the image shape and the shards, once the metadata is known to be usable."""
  # TFDS takes most of a second to import, which those who use other sources need not wait for.
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
    features, splits = dict(builder.info.features), builder.info.splits
  except Exception as error:  # parsers of several libraries, each with errors of its own
    raise _Unusable(f"{folder}: no readable dataset_info.json and features.json") from error
  config = getattr(builder.builder_config, "name", None)
  found = f"{builder.name}/{config}" if config else builder.name
  _require(found == name, folder, f"holds {found}, not {name}")
  stored = builder.info.file_format.file_suffix
  _require(stored == "array_record", folder, f"holds {stored} files, not array_record")
  for part in PARTS:
    _require(part in splits, folder, f"has no {part} split")
  shards = {part: _shards(splits[part], folder) for part in PARTS}
  return _Prepared(_image_shape(features, folder), shards)


def _image_shape(features: dict, folder: Path) -> tuple[int, int, int]:
  """Returns [H, W, C] of the feature `image`, once there is one, and a whole-number `label`."""
  shapes = {key: tuple(getattr(feature, "shape", ())) for key, feature in features.items()}
  dtypes = {key: str(getattr(feature, "np_dtype", "")) for key, feature in features.items()}
  shape = shapes.get("image", ())
  good_image = len(shape) == 3 and all(shape) and shape[2] in _MODES and dtypes["image"] == "uint8"
  _require(good_image, folder, "has no feature `image` of a fixed shape [H, W, C] in uint8")
  good_label = shapes.get("label") == () and "int" in dtypes["label"]
  _require(good_label, folder, "has no feature `label` that is one whole number")
  return shape


def _shards(split, folder: Path) -> list[tuple[Path, int]]:
  """Returns the files of a split, each with the number of records it should have."""
  _require(split.num_examples > 0, folder, f"its {split.name} split is empty")
  return [(Path(path), n) for path, n in zip(split.filepaths, split.shard_lengths, strict=True)]


def _read_part(shards: list[tuple[Path, int]], shape: tuple) -> tuple[np.ndarray, np.ndarray]:
  """Reads one part: (x [M, H, W, C] uint8, y [M] int32)."""
  images, labels = zip(*(_read_shard(path, count, shape) for path, count in shards), strict=True)
  return np.concatenate(images), np.concatenate(labels)


def _read_shard(path: Path, count: int, shape: tuple) -> tuple[np.ndarray, np.ndarray]:
  """Reads one file: (x [count, H, W, C] uint8, y [count] int32)."""
  images, labels = _parse(_records(path, count), path)
  try:
    pixels = b"".join(_decode(image, shape) for image in images)
    y = np.array(labels, np.int32)
  except (OSError, SyntaxError, ValueError, OverflowError) as error:
    raise _Unusable(f"{path}: {_line(error)}") from error
  return np.frombuffer(pixels, np.uint8).reshape(count, *shape), y


def _records(path: Path, count: int) -> list[bytes]:
  """Returns the records of an array_record file."""
  from array_record.python.array_record_module import ArrayRecordReader

  _require(path.is_file(), path, "missing")
  try:
    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
  except RuntimeError as error:
    raise _Unusable(f"{path}: damaged or cut short ({_line(error)})") from error
  # A file cut to a whole number of its 64 KiB blocks can open without an error, and empty.
  _require(len(records) == count, path, f"holds {len(records)} records instead of {count}")
  return records


def _parse(records: Iterable[bytes], path: Path) -> tuple[list[bytes], list[int]]:
  """Returns the encoded images and the labels of serialised examples."""
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_pb2

  images, labels = [], []
  try:
    for record in records:
      feature = tf_example_pb2.Example.FromString(record).features.feature
      images.append(feature["image"].bytes_list.value[0])
      labels.append(feature["label"].int64_list.value[0])
  except (DecodeError, IndexError) as error:
    raise _Unusable(f"{path}: record {len(labels)} is no image with a label") from error
  return images, labels


def _decode(encoded: bytes, shape: tuple) -> bytes:
  """Returns the pixels of an encoded image, row by row, [H, W, C] uint8."""
  height, width, channels = shape
  with Image.open(io.BytesIO(encoded)) as image:
    if image.size != (width, height) or image.mode != _MODES[channels]:
      found = (image.height, image.width, len(image.getbands()))
      raise ValueError(f"an image of shape {found} and mode {image.mode} instead of {shape}")
    return image.tobytes()


def _require(holds: bool, path: Path, problem: str) -> None:
  """Raises _Unusable naming the path, unless `holds`."""
  if not holds:
    raise _Unusable(f"{path}: {problem}")


def _line(error: Exception) -> str:
  """Returns the first line of an error's message."""
  return (str(error).splitlines() or [type(error).__name__])[0]
