"""Predicts the classes of images with a personal model of any form.

  quped predict MODEL IMAGE...

MODEL is a .safetensors, .onnx or .stablehlo file, IMAGE a PNG, JPEG or .npy file or a folder of
such. The model's checksum is verified first.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from qupeD_jax import command_line
from qupeD_jax.checks import at_least, require
from qupeD_jax.io import files, forms, images, packing, shipped

_AT_ONCE = 64  # images


@dataclasses.dataclass(frozen=True)
class Options:
  """Predicts the classes of images with a personal model."""

  model: tyro.conf.Positional[Path]
  """A .safetensors, .onnx or .stablehlo file."""
  images: tyro.conf.Positional[tuple[Path, ...]]
  """PNG, JPEG or .npy files, or folders of such."""
  top: int = 3
  """How many classes to print for each image."""
  json: bool = False
  """Print one JSON object a line, with all probabilities."""


class Model(NamedTuple):
  """A model that was opened, ready to predict."""

  about: shipped.About
  logits: Callable[[np.ndarray], np.ndarray]  # [N, H, W, C] uint8 -> [N, classes] float32


class Prediction(NamedTuple):
  """What a model says of one image."""

  image: str
  probabilities: np.ndarray  # [classes] float64


def open_model(path: Path) -> Model:
  """Opens a model of any form that can predict here.

  Raises:
    BadInput: the file is missing, damaged, of another form, or needs a package that is not there.
  """
  match forms.of(path):
    case "safetensors":
      packed, about = shipped.read(path)
      return Model(about, _by_jax(packed, about, path))
    case "onnx":
      onnx_file = forms.needing("onnx_file")
      opened = onnx_file.read(path)
      return Model(opened.about, onnx_file.predictor(opened))
    case "stablehlo":
      stablehlo = forms.needing("stablehlo")
      opened = stablehlo.read(path)
      return Model(opened.about, stablehlo.predictor(opened))


def predict(model: Model, found: Iterator[images.Named]) -> Iterator[Prediction]:
  """Yields a prediction for every image, computed a few dozen at a time."""
  while batch := list(itertools.islice(found, _AT_ONCE)):
    logits = model.logits(np.stack([image.pixels for image in batch])).astype(np.float64)
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = odds / odds.sum(axis=-1, keepdims=True)
    yield from (
      Prediction(image.name, row) for image, row in zip(batch, probabilities, strict=True)
    )


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""
  return command_line.run(Options, arguments, _act, prog="quped predict")


def _act(options: Options) -> None:
  require(bool(options.images), "IMAGE", "none", "one or more images, or folders of images")
  at_least("top", options.top, 1)
  model = open_model(options.model)
  paths = images.find(options.images)
  bar = track(
    paths,
    description="predicting",
    console=Console(stderr=True),
    transient=True,
    disable=len(paths) == 1 or not sys.stderr.isatty(),
  )
  found = itertools.chain.from_iterable(images.read(path, model.about) for path in bar)
  names = model.about.classes
  for prediction in predict(model, found):
    print(_as_json(prediction, names) if options.json else _as_text(prediction, names, options.top))


def _as_text(prediction: Prediction, names: Sequence[str], top: int) -> str:
  """Writes a prediction in one line.

  >>> _as_text(Prediction("a.png", np.array([0.25, 0.75])), ("cat", "dog"), 3)
  'a.png: dog 75.0 %, cat 25.0 %'
  """
  likely = np.argsort(-prediction.probabilities, kind="stable")[:top]
  said = [f"{names[c]} {100 * prediction.probabilities[c]:.1f} %" for c in likely]
  return f"{prediction.image}: {', '.join(said)}"


def _as_json(prediction: Prediction, names: Sequence[str]) -> str:
  best = int(prediction.probabilities.argmax())
  return files.dump(
    {
      "image": prediction.image,
      "class": best,
      "name": names[best],
      "probabilities": prediction.probabilities,
    }
  )


def _by_jax(
  packed: packing.Packed, about: shipped.About, where: Path
) -> Callable[[np.ndarray], np.ndarray]:
  network, variables = shipped.network(about, where), packing.unpack(packed)
  apply = jax.jit(lambda variables, x: network.apply(variables, x, False)[0])
  return lambda x: np.asarray(apply(variables, x))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
