"""Networks as pairs of pure functions: shapes, names, initial values, precision, cost."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qupeD_jax import checks, models
from qupeD_jax.models import flops
from qupeD_jax.models.conv import forms
from qupeD_jax.types import Model
from tests import toy

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]
SMALL = {"channels": (4, 6), "widths": (12, 8)}  # a CNN of the same make that compiles in no time


def images(shape, batch=5):
  return jax.random.randint(jax.random.key(0), (batch, *shape), 0, 256, jnp.uint8)


def small_cnn(**options):
  return models.make("cnn1", 7, (9, 8, 2), **SMALL, **options)


def initial(model):
  return jax.jit(model.init)(jax.random.key(0))


def logits_of(model, variables, x):
  return jax.jit(lambda variables, x: model.apply(variables, x, False)[0])(variables, x)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", models.NAMES)
def test_shapes_and_dtypes(name, shape):
  model = models.make(name, 62, shape, dtype="bfloat16")
  variables = jax.eval_shape(model.init, jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  for dtype in (jnp.uint8, jnp.float32):
    x = jax.ShapeDtypeStruct((5, *shape), dtype)
    logits, stats = jax.eval_shape(lambda v, x: model.apply(v, x, True), variables, x)
    assert logits == jax.ShapeDtypeStruct((5, 62), jnp.float32)
    assert stats == variables["stats"]
    assert bool(stats) == name.startswith("resnet")


def test_layers_are_named_by_the_convention():
  params = jax.eval_shape(small_cnn().init, jax.random.key(0))["params"]
  assert set(params) == {"stem", "conv_1", "dense_1", "dense_2", "head"}
  assert all(set(layer) == {"kernel", "bias"} for layer in params.values())
  params = jax.eval_shape(models.make("mlp", 10, (8, 8, 1)).init, jax.random.key(0))["params"]
  assert set(params) == {"stem", "dense_1", "head"}


@pytest.mark.parametrize(
  ("name", "shape", "count"),
  [
    # 5*5*3*64+64, 5*5*64*64+64, 8*8*64*384+384, 384*192+192, 192*10+10
    ("cnn1", (32, 32, 3), 4_864 + 102_464 + 1_573_248 + 73_920 + 1_930),
    # 28 -> 14 -> 7, one channel
    ("cnn1", (28, 28, 1), 1_664 + 102_464 + 1_204_608 + 73_920 + 1_930),
    # 5*5*3*32+32, 5*5*32*32+32, 8*8*32*192+192, 192*96+96, 96*10+10
    ("cnn2", (32, 32, 3), 2_432 + 25_632 + 393_408 + 18_528 + 970),
    # 5*5*3*16+16, 5*5*16*16+16, 8*8*16*96+96, 96*48+48, 48*10+10
    ("cnn3", (32, 32, 3), 1_216 + 6_416 + 98_400 + 4_656 + 490),
    # 64*64+64 twice, 64*10+10
    ("mlp", (8, 8, 1), 4_160 + 4_160 + 650),
  ],
)
def test_parameter_counts_by_hand(name, shape, count):
  params = jax.eval_shape(models.make(name, 10, shape).init, jax.random.key(0))["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_initial_values_fill_the_fan_in_range():
  params = initial(models.make("cnn2", 10, (8, 8, 3)))["params"]
  for layer in params.values():
    bound = 1 / np.sqrt(layer["kernel"][..., 0].size)
    for leaf in layer.values():
      assert abs(leaf).max() <= bound
    assert abs(layer["kernel"]).max() > 0.99 * bound
    assert abs(layer["bias"]).max() > 0.7 * bound
    assert abs(layer["kernel"].mean()) < 0.1 * bound


def test_cnn_equals_its_layers_in_numpy():
  """Independent of the module: the order of layers, of the flattening and of the normalisation."""
  mean, std = (100.0, 20.0), (50.0, 60.0)
  model = small_cnn(mean=mean, std=std, conv_form="lax")
  variables, x = initial(model), images((9, 8, 2))
  got = logits_of(model, variables, x)

  params = jax.tree.map(np.asarray, variables["params"])
  y = (np.asarray(x, np.float32) - np.array(mean)) / np.array(std)
  for name in ("stem", "conv_1"):
    y = np.asarray(forms.conv(jnp.float32(y), params[name]["kernel"], "lax"))
    y = np.maximum(y + params[name]["bias"], 0)
    y = y[:, : y.shape[1] // 2 * 2, : y.shape[2] // 2 * 2]
    y = np.max([y[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
  y = y.reshape(len(x), -1)
  for name in ("dense_1", "dense_2"):
    y = np.maximum(y @ params[name]["kernel"] + params[name]["bias"], 0)
  want = y @ params["head"]["kernel"] + params["head"]["bias"]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32, sums of up to 60 products


def test_gradients_of_dense_layers_on_a_cpu_are_those_elsewhere(monkeypatch):
  """Clients side by side: a CPU has its own form of them."""
  model, x = models.make("mlp", 7, (4, 4, 1)), images((4, 4, 1))
  stack = lambda leaf: jnp.stack([leaf, 2 * leaf])
  stacked = jax.tree.map(stack, initial(model))

  def grads():
    loss = lambda variables: jnp.sum(jnp.sin(logits_of(model, variables, x)))
    return str(jax.make_jaxpr(jax.grad(loss))(initial(model))), jax.vmap(jax.grad(loss))(stacked)

  traced, on_cpu = grads()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  traced_elsewhere, elsewhere = grads()
  assert "optimization_barrier" in traced
  assert "optimization_barrier" not in traced_elsewhere
  chex.assert_trees_all_close(on_cpu, elsewhere, rtol=1e-5, atol=1e-5)


def test_default_normalisation_is_to_the_unit_interval():
  model = models.make("mlp", 3, (2, 2, 1), widths=())
  params = {"head": {"kernel": jnp.eye(4, 3), "bias": jnp.zeros(3)}}
  x = jnp.array([0, 51, 255, 7], jnp.uint8).reshape(1, 2, 2, 1)
  logits, _ = model.apply({"params": params, "stats": {}}, x, False)
  np.testing.assert_allclose(logits, [[0, 0.2, 1]], rtol=1e-6)


@pytest.mark.parametrize("make", [small_cnn, lambda: models.make("mlp", 7, (9, 8, 2))])
def test_vmapped_clients_equal_a_loop(make):
  model, x = make(), images((9, 8, 2), batch=15).reshape(3, 5, 9, 8, 2)

  def gradients(params, x):
    loss = lambda params: jnp.square(model.apply({"params": params, "stats": {}}, x, True)[0]).sum()
    return jax.grad(loss)(params)

  params = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(1), 3))["params"]
  together = jax.jit(jax.vmap(gradients))(params, x)
  alone = jax.jit(gradients)
  each = [alone(jax.tree.map(lambda leaf, i=i: leaf[i], params), x[i]) for i in range(3)]
  # float32: a batched product may sum in another order.
  chex.assert_trees_all_close(together, jax.tree.map(lambda *a: jnp.stack(a), *each), rtol=1e-4)


@pytest.mark.parametrize("form", forms.FORMS)
def test_form_changes_rounding_only(form):
  variables, x = initial(small_cnn()), images((9, 8, 2))
  logits = logits_of(small_cnn(conv_form=form), variables, x)
  chosen = logits_of(small_cnn(), variables, x)
  np.testing.assert_allclose(logits, chosen, atol=1e-6)  # logits of order 0.1 in float32


def test_bfloat16_is_close_to_float32():
  variables, x = initial(small_cnn()), images((9, 8, 2))
  exact = logits_of(small_cnn(), variables, x)
  rounded = logits_of(small_cnn(dtype="bfloat16"), variables, x)
  error = np.abs(rounded - exact).max()
  assert 0 < error < 0.02 * np.abs(exact).max()  # 2^-9 a layer, four layers


def test_bfloat16_computes_all_but_the_head_in_bfloat16():
  model = small_cnn(dtype="bfloat16")
  variables = jax.eval_shape(model.init, jax.random.key(0))
  traced = jax.make_jaxpr(lambda v, x: model.apply(v, x, False))(variables, images((9, 8, 2)))
  products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", str(traced))
  assert products == ["bf16"] * 4 + ["f32"]


class Normalised(nn.Module):
  """A user's module with running statistics, and a head in bfloat16."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
    return nn.Dense(4, dtype=jnp.bfloat16, name="head")(x.reshape(x.shape[0], -1))


