"""Safetensors files: whole or not at all, with a checksum, since the format has none."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files

Tensors = dict[str, np.ndarray]
Header = dict[str, str]


def save(path: Path, tensors: Tensors, header: Header) -> None:
  """Writes a file; its folder is made, an older file of that name is replaced.

  Raises:
    BadInput: the file cannot be written; what was there before stays.
  """
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  written = safetensors.numpy.save(tensors, header | {"crc32": _checksum(tensors, header)})
  with files.whole(path) as file:
    file.write(_in_order(written))


def load(path: str | os.PathLike) -> tuple[Tensors, Header]:
  """Reads a file that `save` wrote.

  Raises:
    BadInput: the file is missing or damaged.
  """
  tensors, header = read(path)
  verify(path, tensors, header)
  return tensors, header


def verify(path: str | os.PathLike, tensors: Tensors, header: Header) -> None:
  """Raises BadInput unless what `read` found in a file is what `save` put there."""
  if header.get("crc32") != _checksum(tensors, header):
    raise BadInput(f"{path}: damaged (its checksum does not match)")


def read(path: str | os.PathLike) -> tuple[Tensors, Header]:
  """Reads any safetensors file.

  Args:
    path: the file.

  Returns:
    Its tensors and its metadata.

  Raises:
    BadInput: the file is missing, damaged, or of another format, or numpy lacks a tensor's type.
  """
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = file.keys()
      return {name: _tensor(file, name, path) for name in names}, file.metadata() or {}
  except OSError as error:
    raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
  except safetensors.SafetensorError as error:
    raise BadInput(f"{path}: damaged, or not a safetensors file") from error


def _tensor(file, name: str, path: str | os.PathLike) -> np.ndarray:
  try:
    return file.get_tensor(name)
  except (AttributeError, TypeError) as error:
    kind = file.get_slice(name).get_dtype()
    raise BadInput(f"{path}: {name} is of type {kind}, which is not read; make it F32") from error


def _in_order(written: bytes) -> bytes:
  """Sorts a file's metadata, which the library writes in an order that changes from call to call.

  A file is the length of its header in 8 bytes, the header as JSON, and the tensors.
  """
  end = 8 + int.from_bytes(written[:8], "little")
  header = json.loads(written[8:end])
  header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # tensors are aligned
  return len(text).to_bytes(8, "little") + text + written[end:]


def _checksum(tensors: Tensors, header: Header) -> str:
  """Returns a CRC-32 of all that is in a file, but for itself."""
  texts = {key: text for key, text in header.items() if key != "crc32"}
  crc = zlib.crc32(json.dumps(texts, sort_keys=True).encode())
  for name, tensor in sorted(tensors.items()):
    crc = zlib.crc32(f"{name} {tensor.shape} {tensor.dtype}".encode(), crc)
    crc = zlib.crc32(tensor.tobytes(), crc)
  return f"{crc:08x}"
