"""Local training, federated averaging and QuPeD, each a function from options and clients to a Job.

Every method gets the same number of rounds. Those that differ only in their clients' bits form one
job; `bits` gives one variant each, `mixed` one more in which `options.bits` are dealt over the
clients. Within a `build`, options may hold traced values: variants can differ in them, too.
"""

from functools import partial

import numpy as np

from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import GlobalStep, quped
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.objectives import Distillation
from qupeD_jax.quantization import ops, quantizers
from qupeD_jax.study.faults import aggregate_of
from qupeD_jax.study.federation import Federation
from qupeD_jax.study.jobs import (
  Job,
  Phase,
  Variant,
  averaging_rounds,
  decayed,
  every_client,
  federated_phase,
  finetune_last,
  frozen_last,
  full_precision,
  local_phase,
  local_work,
  one_architecture,
  one_phase,
  personal_rates,
  precisions,
  widest_codebook,
)
from qupeD_jax.study.options import Options, settled
from qupeD_jax.types import Algorithm, Model
from qupeD_jax.wrappers.posttraining import with_post_training_quantisation
from qupeD_jax.wrappers.separate import part, separate


def local_training(options: Options, federation: Federation) -> Job:
  """Every client alone, at full precision."""

  def build(options, _):
    rates = personal_rates(options)
    return local(
      federation.models,
      quantizers.full_precision(),
      rates=rates,
      work=local_work(options, federation),
    )

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
      federation.models,
      quantizer,
      rates=personal_rates(options),
      work=local_work(options, federation),
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune_last(options, federation, quantizer, trained)

  phases = frozen_last(options, variants, build, build_last, phase=local_phase)
  return Job(options, federation, variants, phases)


# --- federated averaging, and what starts from its model


def federated_averaging(options: Options, federation: Federation) -> Job:
  """One model of the server's architecture for all clients."""

  def method(options):
    return partial(fedavg, rate=decayed(options, options.hyper.fedavg_rate))

  return one_architecture("FedAvg", options, federation, method)


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
    algorithm = local(
      federation.models,
      quantizers.full_precision(),
      rates=Rates(decayed(options, options.hyper.fedavg_finetune_rate, last)),
      start=trained.server,
      work=local_work(options, federation),
    )
    if not bits:
      return algorithm
    kmeans = widest_codebook(options, variants, ops.kmeans_centers)
    return with_post_training_quantisation(algorithm, kmeans)

  first = averaging_phases(options, federation, options.work.rounds - last)
  phases = (*first, Phase(last, build, alone=True)) if last else first
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
      start=trained and trained.server,
      work=local_work(options, federation),
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune_last(options, federation, quantizer, trained)

  averaging = averaging_phases(options, federation, first)
  phases = (*averaging, *frozen_last(options, variants, build, build_last, rest, local_phase))
  return Job(options, federation, variants, phases)


def averaging_phases(options: Options, federation: Federation, rounds: int) -> tuple[Phase, ...]:
  """Returns rounds of FedAvg, each architecture for itself, that leave one model of each.

  Without rounds there is no phase, and what follows starts from drawn weights.
  """

  def build(options, _):
    return separate(
      tuple(
        fedavg(
          model,
          rate=decayed(options, options.hyper.fedavg_rate),
          work=local_work(options, federation),
          aggregate=aggregate_of(options, federation.num_clients, fedavg),
        )
        for model in federation.models
      )
    )

  return (federated_phase(rounds, build, separate=True, shared=True),) if rounds else ()


# --- QuPeD


def quped_quantised(
  options: Options, federation: Federation, bits: tuple[int, ...] = (), mixed: bool = False
) -> Job:
  """QuPeD as in the paper, then fine-tuned; at 32 bits it has nothing to freeze."""
  variants = precisions("QuPeD", options, federation, bits, mixed)

  def build(options, _):
    return _as_in_the_paper(options, federation, variants, federation.models)

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune_last(options, federation, quantizer, trained, distillation_of(options))

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
  first = averaging_rounds(options)
  rest = options.work.rounds - first

  def distillation(options):
    return distillation_of(options)._replace(own_classes=True)

  def build(options, trained):
    return quped(
      federation.models[0],
      federation.models,
      widest_codebook(options, variants, ops.kmeans_centers),
      distillation=distillation(options),
      rates=personal_rates(options, rest),
      global_step=global_step_of(options, rest),
      straight_through=options.hyper.straight_through,
      simultaneous=options.variants.simultaneous,
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, quped),
      start=trained and (trained.server[0], trained.server),
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune_last(options, federation, quantizer, trained, distillation(options))

  averaging = averaging_phases(options, federation, first)
  phases = (*averaging, *frozen_last(options, variants, build, build_last, rest))
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
    build_one = lambda model: _as_in_the_paper(options, federation, variants, (model,))
    return separate(tuple(map(build_one, federation.models)))

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    pairs = zip(federation.models, part(trained), strict=True)
    return separate(
      tuple(
        finetune_last(
          options, federation._replace(models=(model,)), quantizer, own, distillation_of(options)
        )
        for model, own in pairs
      )
    )

  phases = frozen_last(options, variants, build, build_last)
  return Job(options, federation, variants, tuple(p._replace(separate=True) for p in phases))


def _as_in_the_paper(
  options: Options, federation: Federation, variants: dict[str, Variant], models: tuple[Model, ...]
) -> Algorithm:
  """Builds the paper's QuPeD of some architectures, the first of which is the server's."""
  return quped(
    models[0],
    models,
    widest_codebook(options, variants),
    distillation=distillation_of(options),
    rates=personal_rates(options),
    global_step=global_step_of(options),
    simultaneous=options.variants.simultaneous,
    work=local_work(options, federation),
    aggregate=aggregate_of(options, federation.num_clients, quped),
  )


def distillation_of(options: Options) -> Distillation:
  """Returns how personal models and the global one teach each other."""
  return Distillation(options.hyper.lambda_p, options.hyper.temperature)


def global_step_of(options: Options, rounds: int | None = None) -> GlobalStep:
  """Returns how clients move their copies of w over so many rounds, by default all."""
  return GlobalStep(
    rate=decayed(options, options.hyper.global_rate, rounds),
    loss_weight=options.hyper.global_loss_weight,
  )
