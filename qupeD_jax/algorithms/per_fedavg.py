"""Per-FedAvg: a global model from which one gradient step leads to a good personal one.

Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A
Model-Agnostic Meta-Learning Approach", NeurIPS 2020, Algorithm 1 in its first-order form.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import gradients, objectives, scoring, server, tree
from qupeD_jax.federation.aggregators import Aggregate, weighted_mean
from qupeD_jax.federation.clients import LocalWork, check_work, local_round, over_clients
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree


def per_fedavg(
  model: Model,
  *,
  inner_rate: Array | float = 0.01,
  rate: Array | float | Callable = 0.1,
  adapt_steps: int = 1,
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = weighted_mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds Per-FedAvg. A client's local step, on two batches, is

    v   <- w_i - alpha grad f(w_i)     on one batch
    w_i <- w_i - eta grad f(v)         on the other

  the first-order form, which leaves out the Hessian of f; the server averages the w_i. A personal
  model is w after `adapt_steps` gradient steps of size alpha. With alpha = 0 this is FedAvg.

  Args:
    model: the one architecture that all clients train.
    inner_rate: alpha, at least 0.
    rate: eta, a number or a schedule of the local step.
    adapt_steps: steps on training batches from w to a personal model; the paper takes one.
    work: local steps, batches and augmentation; each costs two gradients.
    aggregate: how the server combines the w_i; by default the mean by their data.
    start: the server's first variables; None draws them.

  Returns:
    An Algorithm without state at its clients; scored are the adapted models, as "personal", and w,
    as "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  check_work(work)
  checks.at_least("adapt_steps", adapt_steps, 1)
  checks.non_negative("inner_rate", inner_rate)
  checks.positive("rate", rate)

  def init(key, data, cohorts):
    del data
    variables = model.init(key) if start is None else start
    return FedState(variables, tuple(() for _ in cohorts), jnp.int32(0))

  def adapt(variables, batch):
    return gradients.sgd_step(variables, objectives.personal_loss(model, batch), inner_rate)

  def step_fn(variables, step, batch, inner_batch):
    adapted, _ = adapt(variables, inner_batch)
    fn = lambda params: objectives.personal_loss(model, batch)({**adapted, "params": params})
    (loss, stats), grads = jax.value_and_grad(fn, has_aux=True)(adapted["params"])
    params = tree.descend(variables["params"], grads, gradients.value_at(rate, step))
    return {"params": params, "stats": stats}, loss

  def round_fn(key, state, data, cohorts):
    train = local_round(step_fn, data, state.round, work, batches_per_step=2)

    def run(key, nothing, rows):
      copy, loss = train(key, state.server, rows)
      return nothing, copy, loss

    fns = (run,) * len(cohorts)
    return server.run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)

  def personalize(key, state, data, cohorts):
    step = lambda variables, step, batch: adapt(variables, batch)
    train = local_round(step, data, 0, work._replace(steps=adapt_steps))

    def run(key, _, rows):
      personal, loss = train(key, state.server, rows)
      return personal, (), loss

    adapted, _, _ = over_clients(
      (run,) * len(cohorts), key, cohorts, state.clients, work.clients_per_step
    )
    return scoring.beside(model, state.server, (model,) * len(cohorts), adapted, cohorts)

  return Algorithm(init, round_fn, personalize)
