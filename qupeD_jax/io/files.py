"""Files that are written whole or not at all, strict JSON, the reading of JSON, TOML and YAML.

A number that is not finite is written as null. What the file system refuses, and whatever is wrong
with a text that is read, is a BadInput of one line that names the file.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import tomllib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from qupeD_jax.checks import BadInput, place

_DEEPEST = 50  # levels of nesting that are read
_WIDEST = 2**63  # whole numbers that are read lie below, on either side
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LONGEST = 160  # characters of a file name that is made of a name; most systems take 255


def name_of(name: str) -> str:
  """Makes a file name of any text: no two texts share one, and it leads to no other folder.

  A space becomes an underscore; what has a meaning in paths or is not ASCII is percent-encoded as
  in a URL. `urllib.parse.unquote` of the result, underscores read as spaces, is the text again, but
  for long ones: these are cut and end in a hash. That holds for POSIX systems, which the package is
  for: a name that is a device on Windows, CON or NUL, stays as it is.

  >>> name_of("FedAvg + k-means 2 bit"), name_of("QuPeD w/ KD"), name_of(".."), name_of("a_b")
  ('FedAvg_+_k-means_2_bit', 'QuPeD_w%2F_KD', '%2E.', 'a%5Fb')
  """
  quoted = urllib.parse.quote(name, safe=" +,=@()#", errors="surrogatepass")
  quoted = quoted.replace("_", "%5F").replace(" ", "_") or "%"
  if quoted.startswith("."):  # also hides a file
    quoted = "%2E" + quoted[1:]
  if len(quoted) <= _LONGEST:
    return quoted
  return f"{quoted[:_LONGEST]}~{hashlib.sha256(quoted.encode()).hexdigest()[:32]}"


def require_no_link(folder: Path, names: Iterable[str]) -> None:
  """Raises BadInput if one of these in a folder, or anything below it, is a symbolic link.

  What is written there, or removed, would lie somewhere else. The folder itself may be one.
  """
  for name in names:
    path = folder / name
    below = os.walk(path) if not path.is_symlink() else ()
    inside = (Path(where, entry) for where, dirs, files in below for entry in (*dirs, *files))
    for one in filter(Path.is_symlink, itertools.chain((path,), inside)):
      raise BadInput(f"{one}: is a link; results are written and removed in their folder alone")


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
    case np.ndarray() | np.generic():
      return plain(value.tolist())
    case Mapping():
      return {str(key): plain(entry) for key, entry in value.items()}
    case tuple() if hasattr(value, "_asdict"):
      return plain(value._asdict())
    case list() | tuple():
      return [plain(entry) for entry in value]
    case os.PathLike():
      return os.fspath(value)
  if hasattr(value, "__array__"):  # of jax, which reading files does not wait for
    return plain(np.asarray(value))
  if dataclasses.is_dataclass(value):
    names = [field.name for field in dataclasses.fields(value)]
    return {name: plain(getattr(value, name)) for name in names}
  raise TypeError(f"{value!r} has no place in a JSON file")


def dump(value: Any, indent: int | None = None) -> str:
  """Writes a value as strict JSON; see `plain`."""
  return json.dumps(plain(value), indent=indent, allow_nan=False)


def decode(content: bytes, where: object, grammar: Callable[[str], Any] = json.loads) -> Any:
  """Reads a text in UTF-8, whatever may be in it.

  Args:
    content: the text.
    where: its place, for the error.
    grammar: text -> value; raises ValueError where it is none.

  Raises:
    BadInput: it is not in UTF-8, or the grammar refuses it.
  """
  try:
    return grammar(content.decode("utf-8-sig"))
  except RecursionError as error:
    raise BadInput(f"{where}: damaged (nested too deeply)") from error
  except ValueError as error:
    reason = " ".join(str(error).split(";")[0].split())
    raise BadInput(f"{where}: damaged ({reason})") from error


def parse(content: bytes, where: object) -> dict[str, Any]:
  """Reads one JSON object, of finite numbers and sound text; `where` names its place in the error.

  >>> parse(b'{"rounds": 1e999}', "config.json")
  Traceback (most recent call last):
  ...
  qupeD_jax.checks.BadInput: config.json: damaged (a number that is not finite)
  """
  value = decode(content, where, lambda text: _sound(json.loads(text)))
  if not isinstance(value, dict):
    raise BadInput(f"{where}: damaged (not a JSON object)")
  return value


def read(path: Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object, of finite numbers and sound text.

  Raises:
    BadInput: the file cannot be read, or holds something else.
  """
  with on_disk(path):
    content = path.read_bytes()
  return parse(content, path)


