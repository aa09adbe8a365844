"""The squared gradient mapping, along full-batch Algorithm 1 and at its end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from qupeD_jax import models
from qupeD_jax.federation import stationarity
from qupeD_jax.federation.algorithm1 import Rates, Rule, alternating_step
from qupeD_jax.federation.batches import Batch
from qupeD_jax.federation.objectives import personal_loss
from qupeD_jax.quantization import ops, prox, quantizers
from tests import toy
from tests.federation.quadratics import on_kernel, personal, quadratic
from tests.flat import local

STEP = jnp.int32(0)
QUANTIZER = quantizers.learned_codebook(max_bits=2, sharpness=3.0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_algorithm_1_descends_and_becomes_stationary(norm):
  """On a full-batch quadratic with steps 1/L the objective never rises and G averages to 0."""
  value, smoothness, x = quadratic()
  sharpness, pull = 2.0, 0.05
  quantizer = quantizers.learned_codebook(max_bits=1, norm=norm, sharpness=sharpness)

  def objective(state):
    x, c = state.variables["params"]["dense_1"]["kernel"], state.codebooks["dense_1/kernel"]
    soft = ops.soft_quantize(x, c, sharpness)
    return value(x) + value(soft) + pull * prox.regularizer(x, c, norm)

  # Soft Q is Lipschitz with constant max(1, gap P / 4) <= 2 here and bends by at most gap P^2 / 10,
  # so 12 L bounds the curvature of f(x) + f(Q(x)) in x; in c, where every entry moves a center, six
  # times that.
  rates = Rates(1 / (12 * smoothness), 1 / (72 * smoothness), pull)
  rule = Rule(quantizer, rates)

  def step(state, _):
    mapping = stationarity.gradient_mapping(state, on_kernel(value), STEP, rule)
    state, _ = alternating_step(state, on_kernel(value), STEP, rule)
    return state, (objective(state), mapping)

  run = jax.jit(lambda state: jax.lax.scan(step, state, length=400))
  _, (values, mappings) = jax.tree.map(np.asarray, run(personal(x, quantizer)))
  assert np.all(np.diff(values) <= 1e-6)
  assert values[-1] < 0.9 * values[0]
  totals = np.cumsum(mappings)
  # O(1/T): T times the running mean stays bounded, here by twice its value after 100 steps.
  assert totals[399] <= 2 * totals[99]


def test_without_a_codebook_it_is_the_squared_norm_of_the_gradient():
  value, _, x = quadratic()
  expected = jnp.sum(jax.grad(value)(x) ** 2)
  for quantizer in (quantizers.full_precision(), quantizers.learned_codebook(max_bits=1)):
    state, rates = personal(x, quantizer, bits=32), Rates(0.01, 0.01, 1.0)
    mapping = stationarity.gradient_mapping(state, on_kernel(value), STEP, Rule(quantizer, rates))
    np.testing.assert_allclose(mapping, expected, rtol=1e-4)


@pytest.mark.parametrize("sharpness", [None, 3.0])
def test_it_counts_the_steps_of_x_and_of_the_centers(sharpness):
  value, _, x = quadratic()
  quantizer = quantizers.learned_codebook(max_bits=1, sharpness=sharpness)
  state, rates = personal(x, quantizer), Rates(0.03, 0.02, 0.5)
  rule = Rule(quantizer, rates)
  after, _ = alternating_step(state, on_kernel(value), STEP, rule)
  moved = [after.variables["params"]["dense_1"]["kernel"] - x]
  moved.append(after.codebooks["dense_1/kernel"] - state.codebooks["dense_1/kernel"])
  expected = sum(np.sum((m / r) ** 2) for m, r in zip(moved, rates[:2], strict=True))
  # The optimiser's state is not asked for.
  mapping = stationarity.gradient_mapping(
    state._replace(moments="none"), on_kernel(value), STEP, rule
  )
  np.testing.assert_allclose(mapping, expected, rtol=1e-4)


def test_centers_that_no_step_size_moves_do_not_count():
  """BinaryRelax's are the means of their entries, however small the rate."""
  value, _, x = quadratic()
  quantizer = quantizers.binary_relax(max_bits=1, relaxation=1.0)
  state = personal(x, quantizer)
  mappings = [
    stationarity.gradient_mapping(
      state, on_kernel(value), STEP, Rule(quantizer, Rates(0.01, rate, 1.0))
    )
    for rate in (1e-6, 1.0)
  ]
  assert mappings[0] == mappings[1]


