"""SCAFFOLD: FedAvg whose clients correct each step by how their gradients differ from all others'.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning", ICML 2020, Algorithm 1 with option II.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import exchange, gradients, objectives, scoring, server, tree
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.federation.clients import LocalWork, check_work, local_round
from qupeD_jax.types import Algorithm, Array, FedState, Info, Model, PyTree


def scaffold(
  model: Model,
  *,
  rate: Array | float | Callable = 0.1,
  global_rate: Array | float = 1.0,
  num_clients: int | None = None,
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds SCAFFOLD. From y_i = w, c_i and c being the control variates, a client's local step is

    y_i <- y_i - eta (grad f(y_i) - c_i + c)

  and after K of them c_i moves by d_i = (w - y_i) / (K eta) - c, option II: to the mean of its own
  gradients. The server, S being those that took part, sets

    w <- w + eta_g mean_S(y_i - w),    c <- c + |S| / N mean_S(d_i)

  All c_i and c start at 0, so that a first round with eta_g = 1 is FedAvg's.

  Args:
    model: the one architecture that all clients train.
    rate: eta, a number or a schedule of the local step; K eta is then the sum of its values.
    global_rate: eta_g, of the server's parameters; running statistics are averaged.
    num_clients: N, of the whole federation; None for as many as take part in a round.
    work: local steps, batches and augmentation.
    aggregate: how the server combines the y_i and the d_i; the mean, as in the paper, or another.
    start: the server's first variables; None draws them.

  Returns:
    An Algorithm whose clients keep their c_i; scored is the server's model, as "global" and as
    "personal". What travels is twice the model.

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  check_work(work)
  checks.positive("rate", rate)
  checks.positive("global_rate", global_rate)
  if num_clients is not None:
    checks.at_least("num_clients", num_clients, 1)

  def init(key, data, cohorts):
    del data
    variables = model.init(key) if start is None else start
    control = jax.tree.map(jnp.zeros_like, variables["params"])
    clients = tuple(tree.repeat(control, len(cohort.size)) for cohort in cohorts)
    return FedState({"model": variables, "control": control}, clients, jnp.int32(0))

  def client_fn(state, data):
    w, control = state.server["model"], state.server["control"]

    def run(key, own, rows):
      correction = jax.tree.map(jnp.subtract, control, own)

      def step_fn(carry, step, batch):
        copy, taken = carry
        eta = gradients.value_at(rate, step)
        copy, loss = gradients.sgd_step(copy, objectives.personal_loss(model, batch), eta)
        copy = {**copy, "params": tree.descend(copy["params"], correction, eta)}
        return (copy, taken + eta), loss

      train = local_round(step_fn, data, state.round, work)
      (copy, taken), loss = train(key, (w, jnp.float32(0)), rows)

      def moved(before, after, c):
        # Without a step, as at the end of a schedule, c_i has learned nothing.
        return jnp.where(taken > 0, (before - after) / jnp.where(taken > 0, taken, 1.0) - c, 0.0)

      change = jax.tree.map(moved, w["params"], copy["params"], control)
      own = jax.tree.map(jnp.add, own, change)
      sent = jax.tree.map(jnp.add, control, change)
      return own, {"model": copy, "control": sent}, loss

    return run

  def round_fn(key, state, data, cohorts):
    fns = (client_fn(state, data),) * len(cohorts)
    after, info = server.run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)
    toward = lambda share: lambda old, new: old + share * (new - old)
    old, new = state.server, after.server
    params = jax.tree.map(toward(global_rate), old["model"]["params"], new["model"]["params"])
    control = jax.tree.map(toward(_share(info, num_clients)), old["control"], new["control"])
    kept = {"model": {**new["model"], "params": params}, "control": control}
    return after._replace(server=kept), info

  def personalize(key, state, data, cohorts):
    del key, data
    shared = scoring.shared(model, state.server["model"], cohorts)
    return {"personal": shared, "global": shared}

  return Algorithm(init, round_fn, personalize)


def _share(info: tuple[Info, ...], num_clients: int | None) -> Array:
  """Returns |S| / N: the share of all clients whose uploads of this round were taken, []."""
  came = [i.size > 0 for i in info]
  taken = [here & ~i.dropped for here, i in zip(came, info, strict=True)]
  of_round, counted = exchange.add([sum(map(jnp.sum, found)) for found in (came, taken)])
  return counted / (jnp.maximum(of_round, 1) if num_clients is None else num_clients)
