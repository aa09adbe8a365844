"""Cohorts hold each client's rows, in any grouping and after any filling up."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qupeD_jax.checks import BadInput
from qupeD_jax.data import cohort as layout
from qupeD_jax.data.ragged import Ragged, offsets

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def ragged(counts, seed=0):
  rows = np.random.default_rng(seed).permutation(1000)[: sum(counts)]
  return Ragged(rows.astype(np.int32), offsets(np.array(counts)))


def rows_of(found):
  """Returns {client: its rows}, read from cohorts the plain way."""
  return {
    int(client): index[:size].tolist()
    for cohort in found
    for client, size, index in zip(cohort.client, cohort.size, cohort.index, strict=True)
    if size > 0
  }


def expected_rows(source):
  parts = np.split(source.rows, source.offsets[1:-1])
  return {client: rows.tolist() for client, rows in enumerate(parts)}


# Groups and bits


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 20))
def test_groups_divide_clients_and_meet_every_precision(num_groups, num_bits, more):
  num_clients = num_groups * num_bits + more
  groups = layout.assign_groups(num_clients, num_groups, num_bits)
  bits = layout.assign_bits(range(1, num_bits + 1), num_clients)
  assert len(groups) == num_groups
  assert sorted(np.concatenate(groups).tolist()) == list(range(num_clients))
  for group in groups:
    assert set(bits[group].tolist()) == set(range(1, num_bits + 1))


def test_bits_are_dealt_one_after_the_other():
  np.testing.assert_array_equal(layout.assign_bits((32, 1, 2), 7), [32, 1, 2, 32, 1, 2, 32])
  assert layout.assign_bits((32,), 2).dtype == np.int32


# Cohorts


@given(COUNTS, st.integers(1, 3), st.integers(0, 2**32))
def test_every_client_keeps_its_rows(counts, num_groups, seed):
  source = ragged(counts, seed)
  order = np.random.default_rng(seed).permutation(len(counts))
  groups = [group for group in np.array_split(order, num_groups) if len(group)]
  bits = layout.assign_bits((1, 2, 32), len(counts))
  found = layout.cohorts(source, groups, bits)
  assert rows_of(found) == expected_rows(source)
  for cohort, group in zip(found, groups, strict=True):
    assert [field.dtype for field in jax.tree.leaves(cohort)] == [np.int32] * 4
    assert cohort.index.shape == (len(group), max(counts[client] for client in group))
    np.testing.assert_array_equal(cohort.client, group)
    np.testing.assert_array_equal(cohort.bits, bits[group])


def test_filling_is_the_first_row_of_the_same_client():
  source = Ragged(np.array([5, 6, 7, 8], np.int32), np.array([0, 1, 4]))
  (found,) = layout.cohorts(source, [np.array([1, 0])], np.array([1, 2]), pad_to=4)
  np.testing.assert_array_equal(found.index, [[6, 7, 8, 6], [5, 5, 5, 5]])
  np.testing.assert_array_equal(found.size, [3, 1])


@given(st.lists(COUNTS, min_size=1, max_size=3), st.integers(0, 2**32))
def test_stacked_runs_can_be_read_apart_again(runs, seed):
  runs = [run[: min(map(len, runs))] for run in runs]
  num_clients = len(runs[0])
  sources = [ragged(run, seed + i) for i, run in enumerate(runs)]
  groups = [np.arange(num_clients)]
  bits = layout.assign_bits((2,), num_clients)
  (found,) = layout.stack([layout.cohorts(source, groups, bits) for source in sources])
  assert found.index.shape == (len(runs), num_clients, max(map(max, runs)))
  assert found.size.shape == found.client.shape == found.bits.shape == (len(runs), num_clients)
  for i, source in enumerate(sources):
    assert rows_of([jax.tree.map(lambda field, i=i: field[i], found)]) == expected_rows(source)
  assert set(np.unique(found.index)) <= {row for source in sources for row in source.rows}


@pytest.mark.parametrize("stacked", [False, True])
def test_slots_without_data_come_last_and_collide_with_nobody(stacked):
  found = layout.cohorts(ragged([2, 3]), [np.array([0, 1])], np.array([1, 2]))
  if stacked:
    found = layout.stack([found, found])
  padded = layout.pad_clients(found[0], 5)
  lead = found[0].size.shape[:-1]
  assert padded.index.shape == (*lead, 5, 3)
  for before, after in zip(*map(jax.tree.leaves, (found[0], padded)), strict=True):
    assert after.dtype == np.int32
    np.testing.assert_array_equal(
      after[0, :2] if stacked else after[:2], before[0] if stacked else before
    )
  np.testing.assert_array_equal(padded.size[..., 2:], np.zeros((*lead, 3)))
  np.testing.assert_array_equal(padded.client[..., 2:], np.full((*lead, 3), -1))
  np.testing.assert_array_equal(padded.bits[..., 2:], np.full((*lead, 3), 32))
  np.testing.assert_array_equal(padded.index[..., 2:, :], np.zeros((*lead, 3, 3)))


def test_smallest_client_is_a_real_one():
  groups = [np.array([0, 2]), np.array([1, 3])]
  found = layout.cohorts(ragged([4, 3, 5, 2]), groups, layout.assign_bits((2,), 4))
  padded = tuple(layout.pad_clients(cohort, 4) for cohort in found)
  assert layout.smallest(padded) == (3, 2)
  assert layout.smallest(layout.stack([padded, padded])) == (3, 2)
  assert layout.smallest(found[:1]) == (0, 4)
  assert [type(value) for value in layout.smallest(found)] == [int, int]


# Refusals


BITS = np.array([2, 2])
REFUSED = {
  "too few clients to cross": (
    lambda: layout.assign_groups(5, 2, 3),
    "num_clients 5: allowed is at least 6, so that each of 2 models meets 3 precisions",
  ),
  "bits": (
    lambda: layout.assign_bits((2, 9), 4),
    "bits 9: allowed is 1 to 8, or 32 for full precision",
  ),
  "no bits": (lambda: layout.assign_bits((), 4), "bits (): allowed is at least one precision"),
  "bits of other clients": (
    lambda: layout.cohorts(ragged([2, 3]), [np.array([0, 1])], np.array([2])),
    "bits 1: allowed is 2, one a client",
  ),
  "client without rows": (
    lambda: layout.cohorts(ragged([2, 0]), [np.array([0, 1])], BITS),
    "client 1: it has no rows",
  ),
  "narrow": (
    lambda: layout.cohorts(ragged([2, 3]), [np.array([0, 1])], BITS, pad_to=2),
    "pad_to 2: allowed is at least 3, the most rows",
  ),
  "empty group": (
    lambda: layout.cohorts(ragged([2, 3]), [np.array([0, 1]), np.array([], int)], BITS),
    "group 1 of no clients: allowed is at least one client",
  ),
  "client twice": (
    lambda: layout.cohorts(ragged([2, 3]), [np.array([0, 1]), np.array([1])], BITS),
    "groups [0, 1, 1]: allowed is client ids below 2, none twice",
  ),
  "client unknown": (
    lambda: layout.cohorts(ragged([2, 3]), [np.array([0, 2])], BITS),
    "groups [0, 2]: allowed is client ids below 2, none twice",
  ),
  "runs of other sizes": (
    lambda: layout.stack(
      [
        layout.cohorts(ragged([2, 3]), [np.array([0, 1])], BITS),
        layout.cohorts(ragged([2, 3]), [np.array([0])], BITS),
      ]
    ),
    "clients of each run [(1,), (2,)]: allowed is the same for all runs",
  ),
  "slots": (
    lambda: layout.pad_clients(layout.cohorts(ragged([2, 3]), [np.array([0, 1])], BITS)[0], 1),
    "clients to pad to 1: allowed is a whole number of at least 2",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
  call, expected = REFUSED[case]
  with pytest.raises(BadInput) as caught:
    call()
  assert str(caught.value) == expected
