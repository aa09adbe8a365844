"""Writes one client's personal model for another runtime, from a results folder or a model's file.

quped export results/NAME --client 7 --to onnx
quped export client_0007.safetensors --to web
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from qupeD_jax import command_line
from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import files, forms, packing, shipped, web

Form = Literal["safetensors", "onnx", "coreml", "stablehlo", "web"]


@dataclasses.dataclass(frozen=True)
class Options:
  """Writes one client's personal model for another runtime."""

  source: tyro.conf.Positional[Path]
  """A results folder, or a model's .safetensors file."""
  to: Form
  """The form to write."""
  client: int | None = None
  """The client, where SOURCE is a results folder."""
  method: str | None = None
  """The method whose model it is; without it the one with the smallest model."""
  out: Path | None = None
  """What to write; by default beside the model's own file, under its name."""
  kept: Literal["float32", "float16"] = "float32"
  """The type of what is not quantised."""


def write(model: shipped.Shipped, to: Form, out: Path) -> None:
  """Writes a model in one of the forms, all of it or nothing.

  Args:
    model: the packed model and its description.
    to: the form.
    out: the file; for Core ML and the web a folder.

  Raises:
    BadInput: the network is not one of the library's, a package is missing, or nothing can be
      written.
  """
  match to:
    case "safetensors":
      packing.save(out, model.packed, model.about.metadata)
    case "onnx":
      _save(out, forms.needing("onnx_file").write(model))
    case "stablehlo":
      _save(out, forms.needing("stablehlo").write(model))
    case "coreml":
      forms.needing("coreml").save(out, model)
    case "web":
      web.save(out, model)


def find(folder: Path, client: int, method: str | None = None) -> Path:
  """Finds a client's model in a results folder.

  Args:
    folder: the results.
    client: its id.
    method: its folder under models/, or the method's name; None for the smallest model there is.

  Raises:
    BadInput: there is none.
  """
  name = f"client_{client:04d}.safetensors"
  found = {path.parent.name: path for path in sorted(folder.glob(f"models/*/{name}"))}
  if not found:
    raise BadInput(f"{folder}: no method has a model of client {client} (models/*/{name})")
  if method is None:
    return min(found.values(), key=lambda path: path.stat().st_size)
  name = method if method in found else files.name_of(method)
  require(name in found, "method", method, ", ".join(found))
  return found[name]


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""
  return command_line.run(Options, arguments, _act, prog="quped export")


def _act(options: Options) -> None:
  source = _source(options)
  packed, about = shipped.read(source)
  if options.kept == "float16":
    packed = packing.halve_kept(packed)
  out = options.out or _beside(source, options.to)
  same = out.exists() and out.samefile(source)
  require(not same, "out", out, "another file than the one that is read")
  write(shipped.Shipped(packed, about), options.to, out)
  print(f"{source} ({source.stat().st_size:,} bytes)")
  print(f"{out} ({size(out):,} bytes)")


def size(path: Path) -> int:
  """Returns how many bytes a file takes, or all files of a folder together."""
  if path.is_file():
    return path.stat().st_size
  return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _source(options: Options) -> Path:
  if options.source.is_dir():
    if options.client is None:
      raise BadInput(f"{options.source}: a results folder; --client N says whose model")
    return find(options.source, options.client, options.method)
  alone = options.client is None and options.method is None
  require(alone, "SOURCE", options.source, "a results folder, where --client or --method is given")
  return options.source


def _beside(source: Path, to: Form) -> Path:
  if to == "web":
    return source.with_name(source.stem + "_web")
  return source.with_suffix(forms.SUFFIXES[to])


def _save(path: Path, data: bytes) -> None:
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as file:
    file.write(data)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
