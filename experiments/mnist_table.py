"""Every method on MNIST, 50 clients of 3 and of 4 classes.

make data NAME=mnist
make experiment NAME=mnist_table

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator, with the
hyperparameters that tune_mnist chose.

On an H100, 19 epochs of bfloat16, three seeds, 4 classes a client; other methods were not reached:

make experiment NAME=mnist_table ARGS="--dtype bfloat16 --inner-steps 3
  --classes-per-client 4 --rounds 40 --finetune-rounds 8 --eval-every 40"

  method                   accuracy (%)  worst decile   model
  local 2 bit               98.0 ± 0.0    96.8   362.1 kB
  local 1 bit               97.1 ± 0.0    95.4   189.5 kB
  pFedMe                    97.2 ± 0.1    95.8     5.5 MB
  FedAvg + codebook 2 bit   98.1 ± 0.0    96.7   362.1 kB
  FedAvg + codebook 1 bit   97.3 ± 0.2    95.2   189.5 kB
  QuPeL 2 bit               97.4 ± 0.1    95.9   362.1 kB
  QuPeL 1 bit               96.5 ± 0.1    94.5   189.5 kB
  QuPeD 32 bit              97.8 ± 0.0    96.6     5.5 MB
  QuPeD+ 2 bit              98.1 ± 0.0    96.7   362.1 kB
  QuPeD+ 1 bit              97.2 ± 0.2    94.4   189.5 kB

On two CPU cores (AMD EPYC), at a smaller scale, three seeds; all of it in docs/reproduction.md:

make experiment NAME=mnist_table ARGS="--downsample 2 --models cnn3 --clients 10
  --classes-per-client 3 --train-share 0.02 --validation 0.2 --rounds 60 --finetune-rounds 12
  --batch-size 5 --eval-every 30 --inner-steps 3 --max-test-rows 300"

  method                   accuracy (%)  worst decile   model
  local                     95.4 ± 0.9    90.8    103.6 kB
  local 2 bit               95.5 ± 0.9    90.0     10.5 kB
  local 1 bit               94.8 ± 1.5    89.0      7.4 kB
  FedAvg                    90.8 ± 1.6    85.3    103.6 kB
  FedProx                   90.7 ± 1.5    86.4    103.6 kB
  FedAvg + fine-tuning      95.7 ± 1.1    91.2    103.6 kB
  FedAvg + k-means 2 bit    94.3 ± 1.1    87.8     10.5 kB
  FedAvg + k-means 1 bit    66.6 ± 16.9    52.2      7.4 kB
  FedAvg + codebook 2 bit   95.7 ± 1.3    89.7     10.5 kB
  FedAvg + codebook 1 bit   95.4 ± 1.6    89.1      7.4 kB
  Per-FedAvg                93.1 ± 0.2    89.2    103.6 kB
  pFedMe                    93.8 ± 0.5    89.3    103.6 kB
  Ditto                     95.2 ± 1.2    89.6    103.6 kB
  FML                       95.8 ± 1.0    91.8    103.6 kB
  QuPeL 32 bit              95.4 ± 1.1    90.1    103.6 kB
  QuPeL 2 bit               95.4 ± 0.8    91.3     10.5 kB
  QuPeL 1 bit               95.1 ± 1.1    91.1      7.4 kB
  QuPeD 32 bit              96.0 ± 1.0    93.4    103.6 kB
  QuPeD 2 bit               95.8 ± 0.9    92.2     10.5 kB
  QuPeD 1 bit               94.6 ± 1.1    89.9      7.4 kB
  QuPeD+ 32 bit             96.0 ± 1.0    91.4    103.6 kB
  QuPeD+ 2 bit              96.3 ± 0.9    92.3     10.5 kB
  QuPeD+ 1 bit              96.0 ± 1.0    91.7      7.4 kB
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_MNIST, replaced

DEFAULTS = replaced(Comparison(), **PAPER_MNIST)


def main(options: Comparison) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  return comparison.run("mnist_table", options)
