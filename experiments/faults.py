"""FedAvg and QuPeD at 2 bits where clients are lost or send garbage, by how the server combines.

make experiment NAME=faults
make experiment NAME=faults ARGS="--topics dropout sign"

Digits, 50 clients of 3 classes, three seeds; 50 minutes on two CPU cores (AMD EPYC, busy with other
work as well). Accuracy (%) where a share of the clients is lost in each round, or so many of the 50
send NaN, noise, or the opposite of their update four times over:

                            no fault  30% lost    10 nan   2 noise  10 noise    2 sign   10 sign
  FedAvg mean                   96.3      96.2      96.0      91.2      70.2      81.6  diverges
  FedAvg weighted_mean          96.0      96.1      96.0      92.2      68.9      82.0  diverges
  FedAvg median                 93.5      93.4      91.8      93.5      91.5      92.4      82.2
  FedAvg trimmed_mean           94.9      95.2      94.1      94.7      95.4      94.6      89.6
  FedAvg clipped_mean           95.8      95.5      95.6      95.8      95.5      94.5      81.4
  QuPeD 2 bit mean              96.1      95.9      96.0      95.2      93.2      95.6      67.7
  QuPeD 2 bit weighted_mean      96.0      95.9      96.0      95.4      93.0      95.6      67.4
  QuPeD 2 bit median            95.4      95.3      95.3      95.3      95.3      95.4      94.8
  QuPeD 2 bit trimmed_mean      95.6      95.6      95.6      95.7      95.7      95.6      95.2
  QuPeD 2 bit clipped_mean      96.0      95.9      95.9      96.0      95.8      95.9      94.0

Training alone at 2 bits: 94.5 ± 0.2. docs/reproduction.md has the spreads, and what the noise of a
private mean costs.
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
