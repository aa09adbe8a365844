"""The options of an experiment, in groups by what they are of, and what is allowed.

An experiment's options are a frozen dataclass of the groups that it uses. On the command line and
in config.json every option has its own name alone; `replaced` and `flat` need no groups either. An
option that plays no part in an experiment is withheld from it (`withheld`), and one that plays none
beside the others is refused (`check_effect`).
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from qupeD_jax import checks, command_line, models

Aggregate = Literal["mean", "weighted_mean", "median", "trimmed_mean", "clipped_mean"]
Bits = Annotated[tuple[int, ...], tyro.conf.arg(metavar="BITS")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"{{{','.join(models.NAMES)}}}")]
MOST = 2**31 - 1  # of anything counted: steps and rows are int32
MOST_SEEDS = 1_000  # runs of one program


@dataclasses.dataclass(frozen=True)
class Run:
  """Where results go, how long it runs and with which seeds."""

  out: str | None = None
  """Folder for the results; by default results/NAME."""
  minutes: float | None = None
  """Save and stop after so many; the same command goes on from there."""
  checkpoint_every: int | None = None
  """Rounds between saves that a run goes on from if it is cut off; by default one about every
  minute, at an evaluation; 0 saves only when the run is told to stop."""
  fresh: bool = False
  """Begin anew, whatever the results folder holds."""
  tensorboard: bool = False
  """Write events for TensorBoard as well, below the results folder."""
  eval_every: int | None = None
  """Rounds between evaluations on the validation rows; by default a tenth of all."""
  seed: int = 0
  """First seed: of the data's division, the weights and the batches."""
  seeds: int = 3
  """Number of seeds, counted up from the first; they train side by side."""


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Devices and processes that share the clients."""

  devices: int | None = None
  """Devices, of each process, that share the clients; by default one, or one for each core of a
  CPU."""
  coordinator: str | None = None
  """Where several processes meet: HOST:PORT of the first, or auto if SLURM or a TPU pod tells."""
  processes: int | None = None
  """How many there are; all are started with the same command but for --process."""
  process: int | None = None
  """Number of this process, from 0."""
  join_timeout: int = 100
  """Seconds in which all processes must have come."""
  clients_per_step: int | None = None
  """Clients of a cohort that a device trains side by side, to save memory; by default all, on a CPU
  as many as are fastest."""
  store: Literal["device", "host", "disk"] = "device"
  """Where clients lie that do not train: with the others on the device, in the host's memory, or in
  a file in the results folder. For more clients than the device holds."""


@dataclasses.dataclass(frozen=True)
class Data:
  """Which images."""

  dataset: str = "digits"
  """Data set: digits, mnist, fashion_mnist, cifar10, cifar100, emnist/NAME or femnist, or a file
  *.npz of one's own with x_train, y_train, x_test and y_test."""
  data_dir: str | None = None
  """Folder that holds the data sets; by default TFDS's own."""
  downsample: int = 1
  """Average images over squares of so many pixels, for runs on a small machine."""


@dataclasses.dataclass(frozen=True)
class Division:
  """How they are dealt to clients."""

  clients: int = 20
  """Number of clients."""
  new_clients: int | None = None
  """The last so many of them take part in no round: each starts from the server's trained model, is
  fine-tuned alone for the rounds of fine-tuning, and scored; by default none."""
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


