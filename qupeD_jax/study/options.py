"""The options of a federated experiment, and what is allowed."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qupeD_jax import checks, models

Aggregate = Literal["mean", "weighted_mean", "median", "trimmed_mean", "clipped_mean"]
Bits = Annotated[tuple[int, ...], tyro.conf.arg(metavar="BITS")]


@dataclasses.dataclass(frozen=True)
class Federated:
  """What every federated experiment has: data, clients, networks and the amount of work."""

  dataset: str = "digits"
  """Data set: digits, mnist, fashion_mnist, cifar10, cifar100, emnist/NAME or femnist, or a file
  *.npz of one's own with x_train, y_train, x_test and y_test."""
  data_dir: str | None = None
  """Folder that holds the data sets; by default TFDS's own."""
  downsample: int = 1
  """Average images over squares of so many pixels, for runs on a small machine."""
  out: str | None = None
  """Folder for the results; by default results/NAME."""
  minutes: float | None = None
  """Save and stop after so many; the same command goes on from there."""
  checkpoint_every: int | None = None
  """Rounds between saves that a run goes on from if it is cut off; by default one about every
  minute, at an evaluation; 0 saves only when the run is told to stop."""
  fresh: bool = False
  """Begin anew, whatever the results folder holds."""

  devices: int | None = None
  """Devices, of each process, that share the clients; by default one, or one for each core of a CPU
  where all clients take part in every round."""
  coordinator: str | None = None
  """Where several processes meet: HOST:PORT of the first, or auto if SLURM or a TPU pod tells."""
  processes: int | None = None
  """How many there are; all are started with the same command but for --process."""
  process: int | None = None
  """Number of this process, from 0."""
  clients_per_step: int | None = None
  """Clients of a cohort that a device trains side by side, to save memory; by default all."""

  clients: int = 20
  """Number of clients."""
  partition: Literal["by_class", "dirichlet", "iid", "natural"] = "by_class"
  """How training rows are dealt to clients."""
  classes_per_client: int = 3
  """Classes that each client holds (partition by_class)."""
  alpha: float = 0.5
  """Concentration of the classes (partition dirichlet)."""
  train_share: float = 1.0
  """Share of its training rows, class by class, that a client keeps."""
  validation: float = 0.1
  """Share of its training rows that a client validates on."""
  max_test_rows: int | None = None
  """Most test rows of a client; a random choice where it would have more."""
  min_test_rows: int | None = None
  """Leave out writers who have fewer test rows (partition natural)."""

  models: tuple[str, ...] = ("mlp",)
  """Architectures; clients are dealt over them, the first is the server's."""
  input_std: tuple[float, ...] = ()
  """What the pixels of each channel are divided by; by default their standard deviation."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """What the networks compute with; parameters stay float32."""
  bits: Bits = (1, 2, 4, 32)
  """Precisions of the mixed federation, dealt over the clients: 1 to 8, or 32 (full precision)."""

  rounds: int = 60
  """Rounds in all, fine-tuning among them."""
  finetune_rounds: int = 12
  """Rounds at the end in which quantised models are frozen and fine-tuned, and FedAvg's local."""
  local_steps: int = 10
  """Steps of a client in a round."""
  batch_size: int = 16
  """Examples of a step."""
  partial_batches: bool = False
  """Let a client with fewer rows than a batch train on all of its rows in each step."""
  participation: float = 1.0
  """Share of the clients that train in a round."""
  aggregate: Aggregate | None = None
  """How the server combines what clients send; by default as the method's paper has it."""
  trim: float = 0.1
  """Share of the clients that the trimmed mean leaves out at either end."""
  clip_norm: float = 1.0
  """L2 norm that no update exceeds in the clipped mean."""
  noise_multiplier: float = 0.0
  """Gaussian noise on the sum of the clipped updates, as a multiple of their bound."""
  noise_seed: int | None = None
  """Seed of runs with noise, for tests: whoever knows it can take the noise away, and no epsilon is
  reported. By default it is secret, new at every start and kept nowhere."""
  delta: float | None = None
  """Of the (epsilon, delta) that the noise is worth; by default 1 / clients^1.1."""
  dropout: float = 0.0
  """Probability that a client is lost in a round; not in local training, which sends nothing."""
  stragglers: float = 0.0
  """Probability that a client does fewer steps in a round, any number; likewise."""
  corrupt: int = 0
  """Number of clients that send something else than they should."""
  corruption: Literal["nan", "noise", "sign"] = "sign"
  """What they send: NaN, noise, or the opposite of their update, four times."""
  store: Literal["device", "host", "disk"] = "device"
  """Where clients lie that do not train: with the others on the device, in the host's memory, or in
  a file in the results folder. For more clients than the device holds."""
  augment: bool = False
  """Flip the images and crop them from padded ones, at random."""
  simultaneous: bool = False
  """Take all of QuPeD's gradients at the models before the step: cheaper, and not the paper's."""
  own_statistics: bool = False
  """Score the server's model with each client's own batch statistics, not with their average."""
  inner_steps: int = 5
  """Gradient steps that pFedMe takes on each batch."""
  averaging_share: float = 0.6
  """Share of the rounds that is FedAvg, in QuPeD+ and FedAvg + codebook, which start from it."""
  eval_every: int = 5
  """Rounds between evaluations on the validation rows."""

  seed: int = 0
  """First seed: of the data's division, the weights and the batches."""
  seeds: int = 3
  """Number of seeds, counted up from the first; they train side by side."""


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
  """What is tuned, method by method."""

  lambda_p: float = 0.5
  """Weight of distillation against cross-entropy."""
  global_lambda_p: float = 0.5
  """The same for FML's global model."""
  temperature: float = 1.0
  """Temperature of the distillation."""
  weights_rate: float = 0.1
  """Step size of the personal weights."""
  global_rate: float = 0.1
  """Step size of the global model that personal ones learn with."""
  fedavg_rate: float = 0.1
  """Step size of FedAvg, FedProx and Per-FedAvg."""
  global_loss_weight: float = 0.0
  """Weight of the global model's own cross-entropy; 0 is the paper's QuPeD."""
  straight_through: float = 0.5
  """Share of the gradient taken at the quantised weights, in QuPeD+ and FedAvg + codebook."""
  penalty: float = 0.1
  """Weight of the pull toward the global model, in Ditto, pFedMe and QuPeL."""
  mu: float = 0.01
  """Weight of FedProx's pull toward the server's model."""
  inner_rate: float = 0.02
  """Step size of Per-FedAvg's inner step, the one that personalises."""
  centers_rate: float = 1e-4
  """Step size of the centers; their gradients are sums over entries, so large tensors want less."""
  centers_clip: float = 10.0
  """Bound of every center's gradient, as in the authors' recipe."""
  proximity: float = 1e-3
  """Weight of the pull toward the centers at the end of training, to which it grows from 0."""
  finetune_rate: float = 0.01
  """Step size of fine-tuning after quantisation."""
  fedavg_finetune_rate: float = 0.05
  """Step size of local training after FedAvg."""
  final_rate: float = 0.08
  """Share of the step sizes that is left at the end of training, on a cosine from 1."""


