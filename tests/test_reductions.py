"""Special cases that equal a simpler method."""

import chex
import jax
import numpy as np
import pytest

from qupeD_jax import quantize, server
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.fedprox import fedprox
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import quped
from tests.test_contract import (
  DATA,
  KEY,
  MODELS,
  QUANTIZER,
  RATES,
  SERVER,
  STEPS,
  TOLERANCE,
  cohorts,
  make_quped,
)


def train(algorithm, groups, rounds=3):
  state = jax.jit(algorithm.init)(KEY, DATA, groups)
  one_round = jax.jit(algorithm.round)
  for r in range(rounds):
    state, _ = one_round(jax.random.fold_in(KEY, r), state, DATA, groups)
  return state


def with_bits(bits):
  return tuple(c._replace(bits=np.full(4, bits, np.int32)) for c in cohorts())


def test_quped_without_distillation_is_local_training():
  alone = train(local(MODELS, QUANTIZER, rates=RATES, **STEPS), cohorts())
  together = train(make_quped(lambda_p=0.0), cohorts())
  chex.assert_trees_all_close(together.clients, alone.clients, rtol=1e-6, atol=1e-6)
  start = SERVER.init(KEY)
  chex.assert_trees_all_close(together.server, start, rtol=1e-6, atol=1e-7)


def test_32_bits_of_a_codebook_equal_no_quantiser():
  with_codebook = train(make_quped(), with_bits(32))
  without = train(quped(SERVER, MODELS, quantize.none(), rates=RATES, **STEPS), with_bits(32))
  chex.assert_trees_all_close(with_codebook.server, without.server, **TOLERANCE)
  for a, b in zip(with_codebook.clients, without.clients, strict=True):
    chex.assert_trees_all_close(a.variables, b.variables, **TOLERANCE)


@pytest.mark.parametrize("bits", [1, 2, 32])
def test_mixed_bits_give_each_client_what_equal_bits_give_it(bits):
  """One round: the global model is the same then, whatever precisions the others have."""
  mixed = train(make_quped(), cohorts(), rounds=1)
  equal = train(make_quped(), with_bits(bits), rounds=1)
  for group, a, b in zip(cohorts(), mixed.clients, equal.clients, strict=True):
    for k in np.flatnonzero(group.bits == bits):
      ours, theirs = (jax.tree.map(lambda leaf, k=k: leaf[k], s) for s in (a, b))
      chex.assert_trees_all_close(ours, theirs, **TOLERANCE)


def test_local_clients_with_mixed_bits_train_as_with_equal_bits():
  make = lambda: local(MODELS, QUANTIZER, rates=RATES, **STEPS)
  mixed, equal = train(make(), cohorts()), train(make(), with_bits(2))
  for group, a, b in zip(cohorts(), mixed.clients, equal.clients, strict=True):
    for k in np.flatnonzero(group.bits == 2):
      ours, theirs = (jax.tree.map(lambda leaf, k=k: leaf[k], s) for s in (a, b))
      chex.assert_trees_all_close(ours, theirs, **TOLERANCE)


def test_fedprox_without_its_term_is_fedavg():
  a = train(fedavg(SERVER, **STEPS), cohorts())
  b = train(fedprox(SERVER, mu=0.0, **STEPS), cohorts())
  chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-6)


def test_equal_amounts_of_data_weigh_equally():
  a = train(fedavg(SERVER, **STEPS), cohorts())
  b = train(fedavg(SERVER, weigh=server.uniform, **STEPS), cohorts())
  chex.assert_trees_all_close(a, b, rtol=1e-6, atol=1e-6)


def test_local_training_goes_on_from_a_given_model():
  start = (MODELS[0].init(jax.random.key(1)), MODELS[1].init(jax.random.key(2)))
  algorithm = local(MODELS, QUANTIZER, rates=RATES, start=start, **STEPS)
  state = algorithm.init(KEY, DATA, cohorts())
  for variables, personal in zip(start, state.clients, strict=True):
    for k in range(4):
      chex.assert_trees_all_equal(jax.tree.map(lambda a, k=k: a[k], personal.variables), variables)


def test_fine_tuning_moves_only_centers_and_what_is_not_quantised():
  trained = train(make_quped(), cohorts())
  phase = finetune(
    MODELS, QUANTIZER, trained, server_model=SERVER, lambda_p=0.3, centers_rate=0.01, **STEPS
  )
  state = train(phase, cohorts())
  for group, before, after in zip(cohorts(), trained.clients, state.clients, strict=True):
    for k in range(4):
      x, y = (np.asarray(c.variables["params"]["dense_1"]["kernel"][k]) for c in (before, after))
      old, new = (np.asarray(c.codebooks["dense_1/kernel"][k]) for c in (before, after))
      if group.bits[k] == 32:
        assert np.all(np.any(x != y, axis=1))
        continue
      assert np.any(old != new)
      codes = np.argmin(np.abs(x[..., None] - old[np.isfinite(old)]), axis=-1)
      np.testing.assert_array_equal(y, new[codes])
    for module in ("stem", "head"):
      moved = after.variables["params"][module]["kernel"]
      assert np.all(np.any(before.variables["params"][module]["kernel"] != moved, axis=(1, 2)))
  chex.assert_trees_all_equal(state.server, trained.server)
