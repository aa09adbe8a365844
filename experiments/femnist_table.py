"""Every method on FEMNIST: 66 writers, each a client, with the hyperparameters of CIFAR-10.

make experiment NAME=femnist_table ARGS="--data-dir FOLDER"

FOLDER/femnist holds LEAF's JSON files or TensorFlow Federated's HDF5 files. By default at the
paper's scale, about 30 epochs of batches of 50, which wants an accelerator.
"""

from experiments.recipes import comparison
from experiments.recipes.comparison import Comparison

DEFAULTS = Comparison(
  dataset="femnist",
  partition="natural",
  classes_per_client=(62,),
  models=("cnn1",),
  clients=66,
  rounds=20,
  finetune_rounds=4,
  batch_size=50,
  partial_batches=True,
  eval_every=4,
)


def main(options: Comparison) -> None:
  """Runs the experiment."""
  comparison.run("femnist_table", options)
