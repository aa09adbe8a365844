"""Special cases that equal a simpler method."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import rng
from qupeD_jax.checks import BadInput
from qupeD_jax.federation.aggregators import mean, weighted_mean
from qupeD_jax.quantization import quantizers
from qupeD_jax.wrappers.posttraining import with_post_training_quantisation
from qupeD_jax.wrappers.separate import separate
from tests import toy
from tests.algorithms.federations import (
  DATA,
  KEY,
  KMEANS,
  LOCAL,
  MODELS,
  QUANTIZER,
  QUPED,
  RATES,
  SERVER,
  STEPS,
  TOLERANCE,
  cohorts,
  make_local,
  make_quped,
)
from tests.flat import (
  apfl,
  ditto,
  fedavg,
  fedbn,
  fedprox,
  fedrep,
  finetune,
  fml,
  local,
  per_fedavg,
  pfedme,
  quped,
  qupel,
  scaffold,
)

EXACTLY = {"rtol": 1e-6, "atol": 1e-6}  # up to how XLA orders a few float32 sums
BOTH = {"rate": RATES.weights, "global_rate": 0.2, **STEPS}
ONE_ARCHITECTURE = (SERVER, SERVER)
FEDAVG = fedavg(SERVER, **STEPS)


def train(algorithm, groups, rounds=3, data=DATA):
  state = jax.jit(algorithm.init)(KEY, data, groups)
  one_round = jax.jit(algorithm.round)
  for r in range(rounds):
    state, _ = one_round(jax.random.fold_in(KEY, r), state, data, groups)
  return state


def variables_of(state):
  return tuple(personal.variables for personal in state.clients)


@functools.cache
def trained_alone(models=ONE_ARCHITECTURE, quantizer=None):
  """The clients' models after local training, at full precision unless a quantizer is given."""
  algorithm = local(models, quantizer or quantizers.full_precision(), rates=RATES, **STEPS)
  return variables_of(train(algorithm, cohorts()))


@functools.cache
def averaged(rate=BOTH["global_rate"]):
  return train(fedavg(SERVER, rate=rate, **STEPS), cohorts()).server


def spread(variables, group):
  """One model as every client of a cohort would have it."""
  return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(group.size), *leaf.shape)), variables)


def with_bits(bits):
  return tuple(c._replace(bits=np.full(4, bits, np.int32)) for c in cohorts())


def test_quped_without_distillation_is_local_training():
  alone = train(LOCAL, cohorts())
  together = train(make_quped(lambda_p=0.0), cohorts())
  chex.assert_trees_all_close(together.clients, alone.clients, **EXACTLY)
  start = SERVER.init(KEY)
  chex.assert_trees_all_close(together.server, start, rtol=1e-6, atol=1e-7)


def test_32_bits_of_a_codebook_equal_no_quantiser():
  with_codebook = train(QUPED, with_bits(32))
  without = train(
    quped(SERVER, MODELS, quantizers.full_precision(), rates=RATES, **STEPS), with_bits(32)
  )
  chex.assert_trees_all_close(with_codebook.server, without.server, **TOLERANCE)
  for a, b in zip(with_codebook.clients, without.clients, strict=True):
    chex.assert_trees_all_close(a.variables, b.variables, **TOLERANCE)


@pytest.mark.parametrize("bits", [1, 2, 32])
def test_mixed_bits_give_each_client_what_equal_bits_give_it(bits):
  """One round: the global model is the same then, whatever precisions the others have."""
  mixed = train(QUPED, cohorts(), rounds=1)
  equal = train(QUPED, with_bits(bits), rounds=1)
  for group, a, b in zip(cohorts(), mixed.clients, equal.clients, strict=True):
    for k in np.flatnonzero(group.bits == bits):
      ours, theirs = (jax.tree.map(lambda leaf, k=k: leaf[k], s) for s in (a, b))
      chex.assert_trees_all_close(ours, theirs, **TOLERANCE)


def test_local_clients_with_mixed_bits_train_as_with_equal_bits():
  mixed, equal = train(LOCAL, cohorts()), train(LOCAL, with_bits(2))
  for group, a, b in zip(cohorts(), mixed.clients, equal.clients, strict=True):
    for k in np.flatnonzero(group.bits == 2):
      ours, theirs = (jax.tree.map(lambda leaf, k=k: leaf[k], s) for s in (a, b))
      chex.assert_trees_all_close(ours, theirs, **TOLERANCE)


def test_fedprox_without_its_term_is_fedavg():
  a = train(FEDAVG, cohorts())
  b = train(fedprox(SERVER, mu=0.0, **STEPS), cohorts())
  chex.assert_trees_all_close(a, b, **EXACTLY)


def test_equal_amounts_of_data_weigh_equally():
  a = train(FEDAVG, cohorts())
  b = train(fedavg(SERVER, aggregate=mean(), **STEPS), cohorts())
  chex.assert_trees_all_close(a, b, **EXACTLY)


