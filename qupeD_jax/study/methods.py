"""Local training, federated averaging and QuPeD, each a function from options and clients to a Job.

Every method gets the same number of rounds. Those that differ only in their clients' bits form one
job; `bits` gives one variant each, `mixed` one more in which `options.bits` are dealt over the
clients. Within a `build`, options may hold traced values: variants can differ in them, too.
"""

import numpy as np

from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import quped
from qupeD_jax.federation import client
from qupeD_jax.quantization import ops, quantizers
from qupeD_jax.study.federation import Federation, of_server
from qupeD_jax.study.jobs import (
  Job,
  Phase,
  Variant,
  averaging_rounds,
  decayed,
  every_client,
  federated,
  federated_phase,
  finetune_options,
  frozen_last,
  full_precision,
  local_phase,
  one_phase,
  personal_rates,
  precisions,
  steps,
  widest_codebook,
)
from qupeD_jax.study.options import Options, settled
from qupeD_jax.wrappers.posttraining import with_post_training_quantisation
from qupeD_jax.wrappers.separate import part, separate


def local_training(options: Options, federation: Federation) -> Job:
  """Every client alone, at full precision."""

  def build(options, _):
    rates = personal_rates(options)
    return local(federation.models, quantizers.none(), rates=rates, **steps(options, federation))

  variants = full_precision("local", federation)
  return Job(options, federation, variants, one_phase(options, build, local_phase))


