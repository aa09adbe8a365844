"""FML: a personal model and the copy of a shared one teach each other.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu, "Federated Mutual Learning", 2020
(arXiv 2006.16765). The teachers' outputs are held fixed, as in Zhang, Xiang, Hospedales, Lu, "Deep
Mutual Learning", CVPR 2018, on which it builds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import gradients, objectives, scoring, server, tree
from qupeD_jax.federation.aggregators import Aggregate, weighted_mean
from qupeD_jax.federation.clients import LocalWork, check_work, local_round
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
  work: LocalWork = LocalWork(),
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
    work: local steps, batches and augmentation.
    aggregate: how the server combines the w_i; by default the mean by their data.
    start: the server's variables and one client model's per cohort; None draws them.

  Returns:
    An Algorithm; scored are x, as "personal", and w, as "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  check_work(work)
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
      personal_logits, *of_x = gradients.forward(model, personal, batch)
      global_logits, *of_w = gradients.forward(server_model, copy, batch)
      learn = jax.value_and_grad(objectives.batch_loss)
      of_teacher = objectives.Teaching(global_logits, lambda_p, temperature)
      loss, gradient = learn(personal_logits, batch, of_teacher)
      personal = descend(personal, *of_x, gradient, gradients.value_at(rate, step))
      of_pupil = objectives.Teaching(personal_logits, global_lambda_p, temperature)
      _, gradient = learn(global_logits, batch, of_pupil)
      copy = descend(copy, *of_w, gradient, gradients.value_at(global_rate, step))
      return (personal, copy), loss

    return step_fn

  def descend(variables, backward, stats, gradient, eta):
    return {"params": tree.descend(variables["params"], backward(gradient), eta), "stats": stats}

  def round_fn(key, state, data, cohorts):
    steps = map(client_step, client_models)
    trains = (local_round(step, data, state.round, work) for step in steps)
    fns = tuple(server.beside_copy(train, state.server) for train in trains)
    return server.run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)

  def personalize(key, state, data, cohorts):
    del key, data
    return scoring.beside(server_model, state.server, client_models, state.clients, cohorts)

  return Algorithm(init, round_fn, personalize)
