"""Every method on Fashion-MNIST, 50 clients of 3 and of 4 classes.

make data NAME=fashion_mnist
make experiment NAME=fashion_mnist_table

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator, with the
hyperparameters of CIFAR-10; for small networks tune_fashion_mnist has chosen others.

What came of it, at a smaller scale, is in docs/reproduction.md.
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_MNIST, replaced

DEFAULTS = replaced(Comparison(), **PAPER_MNIST | {"dataset": "fashion_mnist"})


def main(options: Comparison) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  return comparison.run("fashion_mnist_table", options)
