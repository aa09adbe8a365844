"""QuPeD: personal quantised models that learn with, and from, a global model by distillation.

Ozkara, Singh, Data, Diggavi, "QuPeD: Quantized Personalization via Distillation with Applications
to Federated Learning", NeurIPS 2021, Algorithm 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from qupeD_jax import checks
from qupeD_jax.federation import algorithm1, gradients, losses, objectives, scoring, server, tree
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.federation.algorithm1 import Pass, Rates, Rule
from qupeD_jax.federation.batches import train_pass
from qupeD_jax.federation.clients import LocalWork, check_work, local_round
from qupeD_jax.federation.objectives import Distillation, Teaching
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree, Quantizer


class GlobalStep(NamedTuple):
  """How a client moves its copy of the global model w."""

  rate: Array | float | Callable = 0.1  # eta_3, a number or a schedule of the local step
  # a >= 0, of the cross-entropy in w's loss; 0 is the paper's, in which w learns from the personal
  # models alone.
  loss_weight: Array | float = 0.0
  # Without its learning rate; started anew every round. The identity is plain gradient descent.
  optimizer: optax.GradientTransformation = optax.identity()


def quped(
  server_model: Model,
  client_models: tuple[Model, ...],
  quantizer: Quantizer,
  *,
  distillation: Distillation = Distillation(),
  rates: Rates = Rates(),
  global_step: GlobalStep = GlobalStep(),
  straight_through: Array | float = 0.0,
  simultaneous: bool = False,
  optimizer: optax.GradientTransformation = optax.identity(),
  work: LocalWork = LocalWork(),
  aggregate: Aggregate = mean(),
  start: tuple[PyTree, tuple[PyTree, ...]] | None = None,
) -> Algorithm:
  """Builds QuPeD. With p = lambda_p, a client's local step on one batch is

    x <- prox_{eta1 lambda R(., c)}(x - eta1 grad_x F)
    c <- prox_{eta2 lambda R(x, .)}(c - eta2 grad_c F)                       at the new x
    w <- w - eta3 grad_w [p (KD(x, w) + KD(Q_c(x), w)) + a f(w)]             at the new x and c

  F(x, c, w) = (1 - p) (f(x) + f(Q_c(x))) + p (KD(x, w) + KD(Q_c(x), w)),
  KD(x, w) = T^2 KL(softmax(w/T) || softmax(x/T)). Terms in Q and c drop out where a client has 32
  bits. With a quantizer that trains at x alone, or at Q alone, the terms of the other drop out, so
  that w learns from the one model that is trained. The defaults are the paper's; what goes beyond
  it is off.

  Args:
    server_model: the architecture of w.
    client_models: one per cohort, with the server's classes.
    quantizer: `quantizers.learned_codebook()`, `quantizers.full_precision()` if every client has 32
      bits, or any other.
    distillation: p, T, the divergence that w minimises, and over which classes.
    rates: eta1, eta2 and lambda, numbers or schedules of the local step.
    global_step: eta3, a, and the optimiser of w.
    straight_through: share in [0, 1] of x's data gradient that is taken at Q_c(x), by a
      quantizer that trains at both.
    simultaneous: take the gradients in c and w at the old x and c, as x's. A step is then one pass,
      forward and backward, of each of x, Q and w; alternation passes through x and Q once more.
    optimizer: over x, without its learning rate: the identity is plain gradient descent.
    work: local steps, batches and augmentation.
    aggregate: how the server combines the w_i; the mean, as in the paper, or another.
    start: the server's variables and one client model's per cohort; None draws them.

  Returns:
    An Algorithm; scored are "personal" (as shipped), "unquantised" and "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  rule = Rule(quantizer, rates, optimizer, straight_through)
  check_work(work)
  algorithm1.check(rule)
  objectives.check(distillation)
  checks.positive("global_rate", global_step.rate)
  checks.non_negative("global_loss_weight", global_step.loss_weight)
  lambda_p, temperature = distillation.lambda_p, distillation.temperature

  def init(key, data, cohorts):
    del data
    server_start, client_start = start or (server_model.init(key), None)
    clients = algorithm1.start_clients(client_models, client_start, key, cohorts, rule)
    return FedState(server_start, clients, jnp.int32(0))

  def alternating(model, classes):
    """The paper's step: x, then c at the new x, then w at the new x and c."""

    def step_fn(carry, step, batch):
      personal, copy = carry
      # One pass through w serves thrice: as the teacher of x, as that of Q, and in w's own step.
      of_w = gradients.forward(server_model, copy.variables, batch)
      teaching = Teaching(of_w[0], lambda_p, temperature, classes)
      loss_fn = objectives.personal_loss(model, batch, teaching)
      personal, loss = algorithm1.alternating_step(personal, loss_fn, step, rule)
      pupils = []
      for weight, params in algorithm1.trained_points(personal, step, quantizer).values():
        variables = {**personal.variables, "params": params}
        pupils.append((weight, train_pass(model, variables, batch)[0]))
      return (personal, learn(copy, of_w, pupils, classes, batch, step)), loss

    return step_fn

  def at_once(model, classes):
    """All gradients at the old models: the passes that x and c learn by are those w learns from."""

    def step_fn(carry, step, batch):
      personal, copy = carry
      of_w = gradients.forward(server_model, copy.variables, batch)
      teaching = Teaching(of_w[0], lambda_p, temperature, classes)
      passes, pupils = {}, []
      before = algorithm1.running_stats(personal)
      for name, (weight, params) in algorithm1.trained_points(personal, step, quantizer).items():
        variables = {"params": params, "stats": before[name]}
        logits, backward, stats = gradients.forward(model, variables, batch)
        value, slope = jax.value_and_grad(objectives.batch_loss)(logits, batch, teaching)
        passes[name] = Pass(value, stats, backward(slope))
        pupils.append((weight, logits))
      personal, loss = algorithm1.simultaneous_step(personal, passes, step, rule)
      return (personal, learn(copy, of_w, pupils, classes, batch, step)), loss

    return step_fn

  def learn(copy, of_w, pupils, classes, batch, step):
    """Moves a client's copy of w toward what its personal models, its pupils, have learned."""
    logits, backward, stats = of_w
    grads = backward(jax.grad(global_loss)(logits, pupils, classes, batch))
    params = copy.variables["params"]
    direction, moments = global_step.optimizer.update(grads, copy.moments, params)
    rate = gradients.value_at(global_step.rate, step)
    return _Copy({"params": tree.descend(params, direction, rate), "stats": stats}, moments)

  def global_loss(logits, pupils, classes, batch):
    """p times the divergences from the pupils, held fixed, and a times the cross-entropy."""
    own_temperature = distillation.global_temperature
    own_temperature = temperature if own_temperature is None else own_temperature
    ours = losses.restrict(logits, classes)
    pupils = [(w, losses.restrict(theirs, classes)) for w, theirs in jax.lax.stop_gradient(pupils)]
    teaching = sum(
      weight * distillation.global_divergence(ours, theirs, own_temperature, batch.mask)
      for weight, theirs in pupils
    )
    own = losses.cross_entropy(logits, batch.y, batch.mask)
    return lambda_p * teaching + global_step.loss_weight * own

  def client_fn(model, state, data):
    def run(key, personal, rows):
      classes = None
      if distillation.own_classes:
        classes = objectives.held_classes(model, personal.variables, data, rows)
      step_fn = (at_once if simultaneous else alternating)(model, classes)
      copy = _Copy(state.server, global_step.optimizer.init(state.server["params"]))
      train = local_round(step_fn, data, state.round, work)
      (personal, copy), loss = train(key, (personal, copy), rows)
      return personal, copy.variables, loss

    return run

  def round_fn(key, state, data, cohorts):
    fns = tuple(client_fn(model, state, data) for model in client_models)
    return server.run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)

  def personalize(key, state, data, cohorts):
    del key, data
    shown = scoring.quantised(client_models, state.clients, quantizer)
    return shown | {"global": scoring.shared(server_model, state.server, cohorts)}

  return Algorithm(init, round_fn, personalize)


class _Copy(NamedTuple):
  """A client's copy of w during a round."""

  variables: PyTree
  moments: PyTree  # of its optimiser
