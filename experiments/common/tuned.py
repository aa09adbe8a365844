"""The file of tuned hyperparameters: read, looked up, written.

TOML, a table per data set and method: [cifar10."QuPeD 2 bit"], then a line per hyperparameter.
What a table does not name keeps its default in `options.Hyperparameters`.
"""

import dataclasses
import tomllib
from pathlib import Path

from experiments.common.options import Hyperparameters
from qupeD_jax import checks, files
from qupeD_jax.checks import BadInput

FILE = Path(__file__).parent.parent / "tuned.toml"
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Hyperparameters)}

Values = dict[str, dict[str, dict[str, float]]]  # data set -> method -> hyperparameter -> value


def read(path: Path) -> Values:
  """Reads the file.

  Raises:
    BadInput: it cannot be read, or something in it is no hyperparameter.
  """
  with files.on_disk(path):
    text = path.read_text("utf-8", errors="replace")
  try:
    values = tomllib.loads(text)
  except tomllib.TOMLDecodeError as error:
    raise BadInput(f"{path}: not TOML ({error})") from error
  for dataset, methods in values.items():
    checks.require(isinstance(methods, dict), f"{path}: {dataset}", methods, "a table of methods")
    for method, changes in methods.items():
      _check(f'{path}: [{dataset}."{method}"]', changes)
  return values


def _check(where: str, changes) -> None:
  checks.require(isinstance(changes, dict), where, changes, "a table of hyperparameters")
  for name, value in changes.items():
    checks.require(name in DEFAULTS, where, name, ", ".join(DEFAULTS))
    checks.require(isinstance(value, int | float), f"{where} {name}", value, "a number")


def of(values: Values, dataset: str, method: str) -> dict[str, float]:
  """Looks up the hyperparameters of a method on a data set.

  Raises:
    BadInput: there are none.
  """
  found = values.get(dataset, {}).get(method)
  if found is None:
    name = dataset.replace("/", "_")
    raise BadInput(
      f'--tuned-on {dataset}: no [{dataset}."{method}"] in the file of --tuned; '
      f"make experiment NAME=tune_{name} chooses such values"
    )
  return {name: float(value) for name, value in found.items()}


def write(path: Path, dataset: str, methods: dict[str, dict[str, float]]) -> None:
  """Writes the hyperparameters of a data set's methods, those that are not the default."""
  lines = []
  key = dataset if dataset.isidentifier() else f'"{dataset}"'
  for method, values in methods.items():
    lines.append(f'[{key}."{method}"]')
    lines += [f"{k} = {float(v):g}" for k, v in sorted(values.items()) if v != DEFAULTS[k]]
    lines.append("")
  files.write(path, "\n".join(lines).rstrip())
