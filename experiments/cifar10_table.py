"""Every method on CIFAR-10: 50 clients of 3 and of 4 classes, tuned one by one.

make data NAME=cifar10
make experiment NAME=cifar10_table
"""

from experiments.common import comparison
from experiments.common.comparison import Comparison

DEFAULTS = Comparison(
  dataset="cifar10",
  models=("cnn1",),
  clients=50,
  rounds=500,
  finetune_rounds=100,
  batch_size=50,
  eval_every=50,
)


def main(options: Comparison) -> None:
  """Runs the experiment."""
  comparison.run("cifar10_table", options)
