"""On an accelerator, only networks multiply at the precision that is its default."""

import re

import jax
import jax.numpy as jnp
import pytest

from qupeD_jax.algorithms.quped import quped
from qupeD_jax.engine import loop, programs
from qupeD_jax.federation import aggregators, stationarity
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.quantization import quantizers
from qupeD_jax.types import Model
from tests import toy

BITS = 5  # as many centers as need products for their sums


def without_products() -> Model:
  """A linear network whose sums are no matrix products: what others there are is the library's."""
  plain = toy.linear()

  def apply(variables, x, train, mask=None):
    del train, mask
    rows, params = x.reshape(len(x), -1, 1) / 64.0, variables["params"]
    return jnp.sum(rows * params["dense_1"]["kernel"], axis=1) + params["head"]["bias"], {}

  return Model(plain.init, apply)


def products(fn, *arguments) -> list[str]:
  """Returns the matrix products of a function, as lowered for a GPU."""
  with jax.default_matmul_precision("default"):
    lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",))
  return re.findall(r"stablehlo\.(?:dot|convolution).*", lowered.as_text())


@pytest.mark.parametrize(
  ("sharpness", "combine"), [(None, aggregators.mean()), (5.0, aggregators.clipped_mean(1.0, 0.5))]
)
def test_training_and_scoring_multiply_at_full_precision(sharpness, combine):
  model, data = without_products(), jax.tree.map(jnp.asarray, toy.dataset())
  quantizer = quantizers.learned_codebook(max_bits=BITS, sharpness=sharpness)
  steps = {"work": LocalWork(2, 4), "aggregate": combine}
  build = lambda _: quped(model, (model,), quantizer, **steps)
  cohorts = (toy.cohort((0, 1), (BITS, 1)),)
  one = loop.Runs(jax.random.key(0), cohorts)
  state = jax.eval_shape(programs.initialise(build), one, data)
  measure = stationarity.of_clients((model,), quantizer, rates=Rates(), local_steps=2, num_rows=4)
  found = [
    *products(programs.train_chunk(build, 1), one, state, data, 1),
    *products(programs.score_run(build), one, state, data, data, cohorts),
    *products(measure, state, data, cohorts),
  ]
  assert found  # the server's mean and the sums per center, at the least
  assert [dot for dot in found if "precision = [HIGHEST, HIGHEST]" not in dot] == []
