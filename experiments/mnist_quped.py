"""QuPeD (2 bits) on MNIST against local training and FedAvg: 50 clients, 3 classes each, CNN1.

make data NAME=mnist
make experiment NAME=mnist_quped

By default at the paper's scale, 50 epochs of batches of 50, which wants an accelerator.
"""

import dataclasses
from functools import partial

from experiments.common import methods, study
from experiments.common.options import Options as Federated


@dataclasses.dataclass(frozen=True)
class Options(Federated):
  """QuPeD at 2 bits on MNIST: 50 clients, 3 classes each."""

  dataset: str = "mnist"
  """Data set: digits, mnist, fashion_mnist, cifar10, emnist/NAME or femnist."""
  models: tuple[str, ...] = ("cnn1",)
  """Architectures; clients are dealt over them, the first is the server's."""
  bits: tuple[int, ...] = (2,)
  """Precisions of the quantised methods, dealt over the clients: 1 to 8, or 32 (full precision)."""
  clients: int = 50
  """Number of clients."""
  rounds: int = 108
  """Rounds in all, fine-tuning among them; 108 of 10 steps are 50 epochs."""
  finetune_rounds: int = 20
  """Rounds at the end in which quantised models are frozen and fine-tuned."""
  batch_size: int = 50
  """Examples of a step."""
  centers_rate: float = 1e-6
  """Step size of the centers; their gradients are sums over entries, so large tensors want less."""
  proximity: float = 1e-4
  """Weight of the pull toward the centers at the end of training, to which it grows from 0."""
  eval_every: int = 10
  """Rounds between evaluations on the validation rows."""


JOBS = (
  methods.local_training,
  partial(methods.local_quantised, mixed=True),
  methods.federated_averaging,
  partial(methods.quped_quantised, mixed=True),
)


def main(options: Options) -> None:
  """Runs the experiment."""
  study.run("mnist_quped", options, JOBS)
