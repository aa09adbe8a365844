"""Reads image data sets that TensorFlow Datasets prepared as array_record files.

Preparing needs TensorFlow (see prepare.py), reading does not, nor does it import what the metadata
name, as TFDS would: an image and a label are all that is looked for in them. The records are read
shard by shard rather than through `tfds.data_source`: that takes half the time, and a shard that
was cut short or does not hold what the metadata promise is found before its first record is used.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qupeD_jax.checks import BadInput, refusal
from qupeD_jax.data import catalog
from qupeD_jax.io import files

PARTS = ("train", "test")
FORMAT = "array_record"
MOST_CLASSES = 2**16  # where the metadata do not say how many there are
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # how PIL calls an image of so many 8-bit channels
_NAMES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # of the files of a split

Part = tuple[np.ndarray, np.ndarray]


class _Prepared(NamedTuple):
  """What the metadata of a prepared data set says."""

  shape: tuple[int, int, int]  # H, W, C
  num_classes: int | None  # None where it is not declared
  shards: dict[str, list[tuple[Path, int]]]  # part -> files and their numbers of records


def read(name: str, data_dir: str | os.PathLike | None = None) -> tuple[Part, Part, int | None]:
  """Reads the training and the test part of a prepared data set.

  Args:
    name: one of catalog.TFDS.
    data_dir: the folder that holds the data sets; None for the one that TFDS uses.

  Returns:
    (x [M, H, W, C] uint8, y [M] int32) of the training part and of the test part, and the number
    of classes if the data set declares it.

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
    return *(_read_part(prepared, part) for part in PARTS), prepared.num_classes
  except _Unusable as error:
    # TFDS takes any folder it finds for a finished one, hence the deletion.
    remedy = f"delete {folder} and run {catalog.make_command(name, data_dir)}"
    raise BadInput(f"{error}; {remedy}") from error


class _Unusable(Exception):
  """What is wrong with which file, in one line."""


def _metadata(folder: Path, name: str) -> _Prepared:
  """Returns the image shape and the shards, once the metadata is known to be usable."""
  try:
    info = files.read(folder / "dataset_info.json")
    features = files.read(folder / "features.json")
  except BadInput as error:
    raise _Unusable(str(error)) from error
  found = _short("/".join(str(info[key]) for key in ("name", "configName") if info.get(key)))
  _require(found == name, folder, f"holds {found}, not {name}")
  stored = _short(info.get("fileFormat", "tfrecord"))
  if stored != FORMAT:
    elsewhere = catalog.make_command(name, "OTHER_FOLDER")
    raise BadInput(f"{folder}: holds {stored} files, and {FORMAT} is read; run {elsewhere}")
  try:
    found = features["featuresDict"]["features"]
    splits = {split["name"]: split for split in info["splits"]}
    shards = {part: _shards(splits, part, folder, name) for part in PARTS}
    return _Prepared(_image_shape(found, folder), _num_classes(found, folder), shards)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    problem = "no layout that is known in dataset_info.json and features.json"
    raise _Unusable(f"{folder}: {problem}") from error


def _image_shape(features: dict[str, Any], folder: Path) -> tuple[int, int, int]:
  """Returns [H, W, C] of the feature `image`, once there is one."""
  image = features.get("image", {}).get("image", {})
  shape = tuple(int(size) for size in image.get("shape", {}).get("dimensions", ()))
  good = len(shape) == 3 and min(shape) > 0 and shape[2] in _MODES
  good = good and image.get("dtype", "uint8") == "uint8"
  _require(good, folder, "has no feature `image` of a fixed shape [H, W, C] in uint8")
  return shape


def _num_classes(features: dict[str, Any], folder: Path) -> int | None:
  """Returns the classes of the feature `label`, None where it is any whole number."""
  label = features.get("label", {})
  number = label.get("tensor", {})
  good = "classLabel" in label or (not number.get("shape") and "int" in number.get("dtype", ""))
  _require(good, folder, "has no feature `label` that is one whole number")
  declared = int(label.get("classLabel", {}).get("numClasses", 0))
  _require(0 <= declared <= MOST_CLASSES, folder, f"declares {declared} classes")
  return declared or None


def _shards(splits: dict[str, Any], part: str, folder: Path, name: str) -> list[tuple[Path, int]]:
  """Returns the files of a split, each with the number of records it should have."""
  _require(part in splits, folder, f"has no {part} split")
  split = splits[part]
  counts = [int(count) for count in split.get("shardLengths", ())]
  _require(sum(counts) > 0 and min(counts) >= 0, folder, f"its {part} split is empty")
  names = split.get("filepathTemplate", _NAMES)
  _require(names == _NAMES, folder, f"names its files {_short(names)}, not {_NAMES}")
  stem = f"{name.partition('/')[0]}-{part}.{FORMAT}"
  return [(folder / f"{stem}-{i:05}-of-{len(counts):05}", n) for i, n in enumerate(counts)]


def _read_part(prepared: _Prepared, part: str) -> Part:
  """Reads one part: (x [M, H, W, C] uint8, y [M] int32)."""
  shards = [_read_shard(prepared, path, count) for path, count in prepared.shards[part]]
  images, labels = zip(*shards, strict=True)
  return np.concatenate(images), np.concatenate(labels)


def _read_shard(prepared: _Prepared, path: Path, count: int) -> Part:
  """Reads one file: (x [count, H, W, C] uint8, y [count] int32)."""
  images, labels = _parse(_records(path, count), path)
  classes = prepared.num_classes or MOST_CLASSES
  wrong = [label for label in labels if not 0 <= label < classes]
  _require(not wrong, path, f"a label {wrong[:1]}, where there are {classes} classes")
  try:
    pixels = b"".join(_decode(image, prepared.shape) for image in images)
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise _Unusable(f"{path}: {_line(error)}") from error
  x = np.frombuffer(pixels, np.uint8).reshape(count, *prepared.shape)
  return x, np.array(labels, np.int32)


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
  """Returns the pixels of a PNG, row by row, [H, W, C] uint8."""
  height, width, channels = shape
  with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
    if image.size != (width, height) or image.mode != _MODES[channels]:
      found = (image.height, image.width, len(image.getbands()))
      raise ValueError(f"an image of shape {found} and mode {image.mode} instead of {shape}")
    return image.tobytes()


def _require(holds: bool, path: Path, problem: str) -> None:
  """Raises _Unusable naming the path, unless `holds`."""
  if not holds:
    raise _Unusable(f"{path}: {problem}")


def _short(value: Any) -> str:
  """Writes what a file says in a part of a line."""
  return " ".join(str(value).split())[:60]


def _line(error: Exception) -> str:
  """Returns the first line of an error's message."""
  return (str(error).splitlines() or [type(error).__name__])[0]
