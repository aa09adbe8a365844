"""Local training: every client alone, by Algorithm 1 of QuPeD or at full precision.

Ozkara, Singh, Data, Diggavi, "QuPeD: Quantized Personalization via Distillation with Applications
to Federated Learning", NeurIPS 2021, Algorithm 1. One client is the centralised Algorithm 1; a
start from FedAvg's model is FedAvg with local fine-tuning.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from qupeD_jax import checks
from qupeD_jax.federation import client
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree, Quantizer


def local(
  models: tuple[Model, ...],
  quantizer: Quantizer,
  *,
  rates: client.Rates = client.Rates(),
  optimizer: optax.GradientTransformation = optax.identity(),
  local_steps: int = 10,
  batch_size: int = 50,
  augment: Callable | None = None,
  clients_per_step: int | None = None,
  straight_through: Array | float = 0.0,
  simultaneous: bool = False,
  start: tuple[PyTree, ...] | None = None,
) -> Algorithm:
  """Builds local training.

  Args:
    models: one per cohort.
    quantizer: `quantizers.learned_codebook()` for Algorithm 1, `quantizers.none()` for full
      precision, or any other.
    rates: step sizes and the weight of R, numbers or schedules of the local step.
    optimizer: over x, without its learning rate: the identity is plain gradient descent.
    local_steps: tau, steps of a round.
    batch_size: B.
    augment: (key, x [B, H, W, C]) -> x, for every batch anew; None for none.
    clients_per_step: clients of a cohort that train side by side; None for all of them.
    straight_through: share in [0, 1] of x's gradient that is taken at Q_c(x), by a quantizer that
      trains at both; 0 is the paper's.
    simultaneous: take the gradient in c at the old x, as x's. A step is then one pass, forward and
      backward, of each of x and Q; alternation passes through Q twice.
    start: variables per cohort that its clients start from; None draws them.

  Returns:
    An Algorithm without a server; scored are "personal" (as shipped) and "unquantised"
    (`client.scored`).

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  client.check(local_steps, batch_size, rates)
  checks.share("straight_through", straight_through)

  def init(key, data, cohorts):
    del data
    clients = client.start_clients(models, start, key, cohorts, quantizer, optimizer)
    return FedState({}, clients, jnp.int32(0))

  def client_round(model, data, first_step):
    def step_fn(personal, step, batch):
      loss_fn = client.personal_loss(model, batch)
      return client.proximal_step(
        personal,
        loss_fn,
        step,
        quantizer=quantizer,
        optimizer=optimizer,
        rates=rates,
        straight_through=straight_through,
        simultaneous=simultaneous,
      )

    train = client.local_round(step_fn, data, first_step, local_steps, batch_size, augment=augment)

    def run(key, personal, rows):
      personal, loss = train(key, personal, rows)
      return personal, (), loss

    return run

  def round_fn(key, state, data, cohorts):
    first_step = state.round * local_steps
    fns = tuple(client_round(model, data, first_step) for model in models)
    clients, _, info = client.over_clients(fns, key, cohorts, state.clients, clients_per_step)
    return FedState({}, clients, state.round + 1), info

  def personalize(key, state, data, cohorts):
    del key, data, cohorts
    return client.scored(models, state.clients, quantizer)

  return Algorithm(init, round_fn, personalize)
