"""Deals a data set to clients as an experiment does, and writes each client's rows to a file."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qupeD_jax.data import cohort
from qupeD_jax.io import files
from qupeD_jax.study import federation
from qupeD_jax.study.federation import Federation
from qupeD_jax.study.options import Options


class Dealt(NamedTuple):
  """What is to be told to the server and to the nodes."""

  run_config: dict[str, Any]  # what the images are
  node_configs: tuple[dict[str, Any], ...]  # client, bits, model and rows of each


def deal(options: Options, folder: Path) -> Dealt:
  """Writes the rows of every client of an experiment.

  Args:
    options: of the experiment, its first seed counts.
    folder: where to write, made where it is missing.

  Returns:
    The configs that go with them. Validation rows are written nowhere.

  Raises:
    BadInput: the data cannot be had, the options do not fit them, or a file cannot be written.
  """
  dealt = federation.load(options)
  bits = cohort.assign_bits(options.bits, dealt.num_clients)
  named = zip(dealt.groups, dealt.names, strict=True)
  models = {int(client): name for group, name in named for client in group}
  nodes = []
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  for client in range(dealt.num_clients):
    path = folder / f"client_{client}.npz"
    with files.whole(path) as file:
      np.savez(file, **_rows(dealt, client))
    about = {"client": client, "bits": int(bits[client]), "model": models[client]}
    nodes.append(about | {"rows": str(path.absolute())})
  words = lambda values: " ".join(map(repr, values))
  run_config = {
    "model": dealt.names[0],
    "num_classes": dealt.num_classes,
    "image_shape": words(dealt.train.x.shape[1:]),
    "mean": words(map(float, dealt.mean)),
    "std": words(map(float, dealt.std)),
  }
  return Dealt(run_config, tuple(nodes))


def _rows(dealt: Federation, client: int) -> dict[str, np.ndarray]:
  """Returns a client's training and test rows by the names of an *.npz file."""
  arrays, (split, *_) = {}, dealt.splits
  for part, data, ragged in (("train", dealt.train, split.train), ("test", dealt.test, split.test)):
    rows = ragged.rows[ragged.offsets[client] : ragged.offsets[client + 1]]
    arrays |= {f"x_{part}": data.x[rows], f"y_{part}": data.y[rows]}
  return arrays
