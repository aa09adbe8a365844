"""The Quantizers: each against a loop in numpy, and what all of them have in common."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.engine import programs
from qupeD_jax.federation.algorithm1 import Rates, Rule, alternating_step, init_personal
from qupeD_jax.federation.gradients import sgd_step
from qupeD_jax.quantization import codebook, ops, quantizers
from tests import oracle, toy
from tests.algorithms.comparing import BOTH, MODEL, PERSONAL, STEPS, assert_model, assert_personal
from tests.flat import finetune, local, quped, qupel
from tests.quantization.tensors import PARAMS, normal

STEP = jnp.int32(0)
FIXED = {"max_bits": 3, "init": ops.fixed_centers}
GROWING = lambda step: 0.02 * (step + 1)
RELAXATION = lambda step: 0.5 * 1.5**step

# A quantizer, and the loop's step, the models it trains and its first centers (None: as usual).
RIVALS = {
  "proxquant": (
    quantizers.proxquant(max_bits=3),
    (oracle.proxquant_step(GROWING), oracle.only_x, None),
  ),
  "proxquant_fixed": (
    quantizers.proxquant(**FIXED),
    (oracle.proxquant_step(GROWING), oracle.only_x, oracle.levels),
  ),
  "binary_relax": (
    quantizers.binary_relax(max_bits=3, relaxation=RELAXATION),
    (oracle.binary_relax_step(RELAXATION), oracle.only_relaxed(RELAXATION), None),
  ),
  "ste": (quantizers.ste(**FIXED), (oracle.ste_step(), oracle.only_q, oracle.levels)),
  "ste_clipped": (
    quantizers.ste(clip_weights=0.4, **FIXED),
    (oracle.ste_step(0.4), oracle.only_q, oracle.levels),
  ),
}
every_rival = pytest.mark.parametrize("name", RIVALS)
ALL = {
  "none": quantizers.full_precision(),
  "learned_codebook": quantizers.learned_codebook(max_bits=3),
  "soft_codebook": quantizers.learned_codebook(max_bits=3, sharpness=5.0, clip_weights=1.0),
} | {name: quantizer for name, (quantizer, _) in RIVALS.items()}
every_quantizer = pytest.mark.parametrize("name", ALL)


@every_rival
@pytest.mark.parametrize("bits", [(1, 2), (32, 3)])
@pytest.mark.parametrize("p", [0.0, 0.6])
def test_a_quantizer_in_quped_and_alone(name, bits, p):
  """QuPeD with p = 0 is local training; clients of 32 bits train beside the others."""
  _, (step, trained, first) = RIVALS[name]
  state, _ = oracle.train(with_quantizer(name, p), bits)
  *personal, w = oracle.quped(bits, p, take_step=step, trained=trained, first=first)
  assert_personal(state.clients[0], *personal)
  if p:
    assert_model(state.server, w)


@functools.cache
def with_quantizer(name, p):
  """One for clients of any bits, which share its program."""
  quantizer, _ = RIVALS[name]
  options = PERSONAL | {"rates": oracle.RATES._replace(proximity=GROWING)}
  if not p:
    return local((MODEL,), quantizer, **options)
  options |= {"lambda_p": p, "temperature": oracle.TEMPERATURE}
  return quped(MODEL, (MODEL,), quantizer, global_rate=BOTH["global_rate"], **options)


@pytest.mark.parametrize("bits", [(1, 2), (32, 3)])
def test_qupel_with_a_quantizer_that_trains_at_q_alone(bits):
  quantizer, (step, _, first) = RIVALS["ste"]
  algorithm = qupel(MODEL, quantizer, penalty=0.8, global_rate=oracle.GLOBAL_RATE, **PERSONAL)
  *personal, w = oracle.qupel(bits, 0.8, take_step=step, first=first)
  state, _ = oracle.train(algorithm, bits)
  assert_personal(state.clients[0], *personal)
  assert_model(state.server, w)


def test_qupel_with_a_quantizer_that_trains_at_x_alone_ties_x():
  """Without a pull toward the centers that is QuPeL at full precision."""
  rates = {"rates": oracle.RATES._replace(proximity=0.0), **STEPS}
  algorithm = qupel(MODEL, quantizers.proxquant(max_bits=2), penalty=0.8, global_rate=0.4, **rates)
  *(xs, _), w = oracle.qupel((32, 32), 0.8)
  state, _ = oracle.train(algorithm, (1, 2))
  assert_personal(state.clients[0], xs, (None, None))
  assert_model(state.server, w)


# --- one step


def quadratic(variables):
  params = variables["params"]
  target = jax.tree.map(lambda p: jnp.sin(7 * p), params)
  gaps = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
  return sum(jax.tree.leaves(gaps)), {}


def one_step(quantizer, personal):
  rule = Rule(quantizer, Rates(0.1, 0.01, 0.05))
  return alternating_step(personal, quadratic, STEP, rule)


def start(quantizer, bits):
  variables = {"params": PARAMS, "stats": {}}
  return init_personal(variables, bits, Rule(quantizer))


@every_quantizer
def test_full_precision_is_one_step_of_gradient_descent(name):
  quantizer = ALL[name]
  after, value = jax.jit(lambda b: one_step(quantizer, start(quantizer, b)))(jnp.int32(32))
  expected, loss = sgd_step({"params": PARAMS, "stats": {}}, quadratic, 0.1)
  np.testing.assert_allclose(value, loss, rtol=1e-6)
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  jax.tree.map(compare, after.variables, expected)
  for centers in after.codebooks.values():
    np.testing.assert_array_equal(centers, np.inf)


@every_quantizer
def test_mixed_bits_side_by_side_train_as_each_alone(name):
  quantizer, bits = ALL[name], np.array([1, 2, 3, 32])
  begin = jax.vmap(lambda b: start(quantizer, b))(bits)
  together = jax.jit(jax.vmap(lambda personal: one_step(quantizer, personal)))(begin)
  for k, b in enumerate(bits):
    alone = one_step(quantizer, start(quantizer, b))
    compare = lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-5, atol=1e-6)
    jax.tree.map(compare, together, alone)


@pytest.mark.parametrize(
  ("name", "expected"),
  [("none", 1), ("proxquant", 1), ("binary_relax", 1), ("ste", 2), ("learned_codebook", 3)],
)
def test_only_the_passes_that_are_needed_are_run(name, expected):
  quantizer, passes = ALL[name], []

  def counted(variables):
    passes.append(1)
    return quadratic(variables)

  step = lambda personal: alternating_step(personal, counted, STEP, Rule(quantizer))
  jax.eval_shape(step, start(quantizer, jnp.int32(2)))
  assert len(passes) == expected


# --- one by one


def test_learned_codebook_with_mixed_bits():
  quantizer = quantizers.learned_codebook(max_bits=3)
  books = jax.vmap(lambda bits: quantizer.init(PARAMS, bits))(np.array([1, 2, 3, 32]))
  centers = np.asarray(books["dense_1/kernel"])
  assert centers.shape == (4, 8)
  np.testing.assert_array_equal(np.isfinite(centers).sum(axis=1), [2, 4, 8, 0])
  active = jax.vmap(ops.is_active)(books)
  np.testing.assert_array_equal(active, [1, 1, 1, 0])
  projected = jax.vmap(lambda c: quantizer.project(PARAMS, c, STEP))(books)
  kernels = np.asarray(projected["dense_1"]["kernel"])
  for kernel, used in zip(kernels[:3], centers, strict=False):
    assert set(kernel.ravel().tolist()) <= set(used[np.isfinite(used)].tolist())
  np.testing.assert_array_equal(kernels[3], PARAMS["dense_1"]["kernel"])
  np.testing.assert_array_equal(projected["stem"]["kernel"][0], PARAMS["stem"]["kernel"])


def test_a_client_that_a_codebook_has_no_room_for_is_refused():
  """By its bits where they are known; where they are traced, by NaNs, at which a run stops."""
  quantizer = quantizers.learned_codebook(max_bits=2)
  groups = (toy.cohort(range(2), (2, 8), oracle.ROWS),)
  message = r"bits 8: allowed is 1 to max_bits \(2\), or 32 for full precision"
  algorithm = local((MODEL,), quantizer, **PERSONAL)
  with pytest.raises(BadInput, match=message):
    algorithm.init(jax.random.key(0), oracle.DATA, groups)
  traced = jax.jit(algorithm.init)(jax.random.key(0), oracle.DATA, groups)
  for broken in programs.holds_nan(traced, groups):
    np.testing.assert_array_equal(broken, [False, True])


def slopes_of(quantizer, books, g):
  """The slopes of sum(g Q) in the centers, g of the quantised kernel's shape."""
  project = lambda books: quantizer.project(PARAMS, books, STEP)["dense_1"]["kernel"]
  return jax.vjp(project, books)[1](g)[0]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_update_is_a_gradient_step_followed_by_the_proximal_map(clip):
  quantizer = quantizers.learned_codebook(max_bits=1, clip=clip)
  x, g = PARAMS["dense_1"]["kernel"], normal(9, 5, 5)
  books = {"dense_1/kernel": jnp.array([-0.7, 0.8])}
  slopes = slopes_of(quantizer, books, g)
  after = quantizer.update(books, PARAMS, slopes, 0.1, 0.01)["dense_1/kernel"]
  low = x <= 0.05
  slope = np.array([g[low].sum(), g[~low].sum()])
  slope = slope if clip is None else np.clip(slope, -clip, clip)
  sides = [np.sign(x[low] + 0.7).sum(), np.sign(x[~low] - 0.8).sum()]
  expected = np.array([-0.7, 0.8]) - 0.1 * slope + 0.01 * np.array(sides)
  np.testing.assert_allclose(after, np.sort(expected), rtol=1e-5, atol=1e-6)


