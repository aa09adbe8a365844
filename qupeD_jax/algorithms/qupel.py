"""QuPeL: QuPeD's forerunner, which holds quantised models near the global one in weight space.

Ozkara, Singh, Data, Diggavi, "QuPeL: Quantized Personalization with Applications to Federated
Learning", 2021 (arXiv 2102.11786).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qupeD_jax import checks
from qupeD_jax.federation import algorithm1, gradients, objectives, scoring, server, tree
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.federation.algorithm1 import Rates, Rule
from qupeD_jax.federation.clients import LocalWork, check_work, local_round
from qupeD_jax.quantization import ops
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree, Quantizer


def qupel(
  model: Model,
  quantizer: Quantizer,
  *,
  penalty: Array | float = 0.1,
  rates: Rates = Rates(),
  global_rate: Array | float | Callable = 0.1,
  optimizer: optax.GradientTransformation = optax.identity(),
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = mean(),
  start: PyTree | None = None,
) -> Algorithm:
  """Builds QuPeL. A client's local step on one batch is that of QuPeD with another tie to w:

    x <- prox_{eta1 lambda R(., c)}(x - eta1 grad_x F)
    c <- prox_{eta2 lambda R(x, .)}(c - eta2 grad_c F)          at the new x
    w <- w - eta3 grad_w penalty/2 ||Q_c(x) - w||^2             at the new x and c

  F(x, c, w) = f(x) + f(Q_c(x)) + penalty/2 ||Q_c(x) - w||^2, where a client at 32 bits has x in the
  place of Q_c(x), and f once. With penalty 0 it is local training. In the limit of hard
  quantisation Q_c(x) does not change with x, so that w reaches a quantised model through its
  centers and its exempt tensors alone. A quantizer that trains at Q alone leaves out f(x); one that
  trains at x alone leaves out f(Q_c(x)), and ties x to w.

  Args:
    model: the one architecture that all clients train.
    quantizer: `quantizers.learned_codebook()`, `quantizers.full_precision()` if every client has 32
      bits, or any other.
    penalty: the paper's lambda_p, at least 0.
    rates: eta1, eta2 and lambda, numbers or schedules of the local step.
    global_rate: eta3, a number or a schedule of the local step.
    optimizer: over x, without its learning rate: the identity is plain gradient descent.
    work: local steps, batches and augmentation.
    aggregate: how the server combines the w_i; the mean, as in the paper, or another.
    start: variables that the server and all clients start from; None draws them.

  Returns:
    An Algorithm; scored are "personal" (as shipped), "unquantised" and "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  rule = Rule(quantizer, rates, optimizer)
  check_work(work)
  algorithm1.check(rule)
  checks.non_negative("penalty", penalty)
  checks.positive("global_rate", global_rate)

  def models_of(cohorts):
    return (model,) * len(cohorts)

  def init(key, data, cohorts):
    del data
    variables = model.init(key) if start is None else start
    starts = (variables,) * len(cohorts)
    clients = algorithm1.start_clients(models_of(cohorts), starts, key, cohorts, rule)
    return FedState(variables, clients, jnp.int32(0))

  def tied(loss_fn, anchor, weight):
    """Adds weight * penalty/2 ||params - anchor||^2 to a loss."""

    def tied_loss_fn(variables):
      loss, stats = loss_fn(variables)
      distance = tree.squared_distance(variables["params"], anchor)
      return loss + weight * penalty / 2 * distance, stats

    return tied_loss_fn

  def step_fn(carry, step, batch):
    personal, copy = carry
    loss_fn = objectives.personal_loss(model, batch)
    codebooks = personal.codebooks
    has_q = ops.is_active(codebooks) if codebooks and quantizer.at_q else 0.0
    at_x = tied(loss_fn, copy["params"], 1.0 - has_q)
    at_q = tied(loss_fn, copy["params"], 1.0)
    personal, loss = algorithm1.alternating_step(personal, at_x, step, rule, at_q)
    projected = quantizer.project(personal.variables["params"], personal.codebooks, step)
    away = jax.tree.map(jnp.subtract, copy["params"], projected)
    pull = gradients.value_at(global_rate, step) * penalty
    copy = {**copy, "params": tree.descend(copy["params"], away, pull)}
    copy["stats"] = gradients.renewed_stats(model, copy, batch)
    return (personal, copy), loss

  def round_fn(key, state, data, cohorts):
    fn = server.beside_copy(local_round(step_fn, data, state.round, work), state.server)
    fns = (fn,) * len(cohorts)
    return server.run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)

  def personalize(key, state, data, cohorts):
    del key, data
    shared = scoring.shared(model, state.server, cohorts)
    personal = scoring.quantised(models_of(cohorts), state.clients, quantizer)
    return personal | {"global": shared}

  return Algorithm(init, round_fn, personalize)
