"""Options: those of a run, alike everywhere, from its run config; a node's from its node config.

Flower's configs hold numbers, texts and booleans, no lists: several numbers are a text with spaces
between them, and `bits`, a list in an experiment, is one number in every node's own config.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from qupeD_jax import checks, models
from qupeD_jax.checks import BadInput, require
from qupeD_jax.command_line import nearest
from qupeD_jax.study import options as study
from qupeD_jax.study.options import Options, replaced
from qupeD_jax.types import Model

METHODS = ("quped", "fedavg", "ditto", "local")


class Settings(NamedTuple):
  """What a run's config says."""

  options: Options  # an experiment's
  method: str  # one of METHODS
  model: str  # the server's architecture
  inputs: dict[str, Any]  # what `models.make` has to know of the data
  nodes: int  # that the first round waits for
  min_clients: int  # that have to answer in a round
  timeout: float  # seconds in which they have to


class Node(NamedTuple):
  """What a node's config says."""

  client: int  # its number, of which random streams follow
  bits: int  # 1 to 8, or 32 for full precision
  model: str  # the client's architecture
  rows: Path  # a file *.npz with x_train, y_train, x_test and y_test
  folder: Path  # what the client keeps


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_OWN = {"method": str, "model": str, "num_classes": int, "image_shape": str, "mean": str,
        "std": str, "nodes": int, "min_clients": int, "timeout": float}  # fmt: skip
_NODE = {"client": int, "bits": int, "model": str, "rows": str, "folder": str}
_MOST_CLIENTS = 2**31 - 1  # ids are int32


def read(run_config: Mapping[str, Any]) -> Settings:
  """Reads a run's config.

  Args:
    run_config: as Flower has it, of the app's defaults and what overrides them.

  Raises:
    BadInput: an option is unknown, of another type or out of range.
  """
  known = _OWN | {name: type(value) for name, value in study.flat(Options()).items()}
  known |= {"finetune_rounds": int, "aggregate": str, "out": str}
  given = _typed(run_config, known)
  own = {name: given.pop(name) for name in _OWN}
  given["aggregate"] = given["aggregate"] or None
  options = replaced(Options(), **given)
  require(own["method"] in METHODS, "method", own["method"], ", ".join(METHODS))
  known = (*get_args(study.Aggregate), None)
  aggregate = options.server.aggregate
  require(aggregate in known, "aggregate", aggregate, ", ".join(known[:-1]))
  study.check(options)
  checks.at_least("nodes", own["nodes"], 1)
  checks.whole("min_clients", own["min_clients"], 1, own["nodes"])
  checks.positive("timeout", own["timeout"])
  inputs = {
    "num_classes": own["num_classes"],
    "image_shape": _numbers("image_shape", own["image_shape"], int),
    "mean": _numbers("mean", own["mean"], float),
    "std": _numbers("std", own["std"], float),
    "dtype": options.networks.dtype,
  }
  named = {name: own[name] for name in ("method", "model", "nodes", "min_clients", "timeout")}
  return Settings(options=options, inputs=inputs, **named)


def read_node(node_config: Mapping[str, Any]) -> Node:
  """Reads a node's config, such as `client=0 bits=2 model="mlp" rows="r.npz" folder="kept"`.

  Raises:
    BadInput: an entry is missing, unknown, of another type or out of range.
  """
  given = _typed({k: v for k, v in node_config.items() if k != "record"}, _NODE)
  for name in _NODE:
    if name not in given:
      raise BadInput(f"{name}: missing in the node's config; needed are {', '.join(_NODE)}")
  checks.whole("client", given["client"], 0, _MOST_CLIENTS)
  checks.bits("bits", (given["bits"],))
  require(given["model"] in models.NAMES, "model", given["model"], ", ".join(models.NAMES))
  rows, folder = (checks.place(name, given.pop(name)) for name in ("rows", "folder"))
  return Node(**given, rows=rows, folder=folder)


def network(settings: Settings, name: str) -> Model:
  """Makes a network for the run's images.

  Raises:
    BadInput: there is none of that name, or it cannot take such images.
  """
  inputs = dict(settings.inputs)
  for name_of, values in (("mean", inputs["mean"]), ("std", inputs["std"])):
    inputs[name_of] = values[0] if len(values) == 1 else values
  return models.make(name, **inputs)


def _typed(config: Mapping[str, Any], known: Mapping[str, type]) -> dict[str, Any]:
  """Requires every entry to be known and of its type; a whole number will do for a number."""
  found = {}
  for name, value in config.items():
    if name not in known:
      raise BadInput(f"{name}: belongs to no option{nearest(name, known)}")
    kind = known[name]
    value = float(value) if kind is float and type(value) is int else value
    require(type(value) is kind, name, value, _KINDS.get(kind, "as it is"))
    found[name] = value
  return found


def _numbers(name: str, text: str, kind: type) -> tuple:
  """Reads several numbers with spaces between."""
  try:
    values = tuple(kind(word) for word in text.split())
  except ValueError:
    values = ()
  require(bool(values), name, text, f"{_KINDS[kind]}, or several with spaces between")
  return values
