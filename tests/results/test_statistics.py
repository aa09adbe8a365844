"""Paired comparisons: by hand, at the edges, and how often intervals hold the truth."""

import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.results.statistics import Comparison, compare, paired_difference

NAN = np.nan


def pair(seeds=5, clients=20, shift=0.0, seed=0):
  """Returns accuracies of two methods; hard clients are hard for both."""
  rng = np.random.default_rng(seed)
  common = rng.uniform(0.4, 0.9, (seeds, clients))
  ours, theirs = common + 0.03 * rng.standard_normal((2, seeds, clients))
  return ours + shift, theirs


def test_the_difference_is_a_mean_over_seeds_of_means_over_clients():
  ours = [[0.9, 0.8, NAN], [0.5, 0.6, 0.7]]
  theirs = [[0.8, 0.4, 0.1], [0.5, 0.5, NAN]]
  # First seed (.1 + .4) / 2, second seed (0 + .1) / 2.
  assert paired_difference(ours, theirs).difference == pytest.approx((0.25 + 0.05) / 2)


def test_equal_methods_do_not_differ():
  ours, _ = pair()
  assert paired_difference(ours, ours) == Comparison(0.0, 0.0, 0.0, 0, None)


@pytest.mark.parametrize(("shift", "wins"), [(0.125, 1), (-0.125, -1)])
def test_a_constant_shift_is_certain(shift, wins):
  ours = np.array([[0.25, 0.5, 0.75], [0.375, 0.5, 0.625]])  # exact in binary
  assert paired_difference(ours + shift, ours) == Comparison(shift, shift, shift, wins, None)


def test_swapping_the_methods_turns_the_difference_around():
  ours, theirs = pair(shift=0.05)
  one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
  assert (one.wins, other.wins) == (1, -1)
  np.testing.assert_allclose(
    [other.difference, other.low, other.high], [-one.difference, -one.high, -one.low], rtol=1e-12
  )


def test_pairing_sees_what_is_small_beside_the_spread_of_seeds():
  theirs = np.array([[0.5, 0.4], [0.6, 0.7], [0.7, 0.6], [0.9, 0.8]])
  ours = theirs + np.array([[0.02], [0.03], [0.03], [0.04]])
  assert paired_difference(ours, theirs).wins == 1
  assert paired_difference(ours, theirs[::-1]).wins == 0


def test_a_wider_level_gives_a_wider_interval():
  ours, theirs = pair()
  narrow, wide = (paired_difference(ours, theirs, level=level) for level in (0.5, 0.99))
  assert wide.low < narrow.low < narrow.difference < narrow.high < wide.high


def test_the_interval_is_students_over_the_means_of_seeds():
  """By hand: means of 1, 2 and 6 points, standard deviation sqrt(7), quantile 4.3027."""
  ours = np.array([[0.0, 0.02, NAN], [0.01, 0.02, 0.03], [0.06, NAN, NAN]])
  one = paired_difference(ours, np.zeros((3, 3)))
  half = 4.302653 * np.sqrt(7) / np.sqrt(3)
  expected = [3, 3 - half, 3 + half]
  np.testing.assert_allclose(100 * np.array(one[:3]), expected, rtol=1e-6)
  assert one[3:] == (0, None)


def test_one_seed_has_no_interval_but_a_spread_over_its_clients():
  one = paired_difference([[0.5, 0.25, NAN, 0.75]], [[0.25, 0.25, 0.0, 0.25]])
  assert one == Comparison(0.25, None, None, 0, 0.25)
  assert paired_difference([[0.5]], [[0.25]]) == Comparison(0.25, None, None, 0, None)


@pytest.mark.parametrize(
  ("seeds", "clients", "between_seeds", "between_clients"),
  [(3, 50, 0.02, 0.03), (3, 10, 0.0, 0.1), (10, 15, 0.01, 0.04)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
  seeds, clients, between_seeds, between_clients
):
  """2,000 experiments without a difference; half a percentage point is chance."""
  rng = np.random.default_rng(0)
  noise = between_clients * rng.standard_normal((2_000, seeds, clients))
  noise += between_seeds * rng.standard_normal((2_000, seeds, 1))
  theirs = np.zeros((seeds, clients))
  found = [paired_difference(ours, theirs) for ours in noise]
  held = np.mean([one.low <= 0 <= one.high for one in found])
  assert 0.92 <= held <= 0.97
  assert held + np.mean([one.wins != 0 for one in found]) == 1


@pytest.mark.parametrize(
  ("ours", "theirs", "message"),
  [
    (np.zeros((2, 3)), np.zeros((2, 4)), r"shape \(2, 4\): allowed is \(2, 3\)"),
    (np.zeros((2, 3)), np.zeros((3, 3)), r"shape \(3, 3\): allowed is \(2, 3\)"),
    (np.zeros(3), np.zeros(3), r"shape \(3,\): allowed is \[seeds, clients\]"),
    (np.zeros((0, 3)), np.zeros((0, 3)), "at least one client"),
    (np.zeros((2, 0)), np.zeros((2, 0)), "at least one client"),
    ([[0.5, NAN], [NAN, 0.5]], [[0.5, 0.5], [0.5, NAN]], "at least one client"),
  ],
)
def test_what_cannot_be_paired_is_refused(ours, theirs, message):
  with pytest.raises(BadInput, match=message):
    paired_difference(ours, theirs)


@pytest.mark.parametrize("wrong", [{"level": 0}, {"level": 1.0}, {"level": NAN}])
def test_options_out_of_range_are_refused(wrong):
  with pytest.raises(BadInput, match=next(iter(wrong))):
    paired_difference(*pair(), **wrong)


def accuracies():
  ours, theirs = pair(seeds=2)
  return {
    "ours": {"seeds": [4, 5], "accuracy": ours},
    "theirs": {"seeds": [4, 5], "accuracy": theirs},
    "other seeds": {"seeds": [5, 4], "accuracy": theirs},
    "other clients": {"seeds": [4, 5], "accuracy": theirs[:, 1:]},
  }


def test_a_method_is_compared_with_each_rival():
  known = accuracies()
  made = compare(known, "ours", ["theirs", "ours"], level=0.8)
  assert list(made) == ["theirs", "ours"]
  expected = [known[method]["accuracy"] for method in ("ours", "theirs")]
  assert made["theirs"] == paired_difference(*expected, level=0.8)
  assert made["ours"].wins == 0


@pytest.mark.parametrize(
  ("rival", "message"),
  [
    ("unknown", "method unknown: allowed is one of ours, theirs, other seeds, other clients"),
    ("other seeds", r"seeds of other seeds \[5, 4\]: allowed is those of ours, \[4, 5\]"),
    ("other clients", "accuracies of shape"),
  ],
)
def test_only_runs_of_the_same_seeds_and_clients_are_compared(rival, message):
  with pytest.raises(BadInput, match=message):
    compare(accuracies(), "ours", [rival])
