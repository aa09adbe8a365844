"""Paired comparisons: by hand, at the edges, and how often intervals hold the truth."""

import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.results import statistics
from qupeD_jax.results.statistics import Comparison, compare, paired_difference

NAN = np.nan


def pair(seeds=3, clients=20, shift=0.0, seed=0):
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
  assert paired_difference(ours, ours) == Comparison(0.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(("shift", "wins"), [(0.125, 1), (-0.125, -1)])
def test_a_constant_shift_is_certain(shift, wins):
  ours = np.array([[0.25, 0.5, 0.75], [0.375, 0.5, 0.625]])  # exact in binary
  assert paired_difference(ours + shift, ours) == Comparison(shift, shift, shift, wins)


def test_swapping_the_methods_turns_the_difference_around():
  ours, theirs = pair(shift=0.05)
  one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
  assert (one.wins, other.wins) == (1, -1)
  np.testing.assert_allclose(
    [other.difference, other.low, other.high], [-one.difference, -one.high, -one.low], rtol=1e-12
  )


def test_pairing_sees_what_is_small_beside_the_spread_of_clients():
  ours, theirs = pair(shift=0.03)
  assert paired_difference(ours, theirs).wins == 1
  shuffled = np.random.default_rng(1).permuted(theirs, axis=1)
  assert paired_difference(ours, shuffled).wins == 0


def test_the_same_seed_gives_the_same_interval():
  ours, theirs = pair()
  assert paired_difference(ours, theirs, seed=7) == paired_difference(ours, theirs, seed=7)
  assert paired_difference(ours, theirs, seed=7) != paired_difference(ours, theirs, seed=8)


def test_chunks_of_draws_are_of_one_distribution(monkeypatch):
  ours, theirs = pair()
  whole = paired_difference(ours, theirs, draws=20_000)
  monkeypatch.setattr(statistics, "_CHUNK", 70 * ours.size)  # 20,000 is no multiple of 70
  parts = paired_difference(ours, theirs, draws=20_000)
  np.testing.assert_allclose(parts[:3], whole[:3], atol=1e-3)


def test_as_many_draws_as_asked_for(monkeypatch):
  sizes = []
  quantile = np.quantile
  monkeypatch.setattr(np, "quantile", lambda a, q: sizes.append(a.size) or quantile(a, q))
  monkeypatch.setattr(statistics, "_CHUNK", 70 * 60)
  paired_difference(*pair(), draws=1_001)
  assert sizes == [1_001]


def test_a_wider_level_gives_a_wider_interval():
  ours, theirs = pair()
  narrow, wide = (paired_difference(ours, theirs, level=level) for level in (0.5, 0.99))
  assert wide.low < narrow.low < narrow.difference < narrow.high < wide.high


def test_one_seed_resamples_its_clients():
  ours, theirs = pair(seeds=1, clients=400)
  one = paired_difference(ours, theirs)
  error = np.std(ours - theirs, ddof=1) / np.sqrt(400)
  np.testing.assert_allclose(one.high - one.low, 2 * 1.96 * error, rtol=0.1)


def test_seeds_are_resampled_as_wholes():
  """All clients of a seed alike: the interval is over seeds, far wider than over all clients."""
  theirs = np.zeros((5, 200))
  ours = theirs + np.array([[0.1], [0.2], [0.3], [0.4], [0.5]])
  one = paired_difference(ours, theirs)
  error = np.std([0.1, 0.2, 0.3, 0.4, 0.5]) / np.sqrt(5)
  np.testing.assert_allclose(one.high - one.low, 2 * 1.96 * error, rtol=0.1)


def test_clients_left_out_are_never_drawn():
  rng = np.random.default_rng(0)
  ours, theirs = pair(seeds=3, clients=6)
  gaps = rng.permuted(np.repeat([[NAN, NAN] + [0.0] * 4], 3, axis=0), axis=1)
  whole = paired_difference(
    *(values[np.isfinite(gaps)].reshape(3, 4) for values in (ours, theirs)), draws=40_000
  )
  left = paired_difference(ours + gaps, theirs, draws=40_000)
  assert left.difference == pytest.approx(whole.difference, abs=1e-12)
  np.testing.assert_allclose(left[:3], whole[:3], atol=1e-3)


def test_seeds_count_alike_however_many_clients_they_have():
  ours = [[0.5] + [NAN] * 9, [0.25] * 10]
  one = paired_difference(ours, np.zeros((2, 10)))
  assert one == Comparison(0.375, 0.25, 0.5, 1)


def test_intervals_hold_the_truth_most_of_the_time():
  """200 experiments without a difference, in which the seeds differ as well as the clients."""
  rng = np.random.default_rng(0)
  held, won = 0, 0
  for _ in range(200):
    clients = 0.04 * rng.standard_normal((10, 15))
    seeds = 0.01 * rng.standard_normal((10, 1))
    one = paired_difference(clients + seeds, np.zeros((10, 15)), draws=400)
    held += one.low <= 0 <= one.high
    won += one.wins != 0
  assert 0.88 <= held / 200 <= 0.99
  assert held + won == 200


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


@pytest.mark.parametrize("wrong", [{"level": 0}, {"level": 1.0}, {"level": NAN}, {"draws": 0}])
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
  made = compare(known, "ours", ["theirs", "ours"], draws=100, level=0.8)
  assert list(made) == ["theirs", "ours"]
  expected = [known[method]["accuracy"] for method in ("ours", "theirs")]
  assert made["theirs"] == paired_difference(*expected, draws=100, level=0.8)
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
