"""Algorithm 1 on CIFAR-10 with ResNet-32, against ProxQuant, BinaryRelax and straight-through.

make data NAME=cifar10
make experiment NAME=cifar10_resnet32_table ARGS="--minutes 9"

As cifar10_resnet20_table, with the larger network: hours on an accelerator, in pieces of any
length. Not measured yet, but for its first three epochs on two CPU cores (docs/reproduction.md); a
version for minutes is that of cifar10_resnet20_table, with ResNet-8. To start from a network of
full precision, train one and name its file:

make experiment NAME=cifar10_resnet32_table ARGS="--only 'full precision' --out results/full"
make experiment NAME=cifar10_resnet32_table
  ARGS="--start results/full/models/full_precision/client_0000.safetensors"
"""

from experiments.recipes import central
from experiments.recipes.central import Central
from qupeD_jax.study import study
from qupeD_jax.study.options import replaced

DEFAULTS = replaced(Central(), **central.CIFAR10, models=("resnet32",))


def main(options: Central) -> study.Outcome:
  """Runs the experiment."""
  return central.run("cifar10_resnet32_table", options)
