"""From options to a federation: data loaded, dealt to clients, laid out in cohorts, all seeds."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qupeD_jax import checks, models
from qupeD_jax.data import cohort, partition, sources, splits
from qupeD_jax.data.federation import divide
from qupeD_jax.models.flops import forward_flops
from qupeD_jax.study.options import Federated
from qupeD_jax.types import FULL_PRECISION, Cohort, Dataset, Model


class Federation(NamedTuple):
  """Data and clients of an experiment; cohorts have a leading axis of R seeds.

  Clients are in groups by architecture, unless `of_server` or `by_bits` says otherwise.
  """

  train: Dataset
  test: Dataset
  splits: tuple[splits.Split, ...]  # one per seed
  groups: tuple[np.ndarray, ...]  # client ids of each architecture
  names: tuple[str, ...]  # of the architectures, one per group; the first is the server's
  models: tuple[Model, ...]  # one per group
  flops: tuple[int, ...]  # of one example's forward pass, one per group
  num_classes: int
  mean: tuple[float, ...]  # of the pixels, per channel: what networks subtract
  std: tuple[float, ...]  # and divide by
  new: np.ndarray = np.arange(0)  # ids of clients that take part in no round, and are in no group

  @property
  def num_clients(self) -> int:
    """The number of clients that take part in rounds."""
    return sum(map(len, self.groups))


def split(options: Federated, train: Dataset, test: Dataset, seed: int) -> splits.Split:
  """Deals the rows to the clients by the partition that the options name."""
  return divide(
    train,
    test,
    clients=options.division.clients,
    partition=options.division.partition,
    classes_per_client=options.division.classes_per_client,
    alpha=options.division.alpha,
    train_share=options.division.train_share,
    validation=options.division.validation,
    max_test_rows=options.division.max_test_rows,
    min_test_rows=options.division.min_test_rows,
    seed=seed,
  )


def natural(
  options: Federated, train: Dataset, test: Dataset, clients: int | None = None
) -> np.ndarray:
  """Makes clients of the writers, the first so many of those that can be tested: owner [M]."""
  least = options.division.min_test_rows
  tested = {} if least is None else {"tested": test.client, "min_test_rows": least}
  return partition.natural(train.client, clients, **tested)


def load(
  options: Federated, split: Callable = split, make_model: Callable = models.make
) -> Federation:
  """Loads the data and deals it to the clients, for every seed.

  Args:
    options: of the experiment.
    split: (options, train, test, seed) -> splits.Split, a partition of one's own.
    make_model: (name, num_classes, image_shape, mean=, std=, dtype=, conv_form=) -> Model, for
      networks of one's own.

  Raises:
    BadInput: the data cannot be had, or the options do not fit it.
  """
  *parts, num_classes = sources.read(options.data.dataset, options.data.data_dir)
  train, test = (sources.downsample(part, options.data.downsample) for part in parts)
  parts = tuple(split(options, train, test, seed) for seed in seeds(options))
  num_new = options.division.new_clients or 0
  num_clients = len(parts[0].train.offsets) - 1 - num_new
  groups = _groups(options, num_clients, num_new)
  mean, std = sources.statistics(train)
  std = options.networks.input_std or std
  image_shape = train.x.shape[1:]
  make = functools.partial(
    make_model, num_classes=num_classes, image_shape=image_shape, mean=mean, std=std
  )
  networks = {name: make(name, dtype=options.networks.dtype) for name in options.networks.models}
  models.same_outputs(networks, image_shape)
  plain = {name: make(name, conv_form="lax") for name in networks}  # other forms pad with zeros
  flops = {name: forward_flops(model, image_shape) for name, model in plain.items()}
  in_order = lambda by_name: tuple(by_name[name] for name in options.networks.models)
  architectures = groups, options.networks.models, in_order(networks), in_order(flops)
  new = num_clients + np.arange(num_new)
  federation = Federation(train, test, parts, *architectures, num_classes, mean, std, new)
  everyone = (*groups, new) if len(new) else groups
  _check_batches(options, training(federation, np.full(num_clients, 32), everyone))
  return federation


def _groups(options: Federated, num_clients: int, num_new: int) -> tuple[np.ndarray, ...]:
  """Deals the architectures to the clients that train."""
  try:
    return cohort.assign_groups(num_clients, len(options.networks.models), len(options.bits))
  except checks.BadInput as error:
    if not num_new:
      raise
    _, _, allowed = str(error).partition(": ")
    reason = f"leaves {num_clients} clients that train; {allowed}"
    raise checks.refusal("new_clients", num_new, reason) from error


def seeds(options: Federated) -> range:
  """Returns the seeds of an experiment."""
  return range(options.run.seed, options.run.seed + options.run.seeds)


def training(federation: Federation, bits: np.ndarray, groups) -> tuple[Cohort, ...]:
  """Lays out the training rows: cohorts [R, K, ...] of the given groups and precisions."""
  return _stacked(federation, "train", bits, groups)


def validation(federation: Federation, groups) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Returns the data set and cohorts to validate on."""
  bits = np.full(federation.num_clients, 32)
  return federation.train, _stacked(federation, "validation", bits, groups)


def testing(federation: Federation, groups) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Returns the data set and cohorts to test on."""
  bits = np.full(federation.num_clients, 32)
  return federation.test, _stacked(federation, "test", bits, groups)


def of_new(federation: Federation) -> Federation:
  """Returns the clients that took part in no round, as one group of the server's architecture."""
  return _with_server_architecture(federation, (federation.new,))


def of_server(federation: Federation) -> Federation:
  """Returns the same clients as one group: all of them train the server's architecture."""
  everyone = np.arange(federation.num_clients)
  return _with_server_architecture(federation, (everyone,))


def by_bits(federation: Federation, bits: np.ndarray) -> Federation:
  """Returns the same clients grouped by their precision, all with the server's architecture.

  Args:
    federation: of any groups.
    bits: [clients] int32.
  """
  groups = tuple(np.flatnonzero(bits == b) for b in np.unique(bits))
  return _with_server_architecture(federation, groups)


def _with_server_architecture(federation: Federation, groups) -> Federation:
  count = len(groups)
  return federation._replace(
    groups=groups,
    names=federation.names[:1] * count,
    models=federation.models[:1] * count,
    flops=federation.flops[:1] * count,
  )


def _stacked(federation: Federation, part: str, bits, groups) -> tuple[Cohort, ...]:
  # New clients, the last ones, are at full precision.
  total = len(federation.splits[0].train.offsets) - 1
  bits = np.pad(bits, (0, max(0, total - len(bits))), constant_values=FULL_PRECISION)
  runs = [cohort.cohorts(getattr(split, part), groups, bits) for split in federation.splits]
  return cohort.stack(runs)


def _check_batches(options: Federated, cohorts: tuple[Cohort, ...]) -> None:
  client, size = cohort.smallest(cohorts)
  checks.require(
    options.work.partial_batches or options.work.batch_size <= size,
    "batch_size",
    options.work.batch_size,
    f"at most {size}, the training rows of client {client}; with `partial_batches` such a client "
    "trains on all of its rows in each step instead",
  )