def test_local_training_goes_on_from_a_given_model():
  start = (MODELS[0].init(jax.random.key(1)), MODELS[1].init(jax.random.key(2)))
  algorithm = local(MODELS, QUANTIZER, rates=RATES, start=start, **STEPS)
  state = algorithm.init(KEY, DATA, cohorts())
  for variables, personal in zip(start, state.clients, strict=True):
    for k in range(4):
      chex.assert_trees_all_equal(jax.tree.map(lambda a, k=k: a[k], personal.variables), variables)


def test_fine_tuning_moves_only_centers_and_what_is_not_quantised():
  trained = train(QUPED, cohorts())
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
    for module in before.variables["params"].keys() - {"dense_1"}:
      params = (c.variables["params"][module] for c in (before, after))
      for old, new in zip(*map(jax.tree.leaves, params), strict=True):
        assert np.all(np.any(old != new, axis=tuple(range(1, old.ndim))))
  chex.assert_trees_all_equal(state.server, trained.server)


# --- QuPeD's options

ALL_CLASSES = DATA._replace(y=jnp.arange(len(DATA.y)) % toy.CLASSES)  # every client has them all


@functools.cache
def default_quped():
  return train(QUPED, cohorts(), data=ALL_CLASSES)


def test_quped_and_qupel_untied_at_full_precision_are_local_training():
  quantizer = quantizers.full_precision()
  tied_to_none = (
    quped(SERVER, ONE_ARCHITECTURE, quantizer, lambda_p=0.0, rates=RATES, **STEPS),
    qupel(SERVER, quantizer, penalty=0.0, rates=RATES, **STEPS),
  )
  for algorithm in tied_to_none:
    variables = variables_of(train(algorithm, with_bits(32)))
    chex.assert_trees_all_close(variables, trained_alone(), **EXACTLY)


def test_options_at_their_neutral_values_change_nothing():
  neutral = {"global_temperature": 1.0, "straight_through": jnp.float32(0), "own_classes": True}
  other = train(make_quped(**neutral), cohorts(), data=ALL_CLASSES)
  chex.assert_trees_all_close(other, default_quped(), **EXACTLY)


def test_qupel_untied_is_algorithm_1_and_leaves_its_server_alone():
  state = train(qupel(SERVER, QUANTIZER, penalty=0.0, rates=RATES, **STEPS), cohorts())
  alone = train(local(ONE_ARCHITECTURE, QUANTIZER, rates=RATES, **STEPS), cohorts())
  chex.assert_trees_all_close(state.clients, alone.clients, **EXACTLY)
  chex.assert_trees_all_close(state.server, SERVER.init(KEY), **EXACTLY)


# --- rivals


