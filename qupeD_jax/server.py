"""What the server does: weigh its clients and average what they send."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qupeD_jax import checks, client, tree
from qupeD_jax.types import Algorithm, Array, Cohort, FedState, Model, PyTree, Scored


def uniform(cohort: Cohort) -> Array:
  """Weighs every client equally, [K] float32, and padding not at all."""
  return (cohort.size > 0).astype(jnp.float32)


def by_size(cohort: Cohort) -> Array:
  """Weighs every client by its number of training rows, [K] float32."""
  return cohort.size.astype(jnp.float32)


def average(
  uploads: tuple[PyTree, ...], cohorts: tuple[Cohort, ...], weigh: Callable, before: PyTree
) -> PyTree:
  """Averages the clients' uploads.

  Args:
    uploads: one pytree per cohort, leaves [K, ...].
    cohorts: the clients that sent them.
    weigh: cohort -> weights [K].
    before: what the server keeps if nobody sent anything.

  Returns:
    The mean, leaves [...].
  """
  return tree.weighted_mean(uploads, tuple(weigh(cohort) for cohort in cohorts), before)


def score_global(model: Model, variables: PyTree, cohorts: tuple[Cohort, ...]):
  """Returns the server's model as what is scored on every cohort."""
  return tuple(Scored(model, variables, stacked=False) for _ in cohorts)


def train_copy(
  loss_fn: Callable,
  variables: PyTree,
  moments: PyTree,
  optimizer: optax.GradientTransformation,
  rate: Array | float,
) -> tuple[PyTree, PyTree, Array]:
  """Takes one gradient step on a client's copy of the global model.

  Args:
    loss_fn: variables -> (loss [], stats).
    variables: the copy w_i.
    moments: the optimiser's state.
    optimizer: turns the gradient into a direction.
    rate: step size.

  Returns:
    New variables, new moments, and the loss before the step.
  """

  def of_params(params):
    return loss_fn({**variables, "params": params})

  params = variables["params"]
  (loss, stats), grads = jax.value_and_grad(of_params, has_aux=True)(params)
  direction, moments = optimizer.update(grads, moments, params)
  return {"params": tree.descend(params, direction, rate), "stats": stats}, moments, loss


def averaging(
  model: Model,
  objective: Callable,
  *,
  rate: Array | float | Callable,
  optimizer: optax.GradientTransformation,
  local_steps: int,
  batch_size: int,
  weigh: Callable,
  start: PyTree | None,
) -> Algorithm:
  """Builds federated averaging of whatever the clients minimise.

  Args:
    model: the one architecture that all clients train.
    objective: (variables, the server's variables, batch) -> (loss [], stats).
    rate: step size, a number or a schedule of the local step.
    optimizer: of the clients, without its learning rate, started anew every round.
    local_steps: tau, steps of a round.
    batch_size: B.
    weigh: cohort -> weights [K] of the average.
    start: the server's first variables; None draws them.

  Returns:
    An Algorithm without state at its clients; scored is the server's model, as "global" and as
    "personal".
  """
  client.check(local_steps, batch_size)
  checks.positive("--rate", rate)

  def init(key, data, cohorts):
    del data
    server = model.init(key) if start is None else start
    return FedState(server, tuple(() for _ in cohorts), jnp.int32(0))

  def round_fn(key, state, data, cohorts):
    first_step = state.round * local_steps

    def step_fn(carry, batch, step):
      variables, moments, loss = train_copy(
        lambda v: objective(v, state.server, batch), *carry, optimizer, client.value_at(rate, step)
      )
      return (variables, moments), loss

    def run(key, nothing, rows):
      carry = state.server, optimizer.init(state.server["params"])
      (variables, _), loss = client.scan_steps(
        step_fn, carry, key, data, rows, local_steps, batch_size, first_step
      )
      return nothing, variables, loss

    clients, uploads, info = client.over_clients((run,) * len(cohorts), key, cohorts, state.clients)
    server = average(uploads, cohorts, weigh, state.server)
    return FedState(server, clients, state.round + 1), info

  def personalize(key, state, data, cohorts):
    del key, data
    shared = score_global(model, state.server, cohorts)
    return {"personal": shared, "global": shared}

  return Algorithm(init, round_fn, personalize)
