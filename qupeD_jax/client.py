"""What one client does in a round: its batches, its proximal steps, its scan over local steps.

Everything here is written for one client; `over_clients` is the one place that vmaps it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from qupeD_jax import checks, losses, quantize, tree
from qupeD_jax.types import Array, Cohort, Dataset, Info, Model, PyTree, Quantizer, Scored


class Rates(NamedTuple):
  """Step sizes of the alternating proximal gradient steps: numbers, or optax schedules of steps."""

  weights: Array | float | Callable = 0.1  # eta_1, of x
  centers: Array | float | Callable = 1e-4  # eta_2, of c
  proximity: Array | float | Callable = 1e-4  # lambda, the weight of R


class Personal(NamedTuple):
  """One client's personal model while it trains."""

  variables: PyTree  # x and its running statistics
  codebooks: dict[str, Array]  # c
  moments: PyTree  # the optimiser's state over x


class Batch(NamedTuple):
  """One step's examples of one client."""

  x: Array  # [B, H, W, C] uint8
  y: Array  # [B] int32
  mask: Array  # [B] float32, 1 for an example that counts


def value_at(rate: Array | float | Callable, step: Array) -> Array | float:
  """Reads a rate that may be an optax schedule at a step."""
  return rate(step) if callable(rate) else rate


def draw_rows(
  key: Array, index: Array, size: Array, num_steps: int, batch_size: int
) -> tuple[Array, Array]:
  """Draws the rows of a round's batches without replacement, starting over when they run out.

  A client with fewer rows than a batch has slots sees all of its rows in every batch, once.

  Args:
    key: of this client and round.
    index: [N] int32, the client's rows, padded.
    size: [] int32, how many of them are true.
    num_steps: tau.
    batch_size: B.

  Returns:
    rows [tau, B] int32 and mask [tau, B] float32. They do not depend on the padding: entry i of
    the random order is a function of the key and i alone.
  """
  slots = jnp.arange(len(index))
  order = jnp.argsort(jnp.where(slots < size, jax.random.uniform(key, slots.shape), jnp.inf))
  positions = jnp.arange(num_steps * batch_size).reshape(num_steps, batch_size)
  within = jnp.arange(batch_size) < size
  rows = index[order[positions % jnp.maximum(size, 1)]]
  return rows, jnp.broadcast_to(within, rows.shape).astype(jnp.float32)


def scan_steps(
  step_fn: Callable,
  carry: PyTree,
  key: Array,
  data: Dataset,
  rows: tuple[Array, Array],
  num_steps: int,
  batch_size: int,
  first_step: Array,
) -> tuple[PyTree, Array]:
  """Runs a client's local steps of one round.

  Args:
    step_fn: (carry, batch, step [] int32) -> (carry, loss []).
    carry: what the steps change.
    key: of this client and round.
    data: the training examples of all clients.
    rows: the client's index [N] and size [].
    num_steps: tau.
    batch_size: B.
    first_step: [] int32, steps done before this round; schedules are read at the sum.

  Returns:
    The carry after the last step, and the mean loss [].
  """

  def body(carry, inputs):
    step, row, mask = inputs
    return step_fn(carry, Batch(data.x[row], data.y[row], mask), step)

  batches = draw_rows(key, *rows, num_steps, batch_size)
  carry, loss = jax.lax.scan(body, carry, (first_step + jnp.arange(num_steps), *batches))
  return carry, jnp.mean(loss)


def over_clients(
  client_fns: tuple[Callable, ...], key: Array, cohorts: tuple[Cohort, ...], clients: PyTree
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...], tuple[Info, ...]]:
  """Runs a round of all clients, those of a cohort side by side: the one place that vmaps them.

  Args:
    client_fns: one per cohort, (key, client state, (index [N], size [])) -> (client state, upload,
      loss []).
    key: of this round; each client gets its own by its id.
    cohorts: the clients.
    clients: their states, one pytree per cohort, leaves [K, ...].

  Returns:
    Per cohort: new states, uploads (leaves [K, ...]) and what is reported.
  """

  def run(client_fn, cohort, states):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, cohort.client)
    states, uploads, loss = jax.vmap(client_fn)(keys, states, (cohort.index, cohort.size))
    return states, uploads, Info(cohort.client, cohort.size, loss)

  return tuple(zip(*map(run, client_fns, cohorts, clients), strict=True))


# --- the personal model


def init_personal(
  variables: PyTree,
  bits: Array,
  quantizer: Quantizer,
  optimizer: optax.GradientTransformation,
) -> Personal:
  """Starts one client's personal model from given variables."""
  params = variables["params"]
  return Personal(variables, quantizer.init(params, bits), optimizer.init(params))


