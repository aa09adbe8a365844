"""Hyperparameters of every method on Fashion-MNIST, chosen on validation rows.

make data NAME=fashion_mnist
make experiment NAME=tune_fashion_mnist
"""

from experiments.recipes import tuning
from experiments.recipes.tuning import Tuning
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_MNIST, replaced

DEFAULTS = replaced(Tuning(), **PAPER_MNIST | {"dataset": "fashion_mnist"}, **tuning.SHARED)


def main(options: Tuning) -> study.Outcome:
  """Runs the search."""
  return tuning.run("tune_fashion_mnist", options)
