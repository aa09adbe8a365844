"""Command lines: the fields of a dataclass as options, and bad input as one line.

Only here do options have their names of the command line: elsewhere a message names the argument,
`lambda_p`, and `in_flags` writes it as it is typed, `--lambda-p`.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from qupeD_jax.checks import BadInput, place

BAD_INPUT = 2  # exit code
HELP = ("-h", "--help")

# Arguments of the library that have another name as options.
_OPTIONS = {
  "bound": "clip_norm",
  "devices_per_process": "devices",
  "every": "eval_every",
  "factor": "downsample",
  "fraction": "participation",
  "model": "models",
  "num_clients": "clients",
  "pause": "checkpoint_every",
  "rates.centers": "centers_rate",
  "rates.proximity": "proximity",
  "rates.weights": "weights_rate",
}

_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed)


def flag(name: str) -> str:
  """Writes a field's name as it stands on the command line.

  >>> flag("lambda_p")
  '--lambda-p'
  """
  return "--" + name.lstrip("-").replace("_", "-")


def leaves(kind: type) -> dict[str, Any]:
  """Returns the options of a dataclass, nested ones among them, and the type of each.

  What is marked `tyro.conf.Fixed` is no option.
  """
  found = {}
  for name, hint in get_type_hints(kind, include_extras=True).items():
    hint, marks = (get_args(hint)[0], get_args(hint)[1:]) if _is_annotated(hint) else (hint, ())
    if tyro.conf.Fixed in marks:
      continue
    found |= leaves(hint) if dataclasses.is_dataclass(hint) else {name: hint}
  return found


def parse(kind, arguments: Sequence[str], *, prog: str, description: str | None = None):
  """Reads options from the command line.

  Args:
    kind: a frozen dataclass, or an instance of one that has the defaults. Its fields become
      options and their docstrings the help; fields of nested dataclasses keep their own names and
      form a group of the help each.
    arguments: as typed.
    prog: what was typed before them.
    description: for the help; by default the dataclass's docstring.

  Returns:
    An instance, its paths as `checks.place` has them.

  Raises:
    BadInput: naming the nearest option for an unknown one, or what is allowed for a bad value.
    SystemExit: with code 0, after --help.
  """
  # What tyro says of bad input is a box, coloured and as wide as the terminal: it is not for one
  # line. It goes unread, and the argument that is to blame is looked for.
  try:
    options, unknown = _read(kind, arguments, prog, description)
  except SystemExit as error:
    if not error.code:
      raise
    raise BadInput(_blame(kind, arguments, prog)) from None
  if unknown:
    raise BadInput(_stray(kind, unknown[0]))
  return _placed(options)


def in_flags(error: Exception, names: Collection[str]) -> str:
  """Returns a message in one line, with arguments named as on the command line.

  Args:
    error: if a BadInput with a name, the argument that it begins with becomes an option.
    names: of the options that the command has.

  >>> error = BadInput("every 0: allowed is at most `rounds` 3", "every")
  >>> in_flags(error, ("eval_every", "rounds"))
  '--eval-every 0: allowed is at most --rounds 3'
  """
  text = " ".join(str(error).split())
  name = getattr(error, "name", None)
  option = name if name in names else _OPTIONS.get(name)
  if option in names:
    text = flag(option) + text.removeprefix(name)
  return re.sub(r"`(\w+)`", lambda m: flag(m[1]) if m[1] in names else m[0], text)


def run(kind, arguments: Sequence[str], act: Callable, *, prog: str) -> int:
  """Carries a command out.

  Args:
    kind, arguments, prog: as in `parse`.
    act: does what the command is for, told the options.

  Returns:
    The exit code: 0, or 2 after one line on what cannot be done.
  """
  try:
    act(parse(kind, arguments, prog=prog))
  except BadInput as error:
    return fail(in_flags(error, leaves(kind)))
  return 0


def fail(message: object, code: int = BAD_INPUT) -> int:
  """Prints a complaint as one line and returns the exit code."""
  print("error:", " ".join(str(message).split()), file=sys.stderr)
  return code


def nearest(word: str, known: Collection[str]) -> str:
  """Says which name was perhaps meant, as the end of a message; "" where none is near.

  >>> nearest("quikstart", ["quickstart", "faults"]), nearest("../x", ["quickstart"])
  ('; nearest is quickstart', '')
  """
  near = [name for name in known if word and name.startswith(word)]
  near = near or difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
  return f"; nearest is {near[0]}" if near else ""


def _placed(options):
  """Replaces the `~` in paths among options."""
  changes = {}
  for field in dataclasses.fields(options):
    match getattr(options, field.name):
      case Path() as path:
        changes[field.name] = place("path", path)
      case (Path(), *_) as paths:
        changes[field.name] = tuple(place("path", path) for path in paths)
  return dataclasses.replace(options, **changes) if changes else options


def _is_annotated(hint) -> bool:
  return get_origin(hint) is Annotated


def _read(kind, arguments: Sequence[str], prog: str = "", description: str | None = None):
  """Returns the options and the arguments that belong to none."""
  given = {} if isinstance(kind, type) else {"default": kind}
  with contextlib.redirect_stderr(io.StringIO()):
    return tyro.cli(
      kind if isinstance(kind, type) else type(kind),
      **given,
      description=description,
      args=list(arguments),
      prog=prog,
      return_unknown_args=True,
      config=_CONFIG,
    )


def _types(kind) -> dict[str, Any]:
  return leaves(kind if isinstance(kind, type) else type(kind))


def _blame(kind, arguments: Sequence[str], prog: str) -> str:
  """Finds the option whose value cannot be read, and says what is allowed."""
  types = {flag(name): hint for name, hint in _types(kind).items()}
  starts = [i for i, argument in enumerate(arguments) if argument.startswith("--")]
  for start, stop in itertools.pairwise([*starts, None]):
    typed, *values = (*arguments[start].split("=", 1), *arguments[start + 1 : stop])
    option = flag(typed)
    if option in types and not _readable(kind, option, arguments[start:stop]):
      value = " ".join(values) or "without a value"
      return f"{option} {value}: allowed is {_allowed(types[option])}"
    if option not in types and flag(typed.removeprefix("--no-")) not in types:
      return _stray(kind, typed)
  return f"{' '.join(arguments)}: not understood; {prog} --help lists the options"


def _readable(kind, option: str, arguments: Sequence[str]) -> bool:
  """Tells whether a field's type takes what was typed for it."""
  name = option.removeprefix("--").replace("-", "_")
  one = dataclasses.make_dataclass("One", [(name, _types(kind)[name])])
  try:
    _read(one, [argument for argument in arguments if argument not in HELP])
  except SystemExit:
    return False
  return True


def _allowed(hint) -> str:
  """Says what can be typed for a field of this type.

  >>> _allowed(int | None), _allowed(tuple[float, ...])
  ('a whole number or None', 'a number, or several with spaces between')
  """
  choices = [choice for choice in get_args(hint) if choice is not ...]
  if get_origin(hint) is tuple:
    several = len(set(choices)) == 1
    return f"{_allowed(choices[0])}, or several with spaces between" if several else str(hint)
  if get_origin(hint) is Literal:
    return " or ".join(map(str, choices))
  if choices:
    return " or ".join(map(_allowed, choices))
  words = {int: "a whole number", float: "a number", str: "any text", type(None): "None"}
  return words.get(hint, getattr(hint, "__name__", str(hint)))


def _stray(kind, unknown: str) -> str:
  """Says that an argument belongs to no option, and which option it may have been meant for."""
  types = _types(kind)
  known = [*types, *(f"no_{name}" for name, hint in types.items() if hint is bool)]
  typed = unknown.split("=")[0]
  hint = nearest(typed.strip("-").replace("-", "_").lower(), known)
  *_, name = hint.split(" ")
  return f"{typed}: belongs to no option{hint.removesuffix(name) + flag(name) if hint else ''}"