def test_stats_are_renewed_in_training_only():
  model = models.from_linen(Normalised(), (2, 2, 3), mean=0.0, std=1.0)
  variables = initial(model)
  assert set(variables) == {"params", "stats"}
  x = images((2, 2, 3))
  logits, kept = model.apply(variables, x, False)
  assert logits.dtype == jnp.float32
  chex.assert_trees_all_equal(kept, variables["stats"])
  _, renewed = model.apply(variables, x, True)
  chex.assert_trees_all_equal_shapes_and_dtypes(renewed, kept)
  running = renewed["batch_stats"]["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(running, 0.5 * x.mean((0, 1, 2)), rtol=1e-6)


LISTED = "mlp, mlp2, cnn1, cnn2, cnn3, resnet8, resnet20, resnet32"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"model": "cnn4"}, rf"model cnn4: allowed is {LISTED} \(nearest: cnn1\)"),
    ({"model": "MLP"}, rf"model MLP: allowed is {LISTED} \(nearest: mlp\)"),
    ({"dtype": "float16"}, "dtype float16: allowed is float32 or bfloat16"),
    ({"conv_form": "fft"}, "conv_form fft: allowed is lax, im2col, tiles, serial, None"),
    ({"num_classes": 0}, "num_classes 0: allowed is a whole number of at least 1"),
    ({"image_shape": None}, r"image_shape None: allowed is \(height, width, channels\)"),
    ({"image_shape": (3, 8, 1)}, r"image shape \(3, 8, 1\): allowed is 4x4 or larger"),
    ({"image_shape": (8, 8, 0)}, "image shape 0: allowed is a whole number of at least 1"),
    ({"mean": (1.0, 2.0)}, "mean .*: allowed is one number, or one for each of 1 channels"),
    ({"std": 0.0}, "std .*: allowed is finite and above 0"),
    (
      {"model": "resnet8", "channels": (8, 4)},
      r"channels \(8, 4\): allowed is in rising order: shortcuts drop none",
    ),
  ],
)
def test_bad_options_are_refused_in_one_line(options, message):
  good = {"model": "cnn1", "num_classes": 10, "image_shape": (8, 8, 1)}
  with pytest.raises(checks.BadInput) as raised:
    models.make(**{**good, **options})
  assert re.fullmatch(message, str(raised.value))


