"""Every method on Fashion-MNIST, 50 clients of 3 and of 4 classes.

make data NAME=fashion_mnist
make experiment NAME=fashion_mnist_table

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator, with the
hyperparameters of CIFAR-10. tune_fashion_mnist chooses others, for --tuned and --tuned-on.

On two CPU cores (AMD EPYC), at a smaller scale, three seeds; more of it in docs/reproduction.md:

make experiment NAME=fashion_mnist_table ARGS="--downsample 2 --models cnn3 --clients 10
  --classes-per-client 3 --train-share 0.02 --validation 0.2 --rounds 60 --finetune-rounds 12
  --batch-size 5 --eval-every 30 --inner-steps 3 --max-test-rows 300"

  method                   accuracy (%)  worst decile   model
  local                     87.8 ± 3.7    66.1   103.6 kB
  local 2 bit               88.7 ± 3.5    72.0    10.5 kB
  local 1 bit               87.2 ± 3.6    63.8     7.4 kB
  FedAvg                    71.7 ± 0.1    54.3   103.6 kB
  FedProx                   70.5 ± 1.6    51.9   103.6 kB
  FedAvg + fine-tuning      89.0 ± 3.6    72.7   103.6 kB
  FedAvg + k-means 2 bit    86.9 ± 5.1    67.2    10.5 kB
  FedAvg + k-means 1 bit    67.5 ± 9.6    46.1     7.4 kB
  FedAvg + codebook 2 bit   88.0 ± 3.7    71.0    10.5 kB
  FedAvg + codebook 1 bit   86.3 ± 3.4    66.3     7.4 kB
  Per-FedAvg                81.1 ± 4.3    57.4   103.6 kB
  pFedMe                    81.4 ± 5.6    59.3   103.6 kB
  Ditto                     87.6 ± 3.8    72.1   103.6 kB
  FML                       87.5 ± 3.9    65.8   103.6 kB
  QuPeL 32 bit              87.7 ± 3.9    66.2   103.6 kB
  QuPeL 2 bit               88.7 ± 3.3    72.4    10.5 kB
  QuPeL 1 bit               86.9 ± 3.5    62.1     7.4 kB
  QuPeD 32 bit              89.2 ± 3.6    73.8   103.6 kB
  QuPeD 2 bit               87.0 ± 3.4    61.4    10.5 kB
  QuPeD 1 bit               85.0 ± 3.2    57.8     7.4 kB
  QuPeD+ 32 bit             89.2 ± 3.8    73.6   103.6 kB
  QuPeD+ 2 bit              88.5 ± 3.5    69.6    10.5 kB
  QuPeD+ 1 bit              87.1 ± 3.9    66.4     7.4 kB
"""

from experiments.common import comparison
from experiments.common.comparison import Comparison
from experiments.common.options import PAPER_MNIST

DEFAULTS = Comparison(**PAPER_MNIST | {"dataset": "fashion_mnist"})


def main(options: Comparison) -> None:
  """Runs the experiment."""
  comparison.run("fashion_mnist_table", options)
