"""What a study trains: jobs, their phases, and the options as the algorithms take them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from qupeD_jax import checks, shares
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.data import augment, cohort
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.clients import LocalWork, usual_clients_per_step
from qupeD_jax.federation.objectives import Distillation
from qupeD_jax.quantization import ops, quantizers
from qupeD_jax.study.faults import aggregate_of, faulty
from qupeD_jax.study.federation import Federation, of_server
from qupeD_jax.study.options import Federated, Options, replaced, settled
from qupeD_jax.types import FULL_PRECISION, Algorithm, FedState, Quantizer
from qupeD_jax.wrappers.sampling import with_sampling


class Phase(NamedTuple):
  """A stretch of rounds of one algorithm."""

  rounds: int
  build: Callable  # (options, the state that the phase before left or None) -> Algorithm
  separate: bool = False  # each group is a federation of its own, the server a tuple of theirs
  sends: bool = False  # clients send updates that a server combines
  alone: bool = False  # no client sits out a round, and none learns from another
  shared: bool = False  # bits play no part: variants that differ in nothing else train as one
  # What metrics.jsonl gets beside loss and accuracy after each chunk, by its name there:
  # (options, state, data, cohorts) -> per cohort [K], of which the mean over clients is written.
  measures: Mapping[str, Callable] = MappingProxyType({})


class Variant(NamedTuple):
  """One of the methods of a job."""

  bits: np.ndarray  # [clients] int32, precision of each
  changes: Mapping[str, float] = MappingProxyType(
    {}
  )  # hyperparameters that differ from the job's options


class Job(NamedTuple):
  """Methods that train side by side, as runs of one program; bits and hyperparameters differ."""

  options: Options
  federation: Federation  # its groups are the cohorts
  variants: dict[str, Variant]  # by method
  phases: tuple[Phase, ...]


MakeJob = Callable[[Options, Federation], Job]


def job_name(job: Job) -> str:
  """Names a job by its first method, and counts the others."""
  first, *others = job.variants
  return f"{first} and {len(others)} more" if others else first


# --- other jobs of a job


def with_values(make: MakeJob, values: dict[str, Any]) -> MakeJob:
  """Makes the same job with other options."""

  def made(options, federation):
    return make(replaced(options, **values), federation)

  return made


def on_server_architecture(make: MakeJob) -> MakeJob:
  """Makes the same job with all clients on the server's architecture."""
  return lambda options, federation: make(options, of_server(federation))


def changed(make: MakeJob, changes: Mapping[str, Mapping[str, float]]) -> MakeJob:
  """Trains a job's only method with several changes of its hyperparameters, each by a name."""

  def made(options, federation):
    job = make(options, federation)
    (variant,) = job.variants.values()
    variants = {name: variant._replace(changes=values) for name, values in changes.items()}
    return job._replace(variants=variants)

  return made


# --- what a job is made of


def one_architecture(
  name: str, options: Options, federation: Federation, method: Callable[[Options], Callable]
) -> Job:
  """Makes the job of a method at full precision, all of whose clients have the server's network.

  Args:
    name: of the method.
    options: of the experiment.
    federation: the clients.
    method: as in `with_server`.
  """
  phases = one_phase(options, with_server(federation, method))
  return Job(options, of_server(federation), full_precision(name, federation), phases)


def with_server(federation: Federation, method: Callable[[Options], Callable]) -> Callable:
  """Returns a phase's `build` for a method with a server.

  Args:
    federation: the clients.
    method: from options to the algorithm's builder, told all but the server's model, the local work
      and the aggregate.
  """

  def build(options, _):
    builder = method(options)
    return builder(
      federation.models[0],
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, builder),
    )

  return build


def full_precision(method: str, federation: Federation) -> dict[str, Variant]:
  """Returns the one variant of a method at full precision."""
  return {method: Variant(every_client(federation, FULL_PRECISION))}


def precisions(
  method: str, options: Options, federation: Federation, bits: tuple[int, ...], mixed: bool
) -> dict[str, Variant]:
  """Names the variants of a method and gives their clients precisions.

  Args:
    method: its name.
    options: of the experiment.
    federation: the clients.
    bits: one variant each, in which all clients have these bits.
    mixed: one more variant, in which `options.bits` are dealt over the clients.
  """
  variants = {f"{method} {b} bit": Variant(every_client(federation, b)) for b in bits}
  if mixed:
    kind = "mixed" if len(set(options.bits)) > 1 else f"{options.bits[0]} bit"
    dealt = cohort.assign_bits(options.bits, federation.num_clients)
    variants[f"{method} {kind}"] = Variant(dealt)
  return variants


def every_client(federation: Federation, bits: int) -> np.ndarray:
  """Gives every client the same precision, [clients] int32."""
  return np.full(federation.num_clients, bits, np.int32)


def widest_codebook(
  options: Options, variants: dict[str, Variant], init: Callable = ops.init_centers
) -> Quantizer:
  """Builds a learned codebook as wide as the highest precision below 32 takes.

  Where all clients are at full precision there is none, and nothing is computed for one.
  """
  if not is_quantised(variants):
    return quantizers.full_precision()
  bits = np.concatenate([variant.bits for variant in variants.values()])
  widest = int(bits[bits != FULL_PRECISION].max())
  return quantizers.learned_codebook(max_bits=widest, init=init, clip=options.hyper.centers_clip)


