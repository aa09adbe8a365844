"""The file of tuned hyperparameters: read, looked up, written.

TOML, a table per data set, model and method, [cifar10_cnn1."QuPeD 2 bit"], then a line per
hyperparameter. What a table does not name keeps its default in `options.Hyperparameters`.
"""

import dataclasses
from pathlib import Path

from qupeD_jax import checks
from qupeD_jax.checks import refusal
from qupeD_jax.io import files
from qupeD_jax.study.options import Hyperparameters

FILE = Path(__file__).parent.parent / "tuned.toml"
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Hyperparameters)}

Values = dict[str, dict[str, dict[str, float]]]  # key -> method -> hyperparameter -> value


def key(dataset: str, model: str) -> str:
  """Names a data set and the server's model.

  >>> key("cifar10", "cnn1")
  'cifar10_cnn1'
  """
  return f"{dataset}_{model}"


def read(path: Path) -> Values:
  """Reads the file.

  Raises:
    BadInput: it cannot be read, or something in it is no hyperparameter.
  """
  values = files.read_toml(path)
  for group, methods in values.items():
    checks.require(isinstance(methods, dict), f"{path}: {group}", methods, "a table of methods")
    for method, changes in methods.items():
      _check(f'{path}: [{group}."{method}"]', changes)
  return values


def _check(where: str, changes) -> None:
  checks.require(isinstance(changes, dict), where, changes, "a table of hyperparameters")
  for name, value in changes.items():
    checks.require(name in DEFAULTS, where, name, ", ".join(DEFAULTS))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    checks.require(number, f"{where} {name}", value, "a number")


def of(values: Values, group: str, method: str) -> dict[str, float]:
  """Looks up the hyperparameters of a method under a key.

  Raises:
    BadInput: there are none.
  """
  found = values.get(group, {}).get(method)
  if found is None:
    raise refusal(
      "tuned_on",
      group,
      f'no [{group}."{method}"] in the file of `tuned`; '
      "make experiment NAME=tune_cifar10, and its like for other data sets, chooses such values",
    )
  return {name: float(value) for name, value in found.items()}


def write(path: Path, group: str, methods: dict[str, dict[str, float]]) -> None:
  """Writes the hyperparameters of all methods under a key, those that are not the default."""
  lines = []
  group = group if group.isidentifier() else f'"{group}"'
  for method, values in methods.items():
    lines.append(f'[{group}."{method}"]')
    lines += [f"{k} = {float(v):g}" for k, v in sorted(values.items()) if v != DEFAULTS[k]]
    lines.append("")
  files.write(path, "\n".join(lines).rstrip())
