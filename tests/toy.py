"""Small federations that train in milliseconds, for the tests of algorithms and engine."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qupeD_jax import models
from qupeD_jax.types import Cohort, Dataset, Model

IMAGE = (2, 3, 1)
CLASSES = 4


def linear() -> Model:
  """A quantised kernel and an exempt bias: the smallest model QuPeD has something to do with."""

  def init(key):
    kernel = jax.random.normal(key, (6, CLASSES)) * 0.5
    return {
      "params": {"dense_1": {"kernel": kernel}, "head": {"bias": jnp.zeros(CLASSES)}},
      "stats": {},
    }

  def apply(variables, x, train, mask=None):
    del train, mask
    params = variables["params"]
    rows = x.reshape(len(x), -1) / 64.0
    return rows @ params["dense_1"]["kernel"] + params["head"]["bias"], {}

  return Model(init, apply)


def mlp(width: int) -> Model:
  """Three dense layers: the first and the last exempt, the one between quantised."""
  sizes = {"stem": (6, width), "dense_1": (width, width), "head": (width, CLASSES)}

  def init(key):
    keys = dict(zip(sizes, jax.random.split(key, len(sizes)), strict=True))
    layer = lambda name, size: {
      "kernel": jax.random.normal(keys[name], size) / np.sqrt(size[0]),
      "bias": jnp.zeros(size[1]),
    }
    return {"params": {name: layer(name, size) for name, size in sizes.items()}, "stats": {}}

  def apply(variables, x, train, mask=None):
    del train, mask
    y = x.reshape(len(x), -1) / 64.0
    for name in sizes:
      layer = variables["params"][name]
      y = y @ layer["kernel"] + layer["bias"]
      y = y if name == "head" else jax.nn.relu(y)
    return y, {}

  return Model(init, apply)


class Normalised(nn.Module):
  """A quantised layer, what goes in and what comes out normalised by their batch, and a head."""

  @nn.compact
  def __call__(self, x, train):
    norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
    x = nn.Dense(5, name="dense_1")(norm("norm_0")(x).reshape(len(x), -1))
    x = norm("norm_1")(x)
    return nn.Dense(CLASSES, name="head")(jnp.tanh(x))


def normalised() -> Model:
  """A model with batch statistics."""
  return models.from_linen(Normalised(), IMAGE)


def dataset(num_rows: int = 96, seed: int = 0) -> Dataset:
  """Images whose class can be learned from their pixels."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, CLASSES, num_rows).astype(np.int32)
  means = rng.uniform(0, 255, (CLASSES, *IMAGE))
  x = np.clip(means[y] + rng.normal(0, 40, (num_rows, *IMAGE)), 0, 255).astype(np.uint8)
  return Dataset(x, y)


def cohort(clients, bits, rows_per_client: int = 12, padding: int = 0) -> Cohort:
  """Clients that hold consecutive rows of `dataset`: client i from row i * rows_per_client on."""
  clients = np.asarray(clients, np.int32)
  index = clients[:, None] * rows_per_client + np.arange(rows_per_client)
  index = np.pad(index, ((0, 0), (0, padding)), mode="edge").astype(np.int32)
  size = np.full(len(clients), rows_per_client, np.int32)
  return Cohort(index, size, clients, np.asarray(bits, np.int32))
