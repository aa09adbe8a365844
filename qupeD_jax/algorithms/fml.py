"""FML: a personal model and the copy of a shared one teach each other.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu, "Federated Mutual Learning", 2020
(arXiv 2006.16765). The teachers' outputs are held fixed, as in Zhang, Xiang, Hospedales, Lu, "Deep
Mutual Learning", CVPR 2018, on which it builds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import client, server, tree
from qupeD_jax.federation.aggregators import Aggregate, weighted_mean
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree


def fml(
  server_model: Model,
  client_models: tuple[Model, ...],
  *,
  lambda_p: Array | float = 0.5,
  global_lambda_p: Array | float = 0.5,
  temperature: Array | float = 1.0,
  rate: Array | float | Callable = 0.1,
  global_rate: Array | float | Callable = 0.1,
  local_steps: int = 10,
  batch_size: int = 50,
  augment: Callable | None = None,
  clients_per_step: int | None = None,
  aggregate: Aggregate = weighted_mean(),
  start: tuple[PyTree, tuple[PyTree, ...]] | None = None,
) -> Algorithm:
  """Builds FML. A client's local step on one batch, both gradients taken at the models before it:

    x_i <- x_i - eta1 grad_x [(1 - p) f(x_i) + p T^2 KL(softmax(w_i/T) || softmax(x_i/T))]
    w_i <- w_i - eta3 grad_w [(1 - q) f(w_i) + q T^2 KL(softmax(x_i/T) || softmax(w_i/T))]

  and the server averages the w_i. With p = 0 the x_i train alone, with q = 0 w is FedAvg's.

  Args:
    server_model: the architecture of w, FML's "meme" model.
    client_models: of x, one per cohort, with the server's classes.
    lambda_p: p in [0, 1), the paper's 1 - alpha.
    global_lambda_p: q in [0, 1), the paper's 1 - beta.
    temperature: T > 0.
    rate: eta1, a number or a schedule of the local step.
    global_rate: eta3, likewise.
    local_steps: tau, steps of a round.
    batch_size: B.
    augment: (key, x [B, H, W, C]) -> x, for every batch anew; None for none.
    clients_per_step: clients of a cohort that train side by side; None for all of them.
    aggregate: how the server combines the w_i; by default the mean by their data.
    start: the server's variables and one client model's per cohort; None draws them.

  Returns:
    An Algorithm; scored are x, as "personal", and w, as "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  client.check(local_steps, batch_size)
  checks.fraction("lambda_p", lambda_p, closed=False)
  checks.fraction("global_lambda_p", global_lambda_p, closed=False)
  checks.positive("temperature", temperature)
  checks.positive("rate", rate)
  checks.positive("global_rate", global_rate)

  def init(key, data, cohorts):
    del data
    server_start, starts = start or (server_model.init(key), [m.init(key) for m in client_models])
    pairs = zip(starts, cohorts, strict=True)
    clients = tuple(tree.repeat(variables, len(cohort.size)) for variables, cohort in pairs)
    return FedState(server_start, clients, jnp.int32(0))

  def client_step(model):
    def step_fn(carry, step, batch):
      personal, copy = carry
      # One pass through each serves twice: as a teacher, and in its own step.
      personal_logits, *of_x = client.forward(model, personal, batch)
      global_logits, *of_w = client.forward(server_model, copy, batch)
      learn = jax.value_and_grad(client.batch_loss)
      loss, gradient = learn(personal_logits, batch, global_logits, lambda_p, temperature)
      personal = descend(personal, *of_x, gradient, client.value_at(rate, step))
      _, gradient = learn(global_logits, batch, personal_logits, global_lambda_p, temperature)
      copy = descend(copy, *of_w, gradient, client.value_at(global_rate, step))
      return (personal, copy), loss

    return step_fn

  def descend(variables, backward, stats, gradient, eta):
    return {"params": tree.descend(variables["params"], backward(gradient), eta), "stats": stats}

  def round_fn(key, state, data, cohorts):
    first_step = state.round * local_steps

    trains = tuple(
      client.local_round(
        client_step(model), data, first_step, local_steps, batch_size, augment=augment
      )
      for model in client_models
    )
    return server.train_beside(trains, key, state, cohorts, aggregate, clients_per_step)

  def personalize(key, state, data, cohorts):
    del key, data
    return server.scored(server_model, state.server, client_models, state.clients, cohorts)

  return Algorithm(init, round_fn, personalize)
