"""The personalised rivals, each a function from options and clients to a Job; as `methods`."""

from qupeD_jax.algorithms.apfl import apfl
from qupeD_jax.algorithms.ditto import ditto
from qupeD_jax.algorithms.fedbn import fedbn
from qupeD_jax.algorithms.fedprox import fedprox
from qupeD_jax.algorithms.fedrep import fedrep
from qupeD_jax.algorithms.fml import fml
from qupeD_jax.algorithms.per_fedavg import per_fedavg
from qupeD_jax.algorithms.pfedme import pfedme
from qupeD_jax.algorithms.qupel import qupel
from qupeD_jax.algorithms.scaffold import scaffold
from qupeD_jax.study.faults import aggregate_of
from qupeD_jax.study.federation import Federation, of_server
from qupeD_jax.study.jobs import (
  Job,
  decayed,
  finetune_last,
  frozen_last,
  full_precision,
  local_work,
  one_phase,
  personal_rates,
  precisions,
  widest_codebook,
)
from qupeD_jax.study.options import Options


def fedprox_job(options: Options, federation: Federation) -> Job:
  """FedProx: FedAvg whose clients are held near the server's model."""

  def build(options, _):
    rate = decayed(options, options.hyper.fedavg_rate)
    return fedprox(
      federation.models[0],
      mu=options.hyper.mu,
      rate=rate,
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, fedprox),
    )

  variants = full_precision("FedProx", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def per_fedavg_job(options: Options, federation: Federation) -> Job:
  """Per-FedAvg: one gradient step from the global model."""

  def build(options, _):
    return per_fedavg(
      federation.models[0],
      inner_rate=options.hyper.inner_rate,
      rate=decayed(options, options.hyper.fedavg_rate),
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, per_fedavg),
    )

  variants = full_precision("Per-FedAvg", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def pfedme_job(options: Options, federation: Federation) -> Job:
  """pFedMe: personal models near the local copies of a global one, which follow them."""

  def build(options, _):
    return pfedme(
      federation.models[0],
      penalty=options.hyper.penalty,
      rate=decayed(options, options.hyper.weights_rate),
      global_rate=decayed(options, options.hyper.global_rate),
      inner_steps=options.variants.inner_steps,
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, pfedme),
    )

  variants = full_precision("pFedMe", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def ditto_job(options: Options, federation: Federation) -> Job:
  """Ditto: personal models near FedAvg's."""

  def build(options, _):
    return ditto(
      federation.models[0],
      penalty=options.hyper.penalty,
      rate=decayed(options, options.hyper.weights_rate),
      global_rate=decayed(options, options.hyper.fedavg_rate),
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, ditto),
    )

  variants = full_precision("Ditto", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def fml_job(options: Options, federation: Federation) -> Job:
  """FML: personal models and copies of a global one that teach each other."""

  def build(options, _):
    return fml(
      federation.models[0],
      federation.models,
      lambda_p=options.hyper.lambda_p,
      global_lambda_p=options.hyper.global_lambda_p,
      temperature=options.hyper.temperature,
      rate=decayed(options, options.hyper.weights_rate),
      global_rate=decayed(options, options.hyper.global_rate),
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, fml),
    )

  variants = full_precision("FML", federation)
  return Job(options, federation, variants, one_phase(options, build))


def fedrep_job(options: Options, federation: Federation) -> Job:
  """FedRep: FedAvg's layers below a head of one's own, which takes half of the steps."""

  def build(options, _):
    return fedrep(
      federation.models[0],
      rate=decayed(options, options.hyper.fedavg_rate),
      head_rate=decayed(options, options.hyper.weights_rate),
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, fedrep),
    )

  variants = full_precision("FedRep", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def fedbn_job(options: Options, federation: Federation) -> Job:
  """FedBN: FedAvg with normalisation layers of one's own."""

  def build(options, _):
    return fedbn(
      federation.models[0],
      rate=decayed(options, options.hyper.fedavg_rate),
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, fedbn),
    )

  variants = full_precision("FedBN", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def scaffold_job(options: Options, federation: Federation) -> Job:
  """SCAFFOLD: FedAvg whose clients correct their gradients by those of all."""

  def build(options, _):
    return scaffold(
      federation.models[0],
      rate=decayed(options, options.hyper.fedavg_rate),
      num_clients=federation.num_clients,
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, scaffold),
    )

  variants = full_precision("SCAFFOLD", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def apfl_job(options: Options, federation: Federation) -> Job:
  """APFL: mixtures of a model of one's own and of FedAvg's, half and half until they learn."""

  def build(options, _):
    return apfl(
      federation.models[0],
      adaptive=True,
      rate=decayed(options, options.hyper.weights_rate),
      global_rate=decayed(options, options.hyper.fedavg_rate),
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, apfl),
    )

  variants = full_precision("APFL", federation)
  return Job(options, of_server(federation), variants, one_phase(options, build))


def qupel_job(options: Options, federation: Federation, bits: tuple[int, ...]) -> Job:
  """QuPeL: quantised models held near the global one in weight space, then fine-tuned."""
  variants = precisions("QuPeL", options, federation, bits, mixed=False)
  model = federation.models[0]

  def build(options, _):
    return qupel(
      model,
      widest_codebook(options, variants),
      penalty=options.hyper.penalty,
      rates=personal_rates(options),
      global_rate=decayed(options, options.hyper.global_rate),
      work=local_work(options, federation),
      aggregate=aggregate_of(options, federation.num_clients, qupel),
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune_last(options, of_server(federation), quantizer, trained)

  phases = frozen_last(options, variants, build, build_last)
  return Job(options, of_server(federation), variants, phases)
