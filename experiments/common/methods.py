"""The methods of the comparison, each as phases of algorithms with the options' hyperparameters.

Every method gets the same number of rounds. Methods that differ only in their clients' bits form
one job: they train side by side, as runs of one program.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import optax

from experiments.common.federation import Federation, server_groups
from experiments.common.options import Options
from qupeD_jax import client, quantize
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import quped
from qupeD_jax.algorithms.sampling import with_sampling
from qupeD_jax.data import cohort
from qupeD_jax.types import FULL_PRECISION, Model, Quantizer


class Phase(NamedTuple):
  """A stretch of rounds of one algorithm."""

  rounds: int
  build: Callable  # the state that the phase before left (None at first) -> Algorithm


class Job(NamedTuple):
  """Methods that train side by side; they differ in their clients' precisions alone."""

  bits: dict[str, np.ndarray]  # method -> precision of each client [clients]
  groups: tuple[np.ndarray, ...]  # client ids of each cohort
  models: tuple[Model, ...]  # personal architecture of each cohort
  phases: tuple[Phase, ...]


def local_training(options: Options, federation: Federation) -> Job:
  """Every client alone, at full precision."""

  def build(_):
    return local(
      federation.models, quantize.none(), rates=personal_rates(options), **steps(options)
    )

  bits = {"local": every_client(federation, FULL_PRECISION)}
  phases = (Phase(options.rounds, sampled(options, build)),)
  return Job(bits, federation.groups, federation.models, phases)


def local_quantised(
  options: Options, federation: Federation, bits: tuple[int, ...] = (), mixed: bool = False
) -> Job:
  """Every client alone, by Algorithm 1, then fine-tuned; see `precisions` for bits and mixed."""
  methods = precisions("local", options, federation, bits, mixed)
  quantizer = widest_codebook(options, methods)

  def build(_):
    return local(federation.models, quantizer, rates=personal_rates(options), **steps(options))

  def build_finetune(trained):
    return finetune(federation.models, quantizer, trained, **finetune_options(options))

  phases = two_phases(options, build, build_finetune)
  return Job(methods, federation.groups, federation.models, phases)


def federated_averaging(options: Options, federation: Federation) -> Job:
  """One model of the server's architecture for all clients."""
  model = federation.models[0]

  def build(_):
    return fedavg(model, rate=decayed(options, options.fedavg_rate), **steps(options))

  bits = {"FedAvg": every_client(federation, FULL_PRECISION)}
  phases = (Phase(options.rounds, sampled(options, build)),)
  return Job(bits, server_groups(federation), (model,), phases)


def averaging_then_local(options: Options, federation: Federation) -> Job:
  """One model of the server's architecture, then trained on by every client alone."""
  model = federation.models[0]

  def build(_):
    return fedavg(model, rate=decayed(options, options.fedavg_rate), **steps(options))

  def build_local(trained):
    rates = client.Rates(weights=options.fedavg_finetune_rate)
    return local((model,), quantize.none(), rates=rates, start=(trained.server,), **steps(options))

  return Job(
    {"FedAvg + fine-tuning": every_client(federation, FULL_PRECISION)},
    server_groups(federation),
    (model,),
    two_phases(options, build, build_local),
  )


def quped_full_precision(options: Options, federation: Federation) -> Job:
  """QuPeD without codebooks: personalisation by distillation alone."""

  def build(_):
    return quped(federation.models[0], federation.models, quantize.none(), **quped_options(options))

  bits = {"QuPeD 32 bit": every_client(federation, FULL_PRECISION)}
  phases = (Phase(options.rounds, sampled(options, build)),)
  return Job(bits, federation.groups, federation.models, phases)


