"""FedAvg and QuPeD at 2 bits where clients are lost or send garbage, by how the server combines.

make experiment NAME=faults
make experiment NAME=faults ARGS="--topics dropout sign"

Digits, 50 clients of 3 classes: a share of the clients is lost or slow in each round, or some send
NaN, noise, or the opposite of their update four times over; and noise on a clipped mean, for
privacy. What came of it is in docs/reproduction.md.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any, get_args

from experiments import quickstart
from qupeD_jax import checks
from qupeD_jax.study import methods, study
from qupeD_jax.study.jobs import MakeJob, changed, with_values
from qupeD_jax.study.options import Aggregate, replaced, withheld
from qupeD_jax.study.options import Options as Shared

METHODS = {
  "FedAvg": methods.federated_averaging,
  "QuPeD 2 bit": partial(methods.quped_quantised, bits=(2,)),
}
LOST = {f"{share:.0%} lost": {"dropout": share} for share in (0.0, 0.1, 0.3)}
SLOW = {"30% slow": {"stragglers": 0.3}}
CORRUPT = (2, 10)  # clients, in every round the same
NOISE = (0.0, 1.0, 3.0, 10.0)  # multiples of the bound


# What a topic sets, and what nothing here would take.
WITHHELD = ("aggregate", "noise_multiplier", "bits", "fedavg_finetune_rate", *quickstart.OTHERS)


@dataclasses.dataclass(frozen=True)
class Options(withheld(Shared, *WITHHELD)):
  """Faults of clients, and how a server combines what comes."""

  topics: tuple[str, ...] = ()
  """What is studied: dropout, nan, noise, sign, privacy; by default all."""


DEFAULTS = replaced(
  Options(),
  clients=50,
  validation=0.2,
  batch_size=8,
  partial_batches=True,
  lambda_p=0.3,
  temperature=2.0,
  weights_rate=0.2,
  global_rate=0.2,
  fedavg_rate=0.4,
  trim=0.2,
  eval_every=20,
)


# --- topics: the jobs of one study


def dropout() -> list[MakeJob]:
  """Clients that are lost in a round or do less, beside training that needs no server."""
  return [partial(methods.local_quantised, bits=(2,)), *_every_way({}, LOST | SLOW)]


def corruption(kind: str) -> list[MakeJob]:
  """Clients that send something else than they should."""
  return _every_way({"corruption": kind}, {f"{n} {kind}": {"corrupt": n} for n in CORRUPT})


def privacy() -> list[MakeJob]:
  """Noise on the clipped mean."""
  changes = {f"noise {multiplier:g}": {"noise_multiplier": multiplier} for multiplier in NOISE}
  return [_job(method, "clipped_mean", {}, changes) for method in METHODS]


TOPICS = {
  "dropout": dropout,
  **{kind: partial(corruption, kind) for kind in ("nan", "noise", "sign")},
  "privacy": privacy,
}


def _every_way(values: dict[str, Any], changes: dict[str, dict[str, float]]) -> list[MakeJob]:
  ways = itertools.product(METHODS, get_args(Aggregate))
  return [_job(method, aggregate, values, changes) for method, aggregate in ways]


def _job(method: str, aggregate: str, values: dict, changes: dict) -> MakeJob:
  make = with_values(METHODS[method], {"aggregate": aggregate, **values})
  return changed(make, {f"{method} {aggregate}, {name}": v for name, v in changes.items()})


def main(options: Options) -> tuple[study.Outcome, ...]:
  """Runs the experiment: every topic has a folder of its own below results/faults."""
  for topic in options.topics:
    checks.require(topic in TOPICS, "topics", topic, ", ".join(TOPICS))
  folder = study.folder_of("faults", options)
  studies = [
    (replaced(options, out=str(folder / topic)), TOPICS[topic]())
    for topic in options.topics or TOPICS
  ]
  return study.run_all("faults", studies, keep_going=True)
