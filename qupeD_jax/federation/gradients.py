"""Passes through one client's model, and plain steps along its gradients."""

from collections.abc import Callable

import jax
import optax

from qupeD_jax.federation import tree
from qupeD_jax.federation.batches import Batch, train_pass
from qupeD_jax.types import Array, Model, PyTree


def value_at(rate: Array | float | Callable, step: Array) -> Array | float:
  """Reads a rate that may be an optax schedule at a step."""
  return rate(step) if callable(rate) else rate


def gradient_step(
  variables: PyTree,
  moments: PyTree,
  loss_fn: Callable,
  rate: Array | float,
  optimizer: optax.GradientTransformation,
) -> tuple[PyTree, PyTree, Array]:
  """Takes one step of an optimiser on a whole model.

  Args:
    variables: the model.
    moments: the optimiser's state.
    loss_fn: variables -> (loss [], stats).
    rate: step size.
    optimizer: turns the gradient into a direction.

  Returns:
    New variables, new moments, and the loss before the step.
  """

  def of_params(params):
    return loss_fn({**variables, "params": params})

  params = variables["params"]
  (loss, stats), grads = jax.value_and_grad(of_params, has_aux=True)(params)
  direction, moments = optimizer.update(grads, moments, params)
  return {"params": tree.descend(params, direction, rate), "stats": stats}, moments, loss


def sgd_step(variables: PyTree, loss_fn: Callable, rate: Array | float) -> tuple[PyTree, Array]:
  """Takes one step of plain gradient descent; new variables and the loss before it."""
  optimizer = optax.identity()
  variables, _, loss = gradient_step(variables, optimizer.init(()), loss_fn, rate, optimizer)
  return variables, loss


def forward(model: Model, variables: PyTree, batch: Batch) -> tuple[Array, Callable, PyTree]:
  """Runs a model on a batch in training mode, once for all losses that its logits enter.

  Returns:
    Logits [B, classes] float32; what turns a gradient in them into one in the parameters; stats.
  """

  def of_params(params):
    return train_pass(model, {**variables, "params": params}, batch)

  logits, backward, stats = jax.vjp(of_params, variables["params"], has_aux=True)
  return logits, lambda gradient: backward(gradient)[0], stats


def renewed_stats(model: Model, variables: PyTree, batch: Batch) -> PyTree:
  """Returns the running statistics after a pass of a model that no loss is taken of.

  A network without statistics computes nothing for it.
  """
  return train_pass(model, variables, batch)[1]
