"""The full comparison: every method with its own tuned hyperparameters, and what is tried for each.

Methods whose name has a codebook are tuned at 2 bits; their 1-bit variants train side by side with
them, with the same values.
"""

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.common import methods, rivals, study, tuned
from experiments.common.federation import Federation
from experiments.common.jobs import Job, MakeJob
from experiments.common.options import Federated, Options
from qupeD_jax import checks


class Entry(NamedTuple):
  """A method of the comparison."""

  name: str  # of the variant that is tuned
  make: MakeJob  # the job of the table
  tune: MakeJob  # the job of which configurations are tried: the tuned variant alone
  grid: dict[str, tuple[float, ...]]  # hyperparameter -> what is tried; all products of it


def _entry(name: str, make: MakeJob, bits: tuple[int, ...], **grid: tuple[float, ...]) -> Entry:
  return Entry(name, partial(make, bits=bits), partial(make, bits=bits[:1]), grid)


def _plain(name: str, make: MakeJob, **grid: tuple[float, ...]) -> Entry:
  return Entry(name, make, make, grid)


LOW = (2, 1)  # bits
RATES = (0.02, 0.05, 0.1)

ENTRIES = (
  _plain("local", methods.local_training, weights_rate=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3)),
  _entry("local 2 bit", methods.local_quantised, LOW, weights_rate=RATES, proximity=(1e-4, 1e-3)),
  _plain("FedAvg", methods.federated_averaging, fedavg_rate=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3)),
  _plain("FedProx", rivals.fedprox_averaging, fedavg_rate=(0.05, 0.1, 0.2), mu=(0.01, 0.1)),
  Entry(
    "FedAvg + fine-tuning",
    partial(methods.averaging_then_local, bits=LOW),
    methods.averaging_then_local,
    {"fedavg_rate": (0.05, 0.1, 0.2), "fedavg_finetune_rate": (0.02, 0.1)},
  ),
  _entry(
    "FedAvg + codebook 2 bit",
    methods.averaging_then_quantised,
    LOW,
    fedavg_rate=(0.1, 0.2),
    weights_rate=RATES,
  ),
  _plain("Per-FedAvg", rivals.meta_averaging, fedavg_rate=(0.05, 0.1, 0.2), inner_rate=(0.02, 0.1)),
  _plain("pFedMe", rivals.moreau_envelopes, penalty=(1.0, 5.0, 15.0), weights_rate=(0.02, 0.1)),
  _plain("Ditto", rivals.near_averaging, weights_rate=RATES, penalty=(0.1, 1.0)),
  _plain("FML", rivals.mutual_learning, weights_rate=RATES, lambda_p=(0.3, 0.6)),
  _entry("QuPeL 32 bit", rivals.weight_space, (32,), weights_rate=RATES, penalty=(0.1, 1.0)),
  _entry("QuPeL 2 bit", rivals.weight_space, LOW, weights_rate=RATES, penalty=(0.1, 1.0)),
  _entry("QuPeD 32 bit", methods.quped_quantised, (32,), weights_rate=RATES, lambda_p=(0.3, 0.6)),
  _entry("QuPeD 2 bit", methods.quped_quantised, LOW, weights_rate=RATES, lambda_p=(0.3, 0.6)),
  _entry(
    "QuPeD+ 32 bit", methods.quped_from_averaging, (32,), weights_rate=RATES, lambda_p=(0.3, 0.6)
  ),
  _entry(
    "QuPeD+ 2 bit", methods.quped_from_averaging, LOW, weights_rate=RATES, lambda_p=(0.3, 0.6)
  ),
)

# Each QuPeD against the rivals at its own precision.
_FULL = ("local", "FedAvg", "FedProx", "FedAvg + fine-tuning", "Per-FedAvg", "pFedMe", "Ditto")
_FULL += ("FML", "QuPeL 32 bit")
_QUANTISED = ("local", "FedAvg + k-means", "FedAvg + codebook", "QuPeL")
COMPARISONS = {
  **{f"{ours} 32 bit": _FULL for ours in ("QuPeD", "QuPeD+")},
  **{
    f"{ours} {bits} bit": (*(f"{rival} {bits} bit" for rival in _QUANTISED), "FedAvg")
    for bits, ours in itertools.product(LOW, ("QuPeD", "QuPeD+"))
  },
}


@dataclasses.dataclass(frozen=True)
class Comparison(Federated):
  """A comparison in which every method has its own hyperparameters, those of a file."""

  tuned: str = str(tuned.FILE)
  """File with the hyperparameters of every method, by data set."""
  only: tuple[str, ...] = ()
  """Methods to train, by their names in that file; by default all."""


def run(name: str, options: Comparison) -> Path:
  """Trains all methods, each with its tuned hyperparameters, and compares them."""
  values = tuned.read(Path(options.tuned).expanduser())
  jobs = [
    with_hyperparameters(entry.make, tuned.of(values, options.dataset, entry.name))
    for entry in chosen(options.only)
  ]
  return study.run(name, options, jobs, comparisons=COMPARISONS)


def chosen(names: tuple[str, ...]) -> tuple[Entry, ...]:
  """Returns the entries of these names, or all; raises BadInput for a name there is not."""
  known = {entry.name: entry for entry in ENTRIES}
  for name in names:
    checks.require(name in known, "--only", repr(name), ", ".join(map(repr, known)))
  return tuple(known[name] for name in names or known)


def with_hyperparameters(make: MakeJob, values: dict[str, float]) -> MakeJob:
  """Completes options that have no hyperparameters with given ones."""

  def made(options: Federated, federation: Federation) -> Job:
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Federated)}
    return make(Options(**shared, **values), federation)

  return made


def configurations(grid: dict[str, tuple[float, ...]]) -> list[dict[str, float]]:
  """Returns all products of a grid."""
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
