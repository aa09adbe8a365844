"""The front door: one run in one call equals the engine's, and its models come back from files."""

import jax
import numpy as np
import pytest

import qupeD_jax as qj
from qupeD_jax.checks import BadInput
from qupeD_jax.data.federation import scored

BITS, GROUPS = (2, 32), qj.data.assign_groups(4, 2, num_bits=2)


@pytest.fixture(scope="module")
def trained():
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 300).astype(np.int32)
  x = np.clip(rng.normal(60 * (1 + y[:, None, None]), 20, (300, 4, 4)), 0, 255).astype(np.uint8)
  train, test = qj.data.dataset(x[:200], y[:200]), qj.data.dataset(x[200:], y[200:])
  federation = qj.data.federate(train, test, clients=4, classes_per_client=2)
  models = tuple(qj.models.make(name, **federation.inputs) for name in ("mlp", "mlp2"))
  work = qj.LocalWork(steps=5, batch_size=8)
  algorithm = qj.quped(models[0], models, qj.learned_codebook(max_bits=2), work=work)
  told = []
  result = qj.run(
    algorithm, federation, rounds=5, bits=BITS, groups=GROUPS, eval_every=2, callback=told.append
  )
  return federation, result, told


def test_it_scores_every_client_and_tells_how_it_went(trained):
  _, result, told = trained
  assert result.accuracy["personal"].shape == result.accuracy["global"].shape == (4,)
  assert result.accuracy["personal"].mean() > 0.8
  assert [progress.round for progress in told] == [2, 4, 5]
  assert tuple(told) == result.history
  assert result.loss.shape == (5,)
  assert result.loss[-1] == told[-1].loss < result.loss[0]
  assert result.bits.tolist() == [2, 32, 2, 32]


def test_models_from_files_score_as_those_that_trained(trained, tmp_path):
  federation, result, _ = trained
  data, cohorts = scored(federation, "test", GROUPS)
  rows = {int(c): i[:n] for g in cohorts for c, i, n in zip(g.client, g.index, g.size, strict=True)}
  for client in range(4):
    own = result.personal(client)
    qj.save_model(tmp_path / "own.safetensors", own)
    back = qj.load_model(tmp_path / "own.safetensors")
    assert (back.client, back.bits) == (client, BITS[client % 2])
    jax.tree.map(np.testing.assert_array_equal, own.variables, back.variables)
    levels = len(np.unique(own.variables["params"].get("dense_1", {"kernel": 0})["kernel"]))
    assert own.bits == 32 or levels <= 4
    logits, _ = back.model.apply(back.variables, data.x[rows[client]], False)
    right = np.mean(np.argmax(logits, -1) == data.y[rows[client]])
    np.testing.assert_allclose(right, result.accuracy["personal"][client], rtol=1e-6)


def test_a_client_that_is_none_is_refused(trained):
  _, result, _ = trained
  with pytest.raises(BadInput, match="client 4: allowed is 0 to 3"):
    result.personal(4)


def test_a_network_of_ones_own_is_not_written_as_one_of_the_library(trained, tmp_path):
  _, result, _ = trained
  own = result.personal(0)
  with pytest.raises(BadInput, match=r"personal.model a network of one's own"):
    qj.save_model(tmp_path / "x", own._replace(model=own.model._replace(about=None)))
