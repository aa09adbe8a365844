"""QuPeD: personal quantised models that learn with, and from, a global model by distillation.

Ozkara, Singh, Data, Diggavi, "QuPeD: Quantized Personalization via Distillation with Applications
to Federated Learning", NeurIPS 2021, Algorithm 2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qupeD_jax import checks
from qupeD_jax.federation import client, losses, server, tree
from qupeD_jax.federation.aggregators import Aggregate, mean
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree, Quantizer


def quped(
  server_model: Model,
  client_models: tuple[Model, ...],
  quantizer: Quantizer,
  *,
  lambda_p: Array | float = 0.5,
  temperature: Array | float = 1.0,
  rates: client.Rates = client.Rates(),
  global_rate: Array | float | Callable = 0.1,
  global_loss_weight: Array | float = 0.0,
  global_divergence: Callable = losses.kl,
  global_temperature: Array | float | None = None,
  own_classes: bool = False,
  straight_through: Array | float = 0.0,
  simultaneous: bool = False,
  optimizer: optax.GradientTransformation = optax.identity(),
  global_optimizer: optax.GradientTransformation = optax.identity(),
  local_steps: int = 10,
  batch_size: int = 50,
  augment: Callable | None = None,
  clients_per_step: int | None = None,
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
  it is off: a = 0, so that the global model learns from the personal ones alone, one divergence and
  temperature for both directions, distillation over all classes, x's gradient taken at x, a cold
  start.

  Args:
    server_model: the architecture of w.
    client_models: one per cohort, with the server's classes.
    quantizer: `quantizers.learned_codebook()`, `quantizers.none()` if every client has 32 bits, or
      any other.
    lambda_p: p in [0, 1); 0 is local training.
    temperature: T > 0.
    rates: eta1, eta2 and lambda, numbers or schedules of the local step.
    global_rate: eta3, a number or a schedule of the local step.
    global_loss_weight: a >= 0, of the cross-entropy in w's loss.
    global_divergence: what w minimises, (global logits, personal logits, T, mask) -> []:
      `losses.kl`, as in the paper, or `losses.reverse_kl`, in which x teaches w as w teaches x.
    global_temperature: T of w's loss, where it is another than x's.
    own_classes: distil over the classes that the client has training rows of.
    straight_through: share in [0, 1] of x's data gradient that is taken at Q_c(x), by a
      quantizer that trains at both.
    simultaneous: take the gradients in c and w at the old x and c, as x's. A step is then one pass,
      forward and backward, of each of x, Q and w; alternation passes through x and Q once more.
    optimizer: over x, without its learning rate: the identity is plain gradient descent.
    global_optimizer: over a client's copy of w, likewise; started anew every round.
    local_steps: tau, steps of a round.
    batch_size: B.
    augment: (key, x [B, H, W, C]) -> x, for every batch anew; None for none.
    clients_per_step: clients of a cohort that train side by side; None for all of them.
    aggregate: how the server combines the w_i; the mean, as in the paper, or another.
    start: the server's variables and one client model's per cohort; None draws them.

  Returns:
    An Algorithm; scored are "personal" (as shipped), "unquantised" and "global".

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  client.check(local_steps, batch_size, rates)
  checks.fraction("lambda_p", lambda_p, closed=False)
  checks.positive("temperature", temperature)
  checks.positive("global_rate", global_rate)
  checks.non_negative("global_loss_weight", global_loss_weight)
  checks.share("straight_through", straight_through)
  global_temperature = temperature if global_temperature is None else global_temperature
  checks.positive("global_temperature", global_temperature)

  def init(key, data, cohorts):
    del data
    server_start, client_start = start or (server_model.init(key), None)
    clients = client.start_clients(client_models, client_start, key, cohorts, quantizer, optimizer)
    return FedState(server_start, clients, jnp.int32(0))

  def client_step(model, classes):
    def step_fn(carry, step, batch):
      before, (copy, moments) = carry
      # One pass through w serves thrice: as the teacher of x, as that of Q, and in w's own step.
      teacher_logits, backward, stats = client.forward(server_model, copy, batch)
      distilled = teacher_logits, lambda_p, temperature, classes
      passes = None
      if simultaneous:
        passes, targets = known_passes(model, before, step, batch, distilled)
      personal, loss = client.proximal_step(
        before,
        client.personal_loss(model, batch, *distilled),
        step,
        quantizer=quantizer,
        optimizer=optimizer,
        rates=rates,
        straight_through=straight_through,
        simultaneous=simultaneous,
        passes=passes,
      )
      if not simultaneous:
        targets = personal_logits(model, personal, step, batch)
      grads = backward(jax.grad(global_loss)(teacher_logits, targets, batch, classes))
      direction, moments = global_optimizer.update(grads, moments, copy["params"])
      rate = client.value_at(global_rate, step)
      copy = {"params": tree.descend(copy["params"], direction, rate), "stats": stats}
      return (personal, (copy, moments)), loss

    return step_fn

  def trained_points(personal, step):
    params, codebooks = personal.variables["params"], personal.codebooks
    return client.trained_points(params, codebooks, quantizer, step)

  def known_passes(model, personal, step, batch, distilled):
    """Passes through the models that are trained: for x's and c's step, and what w learns from."""
    passes, targets = {}, []
    before = client.running_stats(personal)
    for name, (weight, params) in trained_points(personal, step).items():
      variables = {"params": params, "stats": before[name]}
      logits, backward, stats = client.forward(model, variables, batch)
      value, gradient = jax.value_and_grad(client.batch_loss)(logits, batch, *distilled)
      passes[name] = client.Pass(value, stats, backward(gradient))
      targets.append((weight, logits))
    return passes, targets

  def personal_logits(model, personal, step, batch):
    """Returns pairs (weight, logits) of what w learns from: the models that x is trained by."""

    def logits(params):
      variables = {**personal.variables, "params": params}
      return model.apply(variables, batch.x, True, batch.mask)[0]

    return [(weight, logits(params)) for weight, params in trained_points(personal, step).values()]

  def global_loss(global_logits, targets, batch, classes):
    ours, targets = losses.restrict(global_logits, classes), jax.lax.stop_gradient(targets)
    teaching = sum(
      weight
      * global_divergence(ours, losses.restrict(logits, classes), global_temperature, batch.mask)
      for weight, logits in targets
    )
    own = losses.cross_entropy(global_logits, batch.y, batch.mask)
    return lambda_p * teaching + global_loss_weight * own

  def round_fn(key, state, data, cohorts):
    first_step = state.round * local_steps

    def client_fn(model):
      def run(key, personal, rows):
        held = (model, personal.variables, data, rows)
        classes = client.held_classes(*held) if own_classes else None
        step_fn = client_step(model, classes)
        train = client.local_round(
          step_fn, data, first_step, local_steps, batch_size, augment=augment
        )
        carry = personal, (state.server, global_optimizer.init(state.server["params"]))
        (personal, (copy, _)), loss = train(key, carry, rows)
        return personal, copy, loss

      return run

    fns = tuple(client_fn(model) for model in client_models)
    clients, uploads, info = client.over_clients(fns, key, cohorts, state.clients, clients_per_step)
    copy, info = server.combine(aggregate, key, uploads, cohorts, state.server, info)
    return FedState(copy, clients, state.round + 1), info

  def personalize(key, state, data, cohorts):
    del key, data
    shared = server.score_global(server_model, state.server, cohorts)
    return client.scored(client_models, state.clients, quantizer) | {"global": shared}

  return Algorithm(init, round_fn, personalize)
