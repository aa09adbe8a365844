"""FedRep: clients share a representation, and each has a head of its own on it.

Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized
Federated Learning", ICML 2021, Algorithm 1.
"""

from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import gradients, objectives, partly
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.types import Algorithm, Array, Model, PyTree


def in_head(path: str) -> bool:
  """Tells by its path whether a parameter is the classifier's: whether it lies in "head".

  >>> in_head("head/kernel"), in_head("dense_1/kernel")
  (True, False)
  """
  return "head" in path.split("/")[:-1]


def fedrep(
  model: Model,
  *,
  rate: Array | float | Callable = 0.1,
  head_rate: Array | float | Callable = 0.1,
  head_steps: int | None = None,
  is_head: Callable[[str], bool] = in_head,
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds FedRep. In a round a client takes the server's body phi and its own head h_i, and

    h_i   <- h_i - eta_h grad_h f(phi_i, h_i)        for so many steps, then
    phi_i <- phi_i - eta grad_phi f(phi_i, h_i)      for the others

  and the server averages the phi_i. A step costs a whole gradient, whichever part it moves.

  Args:
    model: the one architecture that all clients train.
    rate: eta, of the body, a number or a schedule of the local step.
    head_rate: eta_h, of the head, likewise.
    head_steps: how many of a round's local steps, from its first on, are the head's; None for half
      of them, rounded down.
    is_head: path of a parameter, such as "head/kernel" -> whether it belongs to the head. Where all
      do, with head_steps all steps, it is local training, and where none does, with head_steps 0,
      FedAvg.
    work: local steps of both kinds, batches and augmentation.
    aggregate: how the server combines the phi_i, running statistics among them; the mean, as in the
      paper, or another.
    start: the first variables of all clients; None draws them.

  Returns:
    An Algorithm; scored are, as "personal", the server's body with each client's head. A server
    without a head has no model that could be scored.

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  checks.positive("rate", rate)
  checks.positive("head_rate", head_rate)
  of_head = work.steps // 2 if head_steps is None else head_steps
  checks.whole("head_steps", of_head, 0, work.steps)

  def heads(variables):
    found = {f"params/{path}" for path in partly.paths(variables["params"]) if is_head(path)}
    allowed = "0 where no parameter is the head's; `is_head` tells by its path which are"
    checks.require(of_head == 0 or bool(found), "head_steps", of_head, allowed)
    return found

  def step_fn(variables, step, batch):
    on_head = step % work.steps < of_head
    eta_head = jnp.where(on_head, gradients.value_at(head_rate, step), 0.0)
    eta_body = jnp.where(on_head, 0.0, gradients.value_at(rate, step))
    loss_fn = objectives.personal_loss(model, batch)
    of_params = lambda params: loss_fn({**variables, "params": params})
    (loss, stats), grads = jax.value_and_grad(of_params, has_aux=True)(variables["params"])
    etas = {path: eta_head if is_head(path) else eta_body for path in partly.paths(grads)}
    etas = flax.traverse_util.unflatten_dict(etas, sep="/")
    params = jax.tree.map(lambda p, g, eta: p - eta * g, variables["params"], grads, etas)
    return {"params": params, "stats": stats}, loss

  return partly.averaging(model, heads, step_fn, work=work, aggregate=aggregate, start=start)
