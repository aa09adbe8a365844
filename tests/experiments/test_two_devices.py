"""Every kind of experiment, very small, on two devices, as any processor with two cores has them.

Of a study one job trains, another one in each; the suite of all algorithms is on two devices too.
"""

import importlib
import inspect

import numpy as np
import pytest

from experiments import ablations, faults
from qupeD_jax.engine import parallel
from qupeD_jax.results import metrics
from qupeD_jax.study import cli, study
from qupeD_jax.study.options import flat, replaced
from tests import untrained

SMALLEST = {
  "dataset": "digits", "models": ("mlp2",), "dtype": "float32", "clients": 5, "devices": 2,
  "bits": (2,), "rounds": 2, "finetune_rounds": 0, "local_steps": 1, "batch_size": 2,
  "eval_every": 2, "seeds": 1, "max_test_rows": 8, "augment": False,
}  # fmt: skip

# Experiment -> a method of the job that trains, and what else is small.
TRAINED = {
  "ablations": ("local 2 bit", {"topics": ("data",)}),
  "cifar10_bits_pareto": ("local", {}),
  "cifar10_mixed_bits": ("QuPeD within groups", {"bits": (2, 32)}),
  "cifar10_mixed_models": ("local", {"models": ("mlp", "mlp2")}),
  "cifar10_resnet20_table": (
    "Algorithm 1 2 bit",
    {"clients": 1, "only": ("Algorithm 1",), "measured_rows": 0},
  ),
  "faults": (None, {"topics": ("sign",)}),  # all train: every way in which a server combines
  "mnist_quped": ("local", {}),
  "mnist_table": ("Ditto", {"classes_per_client": (3,)}),
  "quickstart": ("FedAvg + fine-tuning", {"models": ("mlp", "mlp2"), "finetune_rounds": 1}),
  "tune_mnist": ("local", {"only": ("local",)}),
  "warm_start": ("FedAvg + fine-tuning", {"shares": (0.5,)}),
}
# Those that differ from one of these in their options alone.
LIKE = {
  "cifar10_resnet32_table": "cifar10_resnet20_table",
  "cifar10_table": "mnist_table",
  "fashion_mnist_table": "mnist_table",
  "femnist_table": "mnist_table",
  "tune_cifar10": "tune_mnist",
  "tune_fashion_mnist": "tune_mnist",
}


def module(name):
  return importlib.import_module(f"experiments.{name}")


def test_every_experiment_is_here_or_like_one_that_is():
  assert sorted([*TRAINED, *LIKE]) == cli.names()
  for name, other in LIKE.items():
    source = inspect.getsource(module(name).main)
    assert source.replace(name, other) == inspect.getsource(module(other).main)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", TRAINED)
def test_two_devices_run_it(name, tmp_path, monkeypatch):
  trained, changes = TRAINED[name]
  run_job, make_mesh, devices = study.run_job, parallel.make_mesh, set()

  def one_of_them(job, *rest):
    train = run_job if trained in (None, *job.variants) else untrained.run_job
    return train(job, *rest)

  def seen(count):
    devices.add(count)
    return make_mesh(count)

  monkeypatch.setattr(study, "run_job", one_of_them)
  monkeypatch.setattr(parallel, "make_mesh", seen)
  monkeypatch.setattr(ablations, "SHARES", (1.0,))
  monkeypatch.setattr(faults, "METHODS", {"FedAvg": faults.METHODS["FedAvg"]})
  monkeypatch.setattr(faults, "CORRUPT", (1, 2))
  experiment = module(name)
  known = flat(experiment.DEFAULTS)
  smallest = {option: value for option, value in SMALLEST.items() if option in known}
  experiment.main(replaced(experiment.DEFAULTS, **smallest | changes, out=str(tmp_path)))
  assert devices == {2}  # and so some job was trained
  for path in tmp_path.rglob("metrics.jsonl"):
    rows = metrics.read_metrics(path.parent)
    assert {row["round"] for row in rows} == {1, 2}
    assert all(np.isfinite(row["loss"]) for row in rows)
