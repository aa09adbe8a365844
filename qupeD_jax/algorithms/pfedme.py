"""pFedMe: personal models that minimise a client's loss plus their distance from the local copy.

Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020,
Algorithm 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import gradients, objectives, scoring, server, tree
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.federation.clients import LocalWork, check_work, local_round
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree


def pfedme(
  model: Model,
  *,
  penalty: Array | float = 15.0,
  rate: Array | float | Callable = 0.1,
  global_rate: Array | float | Callable = 0.1,
  inner_steps: int = 5,
  mixing: Array | float = 1.0,
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds pFedMe. A client's local step, on one batch, is

    theta_i <- prox_{eta1 penalty/2 ||. - w_i||^2}(theta_i - eta1 grad f(theta_i))    K times
    w_i     <- w_i - eta3 penalty (w_i - theta_i)

  from w_i = theta_i = w at the beginning of a round; the server then sets
  w <- (1 - beta) w + beta mean(w_i). The inner steps approach the minimiser of
  f(theta) + penalty/2 ||theta - w_i||^2; the quadratic is taken implicitly, where the authors take
  a gradient step: the minimiser is the same, and no penalty is too large. As it grows, theta_i
  tends to w_i and the server to FedAvg's at the rate eta3.

  Args:
    model: the one architecture that all clients train.
    penalty: the paper's lambda, above 0.
    rate: eta1, of theta, a number or a schedule of the local step.
    global_rate: eta3, of w, likewise. A step with eta3 penalty above 1 goes beyond theta_i.
    inner_steps: K, gradient steps on each batch.
    mixing: beta, above 0; 1 is plain averaging.
    work: local steps, batches and augmentation; each costs K gradients.
    aggregate: how the server combines the w_i; the mean, as in the paper, or another.
    start: the server's first variables; None draws them.

  Returns:
    An Algorithm; scored are theta, as "personal", and w, as "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  check_work(work)
  checks.at_least("inner_steps", inner_steps, 1)
  for name, value in (("penalty", penalty), ("mixing", mixing)):
    checks.positive(name, value)
  checks.positive("rate", rate)
  checks.positive("global_rate", global_rate)

  def init(key, data, cohorts):
    del data
    variables = model.init(key) if start is None else start
    clients = tuple(tree.repeat(variables, len(cohort.size)) for cohort in cohorts)
    return FedState(variables, clients, jnp.int32(0))

  def minimise(personal, anchor, batch, eta):
    """Takes the inner steps from `personal`, held near the parameters `anchor`."""

    def inner(personal, _):
      loss_fn = objectives.personal_loss(model, batch)
      personal, loss = gradients.sgd_step(personal, loss_fn, eta)
      near = tree.pull(personal["params"], anchor, eta * penalty)
      return {**personal, "params": near}, loss

    personal, losses = jax.lax.scan(inner, personal, length=inner_steps)
    return personal, losses[0]

  def step_fn(carry, step, batch):
    personal, copy = carry
    personal, loss = minimise(personal, copy["params"], batch, gradients.value_at(rate, step))
    pull = gradients.value_at(global_rate, step) * penalty
    away = jax.tree.map(jnp.subtract, copy["params"], personal["params"])
    copy = {**copy, "params": tree.descend(copy["params"], away, pull)}
    copy["stats"] = gradients.renewed_stats(model, copy, batch)
    return (personal, copy), loss

  def round_fn(key, state, data, cohorts):
    train = local_round(step_fn, data, state.round, work)

    def run(key, _, rows):
      (personal, copy), loss = train(key, (state.server, state.server), rows)
      return personal, copy, loss

    fns = (run,) * len(cohorts)
    after, info = server.run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)
    mixed = jax.tree.map(lambda old, new: old + mixing * (new - old), state.server, after.server)
    return after._replace(server=mixed), info

  def personalize(key, state, data, cohorts):
    del key, data
    return scoring.beside(model, state.server, (model,) * len(cohorts), state.clients, cohorts)

  return Algorithm(init, round_fn, personalize)
