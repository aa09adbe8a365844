"""Every method on Fashion-MNIST: 50 clients of 3 and of 4 classes, tuned one by one.

make data NAME=fashion_mnist
make experiment NAME=fashion_mnist_table
"""

from experiments.common import comparison
from experiments.common.comparison import Comparison

DEFAULTS = Comparison(
  dataset="fashion_mnist",
  models=("cnn1",),
  clients=50,
  rounds=110,
  finetune_rounds=22,
  batch_size=50,
  eval_every=11,
)


def main(options: Comparison) -> None:
  """Runs the experiment."""
  comparison.run("fashion_mnist_table", options)
