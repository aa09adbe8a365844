"""Running statistics that stay with the client, beside those that the server averages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qupeD_jax import models
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.fml import fml
from qupeD_jax.checks import BadInput
from qupeD_jax.engine import evaluate
from qupeD_jax.federation import aggregators
from qupeD_jax.federation.batches import draw_rows
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.wrappers import own_statistics
from qupeD_jax.wrappers.own_statistics import with_own_statistics
from tests import toy


class Normalised(nn.Module):
  """A head on normalised pixels."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.reshape(x.shape[0], -1))
    return nn.Dense(toy.CLASSES, name="head")(x)


MODEL = models.from_linen(Normalised(), toy.IMAGE)
STEPS = {"work": LocalWork(steps=3, batch_size=4)}
DRAWN = {"num_batches": 5, "batch_size": 4}
KEY = jax.random.key(3)
DATA = jax.tree.map(jnp.asarray, toy.dataset(60))
IDS = ((0, 1, 2), (3, 4))


def cohorts(first=IDS[0], second=IDS[1], padding=0):
  return tuple(toy.cohort(ids, [32] * len(ids), padding=padding) for ids in (first, second))


@pytest.fixture(scope="module")
def state():
  algorithm = fedavg(MODEL, **STEPS)
  return jax.jit(algorithm.round)(KEY, algorithm.init(KEY, DATA, cohorts()), DATA, cohorts())[0]


def shown(state, groups, **options):
  algorithm = with_own_statistics(fedavg(MODEL, **STEPS), **DRAWN | options)
  show = lambda state: [
    s.variables for s in algorithm.personalize(KEY, state, DATA, groups)["personal"]
  ]
  return jax.jit(show)(state)


def by_id(groups, variables):
  return {
    int(i): jax.tree.map(lambda leaf, k=k: leaf[k], v["stats"])
    for cohort, v in zip(groups, variables, strict=True)
    for k, i in enumerate(cohort.client)
    if i >= 0
  }