@dataclasses.dataclass(frozen=True)
class Options(Hyperparameters, Federated):
  """Options of an experiment in which all methods share their hyperparameters."""


def check(options: Federated) -> None:
  """Raises BadInput for the first option that is out of range; needs no data."""
  if isinstance(options, Hyperparameters):
    check_hyperparameters(options)
  at_least = {
    "clients": 1, "classes_per_client": 1, "rounds": 1, "finetune_rounds": 0, "local_steps": 1,
    "batch_size": 1, "inner_steps": 1, "downsample": 1, "eval_every": 1, "seed": 0, "seeds": 1,
    "corrupt": 0,
  }  # fmt: skip
  for name, low in at_least.items():
    checks.at_least(name, getattr(options, name), low)
  checks.positive("alpha", options.alpha)
  if options.clients_per_step is not None:
    checks.at_least("clients_per_step", options.clients_per_step, 1)
  if options.minutes is not None:
    checks.positive("minutes", options.minutes)
  if options.checkpoint_every is not None:
    checks.at_least("checkpoint_every", options.checkpoint_every, 0)
  # Keys take 32 bits of a seed.
  last = options.seed + options.seeds - 1
  checks.require(last < 2**32, "seed", options.seed, f"below 2^32, with {options.seeds} seeds")
  for name in ("participation", "averaging_share", "train_share"):
    checks.fraction(name, getattr(options, name), closed=True)
  if options.min_test_rows is not None:
    natural = options.partition == "natural"
    allowed = f"None with `partition` {options.partition}: there are no writers"
    checks.require(natural, "min_test_rows", options.min_test_rows, allowed)
  _check_faults(options)
  _check_store(options)
  checks.bits("bits", options.bits)
  checks.require(len(options.bits) > 0, "bits", "()", "at least one precision")
  fits = options.finetune_rounds < options.rounds
  allowed = f"below `rounds` {options.rounds}"
  checks.require(fits, "finetune_rounds", options.finetune_rounds, allowed)
  checks.require(len(options.models) > 0, "models", "()", " or ".join(models.NAMES))
  for name in ("data_dir", "out"):
    _check_folder(name, getattr(options, name), must_exist=name == "data_dir")


