"""Every method on MNIST, 50 clients of 3 and of 4 classes.

make data NAME=mnist
make experiment NAME=mnist_table

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator, with the
hyperparameters that tune_mnist chose.

What came of it, at two scales, is in docs/reproduction.md.
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_MNIST, replaced

DEFAULTS = replaced(Comparison(), **PAPER_MNIST)


def main(options: Comparison) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  return comparison.run("mnist_table", options)
