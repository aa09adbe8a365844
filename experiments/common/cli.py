"""Finds an experiment by name, reads its options, and turns errors into one line."""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.common.errors import Diverged
from qupeD_jax.checks import BadInput

FOLDER = Path(__file__).parent.parent
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


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
  name, *rest = arguments
  try:
    require_name(name)
    # Imported only now: a typo must not wait for jax.
    experiment = importlib.import_module(f"experiments.{name}")
    experiment.main(parse(experiment.Options, rest, name))
  except BadInput as error:
    return _fail(error, BAD_INPUT)
  except KeyboardInterrupt:
    return _fail("interrupted; what was written so far can be read", INTERRUPTED)
  except Diverged as error:
    return _fail(error, FAILED)
  return 0


def require_name(name: str) -> None:
  """Raises BadInput, naming the nearest experiment, unless there is one of that name."""
  if name not in names():
    nearest = difflib.get_close_matches(name, names(), n=1, cutoff=0)[0]
    raise BadInput(f"NAME={name}: no such experiment; nearest is {nearest}; all: make experiments")


def parse(options_type: type, arguments: Sequence[str], name: str):
  """Reads the options of an experiment from the command line.

  Args:
    options_type: a frozen dataclass; tyro makes its fields options and its docstrings their help.
    arguments: as typed.
    name: of the experiment.

  Returns:
    An instance of `options_type`.

  Raises:
    BadInput: with tyro's complaint in one line, and the nearest option for an unknown one.
    SystemExit: with code 0, after --help.
  """
  complaint = io.StringIO()
  try:
    with contextlib.redirect_stderr(complaint):
      return tyro.cli(options_type, args=list(arguments), prog=f"make experiment NAME={name} ARGS=")
  except SystemExit as error:
    if not error.code:
      raise
  raise BadInput(_in_one_line(complaint.getvalue()) + _nearest(options_type, arguments))


def _in_one_line(box: str) -> str:
  """Takes the message out of tyro's box: its lines between the frame and the first rule."""
  lines = [line.strip("│ ").strip() for line in box.splitlines()]
  message = []
  for line in lines:
    if line.startswith("──") and message:
      break
    if line and line[0] not in "╭╰─":
      message.append(line)
  return re.sub(r"\s+", " ", " ".join(message))


def _nearest(options_type: type, arguments: Sequence[str]) -> str:
  known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(options_type)]
  for argument in arguments:
    typed = argument.split("=")[0].replace("_", "-")
    if typed.startswith("--") and typed not in known and typed.replace("--no-", "--") not in known:
      return f"; nearest is {difflib.get_close_matches(typed, known, n=1, cutoff=0)[0]}"
  return ""


def _first_line(name: str) -> str:
  """Reads the first line of a docstring without importing the file."""
  documentation = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))) or ""
  return documentation.partition("\n")[0]


def _fail(message: object, code: int) -> int:
  print(f"error: {message}", file=sys.stderr)
  return code