def test_none_does_nothing():
  quantizer = quantizers.full_precision()
  assert quantizer.init(PARAMS, 32) == {}
  assert quantizer.project(PARAMS, {}, STEP) is PARAMS
  assert quantizer.prox(PARAMS, {}, 0.1) is PARAMS
  assert quantizer.update({}, PARAMS, None, 0.1, 0.1) == {}
  jax.tree.map(np.testing.assert_array_equal, ops.harden(PARAMS, {}), PARAMS)


@pytest.mark.parametrize(
  "make", [quantizers.learned_codebook, quantizers.proxquant, quantizers.ste]
)
def test_weights_are_clipped_after_the_step_where_there_is_a_codebook(make):
  free, clipped = make(max_bits=2), make(max_bits=2, clip_weights=0.3)
  for bits, bound in ((2, 0.3), (32, np.inf)):
    books = free.init(PARAMS, jnp.int32(bits))
    flat = ops.flatten(free.prox(PARAMS, books, 0.1))
    kernel = flat.pop("dense_1/kernel")
    expected = ops.replace(flat, {"dense_1/kernel": np.clip(kernel, -bound, bound)})
    actual = clipped.prox(PARAMS, books, 0.1)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_the_relaxation_grows_from_the_weights_to_the_centers():
  x = PARAMS["dense_1"]["kernel"]
  for weight, share in ((0.0, 1.0), (3.0, 0.25), (jnp.inf, 0.0)):
    quantizer = quantizers.binary_relax(max_bits=2, relaxation=lambda step, w=weight: w * 1.0)
    books = quantizer.init(PARAMS, jnp.int32(2))
    q = ops.harden(PARAMS, books)["dense_1"]["kernel"]
    relaxed = lambda p, z=quantizer, b=books: z.project(p, b, STEP)["dense_1"]["kernel"]
    np.testing.assert_allclose(relaxed(PARAMS), q + share * (x - q), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda p, fn=relaxed: fn(p).sum())(PARAMS)["dense_1"]["kernel"]
    np.testing.assert_array_equal(slope, np.ones_like(x))