def _check_store(options: Federated) -> None:
  if options.store == "device":
    return
  where = f"with `store` {options.store}"
  allowed = f"below 1 {where}: only those that train are on the device"
  checks.require(options.participation < 1, "participation", options.participation, allowed)
  saved = options.minutes is None and not options.checkpoint_every
  name = "checkpoint_every" if options.minutes is None else "minutes"
  value = options.checkpoint_every if options.minutes is None else options.minutes
  checks.require(saved, name, value, f"None {where}: what lies there is not saved")
  checks.require(options.devices in (None, 1), "devices", options.devices, f"1 {where}")


def _check_faults(options: Federated) -> None:
  checks.fraction("dropout", options.dropout, closed=False)
  checks.share("stragglers", options.stragglers)
  fits = options.stragglers == 0 or options.local_steps > 1
  checks.require(fits, "stragglers", options.stragglers, "0 with `local_steps` 1")
  fits, allowed = options.corrupt <= options.clients, f"at most `clients` {options.clients}"
  checks.require(fits, "corrupt", options.corrupt, allowed)
  checks.require(0 <= options.trim < 0.5, "trim", options.trim, "in [0, 0.5)")
  checks.positive("clip_norm", options.clip_norm)
  noise = options.noise_multiplier
  checks.non_negative("noise_multiplier", noise)
  fits = noise == 0 or options.aggregate == "clipped_mean"
  checks.require(fits, "noise_multiplier", noise, "0 without `aggregate` clipped_mean")
  if options.noise_seed is not None:
    checks.at_least("noise_seed", options.noise_seed, 0)
  if options.delta is not None:
    checks.require(0 < options.delta < 1, "delta", options.delta, "in (0, 1)")


def check_hyperparameters(values: Hyperparameters) -> None:
  """Raises BadInput for the first hyperparameter that is out of range."""
  positive = ("weights_rate", "global_rate", "centers_rate", "centers_clip", "finetune_rate",
              "fedavg_rate", "fedavg_finetune_rate", "temperature", "penalty")  # fmt: skip
  for name in positive:
    checks.positive(name, getattr(values, name))
  for name in ("global_loss_weight", "proximity", "mu", "inner_rate"):
    checks.non_negative(name, getattr(values, name))
  for name in ("lambda_p", "global_lambda_p"):
    checks.fraction(name, getattr(values, name), closed=False)
  checks.share("straight_through", values.straight_through)
  checks.fraction("final_rate", values.final_rate, closed=True)


def _check_folder(name: str, path: str | None, must_exist: bool) -> None:
  if path is None:
    return
  full = Path(path).expanduser().absolute()
  nearest = next(p for p in (full, *full.parents) if p.exists())
  holds = nearest.is_dir() and (nearest == full or not must_exist)
  allowed = "a folder that exists" if must_exist else "a folder, which is made if need be"
  checks.require(holds, name, path, allowed)


# The paper's scale, in rounds of 10 steps: 250 epochs of CIFAR-10, 50 epochs of MNIST.
_PAPER = {"models": ("cnn1",), "clients": 50, "batch_size": 50}
_LONG = {"rounds": 500, "finetune_rounds": 100, "eval_every": 50}
_SHORT = {"rounds": 110, "finetune_rounds": 22, "eval_every": 11}
PAPER_CIFAR10 = _PAPER | _LONG | {"dataset": "cifar10"}
PAPER_MNIST = _PAPER | _SHORT | {"dataset": "mnist"}
