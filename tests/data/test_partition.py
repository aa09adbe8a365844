"""Whatever the labels, clients and seed: no row twice, nobody empty, the classes as asked for."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qupeD_jax.checks import BadInput
from qupeD_jax.data import partition, splits
from qupeD_jax.data.ragged import Ragged, class_counts, gather, rank, select, sizes
from qupeD_jax.types import Dataset

SEEDS = st.integers(0, 2**32)


@st.composite
def labels(draw, min_rows=1):
  """Labels of up to 7 classes, not all numbers taken, from few to many rows each."""
  classes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=7, unique=True))
  counts = draw(st.lists(st.integers(min_rows, 60), min_size=len(classes), max_size=len(classes)))
  rows = np.repeat(classes, counts).astype(np.int32)
  return np.random.default_rng(draw(SEEDS)).permutation(rows)


def data(y, client=None):
  return Dataset(np.zeros((len(y), 1, 1, 1), np.uint8), np.asarray(y, np.int32), client)


def owned(owner, client):
  return set(np.flatnonzero(owner == client).tolist())


def lists(ragged):
  """Returns the rows of each client as a list, the slow and plain way."""
  ends = ragged.offsets.tolist()
  return [ragged.rows[a:b].tolist() for a, b in itertools.pairwise(ends)]


def mnist_labels():
  return np.random.default_rng(0).integers(0, 10, 60000, np.int32)


# by_class


@given(labels(min_rows=20), st.integers(1, 10), st.integers(1, 7), SEEDS)
def test_every_client_holds_exactly_its_classes(y, num_clients, hand, seed):
  assume(hand <= len(np.unique(y)))
  owner = partition.by_class(y, num_clients, hand, seed)
  assert owner.shape == y.shape
  assert owner.dtype == np.int32
  for client in range(num_clients):
    assert len(np.unique(y[owner == client])) == hand
    assert len(owned(owner, client)) >= partition.LEAST
  assert set(owner.tolist()) <= set(range(-1, num_clients))


@given(labels(min_rows=20), st.integers(1, 10), st.integers(1, 7), SEEDS)
def test_classes_have_equally_many_holders_and_no_row_of_theirs_is_left(y, num_clients, hand, seed):
  classes = np.unique(y)
  assume(hand <= len(classes))
  owner = partition.by_class(y, num_clients, hand, seed)
  holders = [len(set(owner[y == label].tolist()) - {-1}) for label in classes]
  assert sum(holders) == num_clients * hand
  assert max(holders) - min(holders) <= 1
  for label, count in zip(classes, holders, strict=True):
    assert ((owner[y == label] == partition.NOBODY).all()) == (count == 0)
    assert ((owner[y == label] == partition.NOBODY).any()) == (count == 0)


def test_amounts_are_random_but_not_wild():
  y = np.repeat(np.arange(10), 5000)
  owner = partition.by_class(y, 50, 4, seed=0)
  counts = np.bincount(owner * 10 + y, minlength=500)
  counts = counts[counts > 0]
  low, high = partition.AMOUNTS
  mean = 50000 / 200
  assert mean * low / high < counts.min() < 0.7 * mean
  assert 1.3 * mean < counts.max() < mean * high / low


def test_clients_hold_many_different_sets_of_classes():
  y = np.repeat(np.arange(10), 1000)
  owner = partition.by_class(y, 50, 2, seed=0)
  found = {tuple(np.unique(y[owner == client])) for client in range(50)}
  assert len(found) > 20


@pytest.mark.parametrize(
  "make",
  [
    lambda y: partition.by_class(y, 2, 1, seed=0),
    lambda y: partition.dirichlet(y, 2, 100.0, seed=0),
    lambda y: partition.iid(y, 2, seed=0),
  ],
)
def test_rows_of_a_class_are_dealt_in_no_order(make):
  owner = make(np.zeros(1000, np.int32))
  share = (owner == 0).mean()
  assert abs((owner[:500] == 0).mean() - share) < 0.1


def test_one_class_each_still_gives_rows_to_train_and_validate():
  owner = partition.by_class(np.zeros(20, np.int32), 10, 1, seed=0)
  np.testing.assert_array_equal(np.bincount(owner), np.full(10, 2))


# dirichlet, iid, natural


@given(labels(min_rows=4), st.integers(1, 12), st.floats(1e-3, 1e3), SEEDS)
def test_dirichlet_uses_every_row_and_leaves_nobody_short(y, num_clients, alpha, seed):
  assume(num_clients * partition.LEAST <= len(y))
  owner = partition.dirichlet(y, num_clients, alpha, seed)
  assert owner.shape == y.shape
  assert owner.dtype == np.int32
  counts = np.bincount(owner, minlength=num_clients)
  assert len(counts) == num_clients
  assert counts.min() >= partition.LEAST


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e6])
def test_dirichlet_ends_at_the_extremes(alpha):
  y = np.repeat(np.arange(4), 25)
  counts = np.bincount(partition.dirichlet(y, 50, alpha, seed=0), minlength=50)
  np.testing.assert_array_equal(counts, np.full(50, 2))  # there is no other way


def test_alpha_runs_from_one_client_per_class_to_all_alike():
  y = np.repeat(np.arange(10), 1000)

  def mean_largest_share(alpha):
    owner = partition.dirichlet(y, 10, alpha, seed=0)
    counts = np.bincount(owner * 10 + y, minlength=100).reshape(10, 10)
    return (counts / counts.sum(axis=0)).max(axis=0).mean()

  assert mean_largest_share(0.01) > 0.8
  assert 0.2 < mean_largest_share(1.0) < 0.6
  assert mean_largest_share(1e5) < 0.11


def test_relief_comes_from_the_largest_clients_evenly():
  owner = np.repeat([0, 1, 2], [10, 8, 3]).astype(np.int32)
  relieved = partition._relieve(owner, 5, np.random.default_rng(0))
  np.testing.assert_array_equal(np.bincount(relieved), [7, 7, 3, 2, 2])
  assert (relieved[owner == 2] == 2).all()


@given(labels(), st.integers(1, 20), SEEDS)
def test_iid_deals_equally_many(y, num_clients, seed):
  assume(num_clients * partition.LEAST <= len(y))
  counts = np.bincount(partition.iid(y, num_clients, seed), minlength=num_clients)
  assert counts.sum() == len(y)
  assert counts.max() - counts.min() <= 1


def test_natural_clients_are_the_first_writers():
  client = np.array([5, 2, 2, 9, 5, 7])
  np.testing.assert_array_equal(partition.natural(client), [1, 0, 0, 3, 1, 2])
  np.testing.assert_array_equal(partition.natural(client, 2), [1, 0, 0, -1, 1, -1])


def test_writers_with_few_test_rows_are_left_out_before_they_are_counted():
  client, tested = np.array([7, 3, 3, 9, 5]), np.array([9, 9, 3, 8, 5, 5], np.int32)
  left = partition.natural(client, tested=tested)
  np.testing.assert_array_equal(left, [-1, 0, 0, 2, 1])
  left = partition.natural(client, 1, tested=tested, min_test_rows=2)
  np.testing.assert_array_equal(left, [-1, -1, -1, -1, 0])


def test_writers_of_any_number_find_their_test_rows():
  far = np.array([2**31 - 1, 2**31 - 1, 5, 5], np.int32)
  train, test = (
    Dataset(np.zeros((4, 1, 1, 1), np.uint8), far % 2, c) for c in (far, far[::-1] - 0)
  )
  found = splits.split(train, test, partition.natural(far), splits.own_rows)
  np.testing.assert_array_equal(np.sort(found.test.rows.reshape(2, 2)), [[0, 1], [2, 3]])


# Seeds and size


MAKERS = {
  "by_class": lambda y, seed: partition.by_class(y, 10, 3, seed),
  "dirichlet": lambda y, seed: partition.dirichlet(y, 10, 0.5, seed),
  "iid": lambda y, seed: partition.iid(y, 10, seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_decides_everything(name):
  y = mnist_labels()
  first, again, other = (MAKERS[name](y, seed) for seed in (3, 3, 4))
  np.testing.assert_array_equal(first, again)
  assert (first != other).mean() > 0.5


def test_steps_that_share_a_seed_do_not_share_their_numbers():
  first = partition.generator(0, "iid").random(4)
  assert not np.isin(first, partition.generator(0, "split").random(4)).any()


@pytest.mark.parametrize("rule", [splits.own_classes, splits.own_proportions])
@pytest.mark.parametrize("name", ["by_class", "dirichlet", "iid"])
def test_ten_thousand_clients(name, rule):
  train, test = data(mnist_labels()), data(mnist_labels()[:10000])
  make = {
    "by_class": lambda: partition.by_class(train.y, 10000, 4, seed=0),
    "dirichlet": lambda: partition.dirichlet(train.y, 10000, 0.1, seed=0),
    "iid": lambda: partition.iid(train.y, 10000, seed=0),
  }
  found = splits.split(train, test, make[name](), rule, max_test_rows=20)
  used = np.concatenate([found.train.rows, found.validation.rows])
  assert len(np.unique(used)) == len(used) == 60000
  assert all(sizes(part).min() >= 1 for part in found)
  assert sizes(found.test).max() <= 20


# Refusals


REFUSED = {
  "classes": (
    lambda y: partition.by_class(y, 5, 4, 0),
    "classes_per_client 4: allowed is at most 3, the number of classes",
  ),
  "no classes": (
    lambda y: partition.by_class(y, 5, 0, 0),
    "classes_per_client 0: allowed is a whole number of at least 1",
  ),
  "no clients": (
    lambda y: partition.by_class(y, 0, 2, 0),
    "num_clients 0: allowed is a whole number of at least 1",
  ),
  "half a client": (
    lambda y: partition.iid(y, 2.5, 0),
    "num_clients 2.5: allowed is a whole number of at least 1",
  ),
  "holders": (
    lambda y: partition.by_class(y, 14, 3, 0),
    "num_clients 14: too many, 14 clients need 1 each of the 10 rows of its class 1",
  ),
  "lone holders": (
    lambda y: partition.by_class(np.append(y, 10 * [y[-1]]), 18, 1, 0),
    "num_clients 18: too many, 6 clients need 2 each of the 10 rows of its class 1",
  ),
  "more clients than any machine has room for": (
    lambda y: partition.by_class(y, 10**18, 2, 0),
    f"num_clients {10**18}: allowed is at most 15, so that each has 2 of 30 training rows",
  ),
  "iid": (
    lambda y: partition.iid(y, 16, 0),
    "num_clients 16: allowed is at most 15, so that each has 2 of 30 training rows",
  ),
  "dirichlet": (
    lambda y: partition.dirichlet(y, 16, 0.5, 0),
    "num_clients 16: allowed is at most 15, so that each has 2 of 30 training rows",
  ),
  "dirichlet, no clients": (
    lambda y: partition.dirichlet(y, -1, 0.5, 0),
    "num_clients -1: allowed is a whole number of at least 1",
  ),
  "alpha 0": (
    lambda y: partition.dirichlet(y, 2, 0.0, 0),
    "alpha 0.0: allowed is above 0 and at most 1e+06",
  ),
  "alpha NaN": (
    lambda y: partition.dirichlet(y, 2, float("nan"), 0),
    "alpha nan: allowed is above 0 and at most 1e+06",
  ),
  "alpha infinite": (
    lambda y: partition.dirichlet(y, 2, float("inf"), 0),
    "alpha inf: allowed is above 0 and at most 1e+06",
  ),
  "nobody": (
    lambda y: partition.natural(None, 3),
    "partition natural: the data set does not say whose its examples are",
  ),
  "writers": (lambda y: partition.natural(y, 4), "num_clients 4: allowed is at most 3 here"),
  "no writers": (
    lambda y: partition.natural(y, 0),
    "num_clients 0: allowed is a whole number of at least 1",
  ),
  "seed": (
    lambda y: partition.iid(y, 2, -1),
    "seed -1: allowed is a whole number of at least 0",
  ),
  "validation 0": (
    lambda y: split_up(y, validation=0.0),
    "validation 0.0: allowed is above 0 and below 1",
  ),
  "validation 1": (
    lambda y: split_up(y, validation=1.0),
    "validation 1.0: allowed is above 0 and below 1",
  ),
  "no test rows asked": (
    lambda y: split_up(y, max_test_rows=0),
    "max_test_rows 0: allowed is a whole number of at least 1",
  ),
  "one row": (
    lambda y: split_up(y, owner=np.array([0, 0, 1, 2, 2] + [-1] * 25)),
    "num_clients 3: client 1 has 1 training rows; allowed is at least 2",
  ),
  "a gap": (
    lambda y: split_up(y, owner=np.array([0, 0, 2, 2] + [-1] * 26)),
    "num_clients 3: client 1 has 0 training rows; allowed is at least 2",
  ),
  "no owner": (
    lambda y: split_up(y, owner=np.full(30, -1)),
    "num_clients 0: no client has training rows; allowed is at least 2",
  ),
  "class without test rows": (
    lambda y: split_up(y, owner=np.repeat([0, 1, 2], 10), test=data([1, 2, 2])),
    "num_clients 3: client 2 has 0 test rows; allowed is at least 1",
  ),
  "proportions without test rows": (
    lambda y: split_up(y, np.repeat([0, 1, 2], 10), splits.own_proportions, test=data([1, 2, 2])),
    "num_clients 3: client 2 has 0 test rows; allowed is at least 1",
  ),
}


def split_up(y, owner=None, rule=splits.own_classes, test=None, **options):
  owner = partition.iid(y, 3, seed=0) if owner is None else owner
  return splits.split(data(y), data(y) if test is None else test, owner, rule, **options)


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
  call, expected = REFUSED[case]
  with pytest.raises(BadInput) as caught:
    call(np.repeat([1, 2, 5], 10).astype(np.int32))
  assert str(caught.value) == expected


@given(labels(), st.integers(1, 60), st.integers(1, 7), SEEDS)
def test_by_class_either_serves_everybody_or_refuses(y, num_clients, hand, seed):
  counts = np.bincount(y)[np.unique(y)]
  holders = -(-num_clients * hand // len(counts))  # of a class, at most
  try:
    owner = partition.by_class(y, num_clients, hand, seed)
  except BadInput:
    assert hand > len(counts) or counts.min() < holders * (2 if hand == 1 else 1)
    return
  for client in range(num_clients):
    assert len(np.unique(y[owner == client])) == hand


# split


@given(labels(), st.integers(1, 8), st.floats(0.01, 0.99), SEEDS)
def test_train_and_validation_divide_each_client(y, num_clients, validation, seed):
  assume(num_clients * partition.LEAST <= len(y))
  owner = partition.iid(y, num_clients, seed)
  owner[owner == 0] = np.where(np.arange((owner == 0).sum()) < 2, 0, -1)  # some rows unused
  found = split_up(y, owner, validation=validation, seed=seed)
  for client, (train, held_out) in enumerate(
    zip(lists(found.train), lists(found.validation), strict=True)
  ):
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == owned(owner, client)
    count = len(train) + len(held_out)
    assert len(held_out) == min(max(round(Fraction(str(validation)) * count), 1), count - 1)
  assert found.train.rows.dtype == found.validation.rows.dtype == np.int32


def test_validation_rows_are_drawn_at_random():
  y = np.zeros(1000, np.int32)
  found = split_up(y, np.zeros(1000, np.int32), validation=0.5)
  assert 200 < (found.validation.rows < 500).sum() < 300


def test_split_follows_its_seed():
  y = mnist_labels()
  first, again, other = (split_up(y, seed=seed, max_test_rows=99) for seed in (3, 3, 4))
  for one, same, different in zip(first, again, other, strict=True):
    np.testing.assert_array_equal(one.rows, same.rows)
    assert (one.rows != different.rows).mean() > 0.5


@given(labels(min_rows=20), labels(), st.integers(1, 3), SEEDS)
def test_own_classes_are_all_test_rows_of_them(y, test_y, hand, seed):
  assume(hand <= len(np.unique(y)))
  owner = partition.by_class(y, 5, hand, seed)
  held = gather(owner, 5, np.random.default_rng(0))
  found = splits.own_classes(data(y), data(test_y), held, None, np.random.default_rng(seed))
  for client, rows in enumerate(lists(found)):
    assert sorted(rows) == np.flatnonzero(np.isin(test_y, y[owner == client])).tolist()


@given(labels(min_rows=4), labels(), st.integers(1, 6), st.floats(0.05, 10), SEEDS)
def test_own_proportions_are_kept_without_a_row_twice(y, test_y, num_clients, alpha, seed):
  assume(num_clients * partition.LEAST <= len(y))
  owner = partition.dirichlet(y, num_clients, alpha, seed)
  held = gather(owner, num_clients, np.random.default_rng(0))
  found = splits.own_proportions(data(y), data(test_y), held, None, np.random.default_rng(seed))
  available = np.bincount(test_y, minlength=10)
  for client, rows in enumerate(lists(found)):
    assert len(set(rows)) == len(rows)
    counts = np.bincount(y[owner == client], minlength=10) * (available > 0)
    scale = min([1, *(available[c] / counts[c] for c in np.flatnonzero(counts))])
    drawn = np.bincount(test_y[rows], minlength=10)
    assert (drawn[counts > 0] >= 1).all()
    np.testing.assert_array_less(np.abs(drawn - scale * counts), 1)


def test_own_proportions_take_as_many_test_as_training_rows_if_there_are():
  y, test_y = np.repeat([0, 1], [30, 10]), np.repeat([0, 1], [100, 100])
  found = split_up(y, np.zeros(40, np.int32), splits.own_proportions, data(test_y))
  np.testing.assert_array_equal(class_counts(found.test, test_y, 2), [[30, 10]])
  found = split_up(y, np.zeros(40, np.int32), splits.own_proportions, data(test_y[85:]))
  np.testing.assert_array_equal(class_counts(found.test, test_y[85:], 2), [[15, 5]])


@given(labels(min_rows=20), labels(), st.integers(1, 15), SEEDS)
def test_a_cap_takes_a_part_in_proportion(y, test_y, cap, seed):
  owner = partition.by_class(y, 5, 1 + (len(np.unique(y)) > 1), seed)
  held = gather(owner, 5, np.random.default_rng(0))
  args = data(y), data(test_y), held
  everything = splits.own_classes(*args, None, np.random.default_rng(seed))
  found = splits.own_classes(*args, cap, np.random.default_rng(seed))
  for rows, all_rows in zip(lists(found), lists(everything), strict=True):
    assert len(set(rows)) == len(rows) == min(cap, len(all_rows))
    assert set(rows) <= set(all_rows)
    drawn, most = (
      np.bincount(test_y[rows], minlength=10),
      np.bincount(test_y[all_rows], minlength=10),
    )
    share = min(1, cap / max(len(all_rows), 1))
    np.testing.assert_array_less(np.abs(drawn - share * most), 1 + 1e-9)


def test_capped_rows_are_all_equally_likely():
  y, test_y = np.repeat([0, 1], 400), np.repeat([0, 1], [20, 40])
  owner = partition.iid(y, 200, seed=0)
  found = split_up(y, owner, test=data(test_y), max_test_rows=7)
  chosen = np.bincount(found.test.rows, minlength=60)
  mean = 200 * 7 / 60
  assert chosen.min() > 0.4 * mean
  assert chosen.max() < 1.6 * mean
  found = split_up(y, owner, test=data(test_y), max_test_rows=1)
  assert 0.2 < (test_y[found.test.rows] == 0).mean() < 0.5


def test_natural_clients_are_tested_on_their_own_rows():
  writer = np.array([3, 3, 8, 8, 8, 5, 5], np.int32)
  test_writer = np.array([8, 3, 5, 8, 1, 9, 8], np.int32)  # 1 and 9 wrote no training rows
  train, test = data(np.zeros(7), writer), data(np.zeros(7), test_writer)
  found = splits.split(train, test, partition.natural(writer), splits.own_rows)
  assert [sorted(rows) for rows in lists(found.test)] == [[1], [2], [0, 3, 6]]
  found = splits.split(train, test, partition.natural(writer, 2), splits.own_rows)
  assert lists(found.test) == [[1], [2]]
  owner = partition.natural(writer)
  found = splits.split(train, test, owner, splits.own_rows, max_test_rows=2)
  assert [len(rows) for rows in lists(found.test)] == [1, 1, 2]
  assert set(lists(found.test)[2]) < {0, 3, 6}


def test_a_writer_without_test_rows_is_refused():
  writer = np.array([0, 0, 1, 1], np.int32)
  train, test = data(np.zeros(4), writer), data(np.zeros(2), np.zeros(2, np.int32))
  with pytest.raises(BadInput, match=r"^num_clients 2: client 1 has 0 test rows"):
    splits.split(train, test, partition.natural(writer), splits.own_rows)


# report and ragged rows


def test_report_counts_what_everybody_got():
  y, test_y = np.array([0, 0, 1, 1, 1, 1]), np.array([1, 0, 1])
  found = splits.Split(
    Ragged(np.array([0, 2, 4, 5]), np.array([0, 1, 4])),
    Ragged(np.array([1, 3]), np.array([0, 1, 2])),
    Ragged(np.array([1, 0, 2]), np.array([0, 1, 3])),
  )
  counted = splits.report(found, y, test_y, num_classes=3)
  np.testing.assert_array_equal(counted.train_classes, [[1, 0, 0], [0, 3, 0]])
  np.testing.assert_array_equal(counted.test_classes, [[1, 0, 0], [0, 2, 0]])
  np.testing.assert_array_equal(counted.train, [1, 3])
  np.testing.assert_array_equal(counted.validation, [1, 1])
  np.testing.assert_array_equal(counted.test, [1, 2])
  assert splits.summary(counted).splitlines() == [
    "2 clients with 1 classes each",
    "train rows per client: 1 to 3 (mean 2.0)",
    "validation rows per client: 1",
    "test rows per client: 1 to 2 (mean 1.5)",
  ]


@given(st.lists(st.integers(-1, 5), max_size=40), SEEDS)
def test_gather_and_select_agree_with_plain_lists(owner, seed):
  owner = np.array(owner, np.int32)
  rng = np.random.default_rng(seed)
  found = gather(owner, 6, rng)
  for client, rows in enumerate(lists(found)):
    assert set(rows) == owned(owner, client)
    assert len(rows) == len(set(rows))
  expected = [place for rows in lists(found) for place in range(len(rows))]
  np.testing.assert_array_equal(rank(found), expected)
  keep = rng.random(len(found.rows)) < 0.5
  kept = set(found.rows[keep].tolist())
  assert lists(select(found, keep)) == [[r for r in rows if r in kept] for rows in lists(found)]


# --- thinner data


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_thinning_keeps_a_share_of_every_class_of_every_client(share):
  labels = np.repeat(np.arange(5), 40)
  owner = partition.by_class(labels, 6, 3, seed=1)
  owner[:7] = partition.NOBODY
  thinned = partition.thin(owner, labels, share, seed=2)
  kept = thinned != partition.NOBODY
  np.testing.assert_array_equal(thinned[kept], owner[kept])
  for client in range(6):
    for label in range(5):
      had, has = (np.sum((o == client) & (labels == label)) for o in (owner, thinned))
      assert has == math.ceil(Fraction(str(share)) * int(had))


def test_seven_percent_of_100_rows_are_7():
  rows = np.zeros(100, np.int32)
  assert np.sum(partition.thin(rows, rows, 0.07, seed=0) == 0) == 7


def test_thinning_follows_its_seed():
  labels, owner = np.zeros(50, np.int32), np.zeros(50, np.int32)
  one, same, other = (partition.thin(owner, labels, 0.5, seed) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.any(one != other)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, np.nan])
def test_thinning_by_a_share_out_of_range_is_refused(share):
  with pytest.raises(BadInput, match=r"^share"):
    partition.thin(np.zeros(4, np.int32), np.zeros(4, np.int32), share, seed=0)
