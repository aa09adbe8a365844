"""QuPeD (2 bits) on MNIST against local training and FedAvg: 50 clients, 3 classes each, CNN1.

make data NAME=mnist
make experiment NAME=mnist_quped

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator and has not
been measured yet. Shortened to 10 steps of 10 examples for each client, it shows that the whole job
runs, with models still near the 33 % of guessing among three classes. Two CPU cores (AMD EPYC, busy
with other work as well), 17 minutes, two seeds:

make experiment NAME=mnist_quped ARGS="--rounds 2 --finetune-rounds 1 --local-steps 5
  --batch-size 10 --seeds 2 --max-test-rows 200 --eval-every 3"

  method       accuracy (%)    model
  local        41.3 ± 3.2     5.5 MB
  local 2 bit  36.7 ± 1.0   362.1 kB
  FedAvg       36.2 ± 2.9     5.5 MB
  QuPeD 2 bit  38.0 ± 0.1   362.1 kB
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
