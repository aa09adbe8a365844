"""APFL: personal models that are mixtures of a model of one's own and of FedAvg's.

Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020 (arXiv 2003.13461),
Algorithm 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import gradients, objectives, server, tree
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.types import Algorithm, Array, Model, PyTree


def apfl(
  model: Model,
  *,
  alpha: Array | float = 0.5,
  adaptive: bool = False,
  rate: Array | float | Callable = 0.1,
  global_rate: Array | float | Callable = 0.1,
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds APFL. With m_i = a_i v_i + (1 - a_i) w_i, a client's local step on one batch is

    w_i <- w_i - eta3 grad f(w_i)
    v_i <- v_i - eta1 a_i grad f(m_i)
    a_i <- a_i - eta1 <v_i - w_i, grad f(m_i)>, within [0, 1]      where it is adaptive

  all at the models before the step; the server averages the w_i. A personal model is
  a_i v_i + (1 - a_i) w. With a_i = 0 it is FedAvg's, with a_i = 1 that of local training.

  Args:
    model: the one architecture that all clients train, twice.
    alpha: a_i at the beginning, in [0, 1].
    adaptive: let every client's a_i learn; else it stays.
    rate: eta1, of v and a; a number or a schedule of the local step.
    global_rate: eta3, of w, likewise; the paper has one rate for both.
    work: local steps, batches and augmentation; each costs two gradients.
    aggregate: how the server combines the w_i; the mean, as in the paper, or another.
    start: the first variables of w and all v_i; None draws them.

  Returns:
    An Algorithm; scored are the mixtures, as "personal", and w, as "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  checks.share("alpha", alpha)
  checks.positive("rate", rate)
  checks.positive("global_rate", global_rate)

  def step_fn(carry, server_variables, step, batch):
    del server_variables
    own, copy = carry
    loss_fn, eta = objectives.personal_loss(model, batch), gradients.value_at(rate, step)
    of_params = lambda params: loss_fn({"params": params, "stats": own["stats"]})
    mixed = _mixture(own, copy["params"])
    (loss, stats), grads = jax.value_and_grad(of_params, has_aux=True)(mixed)
    mixing = own["alpha"]
    if adaptive:
      away = jax.tree.map(jnp.subtract, own["params"], copy["params"])
      mixing = jnp.clip(mixing - eta * tree.inner(away, grads), 0.0, 1.0)
    params = tree.descend(own["params"], grads, eta * own["alpha"])
    copy, _ = gradients.sgd_step(copy, loss_fn, gradients.value_at(global_rate, step))
    return ({"params": params, "stats": stats, "alpha": mixing}, copy), loss

  return server.averaging_beside(
    model,
    step_fn,
    own=lambda variables: {**variables, "alpha": jnp.float32(alpha)},
    personal=lambda own, w: {"params": _mixture(own, w["params"]), "stats": own["stats"]},
    work=work,
    aggregate=aggregate,
    start=start,
  )


def _mixture(own: PyTree, params: PyTree) -> PyTree:
  """Returns a v + (1 - a) w of a client's own model and the parameters w."""
  return jax.tree.map(lambda v, w: w + own["alpha"] * (v - w), own["params"], params)
