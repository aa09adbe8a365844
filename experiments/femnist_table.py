"""Every method on FEMNIST: 66 writers, each a client, with the hyperparameters of CIFAR-10.

make experiment NAME=femnist_table ARGS="--data-dir FOLDER"

FOLDER/femnist holds LEAF's JSON files or TensorFlow Federated's HDF5 files. By default at the
paper's scale, about 30 epochs of batches of 50, which wants an accelerator.
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison
from qupeD_jax.study import study
from qupeD_jax.study.options import replaced

DEFAULTS = replaced(
  Comparison(),
  dataset="femnist",
  partition="natural",
  models=("cnn1",),
  clients=66,
  rounds=20,
  batch_size=50,
  partial_batches=True,
)


def main(options: Comparison) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  return comparison.run("femnist_table", options)
