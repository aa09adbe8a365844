"""FedProx: FedAvg whose clients are held near the server's model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020.
"""

from collections.abc import Callable

import optax

from qupeD_jax import checks
from qupeD_jax.federation import objectives, server, tree
from qupeD_jax.federation.aggregators import Aggregate, weighted_mean
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.types import Algorithm, Array, Model, PyTree


def fedprox(
  model: Model,
  *,
  mu: Array | float = 0.01,
  rate: Array | float | Callable = 0.1,
  optimizer: optax.GradientTransformation = optax.identity(),
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = weighted_mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds FedProx: every client minimises f_i(w_i) + mu/2 ||w_i - w||^2; mu = 0 is FedAvg.

  Args:
    mu: weight of the proximal term, at least 0.
    model, rate, optimizer, work, aggregate, start: as in `fedavg`.

  Returns:
    An Algorithm; scored is the server's model, as "global" and as "personal".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  checks.non_negative("mu", mu)

  def objective(variables, server_variables, batch):
    loss, stats = objectives.personal_loss(model, batch)(variables)
    distance = tree.squared_distance(variables["params"], server_variables["params"])
    return loss + mu / 2 * distance, stats

  return server.averaging(
    model,
    objective,
    rate=rate,
    optimizer=optimizer,
    work=work,
    aggregate=aggregate,
    start=start,
  )
