"""A shipped model and what its file says of it: enough to rebuild the network, and checked.

Every form of a model carries the same description, JSON in the file's metadata:

  {"model": "cnn1", "client": 7, "bits": 2, "seed": 0, "input": {"dataset": "cifar10",
   "num_classes": 10, "image_shape": [32, 32, 3], "mean": [...], "std": [...],
   "white": 255, "classes": ["airplane", ...]}}
"""

import functools
import math
import numbers
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from qupeD_jax import models
from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import packing
from qupeD_jax.types import Model

Shapes = Mapping[str, tuple[int, ...]]
_LARGEST = 2**16  # height, width, channels or classes: beyond, a file lies
_FLOAT32 = float(np.finfo(np.float32).max)


class About(NamedTuple):
  """What a shipped model's file says of it."""

  model: str  # name of the network
  num_classes: int
  image_shape: tuple[int, int, int]  # H, W, C
  mean: tuple[float, ...]  # [C], of raw images
  std: tuple[float, ...]  # [C]
  dataset: str | None = None
  white: int = 255  # the largest value of a pixel
  classes: tuple[str, ...] = ()  # what each is called
  client: int | None = None
  bits: int | None = None
  metadata: Mapping[str, Any] = {}  # all of it, as it stands in the file


class Shipped(NamedTuple):
  """A packed model with its description."""

  packed: packing.Packed
  about: About


def read(path: str | os.PathLike) -> Shipped:
  """Reads a packed model from a safetensors file and checks that it is whole and fits its network.

  Args:
    path: a file that `packing.save` wrote.

  Raises:
    BadInput: the file is missing, damaged, not a packed model, or its tensors are not those of the
      network it names.
  """
  packed, metadata = packing.load(path)
  about = describe(metadata, path)
  check(packed, about, path)
  return Shipped(packed, about)


def describe(metadata: Mapping[str, Any], where: object) -> About:
  """Reads a description, every field of it checked.

  Args:
    metadata: as in a file.
    where: the file, for the error.

  Raises:
    BadInput: a field is missing, or is not what it has to be.
  """
  inputs = metadata.get("input")
  require(isinstance(inputs, Mapping), f"{where}: input", inputs, "a description of the images")
  model, dataset = metadata.get("model"), inputs.get("dataset")
  require(isinstance(model, str), f"{where}: model", model, "the name of a network")
  require(isinstance(dataset, str | None), f"{where}: dataset", dataset, "a name")
  shape = inputs.get("image_shape")
  fits = isinstance(shape, list | tuple) and len(shape) == 3 and all(map(_is_size, shape))
  require(fits, f"{where}: image_shape", shape, f"three whole numbers from 1 to {_LARGEST}")
  classes = inputs.get("num_classes")
  require(_is_size(classes), f"{where}: num_classes", classes, f"1 to {_LARGEST}")
  mean, std = (_per_channel(inputs.get(name), name, shape[-1], where) for name in ("mean", "std"))
  require(min(std) > 0, f"{where}: std", std, "above 0")
  white = inputs.get("white", 255)
  require(_is_whole(white) and 1 <= white <= 255, f"{where}: white", white, "1 to 255")
  names = inputs.get("classes", [*map(str, range(classes))])
  named = isinstance(names, list | tuple) and len(names) == classes
  named = named and all(isinstance(name, str) for name in names)
  require(named, f"{where}: classes", names, f"{classes} names")
  client, bits = metadata.get("client"), metadata.get("bits")
  require(client is None or _is_whole(client), f"{where}: client", client, "a whole number")
  allowed = bits is None or (_is_whole(bits) and bits in (*range(1, 9), 32))
  require(allowed, f"{where}: bits", bits, "1 to 8, or 32 for full precision")
  return About(
    model,
    classes,
    tuple(shape),
    mean,
    std,
    dataset,
    white,
    tuple(names),
    client,
    bits,
    dict(metadata),
  )


def network(about: About, where: object) -> Model:
  """Rebuilds the network that a description names.

  Raises:
    BadInput: it is not one of the library's, or cannot take such images.
  """
  allowed = f"{', '.join(models.NAMES)}: only these can be rebuilt from a file"
  require(about.model in models.NAMES, f"{where}: model", about.model, allowed)
  try:
    # The plain form of a convolution: here one client runs, not many side by side.
    return models.make(
      about.model,
      about.num_classes,
      about.image_shape,
      mean=about.mean,
      std=about.std,
      conv_form="lax",
    )
  except BadInput as error:
    raise BadInput(f"{where}: {error}") from error


