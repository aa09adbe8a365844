"""Every method on Fashion-MNIST, 50 clients of 3 and of 4 classes.

make data NAME=fashion_mnist
make experiment NAME=fashion_mnist_table

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator, with the
hyperparameters of CIFAR-10; for small networks tune_fashion_mnist has chosen others.

On two CPU cores (AMD EPYC), at a smaller scale, three seeds; more of it in docs/reproduction.md:

make experiment NAME=fashion_mnist_table ARGS="--downsample 2 --models cnn3 --clients 10
  --classes-per-client 3 --train-share 0.02 --validation 0.2 --rounds 60 --finetune-rounds 12
  --batch-size 5 --eval-every 30 --inner-steps 3 --max-test-rows 300"

  method                   accuracy (%)  worst decile   model
  local                     88.2 ± 3.8    73.7  103.6 kB
  local 2 bit               88.7 ± 3.5    72.0   10.5 kB
  local 1 bit               87.2 ± 3.6    63.8    7.4 kB
  FedAvg                    71.7 ± 0.1    54.3  103.6 kB
  FedProx                   71.5 ± 0.4    53.0  103.6 kB
  FedAvg + fine-tuning      89.0 ± 3.6    72.7  103.6 kB
  FedAvg + k-means 2 bit    86.9 ± 5.1    67.2   10.5 kB
  FedAvg + k-means 1 bit    67.5 ± 9.6    46.1    7.4 kB
  FedAvg + codebook 2 bit   88.0 ± 3.7    71.0   10.5 kB
  FedAvg + codebook 1 bit   86.3 ± 3.4    66.3    7.4 kB
  Per-FedAvg                81.1 ± 4.3    57.4  103.6 kB
  pFedMe                    80.8 ± 5.9    57.8  103.6 kB
  Ditto                     87.6 ± 3.8    72.1  103.6 kB
  FML                       88.9 ± 3.8    73.4  103.6 kB
  QuPeL 32 bit              87.7 ± 3.9    66.2  103.6 kB
  QuPeL 2 bit               88.3 ± 3.4    69.8   10.5 kB
  QuPeL 1 bit               85.5 ± 3.3    58.4    7.4 kB
  QuPeD 32 bit              84.8 ± 3.4    59.8  103.6 kB
  QuPeD 2 bit               88.8 ± 2.9    72.2   10.5 kB
  QuPeD 1 bit               86.8 ± 3.7    62.2    7.4 kB
  QuPeD+ 32 bit             89.2 ± 3.8    73.6  103.6 kB
  QuPeD+ 2 bit              88.6 ± 3.6    72.8   10.5 kB
  QuPeD+ 1 bit              87.5 ± 3.4    68.1    7.4 kB
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_MNIST, replaced

DEFAULTS = replaced(Comparison(), **PAPER_MNIST | {"dataset": "fashion_mnist"})


def main(options: Comparison) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  return comparison.run("fashion_mnist_table", options)
