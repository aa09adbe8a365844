"""What an algorithm has to show: the models that are scored, and that ship."""

import jax

from qupeD_jax.federation import algorithm1
from qupeD_jax.federation.algorithm1 import Personal
from qupeD_jax.quantization import ops
from qupeD_jax.types import Cohort, Model, PyTree, Quantizer, Scored


def shipped(models: tuple[Model, ...], clients: tuple[Personal, ...]) -> tuple[Scored, ...]:
  """Returns personal models as they are shipped: entries on their centers, with Q's statistics."""

  def harden(personal):
    params = ops.harden(personal.variables["params"], personal.codebooks)
    return {"params": params, "stats": algorithm1.running_stats(personal)["q"]}

  pairs = zip(models, clients, strict=True)
  return tuple(
    Scored(m, jax.vmap(harden)(c), stacked=True, codebooks=c.codebooks or None) for m, c in pairs
  )


def quantised(
  models: tuple[Model, ...], clients: tuple[Personal, ...], quantizer: Quantizer
) -> dict[str, tuple[Scored, ...]]:
  """Returns what is scored of personal models: "personal", as shipped, and "unquantised".

  The latter is x with statistics of its own passes; it is left out where nothing is quantised, and
  where x makes no passes because its quantizer trains at Q alone.
  """
  shown = {"personal": shipped(models, clients)}
  if quantizer.at_x and any(personal.codebooks for personal in clients):
    pairs = zip(models, clients, strict=True)
    shown["unquantised"] = tuple(Scored(m, c.variables, stacked=True) for m, c in pairs)
  return shown


def shared(model: Model, variables: PyTree, cohorts: tuple[Cohort, ...]) -> tuple[Scored, ...]:
  """Returns the server's model as what is scored on every cohort."""
  return tuple(Scored(model, variables, stacked=False) for _ in cohorts)


def beside(
  model: Model,
  variables: PyTree,
  client_models: tuple[Model, ...],
  clients: tuple[PyTree, ...],
  cohorts: tuple[Cohort, ...],
) -> dict[str, tuple[Scored, ...]]:
  """Returns what is scored of full-precision personal models and a global one.

  Args:
    model, variables: of the server.
    client_models: one per cohort.
    clients: their variables, one pytree per cohort, leaves [K, ...].
    cohorts: the clients.
  """
  pairs = zip(client_models, clients, strict=True)
  personal = tuple(Scored(m, v, stacked=True) for m, v in pairs)
  return {"personal": personal, "global": shared(model, variables, cohorts)}
