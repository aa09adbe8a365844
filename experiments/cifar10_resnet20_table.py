"""Algorithm 1 on CIFAR-10 with ResNet-20, against ProxQuant, BinaryRelax and straight-through.

make data NAME=cifar10
make experiment NAME=cifar10_resnet20_table ARGS="--minutes 9"

By default 250 epochs of batches of 128 at 1, 2 and 4 bits, every quantiser, three seeds: hours on
an accelerator, in pieces of any length, as the command says it. docs/reproduction.md has shorter
runs and what came of them: from the authors' network, and in minutes on two CPU cores with ResNet-8
on small images of MNIST.
"""

from experiments.recipes import central
from experiments.recipes.central import Central
from qupeD_jax.study import study
from qupeD_jax.study.options import replaced

DEFAULTS = replaced(Central(), **central.CIFAR10, models=("resnet20",))


def main(options: Central) -> study.Outcome:
  """Runs the experiment."""
  return central.run("cifar10_resnet20_table", options)
