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
