"""Data sets by name, or of a file of one's own, as two Datasets of numpy arrays."""

import os
from typing import NamedTuple

import numpy as np

from qupeD_jax.checks import at_least, require
from qupeD_jax.data import arrayrecords, arrays, catalog, femnist
from qupeD_jax.types import Dataset


class Source(NamedTuple):
  """A data set, and how many classes it has, whether or not an example shows them all."""

  train: Dataset
  test: Dataset
  num_classes: int


def names() -> tuple[str, ...]:
  """Returns the names that `load` knows.

  >>> "cifar10" in names()
  True
  """
  return catalog.NAMES


def load(name: str, data_dir: str | os.PathLike | None = None) -> tuple[Dataset, Dataset]:
  """Loads a data set.

  Args:
    name: one of `names()`, or a file *.npz with x_train, y_train, x_test and y_test, as
      `arrays.read` takes it. "digits" comes with scikit-learn; "femnist" is read from LEAF's or
      TensorFlow Federated's files, all others from what `make data NAME=...` prepared. EMNIST's
      images lie on their side, as they were published.
    data_dir: the folder that holds the data sets; None for $TFDS_DATA_DIR or, without it,
      ~/tensorflow_datasets.

  Returns:
    The training part and the test part, in numpy arrays: x [M, H, W, C] uint8, or float32 of a file
    that holds no pixels, y [M] int32 and, for femnist and files that tell, client [M] int32, the
    writer.

  Raises:
    BadInput: if the name is unknown, or the files are missing, damaged or of another layout.

  >>> train, test = load("digits")
  >>> train.x.shape, test.x.shape
  ((1437, 8, 8, 1), (360, 8, 8, 1))
  """
  train, test, _ = read(name, data_dir)
  return train, test


def read(name: str, data_dir: str | os.PathLike | None = None) -> Source:
  """Loads a data set as `load` does, with the number of classes that it declares.

  >>> read("digits").num_classes
  10
  """
  if str(name).endswith(".npz"):
    train, test, declared = *arrays.read(name), None
  else:
    *parts, declared = _named(name, data_dir)
    train, test = (Dataset(*part) for part in parts)
  check_pair(train, test)
  return Source(train, test, declared or num_classes(train, test))


def _named(name: str, data_dir: str | os.PathLike | None) -> tuple:
  """Returns the fields of both parts of a data set by name, and its classes if declared."""
  catalog.require_known(name)
  if name == "digits":
    return *_digits(), 10
  if name == "femnist":
    return femnist.read(data_dir)
  return arrayrecords.read(name, data_dir)


def num_classes(train: Dataset, test: Dataset) -> int:
  """Returns the number of classes: one more than the largest label of either part."""
  return int(max(np.max(train.y), np.max(test.y))) + 1