def test_weight_decay_counts():
  value, _, x = quadratic()
  decay = optax.add_decayed_weights(0.5)
  mapping = stationarity.gradient_mapping(
    personal(x, quantizers.full_precision()),
    on_kernel(value),
    STEP,
    Rule(quantizers.full_precision(), Rates(0.01), decay),
  )
  np.testing.assert_allclose(mapping, jnp.sum((jax.grad(value)(x) + 0.5 * x) ** 2), rtol=1e-4)


def test_clients_are_measured_on_their_first_rows_at_the_rates_of_the_next_step():
  """Client by client; of the last client, which has fewer rows, padding does not count.

  Neither in the loss nor in what normalises a batch.
  """
  model, data = toy.normalised(), jax.tree.map(jnp.asarray, toy.dataset())
  cohort = toy.cohort((0, 1, 2), (2, 32, 1))._replace(size=np.int32([12, 12, 4]))
  algorithm = local((model,), QUANTIZER, local_steps=3, batch_size=4)
  state = jax.jit(algorithm.init)(jax.random.key(0), data, (cohort,))._replace(round=jnp.int32(2))
  rates = Rates(optax.linear_schedule(0.05, 0.01, 10), 1e-3, 0.01)
  measure = stationarity.of_clients((model,), QUANTIZER, rates=rates, local_steps=3, num_rows=6)
  (found,) = jax.jit(measure)(state, data, (cohort,))

  @jax.jit
  def of_one(personal, batch):
    loss_fn = personal_loss(model, batch)
    return stationarity.gradient_mapping(personal, loss_fn, jnp.int32(6), Rule(QUANTIZER, rates))

  for k, num_rows in enumerate((6, 6, 4)):
    rows = cohort.index[k, :num_rows]
    batch = Batch(data.x[rows], data.y[rows], jnp.ones(num_rows))
    one = jax.tree.map(lambda leaf, k=k: leaf[k], state.clients[0])
    np.testing.assert_allclose(found[k], of_one(one, batch), rtol=1e-3)


class Dropping(nn.Module):
  """A linear network that drops half of its inputs."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
    return nn.Dense(toy.CLASSES, name="head")(x)


def test_what_a_network_draws_is_the_same_in_every_measure():
  model, data = models.from_linen(Dropping(), toy.IMAGE), jax.tree.map(jnp.asarray, toy.dataset())
  cohort, plain = toy.cohort((0, 1), (32, 32)), quantizers.full_precision()
  state = local((model,), plain).init(jax.random.key(0), data, (cohort,))
  measure = stationarity.of_clients((model,), plain, rates=Rates(0.1), local_steps=3)
  (found,), (again,) = measure(state, data, (cohort,)), measure(state, data, (cohort,))
  assert np.all(found > 0)
  np.testing.assert_array_equal(found, again)


def test_it_is_zero_where_no_step_moves():
  """f is least at x, which lies on its centers."""
  x = jnp.float32([-1.0, 2.0, 2.0, -1.0])
  value = lambda z: jnp.sum((z - x) ** 2)
  for quantizer in (quantizers.learned_codebook(max_bits=1), quantizers.proxquant(max_bits=1)):
    state = personal(x, quantizer)
    mapping = stationarity.gradient_mapping(
      state, on_kernel(value), STEP, Rule(quantizer, Rates(0.1, 0.1, 0.3))
    )
    assert mapping == 0
