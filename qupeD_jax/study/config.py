"""Options from a file: TOML, YAML, or the config.json of a finished run."""

from collections.abc import Collection, Sequence
from typing import Any

from qupeD_jax.checks import BadInput, place
from qupeD_jax.command_line import flag, nearest
from qupeD_jax.io import files

OPTION = "--config"
# What of a run's config.json is about that run alone, or follows from its options.
_OF_THE_RUN = ("experiment", "seed_list", "out", "minutes", "checkpoint_every", "fresh", "parts")
_OF_THE_RUN += ("coordinator", "process", "processes")


def expanded(arguments: Sequence[str], known: Collection[str]) -> list[str]:
  """Replaces --config FILE by the options in the file, before all others, which so win over them.

  Args:
    arguments: as typed.
    known: names of the options that there are.

  Raises:
    BadInput: the file cannot be read, or has a key that is no option.
  """
  for i, typed in enumerate(arguments):
    name, equals, value = typed.partition("=")
    if name == OPTION:
      rest = [*arguments[:i], *arguments[i + 1 + (not equals) :]]
      path = value if equals else next(iter(arguments[i + 1 : i + 2]), "")
      return [*_typed(path, known), *expanded(rest, known)]
  return list(arguments)


def _typed(path: str, known: Collection[str]) -> list[str]:
  """Returns a file's options as they would be typed."""
  arguments = []
  for name, value in _read(path, known).items():
    if name not in known:
      raise BadInput(f"{path}: {name}: belongs to no option{nearest(str(name), known)}")
    if isinstance(value, bool):
      arguments.append(flag(name if value else f"no_{name}"))
    elif isinstance(value, list | tuple):
      arguments += [flag(name), *map(str, value)]
    else:
      arguments.append(f"{flag(name)}={value}")
  return arguments


def _read(path: str, known: Collection[str]) -> dict[str, Any]:
  file = place(OPTION, path)
  match file.suffix:
    case ".json":
      values = files.read(file)
    case ".toml":
      values = files.read_toml(file)
    case ".yaml" | ".yml":
      values = files.read_yaml(file)
    case _:
      raise BadInput(f"{OPTION} {path}: allowed is a file *.toml, *.yaml or *.json")
  if isinstance(values, dict) and isinstance(values.get("config"), dict):
    # Options that an older version had and this one has not played no part.
    own = values["config"]
    return {k: v for k, v in own.items() if k in known and k not in _OF_THE_RUN}
  if not isinstance(values, dict):
    raise BadInput(f"{OPTION} {path}: allowed is a table of options")
  return values