def read_toml(path: Path) -> dict[str, Any]:
  """Reads a TOML file of finite numbers and sound text, without dates.

  Raises:
    BadInput: the file cannot be read, or holds something else.
  """
  with on_disk(path):
    content = path.read_bytes()
  return decode(content, path, lambda text: _sound(tomllib.loads(text)))


def read_yaml(path: Path) -> Any:
  """Reads a YAML file of finite numbers and sound text, without dates and references.

  Raises:
    BadInput: the file cannot be read, or holds something else.
  """
  with on_disk(path):
    content = path.read_bytes()
  return decode(content, path, _yaml)


def _yaml(text: str) -> Any:
  try:
    # A few lines of references to references stand for more values than can be looked at.
    _hold(not any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text)), "a reference")
    return _sound(yaml.safe_load(text))
  except yaml.YAMLError as error:
    raise ValueError(str(error)) from error


def _sound(value: Any, depth: int = 0) -> Any:
  """Returns what was read, once all of it can be computed with, and written again.

  Raises:
    ValueError: there is a number, a text or a kind of value in it of which that is not so.
    RecursionError: it is nested too deeply.
  """
  if depth > _DEEPEST:
    raise RecursionError
  match value:
    case None | bool():
      pass
    case int():
      _hold(-_WIDEST < value < _WIDEST, "a whole number of more than 64 bits")
    case float():
      _hold(math.isfinite(value), "a number that is not finite")
    case str():
      _hold(value.isascii() or not _SURROGATE.search(value), "text with half a character")
    case dict():
      for key, entry in value.items():
        _sound(key), _sound(entry, depth + 1)
    case list():
      for entry in value:
        _sound(entry, depth + 1)
    case _:
      raise ValueError(f"a {type(value).__name__}")
  return value


def _hold(holds: bool, problem: str) -> None:
  if not holds:
    raise ValueError(problem)


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
      partial.unlink(missing_ok=True)  # it may be a link
      with partial.open("xb") as file:
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
  """Appends all of a text to a file that exists, on disk before this returns, or nothing of it.

  Raises:
    BadInput: the file cannot be written; what was there before stays.
  """
  with writing(path), path.open("r+b", buffering=0) as file:
    size, left = file.seek(0, os.SEEK_END), memoryview(text.encode())
    try:
      while left:
        left = left[file.write(left) :]
      sync(file)
    except OSError:
      file.truncate(size)
      raise


def cache_folder() -> Path:
  """Makes, where it is missing, the user's folder of what need not be made or fetched again.

  What lies there is run: nobody else may write in it.

  Returns:
    qupeD_jax in $XDG_CACHE_HOME, or in ~/.cache.

  Raises:
    BadInput: it cannot be made, belongs to another user, or others may write in it.
  """
  caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  folder = place("cache folder", caches) / "qupeD_jax"
  with writing(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
  if found.st_uid != os.geteuid():
    raise BadInput(f"{folder}: belongs to another user; XDG_CACHE_HOME names another place")
  if found.st_mode & 0o022:
    raise BadInput(f"{folder}: others may write in it; remove it, as it is not to be trusted")
  return folder


def sync(file) -> None:
  """Waits until what was written to an open file is on the disk."""
  file.flush()
  os.fsync(file.fileno())