def downsample(dataset: Dataset, factor: int) -> Dataset:
  """Averages images over squares of factor x factor pixels, levels rounded to whole numbers.

  Args:
    dataset: images [M, H, W, C] uint8 or float32.
    factor: at least 1, a divisor of H and W; 1 returns the data set as it is.

  Returns:
    The data set with images [M, H / factor, W / factor, C] of the same dtype.

  Raises:
    BadInput: the factor does not divide H and W.
  """
  at_least("factor", factor, 1)
  if factor == 1:
    return dataset
  m, h, w, c = dataset.x.shape
  divides = h % factor == w % factor == 0
  require(divides, "factor", factor, f"a divisor of {h} and {w}")
  squares = dataset.x.reshape(m, h // factor, factor, w // factor, factor, c)
  if dataset.x.dtype != np.uint8:
    return dataset._replace(x=squares.mean(axis=(2, 4)))
  sums = squares.sum(
    axis=(2, 4), dtype=np.uint32
  )  # exact, where a mean of floats is eight times the size
  return dataset._replace(x=((sums + factor**2 // 2) // factor**2).astype(np.uint8))


def statistics(train: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns the mean and the standard deviation of each channel, in the units of the data.

  For rows of features, [M, 1, 1, D], these are of each feature. A channel that hardly varies has a
  standard deviation of 1, so that it can be divided by it: below 1 for pixels, for floats what
  float32 cannot tell from the mean.

  >>> x = np.stack([np.arange(256), np.full(256, 7)], axis=-1).astype(np.uint8)
  >>> mean, std = statistics(Dataset(x.reshape(4, 8, 8, 2), np.zeros(4, np.int32)))
  >>> mean, round(std[0], 3), std[1]
  ((127.5, 7.0), 73.9, 1.0)
  """
  if train.x.dtype != np.uint8:
    return _float_statistics(train.x)
  levels = np.arange(256)
  weight = _histogram(train.x) / train.x[..., 0].size
  mean = weight @ levels
  variance = (weight * (levels - mean[:, None]) ** 2).sum(1)
  return tuple(mean.tolist()), tuple(np.sqrt(variance).clip(1).tolist())


def check(dataset: Dataset, name: str = "data") -> None:
  """Requires a Dataset to be what everything else takes for granted.

  Args:
    dataset: x [M, H, W, C] uint8 or finite float32, y [M] int32, client None or [M] int32; labels
      and clients are at least 0.
    name: what messages call it.

  Raises:
    BadInput: naming the first field that is otherwise.
  """
  x = arrays.as_array(dataset.x, f"{name}.x")
  known = x.dtype in (np.uint8, np.float32)
  require(known, f"{name}.x", x.dtype, "uint8, pixels from 0 to 255, or float32")
  arrays.require_finite(x, f"{name}.x")
  require(x.ndim == 4 and x.size > 0, f"{name}.x", x.shape, "images [M, H, W, C], at least one")
  _check_ids(dataset.y, f"{name}.y", len(x))
  if dataset.client is not None:
    _check_ids(dataset.client, f"{name}.client", len(x))


def check_pair(train: Dataset, test: Dataset) -> None:
  """Requires both parts of a data set to be good, and to go together.

  Raises:
    BadInput: naming the first field that is otherwise.
  """
  check(train, "train")
  check(test, "test")
  same = train.x.shape[1:] == test.x.shape[1:]
  require(train.x.dtype == test.x.dtype, "test.x", test.x.dtype, f"{train.x.dtype}, as train.x")
  require(same, "test.x", test.x.shape, f"images of the shape of train.x, {train.x.shape[1:]}")
  both = (train.client is None) == (test.client is None)
  require(both, "test.client", type(test.client).__name__, "as in train: both, or neither")


def _check_ids(ids, name: str, count: int) -> None:
  """Requires [count] int32, at least 0."""
  ids = arrays.as_array(ids, name)
  require(ids.dtype == np.int32, name, ids.dtype, "int32")
  require(ids.shape == (count,), name, ids.shape, f"[{count}], one for each image")
  require(ids.min() >= 0, name, ids.min(), "at least 0")


def _digits() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
  """Returns scikit-learn's digits, a fifth of every class as test part, always the same."""
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  images, labels = load_digits(return_X_y=True)
  x = images.reshape(-1, 8, 8, 1).astype(np.uint8)
  train_x, test_x, train_y, test_y = train_test_split(
    x, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
  )
  return (train_x, train_y), (test_x, test_y)


def _float_statistics(x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns the mean and the standard deviation of each channel of x [M, H, W, C] float32."""
  blocks = np.array_split(x, -(-len(x) // 4096))  # in float64, which all of x would double
  mean = x.mean(axis=(0, 1, 2), dtype=np.float64)
  squares = sum(((block - mean) ** 2).sum(axis=(0, 1, 2)) for block in blocks)
  std = np.sqrt(squares / x[..., 0].size)
  blank = std <= np.finfo(np.float32).eps * np.abs(mean)
  return tuple(mean.tolist()), tuple(np.where(blank, 1.0, std).tolist())


def _histogram(x: np.ndarray) -> np.ndarray:
  """Counts the levels of each channel of x [M, H, W, C] uint8: [C, 256]."""
  # By blocks, since bincount copies what it counts into 64-bit integers.
  blocks = np.array_split(x, -(-len(x) // 4096))
  return sum(
    np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(block, -1, 0)])
    for block in blocks
  )