def shapes_of(about: About, where: object) -> Shapes:
  """Returns the shape of every tensor of the described network by path, as "params/head/bias"."""
  require(about.model in models.NAMES, f"{where}: model", about.model, ", ".join(models.NAMES))
  try:
    return _shapes(about.model, about.num_classes, about.image_shape)
  except BadInput as error:
    raise BadInput(f"{where}: {error}") from error


def check(packed: packing.Packed, about: About, where: object) -> None:
  """Requires a packed model to be whole, finite, and to fit the network that it names.

  Args:
    packed: the model.
    about: its description.
    where: the file, for the error.

  Raises:
    BadInput: a tensor is missing, foreign, of another shape or type, or not finite; codes are too
      few or too many; centers are not 2^bits sorted ones.
  """
  shapes = shapes_of(about, where)
  found = {f"params/{path}": shape for path, shape in packed.shapes.items()}
  require(
    not found.keys() & packed.kept.keys(), f"{where}: quantised", [*found], "not kept as well"
  )
  found |= {path: tensor.shape for path, tensor in packed.kept.items()}
  for path in shapes:
    require(path in found, f"{where}: tensor {path}", "missing", f"what {about.model} has")
  for path, shape in found.items():
    require(path in shapes, f"{where}: tensor {path}", tuple(shape), f"what {about.model} has")
    require(tuple(shape) == shapes[path], f"{where}: shape of {path}", shape, str(shapes[path]))
  for path, centers in packed.centers.items():
    check_quantised(f"{where}: {path}", packed.codes[path], centers, packed.shapes[path])
  for path, tensor in packed.kept.items():
    check_kept(f"{where}: {path}", tensor)
    if path.endswith("/var"):
      require(
        bool((tensor >= 0).all()), f"{where}: {path}", tensor.min(), "variances of at least 0"
      )


def check_kept(where: str, tensor: np.ndarray) -> None:
  """Requires a tensor that is not quantised to be of finite float32 or float16."""
  floating = tensor.dtype in (np.float16, np.float32)
  require(floating, f"{where}: type", tensor.dtype, "float32 or float16")
  if not np.isfinite(tensor).all():
    raise BadInput(f"{where}: has entries that are not finite")


def check_quantised(
  where: str, codes: np.ndarray, centers: np.ndarray, shape: tuple[int, ...]
) -> None:
  """Requires as many codes as the shape has entries, and 2^bits sorted, finite centers."""
  sizes = [2**bits for bits in range(1, 9)]
  vector = centers.ndim == 1 and centers.dtype == np.float32 and centers.size in sizes
  require(vector, f"{where}: centers", f"{centers.dtype} {centers.shape}", "2, 4, ... 256 float32")
  tidy = np.isfinite(centers).all() and (np.diff(centers) >= 0).all()
  require(bool(tidy), f"{where}: centers", centers, "finite and sorted")
  entries, bits = math.prod(shape), packing.bits_of(centers)
  length = packing.code_bytes(shape, bits)
  fits = codes.dtype == np.uint8 and codes.shape == (length,)
  require(fits, f"{where}: codes", f"{codes.dtype} {codes.shape}", f"{length} bytes")
  used = entries * bits % 8
  if used:  # what fills the last byte up is no code
    require(not codes[-1] >> used, f"{where}: last byte of codes", codes[-1], "zeros at its end")


@functools.lru_cache
def _shapes(model: str, num_classes: int, image_shape: models.ImageShape) -> Shapes:
  network = models.make(model, num_classes, image_shape, conv_form="lax")
  variables = jax.eval_shape(network.init, jax.random.key(0))
  return {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}


def _per_channel(value: Any, name: str, channels: int, where: object) -> tuple[float, ...]:
  values = [value] * channels if isinstance(value, numbers.Real) else value
  fits = isinstance(values, list | tuple) and len(values) == channels
  fits = fits and all(_is_number(entry) for entry in values)
  require(fits, f"{where}: {name}", value, f"{channels} finite numbers")
  return tuple(map(float, np.float32(values)))


def _is_number(value: Any) -> bool:
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return real and abs(value) <= _FLOAT32


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
  return _is_whole(value) and 1 <= value <= _LARGEST
