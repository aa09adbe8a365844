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

from qupeD_jax import checks
from qupeD_jax.federation import client, server, tree
from qupeD_jax.quantization import ops
from qupeD_jax.types import Algorithm, Array, FedState, Model, Quantizer


def finetune(
  client_models: tuple[Model, ...],
  quantizer: Quantizer,
  trained: FedState,
  *,
  server_model: Model | None = None,
  lambda_p: Array | float = 0.0,
  temperature: Array | float = 1.0,
  own_classes: bool = False,
  rate: Array | float | Callable = 0.01,
  centers_rate: Array | float | Callable = 1e-5,
  optimizer: optax.GradientTransformation = optax.identity(),
  local_steps: int = 10,
  batch_size: int = 50,
  augment: Callable | None = None,
  clients_per_step: int | None = None,
) -> Algorithm:
  """Builds the fine-tuning phase: each client alone, minimising (1 - p) f(Q) + p KD(Q, w), w fixed.

  Args:
    client_models: one per cohort.
    quantizer: the one that trained the models.
    trained: the state to start from, of `quped` or `local`.
    server_model: the architecture of w; None for p = 0.
    lambda_p: p in [0, 1).
    temperature: T > 0.
    own_classes: distil over the classes that the client has training rows of.
    rate: step size of the exempt parameters, a number or a schedule of the local step.
    centers_rate: step size of the centers, likewise, if the quantizer learns them.
    optimizer: over the exempt parameters, without its learning rate.
    local_steps: tau, steps of a round.
    batch_size: B.
    augment: (key, x [B, H, W, C]) -> x, for every batch anew; None for none.
    clients_per_step: clients of a cohort that train side by side; None for all of them.

  Returns:
    An Algorithm that scores as the one before it; "unquantised" is x before it was hardened.

  Raises:
    BadInput: a hyperparameter is out of range.
  """
  client.check(local_steps, batch_size, client.Rates(rate, centers_rate))
  checks.fraction("lambda_p", lambda_p, closed=False)
  checks.positive("temperature", temperature)

  def init(key, data, cohorts):
    del key, data, cohorts
    starts = zip(client.shipped(client_models, trained.clients), trained.clients, strict=True)
    clients = tuple(
      client.Personal(
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
    moved = tree.descend(params, direction, client.value_at(rate, step))
    centers = codebooks
    if quantizer.learned:
      eta = client.value_at(centers_rate, step)
      # f is taken at hard Q, also where soft Q has trained.
      (slopes,) = jax.vjp(lambda c: ops.harden(params, c), codebooks)[1](grads)
      centers = quantizer.update(codebooks, params, slopes, eta, 0.0)
    frozen = ops.follow(params, codebooks, centers)
    params = ops.freeze(moved, frozen, codebooks)
    return client.Personal({"params": params, "stats": stats}, centers, moments), value

  def client_fn(model, state, data):
    def run(key, personal, rows):
      held = (model, personal.variables, data, rows)
      classes = client.held_classes(*held) if own_classes else None

      def step_fn(personal, step, batch):
        teacher_logits = None
        if server_model is not None:
          teacher_logits = server_model.apply(state.server, batch.x, True, batch.mask)[0]
        distilled = (teacher_logits, lambda_p, temperature, classes)
        return train_exempt(personal, client.personal_loss(model, batch, *distilled), step)

      first_step = state.round * local_steps
      train = client.local_round(
        step_fn, data, first_step, local_steps, batch_size, augment=augment
      )
      personal, loss = train(key, personal, rows)
      return personal, (), loss

    return run

  def round_fn(key, state, data, cohorts):
    fns = tuple(client_fn(model, state, data) for model in client_models)
    clients, _, info = client.over_clients(fns, key, cohorts, state.clients, clients_per_step)
    return FedState(state.server, clients, state.round + 1), info

  def before_hardening(scored, personal):
    """Shows x as it was; a client at full precision has hardened nothing, and shows what it has."""
    if not personal.codebooks:
      return scored._replace(variables=personal.variables)
    active = jax.vmap(ops.is_active)(personal.codebooks) > 0
    return scored._replace(variables=tree.select(active, scored.variables, personal.variables))

  def personalize(key, state, data, cohorts):
    del key, data
    scored = client.scored(client_models, trained.clients, quantizer)
    if "unquantised" in scored:
      scored["unquantised"] = tuple(map(before_hardening, scored["unquantised"], state.clients))
    scored["personal"] = client.shipped(client_models, state.clients)
    if server_model is not None:
      scored["global"] = server.score_global(server_model, state.server, cohorts)
    return scored

  return Algorithm(init, round_fn, personalize)
