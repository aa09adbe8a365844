"""QuPeD on real digits in two minutes: local, FedAvg and QuPeD at 32, 2, 1 and mixed bits.

make experiment NAME=quickstart

The 1,797 images of 8x8 pixels that scikit-learn ships; 20 clients, 3 classes each, two
architectures.
"""

from functools import partial

from qupeD_jax.study import example, methods, study
from qupeD_jax.study.jobs import on_server_architecture
from qupeD_jax.study.options import Options, replaced, withheld

# What only rivals that are not here would take.
OTHERS = ("global_lambda_p", "straight_through", "penalty", "mu", "inner_rate", "inner_steps")
OTHERS += ("averaging_share",)

DEFAULTS = replaced(
  withheld(Options, *OTHERS)(),
  models=("mlp", "mlp2"),
  validation=0.2,
  lambda_p=0.3,
  temperature=2.0,
  weights_rate=0.2,
  global_rate=0.2,
  fedavg_rate=0.4,
  fedavg_finetune_rate=0.4,
)

JOBS = (
  methods.local_training,
  partial(methods.local_quantised, bits=(2,)),
  methods.federated_averaging,
  on_server_architecture(methods.averaging_then_local),
  partial(methods.quped_quantised, bits=(32,)),
  partial(methods.quped_quantised, bits=(2, 1), mixed=True),
)


def main(options: Options) -> study.Outcome:
  """Runs the experiment and sets the model of its first client out to be tried."""
  outcome = study.run("quickstart", options, JOBS)
  if any((outcome.folder / "models").glob("*/client_0000.safetensors")):
    print("to predict with a client's model:", example.ship(outcome.folder, options, client=0))
  return outcome
