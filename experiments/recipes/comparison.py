"""The full comparison: every method with its own tuned hyperparameters, and what is tried for each.

Rivals that no published table has (MORE) are trained where `only` names them, with the defaults of
their hyperparameters unless the file has values of a search.

Methods whose name has a codebook are tuned at 2 bits; their variants at the precisions of the table
train side by side, with the same values.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from experiments.recipes import tuned
from qupeD_jax import checks
from qupeD_jax.study import methods, rivals, study
from qupeD_jax.study.federation import Federation
from qupeD_jax.study.jobs import Job, MakeJob
from qupeD_jax.study.options import Bits, Division, Federated, Hyperparameters, Options, replaced
from qupeD_jax.types import FULL_PRECISION


class Entry(NamedTuple):
  """A method of the comparison."""

  name: str  # of the variant that is tuned
  make: MakeJob  # the job of the table
  tune: MakeJob  # the job of which configurations are tried: the tuned variant alone
  grid: dict[str, tuple[float, ...]]  # hyperparameter -> what is tried; all products of it


def _quantised(name: str, make: Callable[..., Job], **grid: tuple[float, ...]) -> Entry:
  """A method that the table has at each of its precisions, and that is tuned at 2 bits."""
  return Entry(name, partial(_at_bits, make), partial(make, bits=(TUNED_BITS,)), grid)


def _at_bits(make: Callable[..., Job], options: Options, federation: Federation) -> Job:
  return make(options, federation, bits=options.bits)


def _full(name: str, make: Callable[..., Job], **grid: tuple[float, ...]) -> Entry:
  return _plain(name, partial(make, bits=(FULL_PRECISION,)), **grid)


def _plain(name: str, make: MakeJob, **grid: tuple[float, ...]) -> Entry:
  return Entry(name, make, make, grid)


TUNED_BITS = 2
SLOW, FAST, FASTEST = (0.02, 0.05), (0.05, 0.1), (0.1, 0.2)  # rates
# What QuPeD+ has besides: not tried, but set.
OURS = {"weights_rate": (0.05,), "global_loss_weight": (1.0,), "global_rate": (0.05,)}

ENTRIES = (
  _plain("local", methods.local_training, weights_rate=(0.02, 0.05, 0.1, 0.2)),
  _quantised("local 2 bit", methods.local_quantised, weights_rate=FAST, proximity=(1e-4, 1e-3)),
  _plain("FedAvg", methods.federated_averaging, fedavg_rate=(0.05, 0.1, 0.2, 0.4)),
  _plain("FedProx", rivals.fedprox_job, fedavg_rate=FASTEST, mu=(0.01, 0.1)),
  Entry(
    "FedAvg + fine-tuning",
    partial(_at_bits, methods.averaging_then_local),
    methods.averaging_then_local,
    {"fedavg_rate": FASTEST, "fedavg_finetune_rate": SLOW},
  ),
  _quantised(
    "FedAvg + codebook 2 bit",
    methods.averaging_then_quantised,
    fedavg_rate=FASTEST,
    weights_rate=SLOW,
  ),
  _plain("Per-FedAvg", rivals.per_fedavg_job, fedavg_rate=FASTEST, inner_rate=SLOW),
  _plain("pFedMe", rivals.pfedme_job, weights_rate=FASTEST, penalty=(4.0, 8.0)),
  _plain("Ditto", rivals.ditto_job, weights_rate=FAST, penalty=(0.1, 1.0)),
  _plain("FML", rivals.fml_job, weights_rate=FAST, lambda_p=(0.2, 0.5)),
  _full("QuPeL 32 bit", rivals.qupel_job, weights_rate=FAST, penalty=(0.01, 0.1)),
  _quantised("QuPeL 2 bit", rivals.qupel_job, weights_rate=FAST, penalty=(0.01, 0.1)),
  _full("QuPeD 32 bit", methods.quped_quantised, weights_rate=FAST, lambda_p=(0.2, 0.5)),
  _quantised("QuPeD 2 bit", methods.quped_quantised, weights_rate=FAST, lambda_p=(0.2, 0.5)),
  _full(
    "QuPeD+ 32 bit",
    methods.quped_from_averaging,
    fedavg_rate=FASTEST,
    lambda_p=(0.1, 0.4),
    **OURS,
  ),
  _quantised(
    "QuPeD+ 2 bit",
    methods.quped_from_averaging,
    fedavg_rate=FASTEST,
    lambda_p=(0.1, 0.4),
    **OURS,
  ),
)

MORE = (
  _plain("FedRep", rivals.fedrep_job, fedavg_rate=FASTEST, weights_rate=FAST),
  _plain("FedBN", rivals.fedbn_job, fedavg_rate=(0.05, 0.1, 0.2, 0.4)),
  _plain("SCAFFOLD", rivals.scaffold_job, fedavg_rate=(0.05, 0.1, 0.2, 0.4)),
  _plain("APFL", rivals.apfl_job, fedavg_rate=FASTEST, weights_rate=FAST),
)

# Each QuPeD against the rivals at its own precision.
_FULL = ("local", "FedAvg", "FedProx", "FedAvg + fine-tuning", "Per-FedAvg", "pFedMe", "Ditto")
_FULL += ("FML", "QuPeL 32 bit", *(entry.name for entry in MORE))
_QUANTISED = ("local", "FedAvg + k-means", "FedAvg + codebook", "QuPeL")


def pairs(bits: Sequence[int]) -> dict[str, tuple[str, ...]]:
  """Returns who is compared with whom in a table of quantised models at these precisions."""
  return {
    **{f"{ours} 32 bit": _FULL for ours in ("QuPeD", "QuPeD+")},
    **{
      f"{ours} {b} bit": (*(f"{rival} {b} bit" for rival in _QUANTISED), "FedAvg")
      for b, ours in itertools.product(bits, ("QuPeD", "QuPeD+"))
    },
  }


@dataclasses.dataclass(frozen=True)
class Tuned(Federated):
  """Options of an experiment whose methods have their own hyperparameters, those of a file."""

  tuned: str | None = None
  """File with the hyperparameters, by data set and method; by default experiments/tuned.toml."""
  tuned_on: str | None = None
  """Whose in that file are used: DATASET_MODEL. By default the data set's and the server's model's;
  where there are none CIFAR-10's with that model, or else with CNN1."""


