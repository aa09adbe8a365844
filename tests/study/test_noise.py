"""Keys of runs with noise: secret, another for every run and at every start."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest

from qupeD_jax.study import faults, jobs, methods, study, training
from qupeD_jax.study.options import Options, replaced

OPTIONS = replaced(
  Options(),
  models=("mlp2",), clients=3, classes_per_client=10, rounds=1, finetune_rounds=0, local_steps=1,
  batch_size=2, seeds=2, aggregate="clipped_mean", noise_multiplier=1.0,
)  # fmt: skip
LEVELS = {"a little": {"noise_multiplier": 1.0}, "more": {"noise_multiplier": 3.0}}


@functools.cache
def federation():
  return study.fed.load(OPTIONS)


def keys(make=methods.federated_averaging, **values):
  job = make(replaced(OPTIONS, **values), federation())
  return [tuple(words) for words in jax.random.key_data(training._keys(job)).tolist()]


def test_no_two_runs_share_a_key_nor_does_a_run_that_goes_on():
  several = jobs.changed(methods.federated_averaging, LEVELS)
  quped = functools.partial(methods.quped_quantised, bits=(2, 1))
  found = [*keys(several), *keys(several), *keys(quped), *keys(quped)]
  assert len(set(found)) == len(found) == 16


def test_a_known_seed_gives_known_keys_of_which_no_two_are_the_same():
  several = jobs.changed(methods.federated_averaging, LEVELS)
  found = keys(several, noise_seed=3)
  assert found == keys(several, noise_seed=3)
  assert len(set(found + keys(noise_seed=3) + keys(several, noise_seed=4))) == 10


@pytest.mark.parametrize("quiet", [{"noise_multiplier": 0.0}, {"aggregate": "mean"}])
def test_without_noise_keys_follow_the_seeds(quiet):
  expected = [tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1)]
  assert keys(**quiet) == keys(**quiet, noise_seed=3) == expected


def test_a_level_of_noise_among_variants_makes_all_keys_secret():
  several = jobs.changed(methods.federated_averaging, {"none": {"noise_multiplier": 0.0}, **LEVELS})
  assert not set(keys(several, noise_multiplier=0.0)) & set(keys(noise_multiplier=0.0))


def test_trained_again_the_noise_is_other_noise_unless_its_seed_is_given():
  def trained(**values):
    job = methods.federated_averaging(replaced(OPTIONS, **values), federation())
    state = training.train(job, lambda done, chunk: None).state
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state.server)])

  one, other, fixed, again = trained(), trained(), trained(noise_seed=1), trained(noise_seed=1)
  assert not np.allclose(one, other)
  np.testing.assert_array_equal(fixed, again)


def test_what_the_noise_is_worth_is_told_where_its_seed_is_secret():
  worth = lambda **values: faults.privacy_of(replaced(OPTIONS, **values), [3], rounds=1)
  assert worth()["epsilon"] > 0
  assert worth(noise_seed=0) is None


@pytest.mark.usefixtures("no_pictures")
def test_no_file_says_what_the_secret_is(tmp_path, monkeypatch):
  secret = 123456789123456789
  monkeypatch.setattr(training.rng, "secret", lambda: secret)
  make = functools.partial(methods.federated_averaging)
  folder, _ = study.run("noise", replaced(OPTIONS, out=str(tmp_path)), [make])
  assert json.loads((folder / "config.json").read_text())["config"]["noise_seed"] is None
  told = [str(secret), *map(str, itertools.chain(*keys()))]
  for path in (path for path in folder.rglob("*") if path.is_file()):
    assert not any(number.encode() in path.read_bytes() for number in told)
