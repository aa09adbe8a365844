"""Files that are written whole or not at all, and strict JSON.

A number that is not finite is written as null. What the file system refuses, and what is no JSON,
is a BadInput of one line that names the file.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from qupeD_jax.checks import BadInput


def plain(value: Any) -> Any:
  """Turns a value into what strict JSON can hold.

  Args:
    value: numbers, strings, arrays, paths, and mappings, sequences, NamedTuples and dataclasses of
      such.

  Returns:
    The same as dicts, lists, strings, numbers, booleans and None.

  Raises:
    TypeError: there is something else in it.
  """
  match value:
    case float():
      return float(value) if math.isfinite(value) else None
    case None | bool() | int() | str():
      return value
    case np.ndarray() | np.generic() | jax.Array():
      return plain(np.asarray(value).tolist())
    case Mapping():
      return {str(key): plain(entry) for key, entry in value.items()}
    case tuple() if hasattr(value, "_asdict"):
      return plain(value._asdict())
    case list() | tuple():
      return [plain(entry) for entry in value]
    case os.PathLike():
      return os.fspath(value)
  if dataclasses.is_dataclass(value):
    names = [field.name for field in dataclasses.fields(value)]
    return {name: plain(getattr(value, name)) for name in names}
  raise TypeError(f"{value!r} has no place in a JSON file")


def dump(value: Any, indent: int | None = None) -> str:
  """Writes a value as strict JSON; see `plain`."""
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def parse(text: str, where: object) -> dict[str, Any]:
  """Reads one JSON object; `where` names its place in the error."""
  try:
    value = json.loads(text)
  except ValueError as error:
    raise BadInput(f"{where}: damaged ({error})") from error
  if not isinstance(value, dict):
    raise BadInput(f"{where}: damaged (not a JSON object)")
  return value


def read(path: Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    BadInput: the file cannot be read, or holds something else.
  """
  with on_disk(path):
    text = path.read_text(encoding="utf-8", errors="replace")
  return parse(text, path)


@contextlib.contextmanager
def on_disk(path: Path):
  """Turns what the file system refuses into one line that names the file."""
  try:
    yield
  except OSError as error:
    raise BadInput(f"{error.filename or path}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing(path: Path):
  """Turns what the file system refuses into one line that names what was to be written."""
  try:
    yield
  except OSError as error:
    raise BadInput(f"{path}: cannot be written ({error.strerror or error})") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
  """Opens a file of which all is there in the end or nothing.

  Raises:
    BadInput: the file cannot be written; what was there before stays.
  """
  partial = path.with_name(path.name + ".partial")
  with writing(path):
    try:
      with partial.open("wb") as file:
        yield file
        sync(file)
      os.replace(partial, path)
    except BaseException:
      with contextlib.suppress(OSError):
        partial.unlink()
      raise


def write(path: Path, text: str) -> None:
  """Writes all of a text file or nothing of it, ending in a newline.

  Raises:
    BadInput: the file cannot be written; what was there before stays.
  """
  with whole(path) as file:
    file.write((text if text.endswith("\n") else text + "\n").encode())


def append(path: Path, text: str) -> None:
  """Appends all of a text to a file, on disk before this returns, or nothing of it.

  Raises:
    BadInput: the file cannot be written; what was there before stays.
  """
  with writing(path), path.open("ab", buffering=0) as file:
    size, left = file.seek(0, os.SEEK_END), memoryview(text.encode())
    try:
      while left:
        left = left[file.write(left) :]
      sync(file)
    except OSError:
      file.truncate(size)
      raise


def sync(file) -> None:
  """Waits until what was written to an open file is on the disk."""
  file.flush()
  os.fsync(file.fileno())