def test_a_partial_batch_is_normalised_by_the_rows_that_count():
  """Logits, statistics and gradients are those of these rows alone."""
  model = toy.normalised()
  variables = model.init(jax.random.key(0))
  x = np.random.default_rng(0).uniform(0, 255, (8, *toy.IMAGE)).astype(np.float32)
  mask = np.float32([1, 1, 0, 1, 0, 1, 1, 0])

  @jax.jit
  def run(params, x, mask):
    def loss(params):
      logits, stats = model.apply({**variables, "params": params}, x, True, mask)
      counted = jnp.where(mask[:, None] > 0, logits, 0.0)
      return jnp.sum(jnp.sin(counted)), (counted, stats)

    return jax.value_and_grad(loss, has_aux=True)(params)

  ((_, (logits, stats)), grads) = run(variables["params"], x, mask)
  alone = run(variables["params"], x[mask > 0], np.ones(5, np.float32))
  ((_, (its_logits, its_stats)), its_grads) = alone
  close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
  close(logits[mask > 0], its_logits)
  close(stats, its_stats)
  close(grads, its_grads)


def test_without_rows_that_count_statistics_stay_finite():
  model = toy.normalised()
  x = jnp.ones((4, *toy.IMAGE), jnp.uint8)
  _, stats = model.apply(model.init(jax.random.key(0)), x, True, jnp.zeros(4))
  chex.assert_tree_all_finite(stats)


def test_unequal_outputs_are_named():
  shape = (8, 8, 1)
  own = Model(lambda key: {"params": {}, "stats": {}}, lambda v, x, *_: (x[:, 0, :5, 0], {}))
  teachers = {"server": models.make("mlp", 5, shape), "clients": own}
  assert models.same_outputs(teachers, shape) == 5
  with pytest.raises(checks.BadInput, match="unequal model output sizes: server 6, clients 5"):
    models.same_outputs({**teachers, "server": models.make("mlp", 6, shape)}, shape)


def test_forward_flops_by_hand():
  shape = (32, 32, 3)
  stem, conv_1 = 32 * 32 * (5 * 5 * 3) * 64, 16 * 16 * (5 * 5 * 64) * 64
  by_hand = 2 * (stem + conv_1 + 8 * 8 * 64 * 384 + 384 * 192 + 192 * 10)
  count = lambda form: flops.forward_flops(models.make("cnn1", 10, shape, conv_form=form), shape)
  assert count("lax") == count("im2col") == by_hand
  assert count("tiles") == by_hand + 2 * (stem + conv_1) * 11 // 25  # 6 * 6 products for 5 * 5


def test_forward_flops_agree_with_xla():
  model = models.make("cnn1", 10, (32, 32, 3), conv_form="lax")
  variables = jax.eval_shape(model.init, jax.random.key(0))
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
  lowered = jax.jit(lambda v, x: model.apply(v, x, False)).lower(variables, x)
  theirs = lowered.cost_analysis()["flops"]
  # XLA leaves out products with the zeros of the padding, and adds elementwise work.
  assert 0.8 < theirs / flops.forward_flops(model, (32, 32, 3)) < 1


def test_forward_flops_follow_loops_and_wrappers():
  def apply(variables, x, train, mask=None):
    x = x.reshape(1, -1).astype(jnp.float32)
    layer = jax.checkpoint(jax.jit(lambda x: jax.nn.relu(x @ jnp.ones((4, 4)))))
    x, _ = jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)
    return x, {}

  model = Model(lambda key: {"params": {}, "stats": {}}, apply)
  assert flops.forward_flops(model, (2, 2, 1)) == 3 * 2 * 4 * 4