def test_statistics_equal_those_of_a_loop_over_drawn_batches(state):
  """In numpy, from the rows that each client's own key draws."""
  drawn = []
  original = draw_rows

  def recorded(key, index, size, *counts):
    rows, mask = original(key, index, size, *counts)
    jax.debug.callback(lambda r: drawn.append(np.array(r)), rows)
    return rows, mask

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(own_statistics, "draw_rows", recorded)
    found = shown(state, cohorts())
    jax.effects_barrier()
  of_rows = {int(rows.min() // 12): rows for rows in drawn}  # client i holds rows from 12 i on
  assert sorted(of_rows) == [0, 1, 2, 3, 4]
  start = jax.device_get(state.server["stats"]["batch_stats"]["BatchNorm_0"])
  for i, stats in by_id(cohorts(), found).items():
    rows, (mean, var) = of_rows[i], (start["mean"], start["var"])
    assert rows.shape == (5, 4)
    assert set(rows.ravel()) == set(range(12 * i, 12 * i + 12))
    for batch in rows:
      x = np.asarray(DATA.x)[batch].reshape(4, -1) / 255
      mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    norm = stats["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(norm["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(norm["var"], var, rtol=1e-4, atol=1e-6)


def test_rows_that_only_fill_a_batch_up_do_not_count(state):
  """A client of 3 rows, and one of none beside it."""
  groups = (toy.cohort((0, 1), [32] * 2)._replace(size=np.int32([3, 0])),)
  algorithm = with_own_statistics(fedavg(MODEL, **STEPS), num_batches=1, batch_size=8)
  (found,) = algorithm.personalize(KEY, state._replace(clients=((),)), DATA, groups)["personal"]
  start, norm = (v["stats"]["batch_stats"]["BatchNorm_0"] for v in (state.server, found.variables))
  x = np.asarray(DATA.x)[:3].reshape(3, -1) / 255
  np.testing.assert_allclose(norm["mean"][0], 0.9 * start["mean"] + 0.1 * x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(norm["var"][0], 0.9 * start["var"] + 0.1 * x.var(0), rtol=1e-4)
  assert np.all(np.isfinite(norm["var"]))


def test_parameters_are_shared(state):
  for variables, group in zip(shown(state, cohorts()), cohorts(), strict=True):
    for k in range(len(group.size)):
      own = jax.tree.map(lambda leaf, k=k: leaf[k], variables["params"])
      chex.assert_trees_all_equal(own, state.server["params"])


def test_order_and_padding_change_nothing(state):
  ours = by_id(cohorts(), shown(state, cohorts()))
  moved = cohorts((2, 0, 1), (4, 3), padding=7)
  padded = tuple(jax.tree.map(pad, cohort) for cohort in moved)
  padded = tuple(c._replace(size=np.where(c.client < 0, 0, c.size)) for c in padded)
  theirs = by_id(padded, shown(state, padded))
  assert ours.keys() == theirs.keys()
  for i in ours:
    # float32: a batched sum over fewer clients may be taken in another order.
    chex.assert_trees_all_close(ours[i], theirs[i], rtol=1e-6)


def pad(leaf):
  """Adds two slots: of client -1, whose rows are of no account."""
  slots = np.full((2, *leaf.shape[1:]), -1 if leaf.ndim == 1 else 0, np.int32)
  return np.concatenate([leaf, slots])


def test_many_batches_forget_the_server(state):
  """Then means are those of the client's rows, each of which is drawn equally often."""
  for i, stats in by_id(cohorts(), shown(state, cohorts(), num_batches=150)).items():
    x = np.asarray(DATA.x)[12 * i : 12 * i + 12].reshape(12, -1) / 255
    found = stats["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(found, x.mean(0), atol=0.02)  # the last batches weigh more


def test_they_can_be_scored(state):
  algorithm = with_own_statistics(fedavg(MODEL, **STEPS), **DRAWN)
  score = lambda state: evaluate.accuracies(algorithm, KEY, state, DATA, cohorts(), DATA, cohorts())
  found = jax.jit(score)(state)
  assert [accuracy.shape for accuracy in found["personal"]] == [(3,), (2,)]
  chex.assert_trees_all_equal(found["personal"], found["global"])


def test_a_model_under_two_names_is_renewed_once(state):
  algorithm = with_own_statistics(fedavg(MODEL, **STEPS), **DRAWN)
  found = algorithm.personalize(KEY, state, DATA, cohorts())
  for personal, shared in zip(found["personal"], found["global"], strict=True):
    assert personal is shared
    assert personal.stacked


def test_models_of_the_clients_own_pass_unchanged():
  """FML's personal models have statistics of their own; its global one has not."""
  algorithm = fml(MODEL, (MODEL, MODEL), **STEPS)
  state = algorithm.init(KEY, DATA, cohorts())
  before = algorithm.personalize(KEY, state, DATA, cohorts())
  after = with_own_statistics(algorithm, **DRAWN).personalize(KEY, state, DATA, cohorts())
  for old, new in zip(before["personal"], after["personal"], strict=True):
    chex.assert_trees_all_equal(old.variables, new.variables)
  assert all(scored.stacked for scored in after["global"])


def test_models_without_statistics_pass_unchanged():
  algorithm = fedavg(toy.mlp(5), **STEPS)
  state = algorithm.init(KEY, DATA, cohorts())
  found = with_own_statistics(algorithm, **DRAWN).personalize(KEY, state, DATA, cohorts())
  for scored in found["personal"]:
    assert not scored.stacked
    assert scored.variables is state.server


def test_rounds_stay_as_they_were():
  algorithm = fedavg(MODEL, **STEPS)
  wrapped = with_own_statistics(algorithm)
  assert (wrapped.init, wrapped.round) == (algorithm.init, algorithm.round)


def test_without_it_the_server_averages_statistics_as_it_does_parameters():
  groups = cohorts()
  stats = [{"stats": {"var": jnp.arange(n, dtype=jnp.float32) + n}} for n in (3, 2)]
  before = {"stats": {"var": jnp.float32(0)}}
  mean, _ = aggregators.mean()(None, tuple(stats), groups, before)
  np.testing.assert_allclose(mean["stats"]["var"], (3 + 4 + 5 + 2 + 3) / 5, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_batches": 0}, "num_batches 0: allowed is a whole number of at least 1"),
    ({"batch_size": 1.5}, "batch_size 1.5: allowed is a whole number of at least 1"),
  ],
)
def test_bad_options_are_refused_in_one_line(options, message):
  with pytest.raises(BadInput) as raised:
    with_own_statistics(fedavg(MODEL), **options)
  assert str(raised.value) == message