@dataclasses.dataclass(frozen=True)
class MixedBits(Tuned):
  """The same, of an experiment with a federation of mixed precisions."""

  bits: Bits = (1, 2, 4, 32)
  """Precisions of the clients: 1 to 8, or 32 (full precision)."""


@dataclasses.dataclass(frozen=True)
class Divisions(Division):
  """How they are dealt to clients: one division or several."""

  classes_per_client: tuple[int, ...] = (3, 4)
  """Classes that each client holds (partition by_class); a table for every number."""


@dataclasses.dataclass(frozen=True)
class Comparison(Tuned):
  """Options of the comparison of all methods."""

  division: Divisions = Divisions()
  bits: Bits = (2, 1)
  """Precisions of the quantised models, 1 to 8; methods at full precision are there in any case."""
  only: tuple[str, ...] = ()
  """Methods to train, by their names in the file; by default all. FedRep, FedBN, SCAFFOLD and APFL
  only if they are named: theirs are untuned defaults."""
  parts: tuple[str, ...] = ()
  """Folders of finished runs with the same options; their methods are taken over, not trained."""


def run(name: str, options: Comparison) -> tuple[study.Outcome, ...]:
  """Trains all methods, each with its tuned hyperparameters, and compares them.

  Returns:
    What came of it, by the numbers of classes that a client holds.
  """
  for bits in options.bits:
    checks.whole("bits", bits, 1, 8)
  entries = chosen(options.only)
  jobs = [with_tuned(options, entry.name, entry.make) for entry in entries]
  for method in (name for name in options.only if name in untuned(options)):
    print(f"{method}: its hyperparameters are not tuned, but defaults")
  compared = partial(study.among, pairs(options.bits))
  tables = [(table, jobs) for table in _tables(name, options)]
  return study.run_all(name, tables, comparisons=compared, taken=options.parts)


def _tables(name: str, options: Comparison) -> list[Federated]:
  """Returns the options of each table: clients hold so many classes, if they are dealt by class."""
  counts, folder = options.division.classes_per_client, study.folder_of(name, options)
  by_class = options.division.partition == "by_class"
  checks.require(len(counts) > 0, "classes_per_client", "()", "at least one number")
  if len(counts) == 1 or not by_class:
    return [replaced(options, classes_per_client=counts[0])]
  return [
    replaced(options, classes_per_client=count, out=str(folder / f"{count}_classes"))
    for count in counts
  ]


def with_tuned(options: Tuned, method: str, make: MakeJob) -> MakeJob:
  """Makes a job with the hyperparameters of a method in the file that the options name."""
  values = _values(options)
  known = method not in untuned(options)
  found = tuned.of(values, _key(values, options), method) if known else {}

  def made(options: Federated, federation: Federation) -> Job:
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(Federated)}
    return make(Options(**shared, hyper=Hyperparameters(**found)), federation)

  return made


def untuned(options: Tuned) -> tuple[str, ...]:
  """Names those of MORE of which the file knows no hyperparameters."""
  values = _values(options)
  found = values.get(_key(values, options), {})
  return tuple(entry.name for entry in MORE if entry.name not in found)


def _values(options: Tuned) -> tuned.Values:
  return tuned.read(checks.place("tuned", options.tuned or tuned.FILE))


def _key(values: tuned.Values, options: Tuned) -> str:
  return options.tuned_on or _nearest(values, options)


def _nearest(values: tuned.Values, options: Tuned) -> str:
  """Returns the key that comes nearest to what is trained."""
  model = options.networks.models[0]
  keys = (tuned.key(dataset, model) for dataset in (options.data.dataset, "cifar10"))
  return next((key for key in keys if key in values), tuned.key("cifar10", "cnn1"))


def chosen(names: tuple[str, ...]) -> tuple[Entry, ...]:
  """Returns the entries of these names, or ENTRIES; raises BadInput for a name there is not."""
  known = {entry.name: entry for entry in (*ENTRIES, *MORE)}
  for name in names:
    checks.require(name in known, "only", repr(name), ", ".join(map(repr, known)))
  return tuple(known[name] for name in names) if names else ENTRIES


def configurations(grid: dict[str, tuple[float, ...]]) -> list[dict[str, float]]:
  """Returns all products of a grid."""
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
