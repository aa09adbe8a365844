"""Hyperparameters of every method on MNIST, chosen on validation rows.

make data NAME=mnist
make experiment NAME=tune_mnist
"""

from experiments.common import tuning
from experiments.common.options import PAPER_MNIST
from experiments.common.tuning import Tuning

DEFAULTS = Tuning(**PAPER_MNIST, **tuning.SHARED)


def main(options: Tuning) -> None:
  """Runs the search."""
  tuning.run("tune_mnist", options)