def federated_phase(rounds: int, build: Callable, **marks: bool) -> Phase:
  """Trains with a server, which some clients may not reach in a round."""
  return Phase(rounds, faulty(build), sends=True, **marks)


def local_phase(rounds: int, build: Callable) -> Phase:
  """Trains every client alone, those that take part in a round."""
  return Phase(rounds, build)


def one_phase(
  options: Options, build: Callable, phase: Callable = federated_phase
) -> tuple[Phase, ...]:
  """Trains by one algorithm for all rounds, with a server unless it is a `local_phase`."""
  return (phase(options.work.rounds, build),)


def frozen_last(
  options: Options,
  variants: dict[str, Variant],
  build: Callable,
  build_last: Callable,
  rounds: int | None = None,
  phase: Callable = federated_phase,
) -> tuple[Phase, ...]:
  """Splits so many rounds, by default all, into training and the fine-tuning of frozen models.

  Training is with a server unless it is a `local_phase`. No client sits out the fine-tuning. There
  is none where nothing is quantised.
  """
  rounds = options.work.rounds if rounds is None else rounds
  last = frozen_rounds(options, rounds) if is_quantised(variants) else 0
  phases = (phase(rounds - last, build), Phase(last, build_last, alone=True))
  return tuple(p for p in phases if p.rounds)


def frozen_rounds(options: Options, rounds: int) -> int:
  """Returns for how many of so many rounds quantised models are frozen, and fine-tuned.

  Where rounds of FedAvg came before, that is at most half of those that are left.
  """
  last = settled(options).work.finetune_rounds
  return last if rounds == options.work.rounds else min(last, rounds // 2)


def is_quantised(variants: dict[str, Variant]) -> bool:
  """Tells whether any client of any variant is quantised."""
  return any(np.any(variant.bits != FULL_PRECISION) for variant in variants.values())


def local_work(options: Federated, federation: Federation) -> LocalWork:
  """Returns the amount of local work, and what is done to the images."""
  usual = usual_clients_per_step(federation.models, jax.default_backend())
  return LocalWork(
    steps=options.work.local_steps,
    batch_size=options.work.batch_size,
    augment=augment.flip_and_crop(fill=federation.mean) if options.work.augment else None,
    clients_per_step=options.hardware.clients_per_step or usual,
  )


def averaging_rounds(options: Options) -> int:
  """Returns how many rounds of FedAvg come before quantised training that starts from its model."""
  share, rounds = options.variants.averaging_share, options.work.rounds
  if share == 0:
    return 0
  least = 2 if settled(options).work.finetune_rounds else 1
  allowed = f"above {least}, for FedAvg, what starts from it, and fine-tuning"
  checks.require(options.work.rounds > least, "rounds", options.work.rounds, allowed)
  return min(max(1, shares.rounded(share, rounds)), rounds - least)


def decayed(options: Options, rate: float, rounds: int | None = None) -> Callable:
  """Lets a rate fall on a cosine over so many rounds, by default all."""
  num_steps = (options.work.rounds if rounds is None else rounds) * options.work.local_steps
  return optax.cosine_decay_schedule(rate, num_steps, options.hyper.final_rate)


def personal_rates(options: Options, rounds: int | None = None) -> Rates:
  """Returns the step sizes of x and c over so many rounds, by default all.

  The pull toward the centers grows linearly until the models are frozen for the last rounds.
  """
  rounds = options.work.rounds if rounds is None else rounds
  growing = (rounds - frozen_rounds(options, rounds)) * options.work.local_steps
  return Rates(
    weights=decayed(options, options.hyper.weights_rate, rounds),
    centers=decayed(options, options.hyper.centers_rate, rounds),
    proximity=optax.linear_schedule(0.0, options.hyper.proximity, growing),
  )


def finetune_last(
  options: Options,
  federation: Federation,
  quantizer: Quantizer,
  trained: FedState,
  distillation: Distillation | None = None,
) -> Algorithm:
  """Builds the fine-tuning of hardened models, taught by the server's model where that is told.

  Args:
    options: of the run.
    federation: the clients; its first model is the server's.
    quantizer: that trained the models.
    trained: what it left.
    distillation: how the server's model teaches; None where clients are alone.
  """
  return finetune(
    federation.models,
    quantizer,
    trained,
    server_model=None if distillation is None else federation.models[0],
    distillation=distillation or Distillation(lambda_p=0.0),
    rate=options.hyper.finetune_rate,
    centers_rate=options.hyper.centers_rate * options.hyper.final_rate,
    work=local_work(options, federation),
  )


def sampled(options: Options, phase: Phase, algorithm: Algorithm) -> Algorithm:
  """Lets a share of the clients take part in a round of a phase, if the options ask for it."""
  if phase.alone or options.server.participation == 1:
    return algorithm
  return with_sampling(algorithm, options.server.participation)
