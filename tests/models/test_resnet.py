"""Residual networks against recorded logits of another implementation, numpy, and sums by hand."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from qupeD_jax import models
from qupeD_jax.data import catalog, sources
from qupeD_jax.io import import_torch, packing
from qupeD_jax.models import flops
from qupeD_jax.models.conv import forms
from qupeD_jax.quantization import ops
from qupeD_jax.results import account
from tests.models.loops import loop_convolution

DATA = pathlib.Path(__file__).parents[1] / "data"
CHECKPOINT = DATA / "resnet20_cifar10_fp.safetensors"
CIFAR = (32, 32, 3)
NORMALISED = {
  "mean": 255 * np.array([0.4914, 0.4822, 0.4465]),
  "std": 255 * np.array([0.2023, 0.1994, 0.2010]),
}
TINY = (8, 7, 1)


def tiny(**options):
  """Two blocks, of which the second halves the image: they compile in no time."""
  return models.make("resnet8", 4, TINY, channels=(2, 5), **options)


def images(*lead):
  return jax.random.randint(jax.random.key(0), (*lead, *TINY), 0, 256, jnp.uint8)


@functools.cache
def initial():
  return jax.jit(tiny().init)(jax.random.key(1))


@functools.cache
def trained():
  """The network of the recorded logits."""
  return import_torch.load(CHECKPOINT, "resnet20")


def shapes_of(name, image_shape=CIFAR):
  model = models.make(name, 10, image_shape)
  return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
  ("name", "parameters", "quantised"),
  [
    # stem, three stages of two kernels, norms with two parameters a channel, head
    ("resnet8", 432 + 9 * (16 * (16 + 16) + 32 * (16 + 32) + 64 * (32 + 64)) + 480 + 650, 6),
    ("resnet20", 269_722, 18),
    ("resnet32", 464_154, 30),
  ],
)
def test_parameters_and_quantised_tensors(name, parameters, quantised):
  params = ops.flatten(shapes_of(name)["params"])
  assert sum(leaf.size for leaf in params.values()) == parameters
  chosen = [path for path in params if ops.is_quantised(path)]
  assert len(chosen) == quantised
  assert {path.split("/")[-2] for path in chosen} == {"conv_1", "conv_2"}


@pytest.mark.parametrize("shape", [CIFAR, (28, 28, 1), (8, 8, 1)], ids=str)
def test_statistics_are_those_of_every_normalisation(shape):
  variables = shapes_of("resnet8", shape)
  assert set(variables["stats"]) == {"batch_stats"}
  found = flatten_dict(variables["stats"]["batch_stats"], sep="/")
  norms = {"stem_norm": 16}
  norms |= {f"stage_{i}_block_0/norm_{j}": 8 * 2**i for i in (1, 2, 3) for j in (1, 2)}
  wanted = {f"{norm}/{kind}": (c,) for norm, c in norms.items() for kind in ("mean", "var")}
  assert {path: leaf.shape for path, leaf in found.items()} == wanted


def test_kernels_start_from_he_normal():
  params = jax.jit(models.make("resnet8", 10, CIFAR).init)(jax.random.key(0))["params"]
  kernel = params["stage_3_block_0"]["conv_2"]["kernel"]
  sigma = np.sqrt(2 / (9 * 64))
  np.testing.assert_allclose([kernel.mean() / sigma, kernel.std() / sigma], [0, 1], atol=0.02)
  assert abs(kernel).max() > 3 * sigma  # not cut off at two


# --- against another implementation


def test_logits_equal_the_recorded_ones():
  recorded = np.load(DATA / "resnet20_logits.npz")
  model = models.make("resnet20", 10, CIFAR, **NORMALISED)
  logits, stats = jax.jit(lambda v, x: model.apply(v, x, False))(trained(), recorded["images"])
  np.testing.assert_allclose(logits, recorded["logits"], atol=1e-3)
  chex.assert_trees_all_equal(stats, trained()["stats"])


def test_the_checkpoint_scores_as_it_did():
  if catalog.newest("cifar10") is None:
    make = catalog.make_command("cifar10")
    pytest.skip(f"cifar10 is not in {catalog.folder()}; run {make}")
  _, test = sources.load("cifar10")
  # Of one network, and in no scan, XLA's own convolution is the fastest on a CPU.
  model = models.make("resnet20", 10, CIFAR, conv_form="lax", **NORMALISED)
  # Ten thousand images are worth the passes of the compiler that tests leave out.
  passes = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
  guess = jax.jit(
    lambda x: jnp.argmax(model.apply(trained(), x, False)[0], axis=-1), compiler_options=passes
  )
  guesses = np.concatenate([guess(x) for x in np.split(test.x, 20)])
  assert 100 * np.mean(guesses == test.y) == pytest.approx(92.05, abs=0.02)


# --- against numpy


class Numpy:
  """Two blocks in training mode, in float64; `stats` collects the renewed running statistics."""

  def __init__(self, variables):
    self.params = jax.tree.map(np.float64, variables["params"])
    self.running = flatten_dict(variables["stats"]["batch_stats"], sep="/")
    self.stats = {}

  def logits(self, x):
    y = np.maximum(self.norm(self.conv(x, "stem"), "stem_norm"), 0)
    for stage in (1, 2):
      y = self.block(y, f"stage_{stage}_block_0", 1 if stage == 1 else 2)
    return y.mean((1, 2)) @ self.params["head"]["kernel"] + self.params["head"]["bias"]

  def block(self, x, name, stride):
    y = self.norm(self.conv(x, f"{name}/conv_1", stride), f"{name}/norm_1")
    y = self.norm(self.conv(np.maximum(y, 0), f"{name}/conv_2"), f"{name}/norm_2")
    below = (y.shape[-1] - x.shape[-1]) // 2
    y[..., below : below + x.shape[-1]] += x[:, ::stride, ::stride]
    return np.maximum(y, 0)

  def conv(self, x, path, stride=1):
    kernel = ops.flatten(self.params)[f"{path}/kernel"]
    return loop_convolution(x, kernel)[:, ::stride, ::stride]

  def norm(self, x, path):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    for kind, value in (("mean", mean), ("var", var)):
      self.stats[f"{path}/{kind}"] = 0.9 * self.running[f"{path}/{kind}"] + 0.1 * value
    params = ops.flatten(self.params)
    scaled = (x - mean) / np.sqrt(var + 1e-5) * params[f"{path}/scale"]
    return scaled + params[f"{path}/bias"]


@pytest.fixture(scope="module")
def moved():
  """Variables none of which is at its initial value."""
  leaves, tree = jax.tree.flatten(initial())
  keys = jax.random.split(jax.random.key(2), len(leaves))
  move = lambda leaf, key: leaf + 0.2 * jax.random.uniform(key, leaf.shape)
  return jax.tree.unflatten(tree, [move(*pair) for pair in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize("form", [*forms.FORMS, None])
def test_training_mode_equals_numpy(form, moved):
  model, x = tiny(conv_form=form), images(3)
  logits, stats = jax.jit(lambda v, x: model.apply(v, x, True))(moved, x)
  oracle = Numpy(moved)
  # Five normalised layers of float32, whose rounding is divided by each batch's deviation.
  np.testing.assert_allclose(logits, oracle.logits(np.float64(x) / 255), rtol=1e-3, atol=1e-4)
  found = flatten_dict(stats["batch_stats"], sep="/")
  assert found.keys() == oracle.stats.keys()
  for path, value in found.items():
    np.testing.assert_allclose(value, oracle.stats[path], rtol=1e-4, atol=1e-5, err_msg=path)


# --- transformations and precision


def test_vmapped_clients_equal_a_loop(moved):
  model, x = tiny(), images(3, 4)

  def gradients(variables, x):
    def loss(params):
      logits, stats = model.apply({**variables, "params": params}, x, True)
      return jnp.square(logits).sum(), stats

    return jax.grad(loss, has_aux=True)(variables["params"])

  variables = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf, 1.2 * leaf]), moved)
  together = jax.jit(jax.vmap(gradients))(variables, x)
  alone = jax.jit(gradients)
  each = [alone(jax.tree.map(lambda leaf, i=i: leaf[i], variables), x[i]) for i in range(3)]
  # float32: a batched product may sum in another order, and gradients pass five normalisations.
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *each)
  chex.assert_trees_all_close(together, stacked, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_is_close_to_float32(train, moved):
  run = lambda dtype: jax.jit(lambda v, x: tiny(dtype=dtype).apply(v, x, train))(moved, images(8))
  (exact, stats), (rounded, rounded_stats) = run("float32"), run("bfloat16")
  error = np.abs(rounded - exact).max()
  assert 0 < error < 0.1 * np.abs(exact).max()  # 2^-9 a step, some twenty of them
  chex.assert_trees_all_equal_shapes_and_dtypes(rounded_stats, stats)
  chex.assert_trees_all_close(rounded_stats, stats, rtol=0.05, atol=0.05)


# --- cost, and the model as shipped


@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 1), ("resnet20", 3), ("resnet32", 5)])
def test_forward_flops_by_hand(name, blocks):
  stage = lambda pixels, c: pixels * 9 * c * c
  stages = 2 * blocks * stage(1024, 16)
  # The first kernel of a later stage reads half as many channels.
  stages += (2 * blocks - 0.5) * (stage(256, 32) + stage(64, 64))
  by_hand = 2 * (1024 * 27 * 16 + stages + 64 * 10)
  assert flops.forward_flops(models.make(name, 10, CIFAR, conv_form="lax"), CIFAR) == by_hand


@pytest.mark.parametrize("bits", [2, 32])
def test_the_shipped_model_keeps_its_statistics(bits, moved, tmp_path):
  flat = ops.flatten(moved["params"])
  paths = [path for path in flat if ops.is_quantised(path)]
  centers = ops.init_centers if bits == 2 else lambda x, m: jnp.full(m, jnp.inf)
  codebooks = {path: centers(flat[path], 4) for path in paths}
  packed = packing.pack(moved, codebooks)
  weight = account.tree_bytes((packed.codes, packed.centers, packed.kept))
  assert weight == account.model_bytes(moved["params"], paths, bits, moved["stats"])
  packing.save(tmp_path / "client.safetensors", packed, {"model": "resnet8"})
  shipped = packing.unpack(packing.load(tmp_path / "client.safetensors")[0])
  chex.assert_trees_all_equal(shipped["stats"], moved["stats"])
  hard = {**moved, "params": ops.harden(moved["params"], codebooks)}
  chex.assert_trees_all_equal(shipped, jax.device_get(hard))
