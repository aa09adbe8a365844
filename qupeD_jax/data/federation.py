"""A data set dealt to clients: from two Datasets to what a federation trains and is scored on."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from qupeD_jax import checks
from qupeD_jax.data import cohort, sources, splits
from qupeD_jax.data import partition as partitions
from qupeD_jax.types import FULL_PRECISION, Cohort, Dataset

Partition = Literal["by_class", "dirichlet", "iid", "natural"]


class Federation(NamedTuple):
  """Clients, and the data they train on, validate on and are tested on."""

  train: Dataset
  test: Dataset
  split: splits.Split  # the rows of each client
  num_classes: int
  mean: tuple[float, ...]  # of the training images, per channel
  std: tuple[float, ...]

  @property
  def num_clients(self) -> int:
    """The number of clients."""
    return len(self.split.train.offsets) - 1

  @property
  def inputs(self) -> dict[str, Any]:
    """What `models.make` has to know of the data."""
    return {
      "num_classes": self.num_classes,
      "image_shape": self.train.x.shape[1:],
      "mean": self.mean,
      "std": self.std,
    }


def federate(
  train: Dataset,
  test: Dataset,
  *,
  clients: int | None = None,
  partition: Partition = "by_class",
  classes_per_client: int = 3,
  alpha: float = 0.5,
  train_share: float = 1.0,
  validation: float = 0.1,
  max_test_rows: int | None = None,
  min_test_rows: int | None = None,
  num_classes: int | None = None,
  seed: int = 0,
) -> Federation:
  """Deals a data set to clients.

  Args:
    train: the training part, which the clients share out for training and validation.
    test: the test part; every client is tested on rows like its own.
    clients: K; None for all writers (natural).
    partition: "by_class", a few classes each in random amounts; "dirichlet", proportions of classes
      at random; "iid", all alike; "natural", the writers that the data set names.
    classes_per_client: classes that each client holds (by_class).
    alpha: concentration of the classes (dirichlet).
    train_share: share of its training rows, class by class, that a client keeps.
    validation: share of its training rows that a client validates on.
    max_test_rows: where a client would have more test rows, a random choice of so many.
    min_test_rows: leave out writers that have fewer (natural); None requires some of every one.
    num_classes: of the data set; None for those that its examples show.
    seed: of everything random here.

  Raises:
    BadInput: the data are not what a Dataset has to be, an argument is out of range, or there are
      too few rows for so many clients.

  >>> train, test = sources.load("digits")
  >>> federation = federate(train, test, clients=20, classes_per_client=3)
  >>> federation.num_clients, federation.num_classes
  (20, 10)
  """
  sources.check_pair(train, test)
  divided = divide(
    train, test, clients=clients, partition=partition, classes_per_client=classes_per_client,
    alpha=alpha, train_share=train_share, validation=validation, max_test_rows=max_test_rows,
    min_test_rows=min_test_rows, seed=seed,
  )  # fmt: skip
  return of_split(train, test, divided, num_classes)


def of_split(
  train: Dataset, test: Dataset, split: splits.Split, num_classes: int | None = None
) -> Federation:
  """Makes a Federation of rows that were dealt by a partition of one's own."""
  mean, std = sources.statistics(train)
  shown = sources.num_classes(train, test)
  return Federation(train, test, split, num_classes or shown, mean, std)


def divide(
  train: Dataset,
  test: Dataset,
  *,
  clients: int | None,
  partition: Partition,
  classes_per_client: int,
  alpha: float,
  train_share: float,
  validation: float,
  max_test_rows: int | None,
  min_test_rows: int | None,
  seed: int,
) -> splits.Split:
  """Deals the rows of a data set to clients; arguments and errors as of `federate`."""
  known = get_args(Partition)
  checks.require(partition in known, "partition", partition, " or ".join(known))
  match partition:
    case "by_class":
      owner = partitions.by_class(train.y, clients, classes_per_client, seed)
      test_rows = splits.own_classes
    case "dirichlet":
      owner = partitions.dirichlet(train.y, clients, alpha, seed)
      test_rows = splits.own_proportions
    case "iid":
      owner, test_rows = partitions.iid(train.y, clients, seed), splits.own_proportions
    case "natural":
      tested = None if min_test_rows is None else test.client
      owner = partitions.natural(
        train.client, clients, tested=tested, min_test_rows=min_test_rows or 1
      )
      test_rows = splits.own_rows
  if train_share < 1:
    owner = partitions.thin(owner, train.y, train_share, seed)
  return splits.split(
    train, test, owner, test_rows, validation=validation, max_test_rows=max_test_rows, seed=seed
  )


def training(
  federation: Federation,
  bits: int | Sequence[int] = FULL_PRECISION,
  groups: Sequence[np.ndarray] | None = None,
) -> tuple[Cohort, ...]:
  """Lays out the training rows, one Cohort for each architecture.

  Args:
    federation: the clients.
    bits: precisions, 1 to 8 or 32, dealt over the clients one after the other.
    groups: client ids of each architecture, such as `cohort.assign_groups` makes; None for one.
  """
  choices = (bits,) if isinstance(bits, int) else tuple(bits)
  dealt = cohort.assign_bits(choices, federation.num_clients)
  return cohort.cohorts(federation.split.train, _groups(federation, groups), dealt)


def scored(
  federation: Federation,
  part: Literal["validation", "test"],
  groups: Sequence[np.ndarray] | None = None,
) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Lays out the rows to score clients on.

  Args:
    federation: the clients.
    part: their validation rows or their test rows.
    groups: as of `training`.

  Returns:
    The data set that the rows index, and one Cohort for each architecture.
  """
  data = {"validation": federation.train, "test": federation.test}[part]
  precision = cohort.assign_bits((FULL_PRECISION,), federation.num_clients)  # plays no part here
  rows = getattr(federation.split, part)
  return data, cohort.cohorts(rows, _groups(federation, groups), precision)


def _groups(federation: Federation, groups: Sequence[np.ndarray] | None) -> Sequence[np.ndarray]:
  return cohort.assign_groups(federation.num_clients, 1) if groups is None else groups
