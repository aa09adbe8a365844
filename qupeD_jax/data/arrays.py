"""Data sets of one's own: numpy arrays, images or rows of features, and files *.npz of them."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qupeD_jax.checks import BadInput, place, refusal, require
from qupeD_jax.io import files
from qupeD_jax.types import Dataset

MOST_CLASSES = 2**16
NEEDED = ("x_train", "y_train", "x_test", "y_test")
CLIENTS = ("client_train", "client_test")  # whose the rows are, in a file that says so


def dataset(x, y, client=None, *, name: str = "data") -> Dataset:
  """Makes a Dataset of arrays as they are at hand.

  Args:
    x: images [M, H, W, C] or [M, H, W], or rows of features [M, D], which become [M, 1, 1, D].
      uint8 stays what it is, pixels from 0 to 255; whatever else are numbers becomes float32.
    y: labels [M], whole numbers from 0, of any type.
    client: [M], whole numbers from 0 or names, the natural client of each example; None where
      there is none. Two parts of a data set must number theirs alike.
    name: what messages call it.

  Returns:
    x [M, H, W, C] uint8 or float32, y [M] int32 and client [M] int32 or None, in numpy arrays.

  Raises:
    BadInput: naming the first of them that is something else.

  >>> rows = dataset([[0.5, 2.0, 1.0], [1.5, 0.0, 3.0]], [1, 0])
  >>> rows.x.shape, rows.y
  ((2, 1, 1, 3), array([1, 0], dtype=int32))
  """
  x = _examples(as_array(x, f"{name}.x"), f"{name}.x")
  y = _whole(as_array(y, f"{name}.y"), f"{name}.y", len(x), MOST_CLASSES)
  if client is not None:
    client = _whole(as_array(client, f"{name}.client"), f"{name}.client", len(x), 2**31)
  return Dataset(x, y, client)


def read(path: str | os.PathLike) -> tuple[Dataset, Dataset]:
  """Reads a file *.npz that holds x_train, y_train, x_test and y_test, as `dataset` takes them.

  With client_train and client_test, numbers or names, it says whose the rows are.

  Returns:
    The training part and the test part.

  Raises:
    BadInput: the file cannot be read, lacks one of the arrays, or one is something else.
  """
  path = place("dataset", path)
  arrays = _load(path)
  for name in NEEDED:
    if name not in arrays:
      found = ", ".join(sorted(arrays)) or "nothing"
      raise BadInput(f"{path}: has no {name}; needed are {', '.join(NEEDED)}, in it are {found}")
  owners = _numbered(path, arrays)
  return tuple(
    dataset(arrays[f"x_{part}"], arrays[f"y_{part}"], owner, name=f"{path}: {part}")
    for part, owner in zip(("train", "test"), owners, strict=True)
  )


def as_array(value, name: str) -> np.ndarray:
  """Returns a field as an array, which ragged lists are not."""
  try:
    return np.asarray(value)
  except ValueError as error:
    raise BadInput(f"{name}: its entries differ in shape") from error


def require_finite(x: np.ndarray, name: str) -> None:
  """Requires numbers without NaN and infinities."""
  if not np.isfinite(x).all():
    raise BadInput(f"{name}: {(~np.isfinite(x)).sum()} values are NaN or infinite")


def _examples(x: np.ndarray, name: str) -> np.ndarray:
  """Returns [M, H, W, C] uint8 or float32, in C order."""
  require(x.dtype.kind in "buif", name, x.dtype, "numbers")
  allowed = "images [M, H, W, C] or [M, H, W], or rows [M, D], at least one"
  require(x.ndim in (2, 3, 4) and x.size > 0, name, x.shape, allowed)
  if x.dtype != np.uint8:
    with np.errstate(over="ignore"):
      x = x.astype(np.float32, copy=False)
    require_finite(x, name)
  axes = {2: (1, 2), 3: (3,), 4: ()}[x.ndim]
  return np.ascontiguousarray(np.expand_dims(x, axes))


def _whole(values: np.ndarray, name: str, count: int, bound: int) -> np.ndarray:
  """Returns [count] int32 of whole numbers from 0 and below a bound, whatever they came as."""
  names = "whole numbers; np.unique(..., return_inverse=True) makes them of names"
  require(values.dtype.kind in "buif", name, values.dtype, names)
  values = values[:, 0] if values.shape == (count, 1) else values
  require(values.shape == (count,), name, values.shape, f"[{count}], one for each example")
  # Before they are narrowed, which would make small numbers of large ones. A NaN is not whole.
  good = (values >= 0) & (values < bound) & (values == np.rint(values))
  require(good.all(), name, values[~good][:1], f"whole numbers from 0 and below {bound}")
  return values.astype(np.int32)


def _load(path: Path) -> dict[str, np.ndarray]:
  with files.on_disk(path):
    path.stat()
  try:
    with np.load(path, allow_pickle=False) as stored:
      return {name: stored[name] for name in stored.files if name in (*NEEDED, *CLIENTS)}
  except Exception as error:  # parsers of zip and npy, each with errors of its own
    reason = " ".join(str(error).split()) or type(error).__name__
    raise BadInput(f"{path}: not a file of arrays, as np.savez writes it ({reason})") from error


def _numbered(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple:
  """Numbers the clients of both parts by their sorted names, alike."""
  if not any(name in arrays for name in CLIENTS):
    return None, None
  for name, rows in zip(CLIENTS, ("y_train", "y_test"), strict=True):
    if name not in arrays:
      raise refusal(f"{path}: {name}", "missing", f"needed are both of {', '.join(CLIENTS)}")
    allowed = f"[{len(arrays[rows])}], one for each example"
    require(arrays[name].ndim == 1, f"{path}: {name}", arrays[name].shape, allowed)
  train, test = (arrays[name] for name in CLIENTS)
  _, number = np.unique(np.concatenate([train, test]), return_inverse=True)
  return number[: len(train)], number[len(train) :]
