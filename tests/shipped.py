"""Small personal models, packed and described, as they come out of a study: drawn, not trained."""

import functools
import zlib

import jax
import numpy as np

from qupeD_jax import models
from qupeD_jax.io import packing
from qupeD_jax.io.shipped import Shipped, describe
from qupeD_jax.quantization import ops

SHAPE = (8, 8, 1)


@functools.cache
def network(name):
  return models.make(name, 10, SHAPE, mean=4.9, std=6.0, conv_form="lax")


@functools.cache
def forward(name):
  """Returns the compiled network as a function of variables and images."""
  return jax.jit(lambda variables, x: network(name).apply(variables, x, False)[0])


@functools.cache
def variables(name):
  """Draws variables of which signals come through: normalisation by what convolutions give."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  shapes = jax.eval_shape(network(name).init, jax.random.key(0))
  fans = lambda shape: max(1, int(np.prod(shape[:-1])))
  draw = lambda leaf: rng.normal(0, fans(leaf.shape) ** -0.5, leaf.shape).astype(np.float32)
  spread = lambda leaf: rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
  stats = jax.tree.map(spread, shapes["stats"])
  params = jax.tree.map(draw, shapes["params"])
  for path in ops.flatten(params):
    if path.endswith("scale"):
      module, leaf = path.rsplit("/", 1)
      functools.reduce(dict.get, module.split("/"), params)[leaf] += 1
  return {"params": params, "stats": stats}


def codebooks(name, bits):
  """Returns for every quantised tensor centers where its entries are, 2^bits of them."""
  if bits == 32:
    return {}
  params = ops.flatten(variables(name)["params"])
  levels = (np.arange(2**bits) + 0.5) / 2**bits
  paths = [path for path in params if ops.is_quantised(path)]
  return {path: np.quantile(params[path], levels).astype(np.float32) for path in paths}


@functools.cache
def shipped(name="mlp", bits=2):
  about = {
    "model": name,
    "client": 7,
    "bits": bits,
    "seed": 0,
    "input": {
      "dataset": "digits",
      "num_classes": 10,
      "image_shape": list(SHAPE),
      "mean": 4.9,
      "std": 6.0,
      "white": 16,
    },
  }
  packed = packing.pack(variables(name), codebooks(name, bits))
  return Shipped(packed, describe(about, "toy"))


def save(folder, model):
  """Writes a model as safetensors and returns the file."""
  path = folder / f"{model.about.model}_{model.about.bits}.safetensors"
  packing.save(path, model.packed, model.about.metadata)
  return path


@functools.cache
def images(number=5):
  rng = np.random.default_rng(0)
  return rng.integers(0, 17, (number, *SHAPE), dtype=np.uint8)


def logits(model, x):
  """Returns what the network says of images with the model's unpacked weights."""
  return np.asarray(forward(model.about.model)(packing.unpack(model.packed), x))
