"""The personalised rivals, each a function from options and clients to a Job; as `methods`."""

from functools import partial

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
from qupeD_jax.study.federation import Federation, of_server
from qupeD_jax.study.jobs import (
  Job,
  decayed,
  finetune_last,
  frozen_last,
  full_precision,
  one_architecture,
  one_phase,
  personal_rates,
  precisions,
  widest_codebook,
  with_server,
)
from qupeD_jax.study.options import Options


def fedprox_job(options: Options, federation: Federation) -> Job:
  """FedProx: FedAvg whose clients are held near the server's model."""

  def method(options):
    rate = decayed(options, options.hyper.fedavg_rate)
    return partial(fedprox, mu=options.hyper.mu, rate=rate)

  return one_architecture("FedProx", options, federation, method)


def per_fedavg_job(options: Options, federation: Federation) -> Job:
  """Per-FedAvg: one gradient step from the global model."""

  def method(options):
    rate = decayed(options, options.hyper.fedavg_rate)
    return partial(per_fedavg, inner_rate=options.hyper.inner_rate, rate=rate)

  return one_architecture("Per-FedAvg", options, federation, method)


def pfedme_job(options: Options, federation: Federation) -> Job:
  """pFedMe: personal models near the local copies of a global one, which follow them."""

  def method(options):
    return partial(
      pfedme,
      penalty=options.hyper.penalty,
      rate=decayed(options, options.hyper.weights_rate),
      global_rate=decayed(options, options.hyper.global_rate),
      inner_steps=options.variants.inner_steps,
    )

  return one_architecture("pFedMe", options, federation, method)


def ditto_job(options: Options, federation: Federation) -> Job:
  """Ditto: personal models near FedAvg's."""

  def method(options):
    return partial(
      ditto,
      penalty=options.hyper.penalty,
      rate=decayed(options, options.hyper.weights_rate),
      global_rate=decayed(options, options.hyper.fedavg_rate),
    )

  return one_architecture("Ditto", options, federation, method)


def fml_job(options: Options, federation: Federation) -> Job:
  """FML: personal models and copies of a global one that teach each other."""

  def method(options):
    return partial(
      fml,
      client_models=federation.models,
      lambda_p=options.hyper.lambda_p,
      global_lambda_p=options.hyper.global_lambda_p,
      temperature=options.hyper.temperature,
      rate=decayed(options, options.hyper.weights_rate),
      global_rate=decayed(options, options.hyper.global_rate),
    )

  variants = full_precision("FML", federation)
  build = with_server(federation, method)
  return Job(options, federation, variants, one_phase(options, build))


def fedrep_job(options: Options, federation: Federation) -> Job:
  """FedRep: FedAvg's layers below a head of one's own, which takes half of the steps."""

  def method(options):
    rate = decayed(options, options.hyper.fedavg_rate)
    return partial(fedrep, rate=rate, head_rate=decayed(options, options.hyper.weights_rate))

  return one_architecture("FedRep", options, federation, method)


def fedbn_job(options: Options, federation: Federation) -> Job:
  """FedBN: FedAvg with normalisation layers of one's own."""

  def method(options):
    return partial(fedbn, rate=decayed(options, options.hyper.fedavg_rate))

  return one_architecture("FedBN", options, federation, method)


def scaffold_job(options: Options, federation: Federation) -> Job:
  """SCAFFOLD: FedAvg whose clients correct their gradients by those of all."""

  def method(options):
    rate = decayed(options, options.hyper.fedavg_rate)
    return partial(scaffold, rate=rate, num_clients=federation.num_clients)

  return one_architecture("SCAFFOLD", options, federation, method)


def apfl_job(options: Options, federation: Federation) -> Job:
  """APFL: mixtures of a model of one's own and of FedAvg's, half and half until they learn."""

  def method(options):
    rate = decayed(options, options.hyper.weights_rate)
    global_rate = decayed(options, options.hyper.fedavg_rate)
    return partial(apfl, adaptive=True, rate=rate, global_rate=global_rate)

  return one_architecture("APFL", options, federation, method)


def qupel_job(options: Options, federation: Federation, bits: tuple[int, ...]) -> Job:
  """QuPeL: quantised models held near the global one in weight space, then fine-tuned."""
  variants = precisions("QuPeL", options, federation, bits, mixed=False)

  def method(options):
    return partial(
      qupel,
      quantizer=widest_codebook(options, variants),
      penalty=options.hyper.penalty,
      rates=personal_rates(options),
      global_rate=decayed(options, options.hyper.global_rate),
    )

  def build_last(options, trained):
    quantizer = widest_codebook(options, variants)
    return finetune_last(options, of_server(federation), quantizer, trained)

  phases = frozen_last(options, variants, with_server(federation, method), build_last)
  return Job(options, of_server(federation), variants, phases)