@dataclasses.dataclass(frozen=True)
class Networks:
  """What is trained."""

  models: Names = ("mlp",)
  """Architectures; clients are dealt over them, the first is the server's."""
  input_std: tuple[float, ...] = ()
  """What the pixels of each channel are divided by; by default their standard deviation."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """What the networks compute with; parameters stay float32."""


@dataclasses.dataclass(frozen=True)
class Work:
  """How much is trained, and on what."""

  rounds: int = 60
  """Rounds in all, fine-tuning among them."""
  finetune_rounds: int | None = None
  """Rounds at the end in which quantised models are frozen and fine-tuned, and FedAvg's local; by
  default a fifth of all."""
  local_steps: int = 10
  """Steps of a client in a round."""
  batch_size: int = 16
  """Examples of a step."""
  partial_batches: bool = False
  """Let a client with fewer rows than a batch train on all of its rows in each step."""
  augment: bool = False
  """Flip the images and crop them from padded ones, at random."""


@dataclasses.dataclass(frozen=True)
class Server:
  """Who takes part in a round, and how the server combines what comes."""

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
  own_statistics: bool = False
  """Score the server's model with each client's own batch statistics, not with their average."""


@dataclasses.dataclass(frozen=True)
class Faults:
  """Clients that fail."""

  dropout: float = 0.0
  """Probability that a client is lost in a round; not in local training, which sends nothing."""
  stragglers: float = 0.0
  """Probability that a client does fewer steps in a round, any number; likewise."""
  corrupt: int = 0
  """Number of clients that send something else than they should."""
  corruption: Literal["nan", "noise", "sign"] = "sign"
  """What they send: NaN, noise, or the opposite of their update, four times."""


@dataclasses.dataclass(frozen=True)
class Variants:
  """Forms of a method."""

  simultaneous: bool = False
  """Take all of QuPeD's gradients at the models before the step: cheaper, and not the paper's."""
  inner_steps: int = 5
  """Gradient steps that pFedMe takes on each batch."""
  averaging_share: float = 0.6
  """Share of the rounds that is FedAvg, in QuPeD+ and FedAvg + codebook, which start from it and
  are frozen for at most half of those that are left; 0 has them start from drawn weights."""


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
  """Step size of FedAvg, FedProx, Per-FedAvg, FedRep's body, FedBN and SCAFFOLD."""
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
class Federated:
  """What every federated experiment has."""

  run: Run = Run()
  hardware: Hardware = Hardware()
  data: Data = Data()
  division: Division = Division()
  networks: Networks = Networks()
  work: Work = Work()
  server: Server = Server()
  faults: Faults = Faults()
  variants: Variants = Variants()
  bits: tyro.conf.Fixed[Bits] = (32,)
  """Precisions of the mixed federation, dealt over the clients: 1 to 8, or 32 (full precision)."""


@dataclasses.dataclass(frozen=True)
class Options(Federated):
  """Options of an experiment in which all methods share their hyperparameters."""

  hyper: Hyperparameters = Hyperparameters()
  bits: Bits = (1, 2, 4, 32)
  """Precisions of the mixed federation, dealt over the clients: 1 to 8, or 32 (full precision)."""


# --- options by their names


def flat(options: Any) -> dict[str, Any]:
  """Returns what can be chosen, by option, wherever it is nested."""
  return {name: value_of(options, name) for name in command_line.leaves(type(options))}


def value_of(options: Any, name: str) -> Any:
  """Returns the value of an option, wherever it is nested.

  >>> value_of(Options(), "lambda_p")
  0.5
  """
  if hasattr(options, name) and not dataclasses.is_dataclass(getattr(options, name)):
    return getattr(options, name)
  return next(getattr(group, name) for group in _groups(options).values() if hasattr(group, name))


def replaced(options: Any, **values: Any) -> Any:
  """Returns options with other values, wherever they are nested.

  >>> replaced(Options(), rounds=7).work.rounds
  7
  """
  changes = {}
  for name, group in _groups(options).items():
    own = {field.name for field in dataclasses.fields(group)} & values.keys()
    if own:
      changes[name] = dataclasses.replace(group, **{option: values[option] for option in own})
      values = {option: value for option, value in values.items() if option not in own}
  return dataclasses.replace(options, **changes, **values)


def withheld(kind: type, *names: str) -> type:
  """Makes a kind of options in which some cannot be chosen: they keep their defaults."""
  hidden = []
  for field in dataclasses.fields(kind):
    default = field.default
    if field.name in names:
      hidden.append((field.name, tyro.conf.Fixed[field.type], default))
    elif dataclasses.is_dataclass(default) and (own := _fields(default) & set(names)):
      group = withheld(type(default), *own)
      hidden.append((field.name, group, group(**vars(default))))
  made = dataclasses.make_dataclass(kind.__name__, hidden, bases=(kind,), frozen=True)
  made.__doc__, made.__module__ = kind.__doc__, kind.__module__
  return made


