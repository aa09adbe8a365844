"""The same federation in simulation, and how far what the nodes and the server hold is from it."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from federation_app.quped_app import checkpoint, node
from federation_app.quped_app.options import Settings
from qupeD_jax.study import methods, rivals, training
from qupeD_jax.study.options import Options
from qupeD_jax.types import PyTree

from .deal import Dealt

JOBS = {
  "quped": functools.partial(methods.quped_quantised, mixed=True),
  "fedavg": methods.federated_averaging,
  "ditto": rivals.ditto_job,
  "local": functools.partial(methods.local_quantised, mixed=True),
}
TOLERANCE = 1e-5


class Simulated(NamedTuple):
  """What a simulation ends with."""

  variables: PyTree  # w; {} in a method without a server
  accuracy: dict[str, np.ndarray]  # "personal", "global" -> [clients]
  seconds: float  # of its rounds, all clients together


class Difference(NamedTuple):
  """Largest differences between a federation and its simulation."""

  w: float
  accuracy: float


def simulate(method: str, options: Options, dealt: Dealt) -> Simulated:
  """Trains the clients of a dealt data set by an experiment's job, all of them in one program."""
  job = JOBS[method](options, dealt.federation)
  trained = training.train(job, lambda *chunk: None)
  scores = training.score_tests(job, trained)
  server = jax.tree.map(lambda leaf: np.asarray(leaf[0]), trained.state.server)
  accuracy = {name: values[0] for name, values in scores.items()}
  return Simulated(server, accuracy, trained.seconds)


def difference(settings: Settings, folder: Path, simulated: Simulated) -> Difference:
  """Compares what lies in the server's folder after a run with a simulation."""
  held = checkpoint.load(folder, node.about_run(settings))
  pairs = zip(jax.tree.leaves(held.variables), jax.tree.leaves(simulated.variables), strict=True)
  w = max((float(np.abs(ours - theirs).max()) for ours, theirs in pairs), default=0.0)
  clients = json.loads((folder / "clients.json").read_text())["clients"]
  gaps = [
    abs(c["right"][name] / c["tested"] - simulated.accuracy[name][c["client"]])
    for c in clients
    for name in node.scored(settings)
  ]
  missing = len(clients) < len(simulated.accuracy["personal"])
  return Difference(w, float("inf") if missing else max(gaps))
