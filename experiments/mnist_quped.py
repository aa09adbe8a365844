"""QuPeD (2 bits) on MNIST against local training and FedAvg: 50 clients, 3 classes each, CNN1.

make data NAME=mnist
make experiment NAME=mnist_quped

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator and has not
been measured yet. docs/reproduction.md has a shortened run that shows that the whole job runs.
"""

from functools import partial

from experiments import quickstart
from qupeD_jax.study import methods, study
from qupeD_jax.study.options import Options, replaced, withheld

DEFAULTS = replaced(
  withheld(Options, *quickstart.OTHERS, "fedavg_finetune_rate")(),
  dataset="mnist",
  models=("cnn1",),
  bits=(2,),
  clients=50,
  rounds=108,  # of 10 steps: 50 epochs
  batch_size=50,
  centers_rate=1e-6,
  proximity=1e-4,
)

JOBS = (
  methods.local_training,
  partial(methods.local_quantised, mixed=True),
  methods.federated_averaging,
  partial(methods.quped_quantised, mixed=True),
)


def main(options: Options) -> study.Outcome:
  """Runs the experiment."""
  return study.run("mnist_quped", options, JOBS)