def settled(options: Any) -> Any:
  """Gives the options that follow others their values."""
  last, every = options.work.finetune_rounds, options.run.eval_every
  return replaced(
    options,
    finetune_rounds=options.work.rounds // 5 if last is None else last,
    eval_every=max(1, options.work.rounds // 10) if every is None else every,
  )


def _groups(options: Any) -> dict[str, Any]:
  fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
  return {name: value for name, value in fields.items() if dataclasses.is_dataclass(value)}


def _fields(group: Any) -> set[str]:
  return {field.name for field in dataclasses.fields(group)}


# --- what is allowed


class Needs(NamedTuple):
  """What an option needs of another one to play a part."""

  option: str
  holds: Callable[[Any], bool]


NEEDS = {
  "alpha": Needs("partition", lambda value: value == "dirichlet"),
  "classes_per_client": Needs("partition", lambda value: value == "by_class"),
  "clip_norm": Needs("aggregate", lambda value: value == "clipped_mean"),
  "corruption": Needs("corrupt", lambda value: value > 0),
  "data_dir": Needs("dataset", lambda value: value != "digits" and not value.endswith(".npz")),
  "delta": Needs("noise_multiplier", lambda value: value > 0),
  "join_timeout": Needs("coordinator", lambda value: value is not None),
  "min_test_rows": Needs("partition", lambda value: value == "natural"),
  "noise_seed": Needs("noise_multiplier", lambda value: value > 0),
  "trim": Needs("aggregate", lambda value: value == "trimmed_mean"),
}


def check_effect(options: Any, defaults: Any) -> None:
  """Raises BadInput for the first option that differs from its default and plays no part."""
  known, own = flat(defaults), flat(options)
  for name, needs in NEEDS.items():
    if name in own and needs.option in own and own[name] != known[name]:
      other = own[needs.option]
      reason = f"has no effect with `{needs.option}` {other}"
      if not needs.holds(other):
        raise checks.refusal(name, own[name], reason)


def check(options: Federated) -> None:
  """Raises BadInput for the first option that is out of range; needs no data."""
  if isinstance(getattr(options, "hyper", None), Hyperparameters):
    check_hyperparameters(options.hyper)
  options = settled(options)
  run, division, work = options.run, options.division, options.work
  counts = {
    "clients": (division, 1), "classes_per_client": (division, 1), "rounds": (work, 1),
    "finetune_rounds": (work, 0), "local_steps": (work, 1), "batch_size": (work, 1),
    "inner_steps": (options.variants, 1), "downsample": (options.data, 1), "eval_every": (run, 1),
    "corrupt": (options.faults, 0),
  }  # fmt: skip
  for name, (group, low) in counts.items():
    checks.whole(name, getattr(group, name), low, MOST)
  checks.at_least("seed", run.seed, 0)
  checks.whole("seeds", run.seeds, 1, MOST_SEEDS)
  optional = {"clients_per_step": (options.hardware, 1), "checkpoint_every": (run, 0),
              "max_test_rows": (division, 1), "min_test_rows": (division, 0)}  # fmt: skip
  for name, (group, low) in optional.items():
    if getattr(group, name) is not None:
      checks.whole(name, getattr(group, name), low, MOST)
  steps, allowed = work.rounds * work.local_steps, f"at most {MOST} steps in all"
  checks.require(steps <= MOST, "rounds", work.rounds, f"{allowed}, of `local_steps` a round")
  checks.positive("alpha", division.alpha)
  if run.minutes is not None:
    checks.positive("minutes", run.minutes)
  # Keys take 32 bits of a seed.
  last = run.seed + run.seeds - 1
  checks.require(last < 2**32, "seed", run.seed, f"below 2^32, with {run.seeds} seeds")
  checks.fraction("participation", options.server.participation, closed=True)
  checks.share("averaging_share", options.variants.averaging_share)
  checks.fraction("train_share", division.train_share, closed=True)
  for value in options.networks.input_std:
    checks.positive("input_std", value)
  if division.min_test_rows is not None:
    natural = division.partition == "natural"
    allowed = f"None with `partition` {division.partition}: there are no writers"
    checks.require(natural, "min_test_rows", division.min_test_rows, allowed)
  _check_new_clients(options)
  _check_faults(options)
  _check_store(options)
  checks.bits("bits", options.bits)
  checks.require(len(options.bits) > 0, "bits", "()", "at least one precision")
  fits = work.finetune_rounds < work.rounds
  allowed = f"below `rounds` {work.rounds}"
  checks.require(fits, "finetune_rounds", work.finetune_rounds, allowed)
  checks.require(len(options.networks.models) > 0, "models", "()", " or ".join(models.NAMES))
  _check_folder("data_dir", options.data.data_dir, must_exist=True)
  _check_folder("out", run.out, must_exist=False)


def trained_clients(options: Federated) -> int:
  """Counts the clients that take part in rounds: all but the new ones."""
  return options.division.clients - (options.division.new_clients or 0)


def _check_new_clients(options: Federated) -> None:
  new, clients = options.division.new_clients, options.division.clients
  if new is None:
    return
  checks.at_least("new_clients", new, 1)
  checks.require(
    new < clients, "new_clients", new, f"below `clients` {clients}: some have to train"
  )
  tuned = options.work.finetune_rounds > 0
  checks.require(tuned, "new_clients", new, "None with `finetune_rounds` 0: none would learn")
  resident = options.hardware.store == "device"
  checks.require(resident, "new_clients", new, f"None with `store` {options.hardware.store}")


def _check_store(options: Federated) -> None:
  hardware, run = options.hardware, options.run
  if hardware.store == "device":
    return
  where = f"with `store` {hardware.store}"
  share = options.server.participation
  allowed = f"below 1 {where}: only those that train are on the device"
  checks.require(share < 1, "participation", share, allowed)
  saved = run.minutes is None and not run.checkpoint_every
  name = "checkpoint_every" if run.minutes is None else "minutes"
  checks.require(saved, name, getattr(run, name), f"None {where}: what lies there is not saved")


def _check_faults(options: Federated) -> None:
  faults, server = options.faults, options.server
  checks.fraction("dropout", faults.dropout, closed=False)
  checks.share("stragglers", faults.stragglers)
  fits = faults.stragglers == 0 or options.work.local_steps > 1
  checks.require(fits, "stragglers", faults.stragglers, "0 with `local_steps` 1")
  clients = trained_clients(options)
  fits, allowed = faults.corrupt <= clients, f"at most {clients}, the `clients` that train"
  checks.require(fits, "corrupt", faults.corrupt, allowed)
  checks.require(0 <= server.trim < 0.5, "trim", server.trim, "in [0, 0.5)")
  checks.positive("clip_norm", server.clip_norm)
  noise = server.noise_multiplier
  checks.non_negative("noise_multiplier", noise)
  fits = noise == 0 or server.aggregate == "clipped_mean"
  checks.require(fits, "noise_multiplier", noise, "0 without `aggregate` clipped_mean")
  if server.noise_seed is not None:
    checks.at_least("noise_seed", server.noise_seed, 0)
  if server.delta is not None:
    checks.require(0 < server.delta < 1, "delta", server.delta, "in (0, 1)")


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
  full = checks.place(name, path).absolute()
  nearest = next(p for p in (full, *full.parents) if p.exists())
  holds = nearest.is_dir() and (nearest == full or not must_exist)
  allowed = "a folder that exists" if must_exist else "a folder, which is made if need be"
  checks.require(holds, name, path, allowed)


# The paper's scale, in rounds of 10 steps: 250 epochs of CIFAR-10, 50 epochs of MNIST.
_PAPER = {"models": ("cnn1",), "clients": 50, "batch_size": 50}
PAPER_CIFAR10 = _PAPER | {"rounds": 500, "dataset": "cifar10"}
PAPER_MNIST = _PAPER | {"rounds": 110, "dataset": "mnist"}
