"""Finds an experiment by name, reads its options, and turns errors into one line."""

import ast
import contextlib
import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import tyro

from experiments.common.errors import Diverged, Lost, OutOfTime, Terminated
from qupeD_jax.checks import BadInput

FOLDER = Path(__file__).parent.parent
BAD_INPUT, FAILED, INTERRUPTED, UNFINISHED, TERMINATED = 2, 1, 130, 75, 143
HELP = ("-h", "--help")


def names() -> list[str]:
  """Returns the names of all experiments."""
  return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))


def listing() -> str:
  """Returns one line per experiment: its name and the first line of its docstring."""
  width = max(map(len, names()))
  return "\n".join(f"{name:{width}}  {_first_line(name)}" for name in names())


def main(arguments: Sequence[str]) -> int:
  """Runs an experiment; returns the exit code."""
  if not arguments:
    print(listing())
    return 0
  try:
    code = run(*arguments)
  except Exception:
    leave(FAILED)
    raise
  leave(code)
  return code


def run(name: str, *arguments: str) -> int:
  """Runs an experiment with the arguments as typed; returns the exit code."""
  keep_compiled()
  try:
    require_name(name)
    # Imported only now: a typo must not wait for jax.
    experiment = importlib.import_module(f"experiments.{name}")
    hosts = importlib.import_module("experiments.common.hosts")
    options = parse(experiment.DEFAULTS, arguments, name)
    if hosts.must_be_watched(options):
      return hosts.watch([name, *arguments])
    hosts.run(name, experiment.main, options)
  except BadInput as error:
    return _fail(error, BAD_INPUT)
  except KeyboardInterrupt:
    return _fail("interrupted; the same command goes on from the last save", INTERRUPTED)
  except (Diverged, Lost) as error:
    return _fail(error, FAILED)
  except OutOfTime as stopped:
    print(stopped)
    return UNFINISHED
  except Terminated as stopped:
    print(stopped)
    return TERMINATED
  return 0


def keep_compiled() -> None:
  """Lets jax keep compiled programs between starts, in the user's cache folder.

  Variables of jax's own that are set already win; it reads them when it is first imported.
  """
  caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  settings = {
    "JAX_COMPILATION_CACHE_DIR": str(caches / "qupeD_jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  for name, value in settings.items():
    os.environ.setdefault(name, value)


def require_name(name: str) -> None:
  """Raises BadInput, naming the nearest experiment, unless there is one of that name."""
  if name not in names():
    nearest = difflib.get_close_matches(name, names(), n=1, cutoff=0)[0]
    raise BadInput(f"NAME={name}: no such experiment; nearest is {nearest}; all: make experiments")


def parse(defaults, arguments: Sequence[str], name: str):
  """Reads the options of an experiment from the command line.

  Args:
    defaults: a frozen dataclass; tyro makes its fields options and its docstrings their help.
    arguments: as typed.
    name: of the experiment.

  Returns:
    `defaults` with what was typed.

  Raises:
    BadInput: naming the nearest option for an unknown one, or what is allowed for a bad value.
    SystemExit: with code 0, after --help.
  """
  # What tyro says of bad input is a box, coloured and as wide as the terminal: it is not for one
  # line. It goes unread, and the argument that is to blame is looked for.
  try:
    options, unknown = _read(defaults, arguments, name)
  except SystemExit as error:
    if not error.code:
      raise
    raise BadInput(_blame(defaults, arguments)) from None
  if unknown:
    raise BadInput(_nearest(defaults, unknown[0]))
  return options


def _read(defaults, arguments: Sequence[str], name: str = ""):
  """Returns the options and the arguments that belong to none."""
  with contextlib.redirect_stderr(io.StringIO()):
    return tyro.cli(
      type(defaults),
      default=defaults,
      description=_first_line(name),
      args=list(arguments),
      prog=f"make experiment NAME={name} ARGS=",
      return_unknown_args=True,
    )


def _blame(defaults, arguments: Sequence[str]) -> str:
  """Finds the option whose value cannot be read, and says what is allowed."""
  types = {_flag(name): kind for name, kind in get_type_hints(type(defaults)).items()}
  starts = [i for i, argument in enumerate(arguments) if argument.startswith("--")]
  for start, stop in zip(starts, [*starts[1:], None], strict=True):
    typed, *values = (*arguments[start].split("=", 1), *arguments[start + 1 : stop])
    flag = _flag(typed)
    if flag in types and not _readable(defaults, arguments[start:stop]):
      value = " ".join(values) or "without a value"
      return f"{flag} {value}: allowed is {_allowed(types[flag])}"
  return f"{' '.join(arguments)}: not understood; ARGS=--help lists the options"


def _readable(defaults, arguments: Sequence[str]) -> bool:
  try:
    _read(defaults, [argument for argument in arguments if argument not in HELP])
  except SystemExit:
    return False
  return True


def _allowed(kind) -> str:
  """Says what can be typed for a field of this type.

  >>> _allowed(int | None), _allowed(tuple[float, ...])
  ('a whole number or None', 'a number, or several with spaces between')
  """
  choices = [choice for choice in get_args(kind) if choice is not ...]
  if get_origin(kind) is tuple:
    return f"{_allowed(choices[0])}, or several with spaces between"
  if get_origin(kind) is Literal:
    return " or ".join(map(str, choices))
  if choices:
    return " or ".join(map(_allowed, choices))
  words = {int: "a whole number", float: "a number", str: "any text", type(None): "None"}
  return words.get(kind, getattr(kind, "__name__", str(kind)))


def _nearest(defaults, unknown: str) -> str:
  """Says that an argument belongs to no option, and which option it may have been meant for."""
  types = get_type_hints(type(defaults))
  known = [*types, *(f"no_{name}" for name, kind in types.items() if kind is bool)]
  typed = unknown.split("=")[0]
  word = typed.strip("-").replace("-", "_").lower()
  # A stray value resembles no option; a mistyped option resembles one, however little.
  cutoff = 0 if typed.startswith("-") else 0.6
  near = [name for name in known if word and name.startswith(word)]
  near = near or difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
  hint = f"; nearest is {_flag(near[0])}" if near else ""
  return f"{typed}: belongs to no option{hint}"


def _flag(name: str) -> str:
  return "--" + name.lstrip("-").replace("_", "-")


def _first_line(name: str) -> str:
  """Reads the first line of a docstring without importing the file; empty if there is none."""
  path = FOLDER / f"{name}.py"
  documentation = (path.is_file() and ast.get_docstring(ast.parse(path.read_text("utf-8")))) or ""
  return documentation.partition("\n")[0]


def _fail(message: object, code: int) -> int:
  print("error:", " ".join(str(message).split()), file=sys.stderr)
  return code


def leave(code: int) -> None:
  """Ends one of several processes at once if it failed: its orderly end waits for the others."""
  jax = sys.modules.get("jax")
  if code and jax and jax.distributed.is_initialized():
    if sys.exc_info()[1]:
      traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
