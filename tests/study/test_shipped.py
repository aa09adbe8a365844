"""What is written is what was scored, however a method makes its personal models."""

import functools

import jax
import numpy as np
import pytest

from qupeD_jax.io import packing
from qupeD_jax.study import methods, rivals, study, training
from qupeD_jax.study.options import Options, replaced

OPTIONS = replaced(
  Options(),
  models=("mlp2", "mlp"), clients=5, bits=(2, 32), rounds=2, finetune_rounds=1, local_steps=2,
  batch_size=4, seeds=2, eval_every=1,
)  # fmt: skip


@functools.cache
def federation(models=OPTIONS.networks.models):
  return study.fed.load(replaced(OPTIONS, models=models))


JOBS = {
  "FedAvg + k-means": functools.partial(methods.averaging_then_local, bits=(2,)),
  "QuPeD": functools.partial(methods.quped_quantised, bits=(1,), mixed=True),
}


def accuracy_of_file(path, clients, dealt):
  """Scores a file on its client's test rows, by itself."""
  packed, metadata = packing.load(path)
  split, test = dealt.splits[0].test, dealt.test
  client = metadata["client"]
  rows = split.rows[split.offsets[client] : split.offsets[client + 1]]
  models = dict(zip(dealt.names, dealt.models, strict=True))
  logits, _ = models[metadata["model"]].apply(packing.unpack(packed), test.x[rows], False)
  clients[client] = np.mean(np.argmax(logits, -1) == test.y[rows])


@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("FedAvg + k-means", {}),
    (
      "FedAvg + k-means",
      {"store": "host", "participation": 0.5, "devices": 2, "models": ("mlp2",)},
    ),
    ("QuPeD", {"devices": 2, "finetune_rounds": 0}),
  ],
)
def test_files_score_as_the_models_did(name, values, tmp_path):
  options = replaced(OPTIONS, **values)
  dealt = federation(options.networks.models)
  job = JOBS[name](options, dealt)
  trained = training.train(job, lambda done, chunk: None, folder=tmp_path)
  scores = training.score_tests(job, trained)["personal"]
  study.save_models(job, trained, tmp_path)
  written = {path.name for path in (tmp_path / "models").iterdir()}
  quantised = [method for method in job.variants if "bit" in method or "mixed" in method]
  assert written == {method.replace(" ", "_") for method in quantised}
  for method in quantised:
    found = {}
    for path in (tmp_path / "models" / method.replace(" ", "_")).iterdir():
      accuracy_of_file(path, found, dealt)
    first = scores[training.runs_of([*job.variants].index(method), OPTIONS)][0]
    np.testing.assert_allclose([found[i] for i in range(5)], first, atol=1e-6)


def test_models_at_full_precision_are_written_where_there_is_one_client(tmp_path):
  """FedAvg's own as well, which its client shares with the server."""
  one = replaced(OPTIONS, clients=1, classes_per_client=10, models=("mlp2",), seeds=1)
  job = methods.federated_averaging(one, study.fed.load(one))
  trained = training.train(job, lambda done, chunk: None)
  study.save_models(job, trained, tmp_path)
  (path,) = tmp_path.rglob("*.safetensors")
  found = packing.unpack(packing.load(path)[0])["params"]
  for ours, theirs in zip(
    jax.tree.leaves(found), jax.tree.leaves(trained.state.server["params"]), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs[0])


def test_several_clients_at_full_precision_are_not(tmp_path):
  job = rivals.fedprox_job(OPTIONS, federation())
  study.save_models(job, None, tmp_path)
  assert not [*tmp_path.iterdir()]
