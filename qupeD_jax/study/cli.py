"""Finds an experiment by name, reads its options, and turns errors into one line."""

import ast
import gc
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from qupeD_jax import command_line
from qupeD_jax.checks import BadInput
from qupeD_jax.command_line import BAD_INPUT, fail
from qupeD_jax.study import config
from qupeD_jax.study.compiled import keep_compiled
from qupeD_jax.study.errors import Diverged, Incomplete, Lost, OutOfTime, Terminated

# Looked up, not imported: the package does not know its experiments.
FOLDER = Path(importlib.util.find_spec("experiments").origin).parent
USAGE = """usage: python -m experiments NAME [OPTIONS], or make experiment NAME=... ARGS="OPTIONS"

NAME --help explains an experiment's options; --config FILE takes them from a TOML or YAML file or
from a finished run's config.json, and what is typed beside it wins."""
FAILED, INTERRUPTED, UNFINISHED, TERMINATED = 1, 130, 75, 143


def names() -> list[str]:
  """Returns the names of all experiments."""
  return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))


def listing() -> str:
  """Returns one line per experiment: its name and the first line of its docstring."""
  width = max(map(len, names()))
  return "\n".join(f"{name:{width}}  {first_line(name)}" for name in names())


def main(arguments: Sequence[str]) -> int:
  """Runs an experiment; returns the exit code."""
  if not arguments or arguments[0] in command_line.HELP:
    print(*([USAGE] if arguments else []), listing(), sep="\n\n" if arguments else "")
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
  known = ()
  try:
    require_name(name)
    # Imported only now: a typo must not wait for jax.
    if broken := _broken(name):
      raise BadInput(broken)
    keep_compiled()
    experiment = importlib.import_module(f"experiments.{name}")
    hosts = importlib.import_module("qupeD_jax.study.durability.hosts")
    known = command_line.leaves(type(experiment.DEFAULTS))
    try:
      options = parse(experiment.DEFAULTS, arguments, name)
      importlib.import_module("qupeD_jax.study.options").check_effect(options, experiment.DEFAULTS)
      watched = hosts.must_be_watched(options)
    except BadInput as error:
      code = fail(command_line.in_flags(error, known), BAD_INPUT)
      hosts.tell_refusal(arguments, error)
      return code
    if watched:
      return hosts.watch([name, *arguments])
    gc.freeze()  # imports stay: to look through them at every collection slows tracing by a sixth
    hosts.run(name, experiment.main, options)
  except BadInput as error:
    return fail(command_line.in_flags(error, known), BAD_INPUT)
  except KeyboardInterrupt:
    return fail("interrupted; the same command goes on from the last save", INTERRUPTED)
  except (Diverged, Incomplete, Lost) as error:
    return fail(error, FAILED)
  except OutOfTime as stopped:
    print(stopped)
    return UNFINISHED
  except Terminated as stopped:
    print(stopped)
    return TERMINATED
  return 0


def require_name(name: str) -> None:
  """Raises BadInput, naming the nearest experiment, unless there is one of that name."""
  if name not in names():
    near = command_line.nearest(name, names())
    raise BadInput(f"NAME={name}: no such experiment{near}; all: make experiments")


def parse(defaults, arguments: Sequence[str], name: str):
  """Reads the options of an experiment from the command line.

  Args:
    defaults: a frozen dataclass, nested or not, whose fields are the options.
    arguments: as typed.
    name: of the experiment.

  Returns:
    `defaults` with what was typed.

  Raises:
    BadInput: an option is unknown or its value cannot be read, typed or in the file of --config.
    SystemExit: with code 0, after --help.
  """
  typed = f"make experiment NAME={name} ARGS="
  arguments = config.expanded(arguments, command_line.leaves(type(defaults)))
  return command_line.parse(defaults, arguments, prog=typed, description=first_line(name))


def first_line(name: str) -> str:
  """Reads the first line of a docstring without importing the file, or what is wrong with it."""
  path = FOLDER / f"{name}.py"
  if not path.is_file():
    return ""
  if broken := _broken(name):
    return f"({broken})"
  return (ast.get_docstring(_parsed(name)) or "").partition("\n")[0]


def _broken(name: str) -> str:
  """Says why a file is no experiment, without importing it; "" where it is one."""
  try:
    statements = _parsed(name).body
  except (SyntaxError, ValueError) as error:
    line = getattr(error, "lineno", None) or 1
    return f"{name}.py, line {line}: {getattr(error, 'msg', error)}"
  defined = {node.name for node in statements if isinstance(node, ast.FunctionDef)}
  for node in statements:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
  missing = [needed for needed in ("DEFAULTS", "main") if needed not in defined]
  return f"{name}.py: has no {' and no '.join(missing)}" if missing else ""


def _parsed(name: str) -> ast.Module:
  return ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))


def leave(code: int) -> None:
  """Ends one of several processes at once if it failed: its orderly end waits for the others."""
  jax = sys.modules.get("jax")
  if code and jax and jax.distributed.is_initialized():
    if sys.exc_info()[1]:
      traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
