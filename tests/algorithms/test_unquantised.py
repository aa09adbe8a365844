"""Batch statistics are those of the model they are with: of x, of Q(x), of the server's w."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qupeD_jax import models
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.quantization import ops, quantizers
from tests import toy
from tests.flat import finetune, local, pfedme, quped, qupel


class Normalised(nn.Module):
  """A quantised layer whose outputs are normalised."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(5, use_bias=False, name="dense_1")(x.reshape(x.shape[0], -1))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
    return nn.Dense(toy.CLASSES, name="head")(x)


MODEL = models.from_linen(Normalised(), toy.IMAGE)
QUANTIZER = quantizers.learned_codebook(max_bits=1)
STILL = Rates(1e-30, 1e-30, 0.0)  # nothing moves, so that statistics are known
STEPS = {"work": LocalWork(steps=4, batch_size=12)}  # all rows of a client, in some order
KEY = jax.random.key(3)
DATA = jax.tree.map(jnp.asarray, toy.dataset(36))
GROUP = (toy.cohort((0, 1, 2), (1, 1, 32)),)


def after_a_round(algorithm, groups=GROUP):
  state = algorithm.init(KEY, DATA, groups)
  return jax.jit(algorithm.round)(KEY, state, DATA, groups)[0]


def expected_mean(params, who, passes):
  """The running mean after so many passes from 0, in numpy."""
  x = np.asarray(DATA.x, np.float64)[12 * who : 12 * who + 12].reshape(12, -1) / 255
  return (1 - 0.9**passes) * (x @ np.asarray(params["dense_1"]["kernel"], np.float64)).mean(axis=0)


def mean_of(stats, who=slice(None)):
  return np.asarray(stats["batch_stats"]["norm"]["mean"])[who]


def assert_own_statistics(variables, who, passes):
  params = jax.tree.map(lambda leaf: leaf[who], variables["params"])
  expected = expected_mean(params, who, passes)
  np.testing.assert_allclose(mean_of(variables["stats"], who), expected, rtol=1e-4, atol=1e-5)


ALGORITHMS = {
  "local": lambda: local((MODEL,), QUANTIZER, rates=STILL, **STEPS),
  "quped": lambda: quped(MODEL, (MODEL,), QUANTIZER, rates=STILL, global_rate=1e-30, **STEPS),
  "quped at once": lambda: quped(
    MODEL, (MODEL,), QUANTIZER, rates=STILL, global_rate=1e-30, simultaneous=True, **STEPS
  ),
  "qupel": lambda: qupel(MODEL, QUANTIZER, rates=STILL, global_rate=1e-30, **STEPS),
  "proxquant": lambda: local((MODEL,), quantizers.proxquant(max_bits=1), rates=STILL, **STEPS),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_x_and_what_is_shipped_have_statistics_of_their_own(name):
  algorithm = ALGORITHMS[name]()
  shown = algorithm.personalize(KEY, after_a_round(algorithm), DATA, GROUP)
  (unquantised,), (shipped,) = shown["unquantised"], shown["personal"]
  far = []
  for who in range(3):
    assert_own_statistics(unquantised.variables, who, passes=4)
    if name != "proxquant":  # its loss is taken at x alone
      assert_own_statistics(shipped.variables, who, passes=4)
    both = (mean_of(scored.variables["stats"], who) for scored in (unquantised, shipped))
    far.append(np.max(np.abs(np.subtract(*both))))
  assert name == "proxquant" or far[0] > 0.01 < far[1]


def test_w_of_qupel_has_statistics_of_its_own():
  state = after_a_round(ALGORITHMS["qupel"]())
  expected = np.mean([expected_mean(state.server["params"], i, passes=4) for i in range(3)], axis=0)
  np.testing.assert_allclose(mean_of(state.server["stats"]), expected, rtol=1e-4, atol=1e-5)


def test_w_of_pfedme_has_statistics_of_its_own():
  """One pass a step, however many its personal model takes."""
  algorithm = pfedme(MODEL, rate=1e-30, global_rate=1e-30, inner_steps=3, **STEPS)
  server = after_a_round(algorithm).server
  expected = np.mean([expected_mean(server["params"], i, passes=4) for i in range(3)], axis=0)
  np.testing.assert_allclose(mean_of(server["stats"]), expected, rtol=1e-4, atol=1e-5)


def test_fine_tuning_shows_x_as_it_was_before_it_was_hardened():
  algorithm = local((MODEL,), QUANTIZER, rates=Rates(0.1, 0.01, 0.01), **STEPS)
  trained = after_a_round(algorithm)
  tuning = finetune((MODEL,), QUANTIZER, trained, rate=0.1, centers_rate=0.1, **STEPS)
  state = after_a_round(tuning)
  shown = tuning.personalize(KEY, state, DATA, GROUP)
  (unquantised,), (shipped,) = shown["unquantised"], shown["personal"]
  (before,), (after,) = trained.clients, state.clients
  take = lambda tree, who: jax.tree.map(lambda leaf: leaf[who], tree)
  for who in (0, 1):
    chex.assert_trees_all_equal(take(unquantised.variables, who), take(before.variables, who))
    kernel = shipped.variables["params"]["dense_1"]["kernel"][who]
    assert (
      len(np.unique(kernel))
      == 2
      < len(np.unique(before.variables["params"]["dense_1"]["kernel"][who]))
    )
  chex.assert_trees_all_equal(take(unquantised.variables, 2), take(after.variables, 2))  # 32 bits


def test_x_is_not_shown_where_it_makes_no_passes_or_nothing_is_quantised():
  for quantizer in (quantizers.ste(max_bits=1, clip_weights=1.0), quantizers.full_precision()):
    algorithm = local((MODEL,), quantizer, rates=STILL, **STEPS)
    shown = algorithm.personalize(KEY, algorithm.init(KEY, DATA, GROUP), DATA, GROUP)
    assert set(shown) == {"personal"}


def test_codebooks_are_those_of_what_is_shipped():
  algorithm = ALGORITHMS["local"]()
  (shipped,) = algorithm.personalize(KEY, after_a_round(algorithm), DATA, GROUP)["personal"]
  for who in (0, 1):
    kernel = np.asarray(shipped.variables["params"]["dense_1"]["kernel"][who])
    assert set(kernel.ravel()) <= set(np.asarray(shipped.codebooks["dense_1/kernel"][who]))
  assert ops.is_quantised("dense_1/kernel")
