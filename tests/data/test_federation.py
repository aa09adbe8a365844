"""Data dealt to clients in one call: the partitions as they are, their rows, what models need."""

import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.data import cohort, federation, partition, splits
from qupeD_jax.types import Dataset


def data(num_rows=120, classes=4) -> Dataset:
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (num_rows, 4, 4, 1)).astype(np.uint8)
  return Dataset(x, np.arange(num_rows, dtype=np.int32) % classes, np.arange(num_rows) // 20)


TRAIN, TEST = data(), data(80)
TRAIN = TRAIN._replace(client=TRAIN.client.astype(np.int32))
TEST = TEST._replace(client=(np.arange(80) % 6).astype(np.int32))
OWNERS = {
  "by_class": lambda: partition.by_class(TRAIN.y, 5, 2, 7),
  "dirichlet": lambda: partition.dirichlet(TRAIN.y, 5, 0.3, 7),
  "iid": lambda: partition.iid(TRAIN.y, 5, 7),
  "natural": lambda: partition.natural(TRAIN.client, 5),
}
ROWS = {"by_class": splits.own_classes, "natural": splits.own_rows}


@pytest.mark.parametrize("name", OWNERS)
def test_it_deals_by_the_partition_of_that_name(name):
  found = federation.federate(
    TRAIN, TEST, clients=5, partition=name, classes_per_client=2, alpha=0.3, seed=7
  )
  test_rows = ROWS.get(name, splits.own_proportions)
  expected = splits.split(TRAIN, TEST, OWNERS[name](), test_rows, validation=0.1, seed=7)
  for ours, theirs in zip(found.split, expected, strict=True):
    np.testing.assert_array_equal(ours.rows, theirs.rows)
    np.testing.assert_array_equal(ours.offsets, theirs.offsets)


def test_it_knows_what_a_model_needs():
  found = federation.federate(TRAIN, TEST, clients=3, classes_per_client=2)
  assert found.inputs["num_classes"] == 4
  assert found.inputs["image_shape"] == (4, 4, 1)
  np.testing.assert_allclose(found.inputs["mean"], TRAIN.x.mean(), rtol=1e-6)
  np.testing.assert_allclose(found.inputs["std"], TRAIN.x.std(), rtol=1e-6)


def test_its_cohorts_hold_the_rows_of_the_split_and_precisions_one_after_the_other():
  found = federation.federate(TRAIN, TEST, clients=4, classes_per_client=2)
  groups = cohort.assign_groups(4, 2, num_bits=2)
  for part, cohorts in {
    "train": federation.training(found, (2, 32), groups),
    "validation": federation.scored(found, "validation", groups)[1],
    "test": federation.scored(found, "test", groups)[1],
  }.items():
    rows = getattr(found.split, part)
    assert [c.client.tolist() for c in cohorts] == [[0, 1], [2, 3]]
    for c in cohorts:
      for index, size, client in zip(c.index, c.size, c.client, strict=True):
        own = rows.rows[rows.offsets[client] : rows.offsets[client + 1]]
        np.testing.assert_array_equal(index[:size], own)
  assert [c.bits.tolist() for c in federation.training(found, (2, 32), groups)] == [[2, 32]] * 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"partition": "random"}, "partition random: allowed is by_class or dirichlet or iid or natur"),
    ({"clients": 0}, "num_clients 0"),
    ({"train_share": 0.0}, "share 0.0"),
    ({"validation": 1.0}, "validation 1.0"),
  ],
)
def test_bad_input_is_one_line(changes, message):
  with pytest.raises(BadInput, match=message):
    federation.federate(TRAIN, TEST, **{"clients": 3, "classes_per_client": 2} | changes)


def test_images_of_different_shapes_are_refused():
  with pytest.raises(BadInput, match=r"test\.x"):
    federation.federate(TRAIN, TEST._replace(x=TEST.x[:, :2]), clients=3, classes_per_client=2)
