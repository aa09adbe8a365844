"""Ditto: personal models held near a global one that FedAvg trains beside them.

Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization",
ICML 2021, Algorithm 1.
"""

from collections.abc import Callable

from qupeD_jax import checks
from qupeD_jax.federation import gradients, objectives, server, tree
from qupeD_jax.federation.aggregators import Aggregate, weighted_mean
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.types import Algorithm, Array, Model, PyTree


def ditto(
  model: Model,
  *,
  penalty: Array | float = 0.1,
  rate: Array | float | Callable = 0.1,
  global_rate: Array | float | Callable = 0.1,
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = weighted_mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds Ditto. A client's local step, w being the server's model as it was sent out, is

    w_i <- w_i - eta3 grad f(w_i)
    v_i <- prox_{eta1 penalty/2 ||. - w||^2}(v_i - eta1 grad f(v_i))

  and the server averages the w_i. The pull toward w is taken implicitly, where the paper takes a
  gradient step: the fixed points are the same, and no penalty is too large. With penalty 0 the v_i
  train alone; as it grows they tend to w.

  Args:
    model: the one architecture that all clients train, twice.
    penalty: the paper's lambda, at least 0.
    rate: eta1, of v, a number or a schedule of the local step.
    global_rate: eta3, of w, likewise.
    work: local steps, batches and augmentation; a step is one of w and one
      of v, on the same batch.
    aggregate: how the server combines the w_i; by default the mean by their data.
    start: the first variables of w and all v_i; None draws them.

  Returns:
    An Algorithm; scored are v, as "personal", and w, as "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  checks.non_negative("penalty", penalty)
  checks.positive("rate", rate)
  checks.positive("global_rate", global_rate)

  def step_fn(carry, server_variables, step, batch):
    personal, copy = carry
    loss_fn = objectives.personal_loss(model, batch)
    eta = gradients.value_at(rate, step)
    copy, _ = gradients.sgd_step(copy, loss_fn, gradients.value_at(global_rate, step))
    personal, loss = gradients.sgd_step(personal, loss_fn, eta)
    near = tree.pull(personal["params"], server_variables["params"], eta * penalty)
    return ({**personal, "params": near}, copy), loss

  return server.averaging_beside(model, step_fn, work=work, aggregate=aggregate, start=start)