def local_quantised(
  options: Options, federation: Federation, bits: tuple[int, ...] = (), mixed: bool = False
) -> Job:
  """Every client alone, by Algorithm 1, then fine-tuned."""
  variants = precisions("local", options, federation, bits, mixed)

  def build(options, _):
    quantizer = widest_codebook(options, variants)
    return local(
      federation.models, quantizer, rates=personal_rates(options), **steps(options, federation)
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune(federation.models, quantizer, trained, **finetune_options(options, federation))

  phases = frozen_last(options, variants, build, build_last, phase=local_phase)
  return Job(options, federation, variants, phases)


# --- federated averaging, and what starts from its model


def federated_averaging(options: Options, federation: Federation) -> Job:
  """One model of the server's architecture for all clients."""

  def build(options, _):
    rate = decayed(options, options.hyper.fedavg_rate)
    return fedavg(federation.models[0], rate=rate, **federated(options, federation, fedavg))

  variants = full_precision("FedAvg", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def averaging_then_local(
  options: Options, federation: Federation, bits: tuple[int, ...] = ()
) -> Job:
  """FedAvg's model, trained on by every client alone, then quantised to given bits by k-means.

  Each architecture is a federation of its own: models of different shapes have no mean.
  """
  variants = full_precision("FedAvg + fine-tuning", federation)
  variants |= {f"FedAvg + k-means {b} bit": Variant(every_client(federation, b)) for b in bits}
  last = settled(options).work.finetune_rounds

  def build(options, trained):
    rates = client.Rates(decayed(options, options.hyper.fedavg_finetune_rate, last))
    alone = {"rates": rates, "start": trained.server, **steps(options, federation)}
    algorithm = local(federation.models, quantizers.none(), **alone)
    if not bits:
      return algorithm
    kmeans = widest_codebook(options, variants, ops.kmeans_centers)
    return with_post_training_quantisation(algorithm, kmeans)

  first = averaging_phase(options, federation, options.work.rounds - last)
  phases = (first, Phase(last, build, alone=True)) if last else (first,)
  return Job(options, federation, variants, phases)


def averaging_then_quantised(
  options: Options, federation: Federation, bits: tuple[int, ...] = ()
) -> Job:
  """FedAvg's model, trained on by every client alone by Algorithm 1: QuPeD+ without its server."""
  variants = precisions("FedAvg + codebook", options, federation, bits, mixed=False)
  first = averaging_rounds(options)
  rest = options.work.rounds - first

  def build(options, trained):
    return local(
      federation.models,
      widest_codebook(options, variants, ops.kmeans_centers),
      rates=personal_rates(options, rest),
      straight_through=options.hyper.straight_through,
      start=trained.server,
      **steps(options, federation),
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune(federation.models, quantizer, trained, **finetune_options(options, federation))

  averaging = averaging_phase(options, federation, first)
  phases = (averaging, *frozen_last(options, variants, build, build_last, rest, local_phase))
  return Job(options, federation, variants, phases)


def averaging_phase(options: Options, federation: Federation, rounds: int) -> Phase:
  """Returns rounds of FedAvg, each architecture for itself, that leave one model of each."""

  def build(options, _):
    rate, shared = (
      decayed(options, options.hyper.fedavg_rate),
      federated(options, federation, fedavg),
    )
    return separate(tuple(fedavg(m, rate=rate, **shared) for m in federation.models))

  return federated_phase(rounds, build, separate=True, shared=True)


# --- QuPeD


def quped_quantised(
  options: Options, federation: Federation, bits: tuple[int, ...] = (), mixed: bool = False
) -> Job:
  """QuPeD as in the paper, then fine-tuned; at 32 bits it has nothing to freeze."""
  variants = precisions("QuPeD", options, federation, bits, mixed)
  server = federation.models[0]

  def build(options, _):
    quantizer = widest_codebook(options, variants)
    return quped(server, federation.models, quantizer, **quped_options(options, federation))

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    taught = {"server_model": server, **teaching(options), **finetune_options(options, federation)}
    return finetune(federation.models, quantizer, trained, **taught)

  phases = frozen_last(options, variants, build, build_last)
  return Job(options, federation, variants, phases)


def quped_from_averaging(
  options: Options, federation: Federation, bits: tuple[int, ...] = (), mixed: bool = False
) -> Job:
  """QuPeD+, our best variant: QuPeD started from FedAvg's model, with all that helped it.

  k-means centers, distillation over the client's own classes, a share of x's gradient straight
  through at Q, cross-entropy in the global model's loss.
  """
  variants = precisions("QuPeD+", options, federation, bits, mixed)
  server = federation.models[0]
  first = averaging_rounds(options)
  rest = options.work.rounds - first

  def build(options, trained):
    return quped(
      server,
      federation.models,
      widest_codebook(options, variants, ops.kmeans_centers),
      own_classes=True,
      straight_through=options.hyper.straight_through,
      start=(trained.server[0], trained.server),
      **quped_options(options, federation, rest),
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    taught = {"server_model": server, **teaching(options), **finetune_options(options, federation)}
    return finetune(federation.models, quantizer, trained, own_classes=True, **taught)

  averaging = averaging_phase(options, federation, first)
  phases = (averaging, *frozen_last(options, variants, build, build_last, rest))
  return Job(options, federation, variants, phases)


def quped_within_groups(options: Options, federation: Federation, bits: np.ndarray) -> Job:
  """QuPeD in which clients learn with their own group only: every group has its own server.

  Args:
    options: of the experiment.
    federation: the groups.
    bits: [clients] int32, precisions.
  """
  variants = {"QuPeD within groups": Variant(bits)}

  def build(options, _):
    quantizer = widest_codebook(options, variants)
    common = quped_options(options, federation)
    return separate(tuple(quped(m, (m,), quantizer, **common) for m in federation.models))

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    common = {**teaching(options), **finetune_options(options, federation)}
    return separate(
      tuple(
        finetune((m,), quantizer, own, server_model=m, **common)
        for m, own in zip(federation.models, part(trained), strict=True)
      )
    )

  phases = frozen_last(options, variants, build, build_last)
  return Job(options, federation, variants, tuple(p._replace(separate=True) for p in phases))


def quped_options(options: Options, federation: Federation, rounds: int | None = None) -> dict:
  """Returns the hyperparameters of QuPeD over so many rounds, by default all."""
  return {
    **teaching(options),
    "rates": personal_rates(options, rounds),
    "global_rate": decayed(options, options.hyper.global_rate, rounds),
    "global_loss_weight": options.hyper.global_loss_weight,
    "simultaneous": options.variants.simultaneous,
    **federated(options, federation, quped),
  }


def teaching(options: Options) -> dict:
  """Returns the hyperparameters of distillation."""
  return {"lambda_p": options.hyper.lambda_p, "temperature": options.hyper.temperature}
