"""Fine-tuning after hard quantisation: only the exempt parameters and the centers go on learning.

The last phase of QuPeD (Ozkara et al., NeurIPS 2021) and of local Algorithm 1. Every entry stays
with its center, and a center's move takes its entries along: the model keeps the form it is shipped
in. Centers that no gradient teaches stay. A client at 32 bits has nothing to freeze and goes on
training all its parameters.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qupeD_jax.federation import algorithm1, objectives, scoring, tree
from qupeD_jax.federation.algorithm1 import Personal, Rates, Rule
from qupeD_jax.federation.batches import train_pass
from qupeD_jax.federation.clients import LocalWork, check_work, local_round, over_clients
from qupeD_jax.federation.gradients import value_at
from qupeD_jax.federation.objectives import Distillation, Teaching
from qupeD_jax.quantization import ops
from qupeD_jax.types import Algorithm, Array, FedState, Model, Quantizer


def finetune(
  client_models: tuple[Model, ...],
  quantizer: Quantizer,
  trained: FedState,
  *,
  server_model: Model | None = None,
  distillation: Distillation = Distillation(lambda_p=0.0),
  rate: Array | float | Callable = 0.01,
  centers_rate: Array | float | Callable = 1e-5,
  optimizer: optax.GradientTransformation = optax.identity(),
  work: LocalWork = LocalWork(),
) -> Algorithm:
  """Builds the fine-tuning phase: each client alone, minimising (1 - p) f(Q) + p KD(Q, w), w fixed.

  Args:
    client_models: one per cohort.
    quantizer: the one that trained the models.
    trained: the state to start from, of `quped` or `local`.
    server_model: the architecture of w; None for p = 0.
    distillation: p, T and the classes that w teaches.
    rate: step size of the exempt parameters, a number or a schedule of the local step.
    centers_rate: step size of the centers, likewise, if the quantizer learns them.
    optimizer: over the exempt parameters, without its learning rate.
    work: local steps, batches and augmentation.

  Returns:
    An Algorithm that scores as the one before it; "unquantised" is x before it was hardened.

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  check_work(work)
  algorithm1.check(Rule(quantizer, Rates(rate, centers_rate)))
  objectives.check(distillation)

  def init(key, data, cohorts):
    del key, data, cohorts
    starts = zip(scoring.shipped(client_models, trained.clients), trained.clients, strict=True)
    clients = tuple(
      Personal(
        start.variables, before.codebooks, jax.vmap(optimizer.init)(start.variables["params"])
      )
      for start, before in starts
    )
    return FedState(trained.server, clients, jnp.int32(0))

  def train_exempt(personal, loss_fn, step):
    variables, codebooks, moments, _ = personal
    params, stats = variables["params"], variables["stats"]
    loss = lambda p: loss_fn({"params": p, "stats": stats})
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    direction, moments = optimizer.update(grads, moments, params)
    moved = tree.descend(params, direction, value_at(rate, step))
    centers = codebooks
    if quantizer.learned:
      eta = value_at(centers_rate, step)
      # f is taken at hard Q, also where soft Q has trained.
      (slopes,) = jax.vjp(lambda c: ops.harden(params, c), codebooks)[1](grads)
      centers = quantizer.update(codebooks, params, slopes, eta, 0.0)
    frozen = ops.follow(params, codebooks, centers)
    params = ops.freeze(moved, frozen, codebooks)
    return Personal({"params": params, "stats": stats}, centers, moments), value

  def lesson(server_variables, batch, classes):
    if server_model is None:
      return None
    logits, _ = train_pass(server_model, server_variables, batch)
    return Teaching(logits, distillation.lambda_p, distillation.temperature, classes)

  def client_fn(model, state, data):
    def run(key, personal, rows):
      classes = None
      if distillation.own_classes:
        classes = objectives.held_classes(model, personal.variables, data, rows)

      def step_fn(personal, step, batch):
        loss_fn = objectives.personal_loss(model, batch, lesson(state.server, batch, classes))
        return train_exempt(personal, loss_fn, step)

      personal, loss = local_round(step_fn, data, state.round, work)(key, personal, rows)
      return personal, (), loss

    return run

  def round_fn(key, state, data, cohorts):
    fns = tuple(client_fn(model, state, data) for model in client_models)
    clients, _, info = over_clients(fns, key, cohorts, state.clients, work.clients_per_step)
    return FedState(state.server, clients, state.round + 1), info

  def before_hardening(scored, personal):
    """Shows x as it was; a client at full precision has hardened nothing, and shows what it has."""
    if not personal.codebooks:
      return scored._replace(variables=personal.variables)
    active = jax.vmap(ops.is_active)(personal.codebooks) > 0
    return scored._replace(variables=tree.select(active, scored.variables, personal.variables))

  def personalize(key, state, data, cohorts):
    del key, data
    scored = scoring.quantised(client_models, trained.clients, quantizer)
    if "unquantised" in scored:
      scored["unquantised"] = tuple(map(before_hardening, scored["unquantised"], state.clients))
    scored["personal"] = scoring.shipped(client_models, state.clients)
    if server_model is not None:
      scored["global"] = scoring.shared(server_model, state.server, cohorts)
    return scored

  return Algorithm(init, round_fn, personalize)
