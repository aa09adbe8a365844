"""Local training: every client alone, by Algorithm 1 of QuPeD or at full precision.

Ozkara, Singh, Data, Diggavi, "QuPeD: Quantized Personalization via Distillation with Applications
to Federated Learning", NeurIPS 2021, Algorithm 1. One client is the centralised Algorithm 1; a
start from FedAvg's model is FedAvg with local fine-tuning.
"""

import jax.numpy as jnp
import optax

from qupeD_jax.federation import algorithm1, objectives, scoring
from qupeD_jax.federation.algorithm1 import Rates, Rule
from qupeD_jax.federation.clients import LocalWork, check_work, local_round, over_clients
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree, Quantizer


def local(
  models: tuple[Model, ...],
  quantizer: Quantizer,
  *,
  rates: Rates = Rates(),
  optimizer: optax.GradientTransformation = optax.identity(),
  work: LocalWork = LocalWork(),
  straight_through: Array | float = 0.0,
  simultaneous: bool = False,
  start: tuple[PyTree, ...] | None = None,
) -> Algorithm:
  """Builds local training.

  Args:
    models: one per cohort.
    quantizer: `quantizers.learned_codebook()` for Algorithm 1, `quantizers.full_precision()`, or
      any other.
    rates: step sizes and the weight of R, numbers or schedules of the local step.
    optimizer: over x, without its learning rate: the identity is plain gradient descent.
    work: local steps, batches and augmentation.
    straight_through: share in [0, 1] of x's gradient that is taken at Q_c(x), by a quantizer that
      trains at both; 0 is the paper's.
    simultaneous: take the gradient in c at the old x, as x's. A step is then one pass, forward and
      backward, of each of x and Q; alternation passes through Q twice.
    start: variables per cohort that its clients start from; None draws them.

  Returns:
    An Algorithm without a server; scored are "personal" (as shipped) and "unquantised"
    (`scoring.quantised`).

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  rule = Rule(quantizer, rates, optimizer, straight_through)
  check_work(work)
  algorithm1.check(rule)

  def init(key, data, cohorts):
    del data
    clients = algorithm1.start_clients(models, start, key, cohorts, rule)
    return FedState({}, clients, jnp.int32(0))

  def take_step(personal, loss_fn, step):
    if not simultaneous:
      return algorithm1.alternating_step(personal, loss_fn, step, rule)
    loss_fns = {"x": loss_fn, "q": loss_fn}
    passes = algorithm1.passes_of(personal, loss_fns, step, quantizer)
    return algorithm1.simultaneous_step(personal, passes, step, rule)

  def client_fn(model, data, rounds_done):
    def step_fn(personal, step, batch):
      return take_step(personal, objectives.personal_loss(model, batch), step)

    train = local_round(step_fn, data, rounds_done, work)

    def run(key, personal, rows):
      personal, loss = train(key, personal, rows)
      return personal, (), loss

    return run

  def round_fn(key, state, data, cohorts):
    fns = tuple(client_fn(model, data, state.round) for model in models)
    clients, _, info = over_clients(fns, key, cohorts, state.clients, work.clients_per_step)
    return FedState({}, clients, state.round + 1), info

  def personalize(key, state, data, cohorts):
    del key, data, cohorts
    return scoring.quantised(models, state.clients, quantizer)

  return Algorithm(init, round_fn, personalize)
