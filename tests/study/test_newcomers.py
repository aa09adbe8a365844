"""Clients that took part in no round: who they are, what they start from, what is told of them."""

import functools
import json

import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.study import federation as fed
from qupeD_jax.study import methods, newcomers, study, training
from qupeD_jax.study.errors import Diverged
from qupeD_jax.study.options import Options, replaced

OPTIONS = replaced(
  Options(),
  models=("mlp2",), clients=6, new_clients=2, rounds=2, finetune_rounds=1, local_steps=5,
  batch_size=4, seeds=2, eval_every=2,
)  # fmt: skip


@functools.cache
def federation():
  return fed.load(OPTIONS)


@functools.cache
def trained(make):
  job = make(OPTIONS, federation())
  return job, training.train(job, lambda done, chunk: None)


@functools.cache
def scored_at(rate):
  job, left = trained(methods.federated_averaging)
  return newcomers.score(job._replace(options=replaced(OPTIONS, fedavg_finetune_rate=rate)), left)


def test_new_clients_are_the_last_and_in_no_group():
  np.testing.assert_array_equal(federation().new, [4, 5])
  np.testing.assert_array_equal(np.concatenate(federation().groups), [0, 1, 2, 3])
  assert federation().num_clients == 4


def test_they_start_from_the_servers_model():
  """At a rate of next to nothing they score as the server's model does on their rows."""
  _, left = trained(methods.federated_averaging)
  test, expected = federation().test, np.zeros((2, 2))
  for seed, split in enumerate(federation().splits):
    params = {k: np.asarray(v[seed]) for k, v in flat(left.state.server["params"]).items()}
    for i, client in enumerate((4, 5)):
      rows = split.test.rows[split.test.offsets[client] : split.test.offsets[client + 1]]
      x = (test.x[rows].reshape(len(rows), -1) - federation().mean) / federation().std
      for layer in ("stem", "dense_1", "head"):
        x = x @ params[f"{layer}/kernel"] + params[f"{layer}/bias"]
        x = x if layer == "head" else np.maximum(x, 0)
      expected[seed, i] = np.mean(np.argmax(x, -1) == test.y[rows])
  np.testing.assert_allclose(scored_at(1e-30), expected, atol=1e-6)


def flat(params):
  return {f"{layer}/{name}": leaf for layer, own in params.items() for name, leaf in own.items()}


def test_they_are_fine_tuned():
  assert scored_at(0.2).mean() > scored_at(1e-30).mean() + 0.1


def test_fine_tuning_that_diverges_names_the_method():
  with pytest.raises(Diverged, match=r"^FedAvg, seed 0: the loss of new clients is not finite"):
    scored_at(1e30)


@pytest.mark.usefixtures("no_pictures")
def test_what_is_told_of_them(tmp_path):
  options = replaced(OPTIONS, seeds=1, rounds=2, out=str(tmp_path))
  jobs = (methods.local_training, methods.federated_averaging)
  summary = study.run("newcomers", options, jobs).summary
  assert summary["local"]["new_clients"] is None
  assert 0 <= summary["FedAvg"]["new_clients"]["mean"] <= 1
  accuracies = json.loads((tmp_path / "accuracies.json").read_text())["methods"]
  assert np.shape(accuracies["FedAvg"]["accuracy"]) == (1, 4)
  head, _, alone, averaged = (tmp_path / "table.md").read_text().splitlines()
  last = lambda line: line.split("|")[-2].strip()
  assert [last(head), last(alone)] == ["New clients (%)", "-"]
  assert last(averaged) == f"{100 * summary['FedAvg']['new_clients']['mean']:.1f}"


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"new_clients": 0}, "new_clients 0: allowed is a whole number of at least 1"),
    ({"new_clients": 6}, "new_clients 6: allowed is below `clients` 6: some have to train"),
    ({"finetune_rounds": 0}, "new_clients 2: allowed is None with `finetune_rounds` 0: none would"),
    ({"store": "host", "participation": 0.5}, "new_clients 2: allowed is None with `store` host"),
    (
      {"models": ("mlp2", "mlp"), "bits": (1, 2, 4)},
      "new_clients 2: leaves 4 clients that train; allowed is at least 6, so that each of 2 models",
    ),
    ({"corrupt": 5}, "corrupt 5: allowed is at most 4, the `clients` that train"),
  ],
)
def test_numbers_that_make_no_sense_are_refused_in_one_line(values, message):
  with pytest.raises(BadInput) as refused:
    study.prepare(replaced(OPTIONS, **values), (methods.federated_averaging,))
  assert str(refused.value).startswith(message)
