"""Images from files, as a network takes them."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import files
from qupeD_jax.io.shipped import About

PICTURES, ARRAYS = (".png", ".jpg", ".jpeg"), (".npy",)
SUFFIXES = (*PICTURES, *ARRAYS)
_MODES = {1: "L", 3: "RGB"}  # by channels
_SAME_COLOURS = {"L": "L", "1": "L", "RGB": "RGB", "P": "RGB"}  # what each mode turns into


class Named(NamedTuple):
  """One image."""

  name: str  # the file, and the place in it if it holds several
  pixels: np.ndarray  # [H, W, C] uint8


def find(paths: Sequence[Path]) -> list[Path]:
  """Lists image files: those named, and those that lie in the folders named, sorted.

  Raises:
    BadInput: a path is not there or no image, or a folder holds none.
  """
  found = []
  for path in paths:
    inside = [path]
    if path.is_dir():
      with files.on_disk(path):
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
      require(bool(inside), f"{path}: images", "none", ", ".join(SUFFIXES))
    found += inside
  for path in found:
    require(path.suffix.lower() in SUFFIXES, "image", path, ", ".join(SUFFIXES))
    if not path.exists():
      raise BadInput(f"{path}: no such image")
  return found


def read(path: Path, about: About) -> Iterator[Named]:
  """Reads the images of a file.

  Args:
    path: a PNG or JPEG, whose white becomes `about.white`; or an array [H, W, C], [N, H, W, C], or
      either without C where that is 1, uint8, taken as it is.
    about: of the model that they are for.

  Raises:
    BadInput: the file is damaged, or its images are not of the model's shape.
  """
  if path.suffix.lower() in ARRAYS:
    return _from_array(path, about)
  return iter([Named(str(path), _from_picture(path, about))])


def write(path: Path, pixels: np.ndarray, white: int) -> None:
  """Writes an image as PNG, from which `read` gets the same pixels back.

  Args:
    path: the file; its folder has to be there.
    pixels: [H, W, C] uint8, C of 1 or 3, at most `white`.
    white: the value of white.

  Raises:
    BadInput: the file cannot be written.
  """
  shown = np.rint(pixels * (255 / white)).astype(np.uint8)
  with files.whole(path) as file:
    Image.fromarray(shown.squeeze(-1) if shown.shape[-1] == 1 else shown).save(file, format="PNG")


def _from_picture(path: Path, about: About) -> np.ndarray:
  height, width, channels = about.image_shape
  require(channels in _MODES, f"{path}: model's channels", channels, "1 or 3, or .npy files")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # an image too large is refused below, undecoded
      image = Image.open(path)
      found = f"{image.height}x{image.width} {image.mode}"
      fits = image.size == (width, height) and _SAME_COLOURS.get(image.mode) == _MODES[channels]
      require(fits, f"{path}: image", found, f"{height}x{width} {_MODES[channels]}")
      pixels = np.asarray(image.convert(_MODES[channels])).reshape(about.image_shape)
  except BadInput:
    raise
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise BadInput(f"{path}: cannot be read as an image") from error
  return np.rint(pixels * (about.white / 255)).astype(np.uint8)


def _from_array(path: Path, about: About) -> Iterator[Named]:
  try:
    array = np.load(path, allow_pickle=False)
  except (OSError, EOFError, SyntaxError, ValueError) as error:
    raise BadInput(f"{path}: cannot be read as an array") from error
  require(isinstance(array, np.ndarray), f"{path}: kind", type(array).__name__, "one array")
  require(array.dtype == np.uint8, f"{path}: type", array.dtype, "uint8")
  shape = about.image_shape
  if shape[-1] == 1 and (array.shape == shape[:2] or array.shape[1:] == shape[:2]):
    array = array[..., None]
  single = array.shape == shape
  fits = single or array.shape[1:] == shape
  require(fits, f"{path}: shape", array.shape, f"{shape}, or (N, ...) of several")
  if single:
    return iter([Named(str(path), array)])
  return (Named(f"{path}[{i}]", pixels) for i, pixels in enumerate(array))
