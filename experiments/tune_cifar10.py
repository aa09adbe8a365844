"""Hyperparameters of every method on CIFAR-10, chosen on validation rows.

make data NAME=cifar10
make experiment NAME=tune_cifar10
"""

from experiments.common import tuning
from experiments.common.tuning import Tuning

DEFAULTS = Tuning(
  dataset="cifar10",
  models=("cnn1",),
  clients=50,
  classes_per_client=4,
  rounds=500,
  finetune_rounds=100,
  batch_size=50,
  eval_every=50,
  centers_rate=1e-6,
  seeds=1,
)


def main(options: Tuning) -> None:
  """Runs the search."""
  tuning.run("tune_cifar10", options)