def test_binary_relax_minimises_the_distance_for_the_owners_that_there_are():
  x = np.float32([-3.0, -1.0, 0.2, 0.4, 5.0])
  params, books = {"a": {"kernel": x}}, {"a/kernel": jnp.float32([-1.5, 0.0, 1.7, jnp.inf])}
  quantizer = quantizers.binary_relax(max_bits=2, relaxation=1.0)
  after = quantizer.update(books, params, None, 0.1, 0.1)["a/kernel"]
  np.testing.assert_allclose(after, [-2.0, 0.3, 5.0, np.inf], rtol=1e-6)
  alone = {"a/kernel": jnp.float32([-9.0, -2.0, 0.5, 8.0])}  # the outer ones own nothing
  after = quantizer.update(alone, {"a": {"kernel": x[:4]}}, None, 0.1, 0.1)["a/kernel"]
  np.testing.assert_allclose(after, [-9.0, -2.0, 0.3, 8.0], rtol=1e-6)


def test_the_scale_follows_its_gradient_and_stays_positive():
  """The gradient of sum(g Q) in s, by the difference of two scales, the owners held."""
  quantizer = quantizers.ste(max_bits=2)
  books = quantizer.init(PARAMS, jnp.int32(2))
  x, g, centers = PARAMS["dense_1"]["kernel"], normal(9, 5, 5), books["dense_1/kernel"]
  scale, owner = float(centers[-1]), codebook.assign(x, centers)
  slope = float(jnp.sum(g * (centers * 1.5)[owner]) - jnp.sum(g * centers[owner])) / (scale * 0.5)
  slopes = slopes_of(quantizer, books, g)
  step = lambda rate: quantizer.update(books, PARAMS, slopes, rate, 0.0)["dense_1/kernel"]
  expected = (scale - 0.01 * slope) * np.linspace(-1, 1, 4)
  np.testing.assert_allclose(step(0.01), expected, rtol=1e-5)
  # Far along the gradient, half of the scale is left.
  np.testing.assert_allclose(
    step(1e6 * np.sign(slope)), scale / 2 * np.linspace(-1, 1, 4), rtol=1e-5
  )


