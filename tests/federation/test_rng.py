"""Random streams: purposes share no key, with each other or with a client."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import rng
from qupeD_jax.federation import aggregators
from qupeD_jax.wrappers.separate import separate
from tests import toy
from tests.flat import fedavg

KEY = jax.random.key(3)


def words(keys):
  """The two words of each key as one number."""
  data = np.asarray(jax.random.key_data(keys)).astype(np.uint64).reshape(-1, 2)
  return data[:, 0] << np.uint64(32) | data[:, 1]


def test_tags_are_as_they_were():
  """A tag that changes, or two that are one, would change the numbers of every run."""
  assert rng.TAGS == {
    "phases": 386492901, "initialise": 164582859, "rounds": 981456212, "evaluate": 2391018120,
    "corruption": 2248887921, "federations": 4269167901, "clients": 13119092, "sampling":
    970651846, "dropout": 2458513353, "stragglers": 1158020021, "steps": 874646130,
    "statistics": 3805514530, "aggregate": 3078179327, "spoil": 2699017246, "noise": 4255749673,
    "batches": 4033766739, "rows": 176944289, "augment": 3944118809,
    "layers": 3867733328,
  }  # fmt: skip
  assert len(set(rng.TAGS.values())) == len(rng.TAGS)


def test_no_purpose_shares_a_key_with_a_client_or_another():
  """The ids at which tags were once folded in among them."""
  once = [49211, 23101, 20751, 53769, 0x51B0, 0x5B01, 0xA06]
  ids = jnp.concatenate([jnp.arange(70_000), jnp.array([*once, *rng.TAGS.values()], jnp.uint32)])
  ids = jnp.unique(ids.astype(jnp.uint32))
  found = [words(rng.client_keys(KEY, purpose, ids)) for purpose in ("clients", "sampling")]
  found += [words(rng.stream(KEY, purpose)) for purpose in rng.TAGS]
  found += [words(KEY), words(jax.random.split(KEY, 64))]
  assert len(np.unique(np.concatenate(found))) == sum(map(len, found))


def test_a_clients_key_is_its_own_number_of_the_stream():
  keys = words(rng.client_keys(KEY, "dropout", jnp.array([7, 2])))
  expected = [words(rng.stream(KEY, "dropout", i))[0] for i in (7, 2)]
  np.testing.assert_array_equal(keys, expected)


def test_an_unknown_purpose_is_an_error():
  with pytest.raises(KeyError):
    rng.stream(KEY, "anything")


def test_derived_seeds_differ_by_secret_and_name():
  names = itertools.product((0, 1), ("FedAvg", "FedAvg, noise 3"), (0, 1))
  assert len({tuple(rng.derived_seed(*name)) for name in names}) == 8
  np.testing.assert_array_equal(rng.derived_seed(5, "a", 2), rng.derived_seed(5, "a", 2))
  assert rng.secret() != rng.secret()


def test_servers_of_separate_federations_draw_independent_noise():
  """Nobody moves, so that what servers get is their noise: as far apart as two draws are."""
  model = toy.mlp(24)
  noisy = aggregators.clipped_mean(1.0, 2.0)
  alone = fedavg(model, rate=1e-30, local_steps=1, batch_size=2, aggregate=noisy)
  algorithm, data = separate((alone, alone)), jax.tree.map(jnp.asarray, toy.dataset(48))
  groups = (toy.cohort((0, 1), [32, 32]), toy.cohort((2, 3), [32, 32]))

  @jax.jit
  def noise(key):
    state = algorithm.init(KEY, data, groups)
    after, _ = algorithm.round(key, state, data, groups)
    moved = jax.tree.map(jnp.subtract, after.server, state.server)
    return [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(of)]) for of in moved]

  one, other = noise(KEY)
  np.testing.assert_allclose([np.std(one), np.std(other)], 1.0, rtol=0.1)  # z S / n
  np.testing.assert_allclose(np.std(one - other), 2**0.5, rtol=0.1)
  assert not np.allclose(one, noise(rng.stream(KEY, "rounds", 1))[0])
