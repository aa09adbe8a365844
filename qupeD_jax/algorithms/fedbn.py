"""FedBN: FedAvg whose clients keep their normalisation layers to themselves.

Li, Jiang, Zhang, Kamp, Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch
Normalization", ICLR 2021, Algorithm 1.
"""

from collections.abc import Callable

from qupeD_jax import checks
from qupeD_jax.federation import gradients, objectives, partly
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.types import Algorithm, Array, Model, PyTree


def fedbn(
  model: Model,
  *,
  rate: Array | float | Callable = 0.1,
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds FedBN: every client minimises f_i(w_i); what is averaged is w_i without its norms.

  A normalisation layer is one with a "scale", as flax's are; its parameters, and all running
  statistics, stay with the client. With a network that has none it is FedAvg.

  Args:
    model: the one architecture that all clients train.
    rate: step size, a number or a schedule of the local step.
    work: local steps, batches and augmentation.
    aggregate: how the server combines what is shared; the mean, as in the paper, or another.
    start: the first variables of all clients; None draws them.

  Returns:
    An Algorithm; scored are, as "personal", the server's parameters with each client's norms. A
    server without norms has no model that could be scored, unless the network has none.

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  checks.positive("rate", rate)

  def step_fn(variables, step, batch):
    loss_fn = objectives.personal_loss(model, batch)
    return gradients.sgd_step(variables, loss_fn, gradients.value_at(rate, step))

  return partly.averaging(model, _norms, step_fn, work=work, aggregate=aggregate, start=start)


def _norms(variables: PyTree) -> set[str]:
  """Returns the paths of normalisation layers' parameters, and of all running statistics."""
  everything = partly.paths(variables)
  layers = {path.removesuffix("/scale") for path in everything if path.endswith("/scale")}
  layer_of = lambda path: path.rpartition("/")[0]
  return {path for path in everything if layer_of(path) in layers or path.startswith("stats/")}
