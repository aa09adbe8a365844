"""Algorithm 1 on CIFAR-10 with ResNet-32, against ProxQuant, BinaryRelax and straight-through.

make data NAME=cifar10
make experiment NAME=cifar10_resnet32_table ARGS="--minutes 9"
"""

from experiments.common import central
from experiments.common.central import Central

DEFAULTS = Central(**central.CIFAR10, models=("resnet32",))


def main(options: Central) -> None:
  """Runs the experiment."""
  central.run("cifar10_resnet32_table", options)
