"""Deals a data set to clients as an experiment does, and writes each client's rows to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qupeD_jax import checks, models
from qupeD_jax.data import cohort
from qupeD_jax.io import files
from qupeD_jax.study import federation
from qupeD_jax.study.federation import Federation
from qupeD_jax.study.options import Options, replaced


class Dealt(NamedTuple):
  """A federation, and what is to be told to the server and to the nodes."""

  federation: Federation  # as an experiment has it
  run_config: dict[str, Any]  # what the images are
  node_configs: tuple[dict[str, Any], ...]  # client, bits, model and rows of each


def deal(options: Options, names: Sequence[str], folder: Path) -> Dealt:
  """Writes the rows of every client of an experiment; validation rows are written nowhere.

  Args:
    options: of the experiment; its first seed counts, its `bits` are dealt over the clients.
    names: architecture of each client; the first is the server's as well.
    folder: where to write, made where it is missing.

  Raises:
    BadInput: the data cannot be had, the options do not fit them, or a file cannot be written.
  """
  dealt = _grouped(options, names)
  bits = cohort.assign_bits(options.bits, dealt.num_clients)
  nodes = []
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  for client, name in enumerate(names):
    path = folder / f"client_{client}.npz"
    with files.whole(path) as file:
      np.savez(file, **_rows(dealt, client))
    about = {"client": client, "bits": int(bits[client]), "model": name}
    nodes.append(about | {"rows": str(path.absolute())})
  words = lambda values: " ".join(map(repr, values))
  run_config = {
    "model": names[0],
    "num_classes": dealt.num_classes,
    "image_shape": words(dealt.train.x.shape[1:]),
    "mean": words(map(float, dealt.mean)),
    "std": words(map(float, dealt.std)),
  }
  return Dealt(dealt, run_config, tuple(nodes))


def _grouped(options: Options, names: Sequence[str]) -> Federation:
  """Loads an experiment's federation, its clients grouped by the architectures they are given."""
  checks.require(len(names) == options.division.clients, "models", len(names), "one a client")
  dealt = federation.load(replaced(options, models=(names[0],)))
  about = {"num_classes": dealt.num_classes, "image_shape": dealt.train.x.shape[1:]}
  make = lambda name: models.make(name, **about, mean=dealt.mean, std=dealt.std)
  kinds = tuple(dict.fromkeys(names))
  return dealt._replace(
    groups=tuple(np.flatnonzero([name == kind for name in names]) for kind in kinds),
    names=kinds,
    models=tuple(map(make, kinds)),
    flops=dealt.flops * len(kinds),
  )


def _rows(dealt: Federation, client: int) -> dict[str, np.ndarray]:
  """Returns a client's training and test rows by the names of an *.npz file."""
  arrays, (split, *_) = {}, dealt.splits
  for part, data, ragged in (("train", dealt.train, split.train), ("test", dealt.test, split.test)):
    rows = ragged.rows[ragged.offsets[client] : ragged.offsets[client + 1]]
    arrays |= {f"x_{part}": data.x[rows], f"y_{part}": data.y[rows]}
  return arrays