def quped_quantised(
  options: Options, federation: Federation, bits: tuple[int, ...] = (), mixed: bool = False
) -> Job:
  """QuPeD with learned codebooks, then fine-tuned; see `precisions` for bits and mixed."""
  methods = precisions("QuPeD", options, federation, bits, mixed)
  quantizer = widest_codebook(options, methods)
  server = federation.models[0]

  def build(_):
    return quped(server, federation.models, quantizer, **quped_options(options))

  def build_finetune(trained):
    return finetune(
      federation.models,
      quantizer,
      trained,
      server_model=server,
      lambda_p=options.lambda_p,
      temperature=options.temperature,
      **finetune_options(options),
    )

  phases = two_phases(options, build, build_finetune)
  return Job(methods, federation.groups, federation.models, phases)


# --- the options as the algorithms take them


def precisions(
  name: str, options: Options, federation: Federation, bits: tuple[int, ...], mixed: bool
) -> dict[str, np.ndarray]:
  """Names the variants of a method and gives their clients precisions.

  Args:
    name: of the method.
    options: of the experiment.
    federation: the clients.
    bits: one variant each, in which all clients have these bits.
    mixed: one more variant, in which `options.bits` are dealt over the clients.

  Returns:
    variant -> precision of each client, [clients] int32.
  """
  variants = {f"{name} {b} bit": every_client(federation, b) for b in bits}
  if mixed:
    kind = "mixed" if len(set(options.bits)) > 1 else f"{options.bits[0]} bit"
    variants[f"{name} {kind}"] = cohort.assign_bits(options.bits, federation.num_clients)
  return variants


def widest_codebook(options: Options, variants: dict[str, np.ndarray]) -> Quantizer:
  """Builds a learned codebook with as many slots as the highest precision below 32 takes."""
  bits = np.concatenate(list(variants.values()))
  largest = int(max(bits[bits != FULL_PRECISION], default=1))
  return quantize.learned_codebook(max_bits=largest, clip=options.centers_clip)


def every_client(federation: Federation, bits: int) -> np.ndarray:
  """Gives every client the same precision, [clients] int32."""
  return np.full(federation.num_clients, bits, np.int32)


def steps(options: Options) -> dict:
  """Returns the amount of local work."""
  return {"local_steps": options.local_steps, "batch_size": options.batch_size}


def decayed(options: Options, rate: float) -> Callable:
  """Lets a rate fall on a cosine over all rounds."""
  return optax.cosine_decay_schedule(rate, options.rounds * options.local_steps, options.final_rate)


def personal_rates(options: Options) -> client.Rates:
  """Returns the step sizes of x and c; the pull grows linearly until models are frozen."""
  growing = (options.rounds - options.finetune_rounds) * options.local_steps
  return client.Rates(
    weights=decayed(options, options.weights_rate),
    centers=decayed(options, options.centers_rate),
    proximity=optax.linear_schedule(0.0, options.proximity, growing),
  )


def quped_options(options: Options) -> dict:
  """Returns the hyperparameters of QuPeD."""
  return {
    "lambda_p": options.lambda_p,
    "temperature": options.temperature,
    "rates": personal_rates(options),
    "global_rate": decayed(options, options.global_rate),
    "global_loss_weight": options.global_loss_weight,
    **steps(options),
  }


def finetune_options(options: Options) -> dict:
  """Returns the hyperparameters of fine-tuning."""
  return {
    "rate": options.finetune_rate,
    "centers_rate": options.centers_rate * options.final_rate,
    **steps(options),
  }


def two_phases(options: Options, build: Callable, build_last: Callable) -> tuple[Phase, ...]:
  """Splits the rounds into the main phase and the fine-tuning, which no client sits out."""
  main = Phase(options.rounds - options.finetune_rounds, sampled(options, build))
  return (main, Phase(options.finetune_rounds, build_last)) if options.finetune_rounds else (main,)


def sampled(options: Options, build: Callable) -> Callable:
  """Lets a share of the clients take part in a round, if the options ask for it."""
  if options.participation == 1:
    return build
  return lambda trained: with_sampling(build(trained), options.participation)
