"""Shows what a model's file holds: its layers, their bits and bytes, its codebooks, its checksum.

quped inspect MODEL
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from qupeD_jax import command_line
from qupeD_jax.io import files, forms, packing, shipped, tensor_file


@dataclasses.dataclass(frozen=True)
class Options:
  """Shows what a model's file holds, after its checksum was verified."""

  model: tyro.conf.Positional[Path]
  """A .safetensors, .onnx or .stablehlo file."""
  json: bool = False
  """Print one JSON object."""


class Tensor(NamedTuple):
  """One tensor of a model."""

  name: str
  shape: tuple[int, ...]
  bits: int  # of an entry
  bytes: int  # of entries and centers
  centers: np.ndarray | None  # [2^bits] float32; None for one that is not quantised


class Inspected(NamedTuple):
  """What a file holds."""

  form: str
  bytes: int  # of the file
  checksum: str
  about: shipped.About
  tensors: list[Tensor] | None  # None where they are part of a program


def inspect(path: Path) -> Inspected:
  """Reads a model's file.

  Raises:
    BadInput: the file is missing, damaged, of another form, or needs a package that is not there.
  """
  match form := forms.of(path):
    case "safetensors":
      packed, about = shipped.read(path)
      checksum = "crc32 " + tensor_file.read(path)[1]["crc32"]
      tensors = [
        _quantised(name, packed.codes[name], centers, packed.shapes[name])
        for name, centers in packed.centers.items()
      ]
      tensors += [_kept(name, tensor) for name, tensor in packed.kept.items()]
    case "onnx":
      opened = forms.needing("onnx_file").read(path)
      about, checksum = opened.about, "sha256 " + opened.digest
      tensors = [
        _kept(name, x) if isinstance(x, np.ndarray) else _quantised(name, *x)
        for name, x in opened.weights.items()
      ]
    case "stablehlo":
      opened = forms.needing("stablehlo").read(path)
      about, checksum, tensors = opened.about, "sha256 " + opened.digest, None
  return Inspected(form, path.stat().st_size, checksum, about, tensors)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""
  return command_line.run(Options, arguments, _act, prog="quped inspect")


def _act(options: Options) -> None:
  found = inspect(options.model)
  if options.json:
    print(files.dump(found))
    return
  console = Console(highlight=False)
  for line in _facts(found):
    console.print(line, markup=False, soft_wrap=True)
  if found.tensors is not None:
    console.print(_table(found.tensors))


def _facts(found: Inspected) -> list[str]:
  about = found.about
  height, width, channels = about.image_shape
  whose = [] if about.client is None else [f"client {about.client}"]
  whose += [about.dataset] if about.dataset else []
  images = f"images {height}x{width}x{channels} uint8, up to {about.white}"
  lines = [", ".join([about.model, *whose, images, f"{about.num_classes} classes"])]
  lines += [f"{found.form}, {found.bytes:,} bytes, checksum {found.checksum}: sound"]
  if found.tensors is None:
    return [*lines, "a program: its weights are constants within"]
  full = 4 * sum(int(np.prod(tensor.shape)) for tensor in found.tensors)
  return [*lines, f"{full / found.bytes:.1f} times smaller than its tensors in float32"]


def _table(tensors: Sequence[Tensor]) -> Table:
  table = Table(box=None, pad_edge=False)
  table.add_column("Tensor", overflow="fold")
  for column in ("Shape", "Bits", "Bytes"):
    table.add_column(column, justify="right")
  table.add_column("Centers", overflow="fold")
  for tensor in tensors:
    shape = "x".join(map(str, tensor.shape)) or "1"
    centers = "" if tensor.centers is None else _numbers(tensor.centers)
    table.add_row(tensor.name, shape, str(tensor.bits), f"{tensor.bytes:,}", centers)
  return table


def _numbers(centers: np.ndarray) -> str:
  """Writes the centers, of many only the outermost.

  >>> _numbers(np.float32([-0.5, 0.25])), _numbers(np.linspace(-1, 1, 16))
  ('-0.5 0.25', '-1 -0.867 -0.733 ... 0.867 1')
  """
  said = [f"{center:.3g}" for center in centers]
  return " ".join(said if len(said) <= 8 else [*said[:3], "...", *said[-2:]])


def _quantised(name: str, codes: np.ndarray, centers: np.ndarray, shape: tuple[int, ...]) -> Tensor:
  return Tensor(name, shape, packing.bits_of(centers), codes.nbytes + centers.nbytes, centers)


def _kept(name: str, tensor: np.ndarray) -> Tensor:
  return Tensor(name, tensor.shape, 8 * tensor.itemsize, tensor.nbytes, None)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
