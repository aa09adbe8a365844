"""Reads FEMNIST, handwritten characters by writer, in the two layouts it is distributed in.

LEAF (Caldas et al. 2018, arXiv 1812.01097) keeps JSON files in the folders train/ and test/,
TensorFlow Federated one HDF5 file for each. Pixels are floats in [0, 1] in both, 1 being the blank
page; rounded to 0..255 they take a quarter of the memory, and lose nothing: that is how the
original scans were stored.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qupeD_jax.checks import BadInput, refusal
from qupeD_jax.data import catalog
from qupeD_jax.io import files

SIDE = 28
CLASSES = 62
HDF5 = {"fed_emnist": CLASSES, "fed_emnist_digitsonly": 10}  # stem of the files -> classes
# Stored images may be packed, blank paper well; what a file promises beyond this is not in it.
PACKED = 100

Part = tuple[np.ndarray, np.ndarray, np.ndarray]


class _Writer(NamedTuple):
  """All that one writer wrote of one part."""

  name: str
  x: np.ndarray  # [n, 28, 28, 1] uint8
  y: np.ndarray  # [n] int32


def read(data_dir: str | os.PathLike | None = None) -> tuple[Part, Part, int]:
  """Reads the training and the test part of FEMNIST.

  Args:
    data_dir: a folder in one of the two layouts, or one with such a folder called femnist, or
      LEAF's own with its femnist/data.

  Returns:
    (x [M, 28, 28, 1] uint8, y [M] int32, writer [M] int32) of the training part and of the test
    part, and the number of classes. Writers are numbered by their sorted names, alike in both
    parts.

  Raises:
    BadInput: if the files are not there, or one of them is not in its layout.
  """
  *parts, num_classes = _layout(catalog.folder(data_dir))
  train, test = (list(writers) for writers in parts)
  names = sorted({writer.name for writer in (*train, *test)})
  number = {name: i for i, name in enumerate(names)}
  return _join(train, number), _join(test, number), num_classes


def _layout(folder: Path) -> tuple[Iterator[_Writer], Iterator[_Writer], int]:
  """Returns the writers of both parts and the classes, in whichever layout the folder has."""
  for root in (folder / "femnist" / "data", folder / "femnist", folder / "data", folder):
    if any(root.glob("train/all_data_*.json")):
      return _leaf(root / "train"), _leaf(root / "test"), CLASSES
    for stem, classes in HDF5.items():
      if (root / f"{stem}_train.h5").exists():
        parts = (_hdf5(root / f"{stem}_{part}.h5", classes) for part in ("train", "test"))
        return *parts, classes
  where = folder / "femnist"
  raise refusal("dataset", "femnist", f"nothing in {where}; put there {catalog.FEMNIST_FILES}")


def _leaf(folder: Path) -> Iterator[_Writer]:
  """Yields the writers of the JSON files of one of LEAF's folders."""
  paths = sorted(folder.glob("all_data_*.json"))
  _require(bool(paths), folder, "no all_data_*.json in it")
  seen: dict[str, Path] = {}
  for path in paths:
    content = _json(path)
    for name in content["users"]:
      good = isinstance(name, str) and name.isprintable()
      _require(good, path, "users that are not texts")
      _require(name not in seen, path, f"user {name} is in {seen.get(name, path).name} already")
      _require(name in content["user_data"], path, f"user {name} is not in user_data")
      seen[name] = path
      yield _writer(path, name, content["user_data"][name], ("x", "y"), CLASSES)


def _json(path: Path) -> dict:
  """Returns the content of one of LEAF's files."""
  with files.on_disk(path):
    content = path.read_bytes()
  content = files.decode(content, path)
  good = isinstance(content, dict) and isinstance(content.get("users"), list)
  good = good and isinstance(content.get("user_data"), dict)
  _require(good, path, "not in LEAF's layout, a dictionary with users and user_data")
  _require(bool(content["users"]), path, "no users in it")
  return content


def _hdf5(path: Path, num_classes: int) -> Iterator[_Writer]:
  """Yields the writers of one of TensorFlow Federated's files."""
  import h5py

  keys = "pixels", "label"
  try:
    with h5py.File(path, "r") as content:
      examples = content.get("examples")
      good = isinstance(examples, h5py.Group) and len(examples) > 0
      _require(good, path, "no clients in a group `examples`")
      for name in examples:
        yield _writer(path, name, _stored(path, name, examples.get(name), keys), keys, num_classes)
  except (OSError, RuntimeError) as error:
    raise BadInput(f"{path}: not readable as HDF5 ({' '.join(str(error).split())})") from error


def _stored(path: Path, name: str, group: Any, keys: tuple[str, str]) -> dict[str, np.ndarray]:
  """Reads a writer's arrays, once the file is known to have room for what it promises."""
  import h5py

  held = {key: group.get(key) for key in keys} if isinstance(group, h5py.Group) else {}
  for key, array in held.items():
    if isinstance(array, h5py.Dataset):
      fits = array.nbytes <= PACKED * path.stat().st_size
      _require(fits, path, f"user {name}: {key} of shape {array.shape}, more than the file holds")
  return {key: array[()] for key, array in held.items() if isinstance(array, h5py.Dataset)}


def _writer(
  path: Path, name: str, content: Mapping, keys: tuple[str, str], num_classes: int
) -> _Writer:
  """Returns one writer's examples, checked and in uint8."""
  here, (x_key, y_key) = f"user {name}:", keys
  try:
    with np.errstate(over="ignore"):  # beyond float32 is an infinity, and refused below
      x = np.asarray(content[x_key], np.float32)
    y = np.asarray(content[y_key])
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    problem = f"{here} no {x_key} of equal length and {y_key}, all of numbers"
    raise BadInput(f"{path}: {problem}") from error
  _require(x.size > 0, path, f"{here} no examples")
  good_shape = x.shape[1:] in ((SIDE * SIDE,), (SIDE, SIDE), (SIDE, SIDE, 1))
  _require(good_shape, path, f"{here} {x_key} of shape {x.shape}, not {SIDE * SIDE} pixels each")
  _require(y.shape == (len(x),), path, f"{here} {len(x)} {x_key} but {y_key} of shape {y.shape}")
  good_labels = y.dtype.kind in "iuf" and np.all((y >= 0) & (y < num_classes) & (y == np.rint(y)))
  _require(good_labels, path, f"{here} {y_key} that are not whole numbers below {num_classes}")
  # Written so that a NaN, which compares as false, is refused too.
  good_pixels = x.min() >= 0 and x.max() <= 1
  _require(good_pixels, path, f"{here} {x_key} outside [0, 1] or NaN")
  pixels = np.rint(x * 255).astype(np.uint8)
  return _Writer(name, pixels.reshape(-1, SIDE, SIDE, 1), y.astype(np.int32))


def _join(writers: Iterable[_Writer], number: dict[str, int]) -> Part:
  """Joins writers into (x [M, 28, 28, 1] uint8, y [M] int32, writer [M] int32)."""
  names, x, y = zip(*writers, strict=True)
  writer = np.repeat([number[name] for name in names], [len(labels) for labels in y])
  return np.concatenate(x), np.concatenate(y), writer.astype(np.int32)


def _require(holds: bool, path: Path, problem: str) -> None:
  """Raises BadInput naming the path, unless `holds`."""
  if not holds:
    raise BadInput(f"{path}: {problem}")
