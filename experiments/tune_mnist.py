"""Hyperparameters of every method on MNIST, chosen on validation rows.

make data NAME=mnist
make experiment NAME=tune_mnist
"""

from experiments.recipes import tuning
from experiments.recipes.tuning import Tuning
from qupeD_jax.study.options import PAPER_MNIST

DEFAULTS = Tuning(**PAPER_MNIST, **tuning.SHARED)


def main(options: Tuning) -> None:
  """Runs the search."""
  tuning.run("tune_mnist", options)
