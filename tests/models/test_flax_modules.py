"""Modules of one's own: what they draw, how they are told that they train, what is quantised."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from qupeD_jax import models
from qupeD_jax.checks import BadInput
from qupeD_jax.federation.batches import train_pass
from qupeD_jax.federation.clients import LocalWork, local_round, over_clients
from qupeD_jax.types import Dataset
from tests import toy
from tests.flat import fedavg

SHAPE = (2, 2, 1)
WIDTH = 32


class Dropping(nn.Module):
  """Logits that are 0 where they were dropped, and twice the bias elsewhere."""

  @nn.compact
  def __call__(self, x, train):
    ones = nn.Dense(WIDTH, name="head", bias_init=nn.initializers.ones)(x.reshape(len(x), -1))
    return nn.Dropout(0.5, deterministic=not train)(ones)


class DroppingNnx(nnx.Module):
  """The same of nnx."""

  def __init__(self, rngs):
    self.head = nnx.Linear(4, WIDTH, bias_init=nnx.initializers.ones, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.drop(self.head(x.reshape(len(x), -1)))


DROPPING = {
  "linen": lambda: models.from_linen(Dropping(), SHAPE),
  "nnx": lambda: models.from_nnx(DroppingNnx, SHAPE),
}
X = jnp.zeros((1, *SHAPE))


@pytest.mark.parametrize("kind", DROPPING)
def test_what_is_dropped_differs_by_client_round_and_step_and_nothing_is_in_scoring(kind):
  model, rows = DROPPING[kind](), 4
  variables = model.init(jax.random.key(0))
  assert model.draws
  logits, _ = model.apply(variables, X, False)
  np.testing.assert_allclose(logits, 1, atol=1e-6)
  data = Dataset(jnp.zeros((rows, *SHAPE)), jnp.zeros(rows, jnp.int32))
  group = toy.cohort((0, 1), (32, 32), rows)
  group = group._replace(index=np.zeros_like(group.index))

  def step_fn(carry, step, batch):
    found, taken = carry
    again = [train_pass(model, variables, batch)[0][0] for _ in range(2)]
    return (found.at[taken].set(jnp.stack(again)), taken + 1), jnp.float32(0)

  def run(key, carry, rows):
    carry, loss = local_round(step_fn, data, 0, LocalWork(steps=2, batch_size=1))(key, carry, rows)
    return carry, (), loss

  @jax.jit
  def one_round(key):
    start = jnp.zeros((2, 2, 2, WIDTH)), jnp.zeros(2, jnp.int32)
    return over_clients((run,), key, (group,), (start,))[0][0][0]

  found = np.stack(
    [one_round(jax.random.key(i)) for i in (0, 1)]
  )  # [round, client, step, 2, WIDTH]
  np.testing.assert_array_equal(found[..., 0, :], found[..., 1, :])  # passes of one step
  assert set(np.round(found, 5).ravel()) == {0, 2}
  patterns = found[..., 0, :].reshape(8, WIDTH)
  assert len(np.unique(patterns, axis=0)) == 8


def test_a_network_with_dropout_trains():
  algorithm = fedavg(
    models.from_linen(Dropping(), toy.IMAGE), rate=0.1, local_steps=3, batch_size=4
  )
  groups, data = (toy.cohort(range(2), (32, 32)),), jax.tree.map(jnp.asarray, toy.dataset(24))
  state, one_round = algorithm.init(jax.random.key(0), data, groups), jax.jit(algorithm.round)
  losses = []
  for r in range(10):
    state, (info,) = one_round(jax.random.key(r), state, data, groups)
    losses.append(np.mean(info.loss))
  assert losses[-1] < losses[0] - 0.5, losses


# --- how a module is told that it trains


class Untold(nn.Module):
  """Takes the images alone, and has the given layers after its own."""

  then: tuple = ()

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="head")(x.reshape(len(x), -1))
    for layer in self.then:
      x = layer(x)
    return x


class Deterministic(nn.Module):
  """Takes flax's other name of the argument."""

  @nn.compact
  def __call__(self, x, deterministic):
    x = nn.Dense(4, name="head", bias_init=nn.initializers.ones)(x.reshape(len(x), -1))
    return nn.Dropout(0.5)(x, deterministic=deterministic)


def test_a_module_without_train_works_where_its_layers_do_not_ask():
  model = models.from_linen(Untold(), SHAPE)
  assert not model.draws
  variables = model.init(jax.random.key(0))
  for train in (False, True):
    assert model.apply(variables, X, train)[0].shape == (1, 4)


def test_deterministic_is_another_word_for_it():
  model = models.from_linen(Deterministic(), SHAPE)
  variables = model.init(jax.random.key(0))
  np.testing.assert_allclose(model.apply(variables, X, False)[0], 1)
  assert set(np.ravel(model.apply(variables, X, True, None, jax.random.key(3))[0])) <= {0, 2}


@pytest.mark.parametrize(
  "layer",
  [
    nn.Dropout(0.5),
    nn.Dropout(0.5, deterministic=False),
    nn.BatchNorm(),
    nn.BatchNorm(use_running_average=False),
  ],
  ids=["dropout", "dropout always", "norm", "norm always"],
)
def test_a_module_that_cannot_be_told_is_refused_in_one_line(layer):
  with pytest.raises(BadInput) as refused:
    models.from_linen(Untold((layer,)), SHAPE)
  wants = r"module Untold: its __call__ needs an argument `train`, or `deterministic`, .*"
  assert re.fullmatch(wants, str(refused.value))


class Caching(nnx.Module):
  def __init__(self, rngs):
    self.seen = nnx.Cache(jnp.zeros(3))


def test_other_variables_of_nnx_are_refused_by_name():
  with pytest.raises(BadInput, match=r"^module Caching: keeps Cache: allowed is Param, BatchStat"):
    models.from_nnx(Caching, SHAPE)


# --- what will be quantised


class Unnamed(nn.Module):
  """Layers as flax calls them, but for those that are given."""

  names: tuple

  @nn.compact
  def __call__(self, x):
    for name in self.names:
      x = nn.Dense(3, name=name)(x.reshape(len(x), -1))
    return x


@pytest.mark.parametrize(
  ("names", "lacking", "quantised"),
  [
    ((None, None), "stem or head", "Dense_0, Dense_1"),
    ((None, "head"), "stem", "Dense_0"),
    (("stem", None), "head", "Dense_0"),
  ],
)
def test_who_names_no_first_or_last_layer_is_told_what_will_be_quantised(names, lacking, quantised):
  line = f"^module Unnamed: quantised will be {quantised}: no layer is called {lacking}, as those"
  with pytest.warns(UserWarning, match=line) as told:
    models.from_linen(Unnamed(names), SHAPE)
  assert told[0].filename == __file__


def test_who_names_them_is_told_nothing():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    models.from_linen(Unnamed(("stem", None, "head")), SHAPE)
    models.from_linen(Unnamed(("head",)), SHAPE)  # nothing is quantised
