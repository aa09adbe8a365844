"""Hyperparameters of every method on MNIST, chosen on validation rows.

make data NAME=mnist
make experiment NAME=tune_mnist
"""

from experiments.common import tuning
from experiments.common.tuning import Tuning

DEFAULTS = Tuning(
  dataset="mnist",
  models=("cnn1",),
  clients=50,
  classes_per_client=4,
  rounds=110,
  finetune_rounds=22,
  batch_size=50,
  eval_every=11,
  centers_rate=1e-6,
  seeds=1,
)


def main(options: Tuning) -> None:
  """Runs the search."""
  tuning.run("tune_mnist", options)
