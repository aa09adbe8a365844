"""Algorithm 1 on CIFAR-10 with ResNet-20, against ProxQuant, BinaryRelax and straight-through.

make data NAME=cifar10
make experiment NAME=cifar10_resnet20_table ARGS="--minutes 9"

By default 250 epochs of batches of 128 at 1, 2 and 4 bits, every quantiser, three seeds: hours on
an accelerator, in pieces of any length, as the command says it. On an H100, 50 epochs of bfloat16
from the authors' network (92.05 %), one seed, their pull toward the centers, ten times the default:

make experiment NAME=cifar10_resnet20_table ARGS="--rounds 50 --finetune-rounds 10
  --start tests/data/resnet20_cifar10_fp.safetensors --input-std 51.5865 50.847 51.255
  --bits 1 2 --seeds 1 --eval-every 5 --proximity 1e-4 --only 'Algorithm 1' ProxQuant"

  quantiser          accuracy (%)    model
  Algorithm 1 1 bit        86.0    48.9 kB
  Algorithm 1 2 bit        87.4    82.4 kB
  ProxQuant 1 bit          86.7    48.9 kB
  ProxQuant 2 bit          86.6    82.4 kB

In minutes on two CPU cores: ResNet-8 on small images of MNIST, from drawn weights, two seeds, all
quantisers with the same rates (AMD EPYC; more of it in docs/reproduction.md):

make experiment NAME=cifar10_resnet20_table ARGS="--dataset mnist --downsample 2 --models resnet8
  --train-share 0.1 --validation 0.1 --local-steps 40 --rounds 15 --finetune-rounds 3 --eval-every 5
  --dtype float32 --bits 1 2 --seeds 2 --no-augment
  --only 'full precision' 'Algorithm 1' ProxQuant BinaryRelax STE"

  quantiser          accuracy (%)    model
  full precision     97.6 ± 0.3   301.9 kB
  Algorithm 1 1 bit  95.8 ± 0.4    16.3 kB
  Algorithm 1 2 bit  96.3 ± 0.6    25.5 kB
  ProxQuant 1 bit    92.6 ± 0.4    16.3 kB
  ProxQuant 2 bit    94.6 ± 0.1    25.5 kB
  BinaryRelax 1 bit  97.1 ± 0.0    16.3 kB
  BinaryRelax 2 bit  97.4 ± 0.0    25.5 kB
  STE 1 bit          97.5 ± 0.1    16.3 kB
  STE 2 bit          97.6 ± 0.2    25.5 kB
"""

from experiments.recipes import central
from experiments.recipes.central import Central
from qupeD_jax.study import study
from qupeD_jax.study.options import replaced

DEFAULTS = replaced(Central(), **central.CIFAR10, models=("resnet20",))


def main(options: Central) -> study.Outcome:
  """Runs the experiment."""
  return central.run("cifar10_resnet20_table", options)
