"""Every method on MNIST, 50 clients of 3 and of 4 classes.

make data NAME=mnist
make experiment NAME=mnist_table

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator, with the
hyperparameters of CIFAR-10. tune_mnist chooses others, for --tuned and --tuned-on.
"""

from experiments.common import comparison
from experiments.common.comparison import Comparison

DEFAULTS = Comparison(
  dataset="mnist",
  tuned_on="cifar10",
  models=("cnn1",),
  clients=50,
  rounds=110,
  finetune_rounds=22,
  batch_size=50,
  eval_every=11,
)


def main(options: Comparison) -> None:
  """Runs the experiment."""
  comparison.run("mnist_table", options)
