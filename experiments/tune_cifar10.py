"""Hyperparameters of every method on CIFAR-10, chosen on validation rows.

make data NAME=cifar10
make experiment NAME=tune_cifar10
"""

from experiments.recipes import tuning
from experiments.recipes.tuning import Tuning
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_CIFAR10, replaced

DEFAULTS = replaced(Tuning(), **PAPER_CIFAR10, **tuning.SHARED)


def main(options: Tuning) -> study.Outcome:
  """Runs the search."""
  return tuning.run("tune_cifar10", options)
