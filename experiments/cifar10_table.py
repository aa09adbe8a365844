"""Every method on CIFAR-10: 50 clients of 3 and of 4 classes, each method tuned by itself.

make data NAME=cifar10
make experiment NAME=cifar10_table

By default at the paper's scale, 250 epochs of batches of 50, which wants an accelerator.
"""

from experiments.common import comparison
from experiments.common.comparison import Comparison

DEFAULTS = Comparison(
  dataset="cifar10",
  tuned_on="cifar10",
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
