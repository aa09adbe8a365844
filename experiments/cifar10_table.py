"""Every method on CIFAR-10: 50 clients of 3 and of 4 classes, each method tuned by itself.

make data NAME=cifar10
make experiment NAME=cifar10_table

By default at the paper's scale, 250 epochs of batches of 50, which wants an accelerator.

What came of it, at three scales, is in docs/reproduction.md.
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_CIFAR10, replaced

DEFAULTS = replaced(Comparison(), **PAPER_CIFAR10)


def main(options: Comparison) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  return comparison.run("cifar10_table", options)
