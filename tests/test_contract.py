"""What every algorithm has to hold to: one suite runs them all."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import client, quantize
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.fedprox import fedprox
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import quped
from qupeD_jax.algorithms.sampling import with_sampling
from qupeD_jax.types import Cohort
from tests import toy

MODELS = (toy.mlp(5), toy.mlp(8))
SERVER = MODELS[1]
QUANTIZER = quantize.learned_codebook(max_bits=2)
RATES = client.Rates(0.1, 0.01, 0.01)
STEPS = {"local_steps": 3, "batch_size": 4}
KEY = jax.random.key(7)
DATA = jax.tree.map(jnp.asarray, toy.dataset(96))
BITS = {0: 1, 1: 2, 2: 32, 3: 2, 4: 1, 5: 2, 6: 32, 7: 1}
# The order of clients changes the order in which the server adds, and XLA may tile a product over
# fewer clients in another way: sums of a few float32 terms of size 1, three rounds long.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def cohorts(first=(0, 1, 2, 3), second=(4, 5, 6, 7), padding=0):
  groups = (first, second)
  return tuple(toy.cohort(g, [BITS[i] for i in g], padding=padding) for g in groups)


def make_quped(**options):
  return quped(SERVER, MODELS, QUANTIZER, rates=RATES, **STEPS, **options)


def make_finetune():
  """Fine-tuning starts from a trained state, whose clients are those of the cohorts it is given."""
  algorithm = make_quped()

  def init(key, data, cohorts):
    return phase(algorithm.init(key, data, cohorts)).init(key, data, cohorts)

  def phase(trained):
    return finetune(MODELS, QUANTIZER, trained, server_model=SERVER, lambda_p=0.5, **STEPS)

  return phase(None)._replace(init=init)


ALGORITHMS = {
  "local": lambda: local(MODELS, QUANTIZER, rates=RATES, **STEPS),
  "local_full_precision": lambda: local(MODELS, quantize.none(), rates=RATES, **STEPS),
  "fedavg": lambda: fedavg(SERVER, **STEPS),
  "fedprox": lambda: fedprox(SERVER, mu=0.1, **STEPS),
  "quped": make_quped,
  "quped_full_precision": lambda: quped(SERVER, MODELS, quantize.none(), rates=RATES, **STEPS),
  "finetune": make_finetune,
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@functools.cache
def rounds_of(name, fraction=None):
  algorithm = ALGORITHMS[name]()
  if fraction is not None:
    algorithm = with_sampling(algorithm, fraction)
  return algorithm, jax.jit(algorithm.init), jax.jit(algorithm.round)


def train(name, groups, rounds=3, fraction=None):
  _, init, one_round = rounds_of(name, fraction)
  state = init(KEY, DATA, groups)
  for r in range(rounds):
    state, info = one_round(jax.random.fold_in(KEY, r), state, DATA, groups)
  return state, info


def by_id(groups, clients):
  """Client states by id, whatever slot they are in."""
  return {
    int(i): jax.tree.map(lambda leaf, k=k: leaf[k], states)
    for cohort, states in zip(groups, clients, strict=True)
    for k, i in enumerate(cohort.client)
    if i >= 0
  }


def assert_same_clients(groups, clients, other_groups, other_clients, **tolerance):
  ours, theirs = by_id(groups, clients), by_id(other_groups, other_clients)
  for i in ours.keys() & theirs.keys():
    chex.assert_trees_all_close(ours[i], theirs[i], **tolerance)


@every_algorithm
def test_a_round_keeps_structure_shapes_and_dtypes(name):
  algorithm, init, _ = rounds_of(name)
  state = init(KEY, DATA, cohorts())
  after, info = jax.eval_shape(algorithm.round, KEY, state, DATA, cohorts())
  chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda s: s, state))
  assert [i.loss.shape for i in info] == [(4,), (4,)]


@every_algorithm
def test_a_round_counts_and_reports_finite_losses(name):
  state, info = train(name, cohorts())
  assert state.round == 3
  assert all(np.all(np.isfinite(i.loss)) for i in info)


@every_algorithm
def test_training_lowers_the_loss(name):
  _, first = train(name, cohorts(), rounds=1)
  _, last = train(name, cohorts(), rounds=20)
  assert np.mean([i.loss for i in last]) < np.mean([i.loss for i in first])


@every_algorithm
def test_the_same_key_gives_the_same_bits(name):
  chex.assert_trees_all_equal(train(name, cohorts())[0], train(name, cohorts())[0])


@every_algorithm
def test_row_padding_changes_nothing(name):
  chex.assert_trees_all_equal(train(name, cohorts())[0], train(name, cohorts(padding=9))[0])


@every_algorithm
def test_client_order_changes_nothing(name):
  ours, theirs = cohorts(), cohorts((2, 0, 3, 1), (7, 6, 5, 4))
  a, b = train(name, ours)[0], train(name, theirs)[0]
  chex.assert_trees_all_close(a.server, b.server, **TOLERANCE)
  assert_same_clients(ours, a.clients, theirs, b.clients, **TOLERANCE)


def pad_clients(cohort, count):
  """Adds slots without rows."""
  pad = lambda leaf, value: np.concatenate([leaf, np.full((count, *leaf.shape[1:]), value)])
  return Cohort(pad(cohort.index, 0), pad(cohort.size, 0), pad(cohort.client, -1),
                pad(cohort.bits, 32))._replace()  # fmt: skip


@every_algorithm
def test_padding_clients_change_nothing(name):
  ours = cohorts()
  theirs = tuple(jax.tree.map(lambda a: a.astype(np.int32), pad_clients(c, 3)) for c in ours)
  a, b = train(name, ours)[0], train(name, theirs)[0]
  chex.assert_trees_all_close(a.server, b.server, **TOLERANCE)
  assert_same_clients(ours, a.clients, theirs, b.clients, **TOLERANCE)


@every_algorithm
def test_sharding_the_clients_changes_nothing(name):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("clients",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("clients"))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  _, init, one_round = rounds_of(name)
  groups = jax.device_put(cohorts(), split)
  data = jax.device_put(DATA, whole)
  state = init(KEY, data, groups)
  state = state._replace(
    server=jax.device_put(state.server, whole), clients=jax.device_put(state.clients, split)
  )
  for r in range(3):
    state, _ = one_round(jax.random.fold_in(KEY, r), state, data, groups)
  for leaf in jax.tree.leaves(state.clients):
    assert len(leaf.sharding.device_set) == 4
  expected = train(name, cohorts())[0]
  chex.assert_trees_all_close(jax.device_get(state), jax.device_get(expected), **TOLERANCE)


@every_algorithm
def test_clients_that_sit_out_keep_their_state_to_the_bit(name):
  groups = cohorts()
  _, init, one_round = rounds_of(name, fraction=0.5)
  state = init(KEY, DATA, groups)
  after, info = one_round(KEY, state, DATA, groups)
  took_part = {int(c) for i in info for c, size in zip(i.client, i.size, strict=True) if size}
  assert [len(i.client) for i in info] == [2, 2]
  assert len(took_part) == 4
  before, now = by_id(groups, state.clients), by_id(groups, after.clients)
  for i in before:
    if i not in took_part:
      chex.assert_trees_all_equal(before[i], now[i])
    elif jax.tree.leaves(before[i]):
      with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(before[i], now[i])


@every_algorithm
def test_full_participation_changes_nothing(name):
  groups = cohorts()
  a, b = train(name, groups)[0], train(name, groups, fraction=1.0)[0]
  chex.assert_trees_all_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("name", ["local", "quped"])
def test_sampling_ignores_order_and_padding(name):
  ours, theirs = cohorts(), cohorts((2, 0, 3, 1), (7, 6, 5, 4), padding=3)
  a, b = (train(name, groups, fraction=0.5)[0] for groups in (ours, theirs))
  assert_same_clients(ours, a.clients, theirs, b.clients, **TOLERANCE)


def test_local_clients_do_not_notice_each_other():
  all_of_them, few = cohorts(), cohorts((1, 3), (6,))
  a, b = train("local", all_of_them)[0], train("local", few)[0]
  assert_same_clients(all_of_them, a.clients, few, b.clients, **TOLERANCE)


@every_algorithm
def test_what_is_scored(name):
  algorithm, _, _ = rounds_of(name)
  state, _ = train(name, cohorts())
  shown = algorithm.personalize(KEY, state, DATA, cohorts())
  assert "personal" in shown
  for models in shown.values():
    assert len(models) == 2
    for scored in models:
      x = DATA.x[:4]
      if scored.stacked:
        logits, _ = jax.vmap(scored.model.apply, (0, None, None))(scored.variables, x, False)
        assert logits.shape == (4, 4, toy.CLASSES)
      else:
        assert scored.model.apply(scored.variables, x, False)[0].shape == (4, toy.CLASSES)