def test_fine_tuning_moves_centers_by_the_gradients_of_their_entries_whatever_trained():
  """Every entry lies on its center, where soft Q's derivative is another than hard Q's."""
  bits, groups = (2, 3), (toy.cohort(range(2), (2, 3), oracle.ROWS),)
  trained, _ = oracle.train(local((MODEL,), ALL["learned_codebook"], **PERSONAL), bits)
  after = []
  for name in ("learned_codebook", "soft_codebook"):
    phase = finetune((MODEL,), ALL[name], trained, centers_rate=0.01, **STEPS)
    state = phase.init(jax.random.key(0), oracle.DATA, groups)
    state, _ = jax.jit(phase.round)(jax.random.key(0), state, oracle.DATA, groups)
    after.append(state.clients[0].codebooks)
  chex.assert_trees_all_close(*after, rtol=1e-6)


@pytest.mark.parametrize("name", ["learned_codebook", *RIVALS])
def test_fine_tuning_freezes_what_any_of_them_trained(name):
  quantizer, bits = ALL[name], (2, 32)
  groups = (toy.cohort(range(2), bits, oracle.ROWS),)
  trained, _ = oracle.train(local((MODEL,), quantizer, **PERSONAL), bits)
  phase = finetune((MODEL,), quantizer, trained, centers_rate=0.01, **STEPS)
  before = phase.init(jax.random.key(0), oracle.DATA, groups).clients[0]
  after = oracle.train(phase, bits)[0].clients[0]
  old, new = (np.asarray(s.codebooks["dense_1/kernel"])[0] for s in (before, after))
  assert np.array_equal(old, new) != quantizer.learned
  (x, _), (y, bias) = (oracle.tensors(s.variables) for s in (before, after))
  np.testing.assert_array_equal(y[0], new[oracle.nearest(x[0], old[np.isfinite(old)])])
  assert np.all(np.any(x[1] != y[1], axis=0))
  assert np.all(np.any(oracle.tensors(before.variables)[1] != bias, axis=1))


def test_bad_options_are_refused():
  for make in (quantizers.learned_codebook, quantizers.proxquant, quantizers.ste):
    with pytest.raises(BadInput, match="max_bits 9: allowed is 1 to 8"):
      make(max_bits=9)
    with pytest.raises(BadInput, match="clip_weights -1: allowed is a finite number above 0"):
      make(clip_weights=-1)
  with pytest.raises(BadInput, match="sharpness 0: allowed is a finite number above 0"):
    quantizers.learned_codebook(sharpness=0)
  with pytest.raises(BadInput, match="norm 'l3': allowed is 'l1' or 'l2'"):
    quantizers.proxquant(norm="l3")
  with pytest.raises(BadInput, match=r"relaxation -0.1: allowed is a finite number of at least 0"):
    quantizers.binary_relax(relaxation=-0.1)