@pytest.mark.parametrize("penalty", [1e6, jnp.float32(jnp.inf)], ids=["huge", "infinite"])
def test_ditto_held_tightly_is_what_the_server_sent(penalty):
  algorithm = ditto(SERVER, penalty=penalty, **BOTH)
  sent = train(algorithm, cohorts(), rounds=2).server
  for group, personal in zip(cohorts(), train(algorithm, cohorts()).clients, strict=True):
    # The pull leaves 1 / (1 + rate penalty) of a step.
    chex.assert_trees_all_close(personal, spread(sent, group), rtol=0, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_dittos_server_is_fedavg(penalty):
  state = train(ditto(SERVER, penalty=penalty, **BOTH), cohorts())
  chex.assert_trees_all_close(state.server, averaged(), **EXACTLY)
  if not penalty:
    chex.assert_trees_all_close(state.clients, trained_alone(), **EXACTLY)


def test_pfedme_held_tightly_is_what_the_server_sent():
  """The step of w is turned down as the pull is turned up, so that w ends up at theta."""
  options = {**BOTH, "penalty": 1e6, "global_rate": 1e-6}
  state = train(pfedme(SERVER, **options), cohorts())
  for group, personal in zip(cohorts(), state.clients, strict=True):
    chex.assert_trees_all_close(personal, spread(SERVER.init(KEY), group), rtol=0, atol=1e-4)
    chex.assert_trees_all_close(personal, spread(state.server, group), rtol=0, atol=1e-5)


def test_pfedme_held_tightly_moves_its_server_as_fedavg_does():
  """penalty (w - theta) tends to the gradient at w: here up to 1 / penalty, and rounding."""
  model = toy.linear()
  held = train(pfedme(model, penalty=1e3, **BOTH), cohorts()).server
  free = train(fedavg(model, rate=BOTH["global_rate"], **STEPS), cohorts()).server
  moved = lambda server: jax.tree.map(np.subtract, server, model.init(KEY))
  chex.assert_trees_all_close(moved(held), moved(free), rtol=0.01, atol=1e-3)


def test_per_fedavg_without_an_inner_step_is_fedavg():
  algorithm = per_fedavg(SERVER, inner_rate=0.0, rate=0.2, **STEPS)
  state = train(algorithm, cohorts())
  chex.assert_trees_all_equal(state.server, averaged(0.2))
  shown = algorithm.personalize(KEY, state, DATA, cohorts())["personal"]
  for group, scored in zip(cohorts(), shown, strict=True):
    chex.assert_trees_all_equal(scored.variables, spread(state.server, group))


@pytest.mark.parametrize("global_lambda_p", [0.0, 0.5])
def test_fml_whose_clients_do_not_listen_is_local_training(global_lambda_p):
  options = {"lambda_p": 0.0, "global_lambda_p": global_lambda_p, **BOTH}
  state = train(fml(SERVER, MODELS, **options), cohorts())
  chex.assert_trees_all_close(state.clients, trained_alone(MODELS), **EXACTLY)
  if not global_lambda_p:
    chex.assert_trees_all_close(state.server, averaged(), **EXACTLY)


def test_fedrep_that_is_all_body_is_fedavg_and_all_head_local_training():
  """What belongs to the head is told by path."""
  options = {"rate": 0.2, "head_rate": RATES.weights, "aggregate": weighted_mean(), **STEPS}
  all_body = fedrep(SERVER, is_head=lambda path: False, head_steps=0, **options)
  all_head = fedrep(SERVER, is_head=lambda path: True, head_steps=STEPS["work"].steps, **options)
  for algorithm, expected in ((all_body, [averaged(0.2)] * 2), (all_head, trained_alone())):
    state = train(algorithm, cohorts())
    shown = algorithm.personalize(KEY, state, DATA, cohorts())["personal"]
    for group, scored, variables in zip(cohorts(), shown, expected, strict=True):
      variables = spread(variables, group) if algorithm is all_body else variables
      chex.assert_trees_all_close(scored.variables, variables, **EXACTLY)


def test_fedrep_wants_a_head():
  headless = fedrep(SERVER, is_head=lambda path: False, **STEPS)
  with pytest.raises(BadInput, match=r"^head_steps 1: allowed is 0 where no parameter is the head"):
    headless.init(KEY, DATA, cohorts())


def test_fedbn_without_norms_is_fedavg():
  algorithm = fedbn(SERVER, rate=0.2, aggregate=weighted_mean(), **STEPS)
  shown = algorithm.personalize(KEY, train(algorithm, cohorts()), DATA, cohorts())["personal"]
  for group, scored in zip(cohorts(), shown, strict=True):
    chex.assert_trees_all_close(scored.variables, spread(averaged(), group), **EXACTLY)


def test_scaffolds_first_round_is_fedavg_and_a_client_alone_has_nothing_to_correct():
  algorithm = scaffold(SERVER, rate=0.2, **STEPS)
  first = train(algorithm, cohorts(), rounds=1).server["model"]
  expected = train(fedavg(SERVER, rate=0.2, **STEPS), cohorts(), rounds=1).server
  chex.assert_trees_all_close(first, expected, **EXACTLY)
  alone = (toy.cohort([3], [32]),)
  expected = train(fedavg(SERVER, rate=0.2, **STEPS), alone).server
  chex.assert_trees_all_close(train(algorithm, alone).server["model"], expected, **EXACTLY)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_apfl_that_mixes_nothing_is_fedavg_or_local_training(alpha):
  algorithm = apfl(SERVER, alpha=alpha, **BOTH)
  state = train(algorithm, cohorts())
  shown = algorithm.personalize(KEY, state, DATA, cohorts())["personal"]
  chex.assert_trees_all_close(state.server, averaged(), **EXACTLY)
  alone = trained_alone() if alpha else [spread(averaged(), group) for group in cohorts()]
  for scored, expected in zip(shown, alone, strict=True):
    chex.assert_trees_all_close(scored.variables, expected, **EXACTLY)


def test_post_training_quantisation_at_32_bits_changes_nothing():
  algorithm = with_post_training_quantisation(make_local(quantizers.full_precision()), KMEANS)
  groups = with_bits(32)
  shown = algorithm.personalize(KEY, train(algorithm, groups), DATA, groups)
  for before, after in zip(shown["unquantised"], shown["personal"], strict=True):
    chex.assert_trees_all_equal(before.variables, after.variables)


def test_separate_federations_are_those_run_one_by_one():
  both = train(separate(tuple(fedavg(model, **STEPS) for model in MODELS)), cohorts())
  for i, (model, group, variables) in enumerate(zip(MODELS, cohorts(), both.server, strict=True)):
    algorithm = fedavg(model, **STEPS)
    own_key = lambda key, i=i: rng.stream(key, "federations", i)
    one_round = lambda key, *rest, of=algorithm, own=own_key: of.round(own(key), *rest)
    alone = train(algorithm._replace(round=one_round), (group,))
    chex.assert_trees_all_close(variables, alone.server, **TOLERANCE)
