"""Reads FEMNIST, handwritten characters by writer, in the two layouts it is distributed in.

LEAF (Caldas et al. 2018, arXiv 1812.01097) keeps JSON files in the folders train/ and test/,
TensorFlow Federated one HDF5 file for each. Pixels are floats in [0, 1] in both, 1 being the blank
page; rounded to 0..255 they take a quarter of the memory, and lose nothing: that is how the
original scans were stored.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qupeD_jax.checks import BadInput, refusal
from qupeD_jax.data import catalog

SIDE = 28
HDF5 = ("fed_emnist", "fed_emnist_digitsonly")


class _Writer(NamedTuple):
  """All that one writer wrote of one part."""

  name: str
  x: np.ndarray  # [n, 28, 28, 1] uint8
  y: np.ndarray  # [n] int32


def read(
  data_dir: str | os.PathLike | None = None,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
  """Reads the training and the test part of FEMNIST.

  Args:
    data_dir: a folder in one of the two layouts, or one with such a folder called femnist.

  Returns:
    (x [M, 28, 28, 1] uint8, y [M] int32, writer [M] int32) of the training part and of the test
    part. Writers are numbered by their sorted names, alike in both parts.

  Raises:
    BadInput: if the files are not there, or one of them is not in its layout.
  """
  train, test = (list(writers) for writers in _layout(catalog.folder(data_dir)))
  names = sorted({writer.name for writer in (*train, *test)})
  number = {name: i for i, name in enumerate(names)}
  return _join(train, number), _join(test, number)


def _layout(folder: Path) -> tuple[Iterator[_Writer], Iterator[_Writer]]:
  """Returns the writers of both parts, in whichever layout the folder has."""
  for root in (folder / "femnist", folder):
    if any(root.glob("train/all_data_*.json")):
      return _leaf(root / "train"), _leaf(root / "test")
    for stem in HDF5:
      if (root / f"{stem}_train.h5").exists():
        return _hdf5(root / f"{stem}_train.h5"), _hdf5(root / f"{stem}_test.h5")
  where = folder / "femnist"
  raise refusal("dataset", "femnist", f"nothing in {where}; put there {catalog.FEMNIST_FILES}")


def _leaf(folder: Path) -> Iterator[_Writer]:
  """Yields the writers of the JSON files of one of LEAF's folders."""
  files = sorted(folder.glob("all_data_*.json"))
  _require(bool(files), folder, "no all_data_*.json in it")
  for file in files:
    content = _json(file)
    for name in content["users"]:
      _require(name in content["user_data"], file, f"user {name} is not in user_data")
      yield _writer(file, name, content["user_data"][name], "x", "y")


def _json(file: Path) -> dict:
  """Returns the content of one of LEAF's files."""
  try:
    content = json.loads(file.read_bytes())
  except (OSError, ValueError) as error:
    raise BadInput(f"{file}: not readable as JSON ({error})") from error
  good = isinstance(content, dict) and isinstance(content.get("users"), list)
  good = good and isinstance(content.get("user_data"), dict)
  _require(good, file, "not in LEAF's layout, a dictionary with users and user_data")
  _require(bool(content["users"]), file, "no users in it")
  return content


def _hdf5(file: Path) -> Iterator[_Writer]:
  """Yields the writers of one of TensorFlow Federated's files."""
  import h5py

  try:
    with h5py.File(file, "r") as content:
      examples = content.get("examples")
      good = isinstance(examples, h5py.Group) and len(examples) > 0
      _require(good, file, "no clients in a group `examples`")
      for name in examples:
        yield _writer(file, name, examples[name], "pixels", "label")
  except OSError as error:
    raise BadInput(f"{file}: not readable as HDF5 ({error})") from error


def _writer(file: Path, name: str, content, x_key: str, y_key: str) -> _Writer:
  """Returns one writer's examples, checked and in uint8."""
  here = f"user {name}:"
  try:
    x = np.asarray(content[x_key], np.float32)
    y = np.asarray(content[y_key])
  except (KeyError, TypeError, ValueError) as error:
    problem = f"{here} no {x_key} of equal length and {y_key}, all of numbers"
    raise BadInput(f"{file}: {problem}") from error
  _require(len(x) > 0, file, f"{here} no examples")
  good_shape = x.shape[1:] in ((SIDE * SIDE,), (SIDE, SIDE))
  _require(good_shape, file, f"{here} {x_key} of shape {x.shape}, not {SIDE * SIDE} pixels each")
  _require(y.shape == (len(x),), file, f"{here} {len(x)} {x_key} but {y_key} of shape {y.shape}")
  good_labels = np.issubdtype(y.dtype, np.integer) and y.min() >= 0
  _require(good_labels, file, f"{here} {y_key} that are not whole numbers of at least 0")
  # Written so that a NaN, which compares as false, is refused too.
  good_pixels = x.min() >= 0 and x.max() <= 1
  _require(good_pixels, file, f"{here} {x_key} outside [0, 1] or NaN")
  pixels = np.rint(x * 255).astype(np.uint8)
  return _Writer(name, pixels.reshape(-1, SIDE, SIDE, 1), y.astype(np.int32))


def _join(
  writers: Iterable[_Writer], number: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Joins writers into (x [M, 28, 28, 1] uint8, y [M] int32, writer [M] int32)."""
  names, x, y = zip(*writers, strict=True)
  writer = np.repeat([number[name] for name in names], [len(labels) for labels in y])
  return np.concatenate(x), np.concatenate(y), writer.astype(np.int32)


def _require(holds: bool, path: Path, problem: str) -> None:
  """Raises BadInput naming the path, unless `holds`."""
  if not holds:
    raise BadInput(f"{path}: {problem}")
