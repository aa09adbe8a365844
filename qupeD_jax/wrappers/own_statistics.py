"""Running statistics that stay with the client: SiloBN, for models with batch normalisation.

Andreux et al., "Siloed federated learning for multi-centric histopathology datasets", DART 2020.
In training a batch is normalised by itself, so running statistics matter only when a model is
scored: it suffices that each client estimates its own then, instead of taking the clients' average
from the server.
"""

import functools

import jax
import jax.numpy as jnp

from qupeD_jax import checks, rng
from qupeD_jax.federation.batches import Batch, draw_rows, train_pass
from qupeD_jax.types import Algorithm, Scored


def with_own_statistics(
  algorithm: Algorithm, num_batches: int = 50, batch_size: int = 50
) -> Algorithm:
  """Wraps an algorithm so that the server's model is scored with each client's own statistics.

  They start from the server's and are renewed by forward passes in training mode over batches of
  the client's training rows, drawn without replacement. With momentum 0.9, 50 of them leave
  0.9^50 = 0.5 % of the server's.

  Args:
    algorithm: any. Models that clients have of their own, and models without statistics, are scored
      as they were.
    num_batches: forward passes of each client.
    batch_size: B, or all rows of a client that has fewer.

  Returns:
    The same Algorithm; a model that all clients shared is scored as one per client.

  Raises:
    BadInput: num_batches or batch_size is not a whole number of at least 1.
  """
  checks.at_least("num_batches", num_batches, 1)
  checks.at_least("batch_size", batch_size, 1)

  def renew(model, variables, data, key, index, size):
    drawn = draw_rows(key, index, size, num_batches, batch_size)

    def step(stats, drawn):
      number, (rows, mask) = drawn
      batch = Batch(data.x[rows], data.y[rows], mask, rng.stream(key, "layers", number))
      return train_pass(model, {**variables, "stats": stats}, batch)[1], None

    numbered = jnp.arange(num_batches), drawn
    return {**variables, "stats": jax.lax.scan(step, variables["stats"], numbered)[0]}

  def own(scored, key, data, cohort):
    if scored.stacked or not jax.tree.leaves(scored.variables["stats"]):
      return scored
    keys = rng.client_keys(key, "statistics", cohort.client)
    renew_one = functools.partial(renew, scored.model, scored.variables, data)
    variables = jax.vmap(renew_one)(keys, cohort.index, cohort.size)
    return Scored(scored.model, variables, stacked=True)

  def personalize(key, state, data, cohorts):
    shown = algorithm.personalize(key, state, data, cohorts)
    # What is shown under two names, as FedAvg's model is, is renewed once.
    renewed = {}
    for models in shown.values():
      for slot, (scored, cohort) in enumerate(zip(models, cohorts, strict=True)):
        if (slot, id(scored)) not in renewed:
          renewed[slot, id(scored)] = own(scored, key, data, cohort)
    return {
      name: tuple(renewed[slot, id(scored)] for slot, scored in enumerate(models))
      for name, models in shown.items()
    }

  return algorithm._replace(personalize=personalize)
