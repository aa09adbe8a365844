"""How far a personal model is from a stationary point of what it minimises."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from qupeD_jax import rng
from qupeD_jax.federation import algorithm1, objectives, tree
from qupeD_jax.federation.algorithm1 import Personal, Rates, Rule
from qupeD_jax.federation.batches import Batch
from qupeD_jax.federation.gradients import value_at
from qupeD_jax.types import Array, Cohort, Dataset, FedState, Model, Quantizer


def gradient_mapping(
  personal: Personal,
  loss_fn: Callable,
  step: Array,
  rule: Rule,
  quantised_loss_fn: Callable | None = None,
) -> Array:
  """Measures stationarity by the squared gradient mapping of Algorithm 1.

  G = ||x - x'||^2 / eta1^2 + ||c - c'||^2 / eta2^2, where x' and c' are what one step of plain
  proximal gradient descent makes of x and, at x', of c. Without a proximal term it is the squared
  norm of the gradient; it is 0 where the step leaves the model as it is. Along the iterates, with
  step sizes below the inverse curvature, its mean falls as 1 / T (Ozkara et al., "QuPeD", NeurIPS
  2021, section 4).

  Only centers that are learned by steps count. ProxQuant's are fixed, BinaryRelax's are the best
  for the weights as they stand. BinaryRelax and the straight-through quantizer follow directions
  that are no objective's gradient: of them G tells how far the next step goes, and it need not
  fall.

  Args:
    personal: a client's x and c.
    loss_fn: variables -> (loss [], stats), the smooth loss, of all of the client's data.
    step: [] int32, at which schedules are read.
    rule: how the model moves. Its optimizer is what training adds to the gradient, such as weight
      decay; momentum has no place here.
    quantised_loss_fn: as in `algorithm1.alternating_step`.

  Returns:
    G, [] float32.
  """
  params, codebooks = personal.variables["params"], personal.codebooks
  fresh = personal._replace(moments=rule.optimizer.init(params))
  after, _ = algorithm1.alternating_step(fresh, loss_fn, step, rule, quantised_loss_fn)
  moved = tree.squared_distance(params, after.variables["params"])
  mapping = moved / value_at(rule.rates.weights, step) ** 2
  if not (codebooks and rule.quantizer.learned):
    return mapping
  # Unused slots hold +inf, before and after.
  used = lambda books: {path: jnp.where(jnp.isfinite(c), c, 0.0) for path, c in books.items()}
  moved = tree.squared_distance(used(codebooks), used(after.codebooks))
  return mapping + moved / value_at(rule.rates.centers, step) ** 2


def of_clients(
  models: tuple[Model, ...],
  quantizer: Quantizer,
  *,
  rates: Rates,
  local_steps: int,
  num_rows: int = 1000,
  optimizer: optax.GradientTransformation = optax.identity(),
) -> Callable:
  """Measures every client of `algorithms.local` on the first of its training rows.

  The loss is that of one batch of these rows, as they are: in training mode, so that batch
  normalisation takes their statistics, and without augmentation. What a network draws, as with
  dropout, is the same in every measure.

  Args:
    models: one per cohort.
    quantizer, rates: those that train.
    local_steps: of a round; rates are read at the step that comes next.
    num_rows: how many rows, or all of a client that has fewer.
    optimizer: as in `gradient_mapping`.

  Returns:
    (state, data, cohorts) -> the squared gradient mappings, per cohort [K] float32.
  """

  def of_client(model, data, step, personal, index, size):
    loss_fn = objectives.personal_loss(model, _first_rows(data, index, size, num_rows))
    return gradient_mapping(personal, loss_fn, step, Rule(quantizer, rates, optimizer))

  def measure(state: FedState, data: Dataset, cohorts: tuple[Cohort, ...]) -> tuple[Array, ...]:
    step = state.round * local_steps
    return tuple(
      jax.vmap(partial(of_client, model, data, step))(clients, cohort.index, cohort.size)
      for model, clients, cohort in zip(models, state.clients, cohorts, strict=True)
    )

  return measure


def _first_rows(data: Dataset, index: Array, size: Array, num_rows: int) -> Batch:
  """Returns a client's first rows; those of a smaller client come again and do not count."""
  positions = jnp.arange(min(num_rows, len(index)))
  rows = index[positions % jnp.maximum(size, 1)]
  mask = (positions < size).astype(jnp.float32)
  return Batch(data.x[rows], data.y[rows], mask, rng.stream(jax.random.key(0), "layers"))
