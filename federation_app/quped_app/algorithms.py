"""The methods, as phases of one client's training: what an experiment's job is to all clients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax.algorithms.ditto import ditto
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import quped
from qupeD_jax.checks import require
from qupeD_jax.data import augment
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.federation.objectives import Distillation
from qupeD_jax.study.faults import aggregate_of
from qupeD_jax.study.jobs import Variant, decayed, personal_rates, widest_codebook
from qupeD_jax.study.methods import distillation_of, global_step_of
from qupeD_jax.types import Aggregate, Algorithm, FedState, Model, Quantizer

from .options import Settings, network

BUILDERS = {"quped": quped, "fedavg": fedavg, "ditto": ditto}  # those with a server
ONE_ARCHITECTURE = ("fedavg", "ditto")
QUANTISES = ("quped", "local")


class Phase(NamedTuple):
  """A stretch of rounds of one algorithm."""

  rounds: int
  build: Callable  # the state that the phase before left, or None -> Algorithm


def as_sent(key, uploads, cohorts, before):
  """Combines the uploads of a cohort of one client: what it sends, untouched, NaN and all.

  An `Aggregate`, with which a node's round leaves the upload where the server's variables are.
  """
  del key, before
  (upload,) = uploads
  return jax.tree.map(lambda leaf: leaf[0], upload), tuple(c.size > 0 for c in cohorts)


def phases(settings: Settings, model: str, bits: int) -> tuple[Phase, ...]:
  """Returns the phases of one client's training, the first with the server.

  Args:
    settings: of the run.
    model: the client's architecture.
    bits: the client's precision.

  Raises:
    BadInput: the method asks for another architecture or precision.
  """
  options, method = settings.options, settings.method
  if method in ONE_ARCHITECTURE:
    require(model == settings.model, "model", model, f"{settings.model}, the server's, in {method}")
  if method not in QUANTISES:
    require(bits == 32, "bits", bits, f"32 in {method}, which quantises nothing")
  server_model, own = network(settings, settings.model), network(settings, model)
  quantizer = widest_codebook(options, {method: Variant(np.array([bits]))})
  last = options.work.finetune_rounds if method in QUANTISES else 0
  first = Phase(
    options.work.rounds - last, lambda _: _training(settings, server_model, own, quantizer)
  )
  finetuning = Phase(
    last, lambda trained: _finetuning(settings, server_model, own, quantizer, trained)
  )
  return (first, finetuning) if last else (first,)


def _training(
  settings: Settings, server_model: Model, own: Model, quantizer: Quantizer
) -> Algorithm:
  """Builds a method for a cohort of one client, as an experiment does for all."""
  options, work = settings.options, _work(settings)
  match settings.method:
    case "quped":
      return quped(
        server_model,
        (own,),
        quantizer,
        distillation=distillation_of(options),
        rates=personal_rates(options),
        global_step=global_step_of(options),
        simultaneous=options.variants.simultaneous,
        work=work,
        aggregate=as_sent,
      )
    case "fedavg":
      rate = decayed(options, options.hyper.fedavg_rate)
      return fedavg(own, rate=rate, work=work, aggregate=as_sent)
    case "ditto":
      return ditto(
        own,
        penalty=options.hyper.penalty,
        rate=decayed(options, options.hyper.weights_rate),
        global_rate=decayed(options, options.hyper.fedavg_rate),
        work=work,
        aggregate=as_sent,
      )
    case "local":
      return local((own,), quantizer, rates=personal_rates(options), work=work)


def _finetuning(
  settings: Settings, server_model: Model, own: Model, quantizer: Quantizer, trained: FedState
) -> Algorithm:
  """Builds the fine-tuning of the client's hardened model, taught by w where there is one."""
  options, taught = settings.options, settings.method == "quped"
  return finetune(
    (own,),
    quantizer,
    trained,
    server_model=server_model if taught else None,
    distillation=distillation_of(options) if taught else Distillation(lambda_p=0.0),
    rate=options.hyper.finetune_rate,
    centers_rate=options.hyper.centers_rate * options.hyper.final_rate,
    work=_work(settings),
  )


def first_state(settings: Settings, key) -> dict | None:
  """Returns the server's first variables, those of a simulation; None where there is no server.

  Args:
    settings: of the run.
    key: of the first phase's initialisation.
  """
  if settings.method not in BUILDERS:
    return None
  return network(settings, settings.model).init(key)


def aggregate(settings: Settings, num_clients: int) -> Aggregate:
  """Returns how the server combines uploads, as an experiment does."""
  return aggregate_of(settings.options, num_clients, BUILDERS[settings.method])


def exchange_rounds(settings: Settings) -> int:
  """Returns how many rounds the server asks for; fine-tuning is the nodes' own."""
  work = settings.options.work
  return work.rounds - (work.finetune_rounds if settings.method in QUANTISES else 0)


def state_of(variables, own, round_: int) -> FedState:
  """Returns the state of a federation of one client, whose server sent these variables or None."""
  return FedState({} if variables is None else variables, (own,), jnp.int32(round_))


def _work(settings: Settings) -> LocalWork:
  options = settings.options
  return LocalWork(
    steps=options.work.local_steps,
    batch_size=options.work.batch_size,
    augment=augment.flip_and_crop(fill=settings.inputs["mean"]) if options.work.augment else None,
  )
