"""One client's batches and proximal steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qupeD_jax import models
from qupeD_jax.checks import BadInput
from qupeD_jax.federation import algorithm1
from qupeD_jax.federation.algorithm1 import Rates, Rule, alternating_step
from qupeD_jax.federation.batches import Rows, draw_rows
from qupeD_jax.federation.clients import (
  LocalWork,
  check_work,
  local_round,
  map_clients,
  usual_clients_per_step,
)
from qupeD_jax.federation.gradients import sgd_step, value_at
from qupeD_jax.federation.objectives import held_classes, personal_loss
from qupeD_jax.quantization import ops, quantizers
from qupeD_jax.types import Dataset
from tests import toy
from tests.federation.quadratics import on_kernel, personal, quadratic

KEY = jax.random.key(3)


def draw(size, num_steps, batch_size, slots=20):
  index = jnp.arange(100, 100 + slots)
  rows, mask = draw_rows(KEY, index, jnp.int32(size), num_steps, batch_size)
  return np.asarray(rows), np.asarray(mask)


def test_batches_pass_over_the_rows_without_replacement():
  rows, mask = draw(size=12, num_steps=6, batch_size=4)
  assert rows.shape == mask.shape == (6, 4)
  assert np.all(mask == 1)
  for first in (0, 3):
    assert sorted(rows[first : first + 3].ravel()) == list(range(100, 112))


def test_rows_within_a_batch_are_distinct_when_an_epoch_ends_inside_it():
  rows, _ = draw(size=7, num_steps=9, batch_size=5)
  assert all(len(set(batch)) == 5 for batch in rows.tolist())


def test_a_client_smaller_than_a_batch_sees_each_of_its_rows_once():
  rows, mask = draw(size=3, num_steps=4, batch_size=5)
  np.testing.assert_array_equal(mask, np.tile([1, 1, 1, 0, 0], (4, 1)))
  for batch in rows:
    assert sorted(batch[:3]) == [100, 101, 102]


def test_padding_does_not_change_the_batches():
  for slots in (12, 13, 40, 1000):
    np.testing.assert_array_equal(draw(12, 5, 4, slots)[0], draw(12, 5, 4, 12)[0])


def test_a_batch_is_no_wider_than_the_largest_client():
  wide, narrow = draw(5, 6, 4096, slots=20), draw(5, 6, 4096, slots=7)
  assert wide[0].shape == wide[1].shape == (6, 20)
  for all_, first in zip(wide, narrow, strict=True):
    np.testing.assert_array_equal(all_[:, :7], first)


def test_a_wider_batch_costs_no_more_than_all_rows():
  data = jax.tree.map(jnp.asarray, toy.dataset())
  rows = Rows(jnp.arange(12), jnp.int32(12))
  model = toy.mlp(4)
  step_fn = lambda v, step, batch: sgd_step(v, personal_loss(model, batch), 0.1)

  def lowered(batch_size):
    train = local_round(step_fn, data, 0, LocalWork(3, batch_size))
    return jax.jit(train).lower(KEY, model.init(KEY), rows)

  whole, wider = lowered(12), lowered(4096)
  assert wider.cost_analysis()["flops"] == whole.cost_analysis()["flops"]
  (ours, _), (theirs, _) = (
    program.compile()(KEY, model.init(KEY), rows) for program in (whole, wider)
  )
  chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_padding_clients_have_empty_batches():
  assert draw(size=0, num_steps=2, batch_size=4)[1].sum() == 0


def batches_of_a_round(batches_per_step, size=10):
  """What every step of a round gets: (rows, labels, mask), each [tau, batches, B]."""
  data = Dataset(jnp.arange(100, 120), jnp.arange(20))  # each example is its row + 100
  shape = (6, batches_per_step, 4)
  seen = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

  def step_fn(seen, step, *batches):
    drawn = map(jnp.stack, zip(*((b.x, b.y, b.mask) for b in batches), strict=True))
    at = step - 30
    return tuple(s.at[at].set(d) for s, d in zip(seen, drawn, strict=True)), step.astype(float)

  run = local_round(step_fn, data, jnp.int32(5), LocalWork(6, 4), batches_per_step)
  seen, loss = run(KEY, seen, (jnp.arange(5, 20), jnp.int32(size)))
  assert loss == 32.5  # the mean over steps, which count on from the first
  return jax.tree.map(np.asarray, seen)


def test_a_second_batch_per_step_leaves_the_first_as_it_was():
  (one, _, _), (two, labels, mask) = batches_of_a_round(1), batches_of_a_round(2)
  np.testing.assert_array_equal(one[:, 0], two[:, 0])
  assert not np.array_equal(two[:, 0], two[:, 1])
  np.testing.assert_array_equal(labels, two - 100)
  assert np.all(mask == 1)
  for which in (0, 1):
    assert sorted(two[:, which].ravel()[:10]) == list(range(105, 115))


def test_a_second_batch_of_a_small_client_holds_the_same_rows():
  x, _, mask = batches_of_a_round(2, size=3)
  np.testing.assert_array_equal(mask, np.broadcast_to([1, 1, 1, 0], mask.shape))
  np.testing.assert_array_equal(np.sort(x[..., :3]), np.broadcast_to([105, 106, 107], (6, 2, 3)))


def test_held_classes_ignore_padding():
  data = toy.dataset(20)._replace(y=jnp.array([0, 2, 2, 0, 3] + [1] * 15))
  model = toy.linear()
  variables = model.init(KEY)
  held = lambda *rows: held_classes(model, variables, data, Rows(*rows))
  index = jnp.array([0, 1, 2, 3, 4, 4, 4, 10])
  for size, expected in ((4, [1, 0, 1, 0]), (5, [1, 0, 1, 1]), (8, [1, 1, 1, 1]), (0, [0] * 4)):
    np.testing.assert_array_equal(held(index, size), np.array(expected, bool))
    np.testing.assert_array_equal(jax.jit(held)(index, size), np.array(expected, bool))


def test_sgd_step_descends_by_the_rate():
  value, _, x = quadratic()
  variables = {"params": {"dense_1": {"kernel": x}}, "stats": {"old": 1}}
  loss_fn = lambda v: (on_kernel(value)(v)[0], {"new": 2})
  after, loss = sgd_step(variables, loss_fn, 0.1)
  np.testing.assert_allclose(loss, value(x), rtol=1e-6)
  expected = x - 0.1 * jax.grad(value)(x)
  np.testing.assert_allclose(after["params"]["dense_1"]["kernel"], expected, rtol=1e-6)
  assert after["stats"] == {"new": 2}


def test_an_infinite_pull_snaps_to_the_centers_in_one_step():
  value, _, x = quadratic()
  quantizer = quantizers.learned_codebook(max_bits=1)
  start = personal(x, quantizer)
  frozen = quantizer._replace(update=lambda codebooks, *_: codebooks)
  state, _ = alternating_step(
    start,
    on_kernel(value),
    jnp.int32(0),
    Rule(frozen, Rates(0.1, 0.1, np.inf)),
  )
  after = np.asarray(state.variables["params"]["dense_1"]["kernel"])
  assert set(after.tolist()) <= set(np.asarray(start.codebooks["dense_1/kernel"]).tolist())


@pytest.mark.parametrize("bits", [1, 32])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, jnp.float32(0), jnp.float32(0.3)])
def test_a_step_with_another_loss_at_the_quantised_point(share, bits):
  """Straight through or not; at full precision neither counts."""
  (f, _, x), (g, _, _) = quadratic(), quadratic(seed=1)
  quantizer = quantizers.learned_codebook(max_bits=1)
  start = personal(x, quantizer, bits)
  after, value = alternating_step(
    start,
    on_kernel(f),
    jnp.int32(0),
    Rule(quantizer, Rates(0.1, 0.1, 0.0), straight_through=share),
    on_kernel(g),
  )
  in_f, in_g, moved = jax.grad(f), jax.grad(g), after.variables["params"]["dense_1"]["kernel"]
  if bits == 32:
    np.testing.assert_allclose(value, f(x), rtol=1e-6)
    np.testing.assert_allclose(moved, x - 0.1 * in_f(x), rtol=1e-5)
    return
  centers = start.codebooks["dense_1/kernel"]
  q = ops.hard_quantize(x, centers)
  np.testing.assert_allclose(value, f(x) + g(q), rtol=1e-6)
  expected = x - 0.1 * ((1 - share) * in_f(x) + share * in_g(q))
  np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
  low = np.asarray(moved) <= np.mean(centers)
  slope = np.asarray(in_g(ops.hard_quantize(moved, centers)))
  expected = np.asarray(centers) - 0.1 * np.array([slope[low].sum(), slope[~low].sum()])
  np.testing.assert_allclose(after.codebooks["dense_1/kernel"], np.sort(expected), rtol=1e-5)


def test_schedules_are_read_at_the_step():
  schedule = optax.linear_schedule(1.0, 0.0, 10)
  assert value_at(schedule, jnp.int32(5)) == 0.5
  assert value_at(0.3, jnp.int32(5)) == 0.3


def test_bad_rates_are_refused():
  quantizer = quantizers.full_precision()
  with pytest.raises(BadInput, match=r"local_steps 0: allowed is a whole number of at least 1"):
    check_work(LocalWork(0, 10))
  with pytest.raises(BadInput, match=r"rates.weights -0.1: allowed is a finite number above 0"):
    algorithm1.check(Rule(quantizer, Rates(weights=-0.1)))
  with pytest.raises(BadInput, match=r"rates.centers nan"):
    algorithm1.check(Rule(quantizer, Rates(centers=float("nan"))))


@pytest.mark.parametrize(
  ("names", "backend", "expected"),
  [
    (("mlp",), "cpu", 2**20 // (4 * 8_970)),
    (("mlp",), "gpu", None),
    (("mlp", "cnn3"), "cpu", 2**20 // (4 * 18_218)),  # the largest counts
    (("mlp", "cnn2"), "cpu", None),  # three of it fit
  ],
)
def test_on_a_cpu_as_many_small_clients_train_side_by_side_as_the_cache_holds(
  names, backend, expected
):
  made = tuple(models.make(name, 10, (8, 8, 1)) for name in names)
  assert usual_clients_per_step(made, backend) == expected


@pytest.mark.parametrize(("count", "per_step", "steps"), [(26, 25, (2, 13)), (8, 3, (3, 3))])
def test_steps_of_a_few_clients_are_of_about_one_size(count, per_step, steps):
  x = jnp.arange(float(count))
  mapped = lambda x: map_clients(lambda of_client: 2 * of_client[0], ((x,),), per_step)
  (scan,) = [e for e in jax.make_jaxpr(mapped)(x).eqns if e.primitive.name == "scan"]
  assert [leaf.aval.shape for leaf in scan.invars] == [steps]
  np.testing.assert_array_equal(mapped(x), 2 * x)
