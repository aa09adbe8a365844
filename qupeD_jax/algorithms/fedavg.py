"""FedAvg: clients train copies of one model, the server averages them.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017.
"""

from collections.abc import Callable

import optax

from qupeD_jax.federation import objectives, server
from qupeD_jax.federation.aggregators import Aggregate, weighted_mean
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.types import Algorithm, Array, Model, PyTree


def fedavg(
  model: Model,
  *,
  rate: Array | float | Callable = 0.1,
  optimizer: optax.GradientTransformation = optax.identity(),
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = weighted_mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds FedAvg: every client minimises f_i(w_i) for tau steps, w becomes their mean.

  Args:
    model: the one architecture that all clients train.
    rate: step size, a number or a schedule of the local step.
    optimizer: of the clients, without its learning rate, started anew every round.
    work: local steps, batches and augmentation.
    aggregate: how the server combines the w_i; the mean by their data, as in the paper, or another.
    start: the server's first variables; None draws them.

  Returns:
    An Algorithm; scored is the server's model, as "global" and as "personal".

  Raises:
    BadInput: a hyperparameter is out of range.
  """

  def objective(variables, server_variables, batch):
    del server_variables
    return objectives.personal_loss(model, batch)(variables)

  return server.averaging(
    model,
    objective,
    rate=rate,
    optimizer=optimizer,
    work=work,
    aggregate=aggregate,
    start=start,
  )
