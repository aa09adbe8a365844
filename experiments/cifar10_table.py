"""Every method on CIFAR-10: 50 clients of 3 and of 4 classes, each method tuned by itself.

make data NAME=cifar10
make experiment NAME=cifar10_table

By default at the paper's scale, 250 epochs of batches of 50, which wants an accelerator.

On an H100, 44 epochs of bfloat16, three seeds, 4 classes a client; other methods were not reached:

make experiment NAME=cifar10_table ARGS="--dtype bfloat16 --inner-steps 3
  --classes-per-client 4 --rounds 80 --finetune-rounds 16 --eval-every 80"

  method                   accuracy (%)  worst decile   model
  local                     67.4 ± 0.6    55.7     7.0 MB
  local 2 bit               67.2 ± 0.6    55.9   467.0 kB
  local 1 bit               65.1 ± 0.6    53.9   248.4 kB
  FedAvg                    54.4 ± 0.1    46.4     7.0 MB
  FedProx                   54.0 ± 0.1    46.0     7.0 MB
  FedAvg + fine-tuning      72.1 ± 0.9    60.6     7.0 MB
  FedAvg + k-means 2 bit    71.1 ± 0.7    59.3   467.0 kB
  FedAvg + k-means 1 bit    65.4 ± 1.3    51.4   248.4 kB
  FedAvg + codebook 2 bit   70.3 ± 0.9    58.6   467.0 kB
  FedAvg + codebook 1 bit   67.8 ± 1.0    55.5   248.4 kB
  QuPeD 32 bit              67.7 ± 0.5    56.0     7.0 MB
  QuPeD 2 bit               67.0 ± 0.6    55.5   467.0 kB
  QuPeD 1 bit               61.8 ± 0.7    50.7   248.4 kB
  QuPeD+ 32 bit             71.6 ± 0.8    60.2     7.0 MB
  QuPeD+ 2 bit              70.7 ± 0.9    59.1   467.0 kB
  QuPeD+ 1 bit              68.7 ± 1.0    56.8   248.4 kB

On two CPU cores (AMD EPYC), at a smaller scale, three seeds; all of it in docs/reproduction.md:

make experiment NAME=cifar10_table ARGS="--downsample 2 --models cnn3 --clients 10
  --classes-per-client 3 --train-share 0.06 --validation 0.2 --rounds 150 --finetune-rounds 30
  --batch-size 5 --eval-every 75 --inner-steps 3 --max-test-rows 300"

  method                   accuracy (%)  worst decile   model
  local                     68.3 ± 3.0    57.6    149.8 kB
  local 2 bit               66.9 ± 3.0    55.9     16.4 kB
  local 1 bit               67.8 ± 3.4    56.9     11.9 kB
  FedAvg                    37.8 ± 2.3    32.4    149.8 kB
  FedProx                   37.1 ± 3.9    30.9    149.8 kB
  FedAvg + fine-tuning      70.9 ± 2.0    59.4    149.8 kB
  FedAvg + k-means 2 bit    67.8 ± 2.6    56.9     16.4 kB
  FedAvg + k-means 1 bit    45.5 ± 5.4    35.3     11.9 kB
  FedAvg + codebook 2 bit   71.1 ± 3.1    59.6     16.4 kB
  FedAvg + codebook 1 bit   69.6 ± 3.4    58.4     11.9 kB
  Per-FedAvg                66.2 ± 4.9    49.2    149.8 kB
  pFedMe                    66.4 ± 3.7    57.0    149.8 kB
  Ditto                     71.8 ± 3.8    60.3    149.8 kB
  FML                       69.9 ± 3.4    58.2    149.8 kB
  QuPeL 32 bit              68.6 ± 2.7    58.4    149.8 kB
  QuPeL 2 bit               67.2 ± 2.6    58.1     16.4 kB
  QuPeL 1 bit               67.5 ± 3.4    57.4     11.9 kB
  QuPeD 32 bit              68.5 ± 3.3    57.2    149.8 kB
  QuPeD 2 bit               69.7 ± 2.7    59.1     16.4 kB
  QuPeD 1 bit               67.8 ± 2.9    56.4     11.9 kB
  QuPeD+ 32 bit             70.6 ± 2.2    60.1    149.8 kB
  QuPeD+ 2 bit              70.4 ± 3.0    59.7     16.4 kB
  QuPeD+ 1 bit              69.1 ± 2.3    57.9     11.9 kB
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison
from qupeD_jax.study import study
from qupeD_jax.study.options import PAPER_CIFAR10, replaced

DEFAULTS = replaced(Comparison(), **PAPER_CIFAR10)


def main(options: Comparison) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  return comparison.run("cifar10_table", options)
