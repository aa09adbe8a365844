"""QuPeD on real digits in two minutes: local, FedAvg and QuPeD at 32, 2, 1 and mixed bits.

make experiment NAME=quickstart
"""

import dataclasses
from functools import partial

from experiments.common import methods, study
from experiments.common.options import Options as Federated


@dataclasses.dataclass(frozen=True)
class Options(Federated):
  """QuPeD on 1,797 real 8x8 digits: 20 clients, 3 classes each, two architectures."""

  models: tuple[str, ...] = ("mlp", "mlp2")
  """Architectures; clients are dealt over them, the first is the server's."""
  validation: float = 0.2
  """Share of its training rows that a client validates on."""
  lambda_p: float = 0.3
  """Weight of distillation against cross-entropy."""
  temperature: float = 2.0
  """Temperature of the distillation."""
  weights_rate: float = 0.2
  """Step size of the personal weights."""
  global_rate: float = 0.2
  """Step size of QuPeD's global model."""
  fedavg_rate: float = 0.4
  """Step size of FedAvg."""
  fedavg_finetune_rate: float = 0.4
  """Step size of local training after FedAvg."""


JOBS = (
  methods.local_training,
  partial(methods.local_quantised, bits=(2,)),
  methods.federated_averaging,
  methods.averaging_then_local,
  methods.quped_full_precision,
  partial(methods.quped_quantised, bits=(2, 1), mixed=True),
)


def main(options: Options) -> None:
  """Runs the experiment."""
  study.run("quickstart", options, JOBS)