def start_clients(
  models: tuple[Model, ...],
  start: tuple[PyTree, ...] | None,
  key: Array,
  cohorts: tuple[Cohort, ...],
  quantizer: Quantizer,
  optimizer: optax.GradientTransformation,
) -> tuple[Personal, ...]:
  """Starts the personal models of all cohorts, equal within a cohort but for their codebooks.

  Args:
    models: one per cohort.
    start: variables per cohort, one model each; None draws them from `key`, so that cohorts (and a
      server) of one architecture start from the same weights.
    key: of the initialisation.
    cohorts: the clients.
    quantizer: makes the codebooks.
    optimizer: over the parameters.
  """
  if start is None:
    start = tuple(model.init(key) for model in models)
  return tuple(
    jax.vmap(lambda bits, v=variables: init_personal(v, bits, quantizer, optimizer))(cohort.bits)
    for variables, cohort in zip(start, cohorts, strict=True)
  )


def proximal_step(
  personal: Personal,
  loss_fn: Callable,
  step: Array,
  *,
  quantizer: Quantizer,
  optimizer: optax.GradientTransformation,
  rates: Rates,
) -> tuple[Personal, Array]:
  """Takes one step of Algorithm 1 (QuPeD, section 3): first x, then c at the new x.

  x <- prox_{eta1 lambda R(., c)}(x - eta1 grad_x [f(x) + f(Q_c(x))])
  c <- prox_{eta2 lambda R(x, .)}(c - eta2 grad_c f(Q_c(x)))

  A client at full precision has no codebook; the terms in Q, R and c drop out.

  Args:
    personal: the client's x, c and optimiser state.
    loss_fn: variables -> (f [], stats), the smooth loss of this batch.
    step: [] int32, for the schedules.
    quantizer: Q, R and the rule for c.
    optimizer: turns the gradient in x into a direction; the identity is plain gradient descent.
    rates: eta1, eta2 and lambda.

  Returns:
    The personal model after the step, and the smooth objective before it.
  """
  eta, pull = value_at(rates.weights, step), value_at(rates.proximity, step)
  variables, codebooks, moments = personal
  params, stats = variables["params"], variables["stats"]

  def objective(params):
    value, new_stats = loss_fn({"params": params, "stats": stats})
    if codebooks:
      quantised = quantizer.project(params, codebooks)
      value += quantize.is_active(codebooks) * loss_fn({"params": quantised, "stats": stats})[0]
    return value, new_stats

  (value, new_stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
  direction, moments = optimizer.update(grads, moments, params)
  params = quantizer.prox(tree.descend(params, direction, eta), codebooks, eta * pull)
  if codebooks:
    eta = value_at(rates.centers, step)
    at_centers = {"params": quantizer.project(params, codebooks), "stats": stats}
    (_, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(at_centers)
    codebooks = quantizer.update(codebooks, params, grads["params"], eta, eta * pull)
  return Personal({"params": params, "stats": new_stats}, codebooks, moments), value


def personal_loss(
  model: Model,
  batch: Batch,
  teacher_logits: Array | None = None,
  lambda_p: Array | float = 0.0,
  temperature: Array | float = 1.0,
) -> Callable:
  """Returns variables -> ((1 - p) f + p KD [], stats) of a model on a batch, in training mode.

  Args:
    model: the client's architecture.
    batch: B examples.
    teacher_logits: [B, classes] float32 of the global model; None for f alone.
    lambda_p: p in [0, 1).
    temperature: T > 0.
  """

  def loss_fn(variables):
    logits, stats = model.apply(variables, batch.x, True)
    loss = losses.cross_entropy(logits, batch.y, batch.mask)
    if teacher_logits is None:
      return loss, stats
    teaching = losses.distillation(logits, teacher_logits, temperature, batch.mask)
    return (1 - lambda_p) * loss + lambda_p * teaching, stats

  return loss_fn


def scored(
  models: tuple[Model, ...], clients: tuple[Personal, ...]
) -> dict[str, tuple[Scored, ...]]:
  """Returns what is scored of personal models: "personal", as shipped, and "unquantised"."""

  def harden(personal):
    params = quantize.harden(personal.variables["params"], personal.codebooks)
    return {**personal.variables, "params": params}

  pairs = tuple(zip(models, clients, strict=True))
  return {
    "personal": tuple(Scored(m, jax.vmap(harden)(c), stacked=True) for m, c in pairs),
    "unquantised": tuple(Scored(m, c.variables, stacked=True) for m, c in pairs),
  }


def check(local_steps: int, batch_size: int, rates: Rates = Rates()) -> None:
  """Requires sensible local training; rates that are schedules or traced pass."""
  checks.at_least("--local-steps", local_steps, 1)
  checks.at_least("--batch-size", batch_size, 1)
  checks.positive("--weights-rate", rates.weights)
  checks.positive("--centers-rate", rates.centers)
  checks.non_negative("--proximity", rates.proximity)
