"""Clients that are lost, slow or corrupt: against rounds without them, and a loop in numpy."""

import functools
import importlib
import io
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qupeD_jax import federation
from qupeD_jax.checks import BadInput
from qupeD_jax.federation import aggregators, corruption, privacy
from qupeD_jax.federation.batches import Rows
from qupeD_jax.federation.clients import LocalWork, local_round
from qupeD_jax.quantization import quantizers
from qupeD_jax.study import faults, jobs, study
from qupeD_jax.study.errors import Diverged
from qupeD_jax.study.options import Options, check, replaced
from qupeD_jax.wrappers.faults import with_dropout, with_stragglers
from qupeD_jax.wrappers.sampling import with_sampling
from tests import toy
from tests.flat import fedavg, quped

MODEL, QUANTIZER = toy.linear(), quantizers.learned_codebook(max_bits=2)
STEPS = {"work": LocalWork(steps=4, batch_size=4)}
KEY = jax.random.key(5)
DATA = jax.tree.map(jnp.asarray, toy.dataset(96))
ALGORITHMS = {
  "fedavg": fedavg(MODEL, **STEPS),
  "quped": quped(MODEL, (MODEL,), QUANTIZER, **STEPS),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def cohorts(first=(0, 1, 2, 3), second=(4, 5, 6, 7), padding=2):
  return tuple(toy.cohort(g, [2] * len(g), padding=padding) for g in (first, second))


EIGHT = (toy.cohort(range(8), [2] * 8),)
GROUPS = {"fedavg": cohorts(), "quped": EIGHT}


WRAPPED = {
  "plain": lambda algorithm: algorithm,
  "dropout": lambda algorithm: with_dropout(algorithm, 0.4),
  "stragglers": lambda algorithm: with_stragglers(algorithm, 0.5, 4),
}


@functools.cache
def compiled(name, fault):
  algorithm = WRAPPED[fault](ALGORITHMS[name])
  return jax.jit(algorithm.init), jax.jit(algorithm.round)


def one_round(name, fault, groups, key=KEY):
  init, round_fn = compiled(name, fault)
  before = init(KEY, DATA, groups)
  return jax.device_get((before, *round_fn(key, before, DATA, groups)))


# --- clients that are lost


@every_algorithm
def test_a_lost_client_leaves_no_trace(name):
  """The server has what it would have without the lost ones; they keep their state to the bit."""
  before, after, info = one_round(name, "dropout", GROUPS[name])
  lost = [i.size == 0 for i in info]
  assert 0 < sum(map(np.sum, lost)) < 8
  assert not any(np.any(i.dropped) for i in info)
  alone = tuple(
    c._replace(size=np.where(gone, 0, c.size)) for c, gone in zip(GROUPS[name], lost, strict=True)
  )
  _, expected, _ = one_round(name, "plain", alone)
  chex.assert_trees_all_equal(after.server, expected.server)
  states = zip(before.clients, after.clients, expected.clients, lost, strict=True)
  for old, new, trained, gone in states:
    take = lambda tree, mask: jax.tree.map(lambda leaf: leaf[mask], tree)
    chex.assert_trees_all_equal(take(new, gone), take(old, gone))
    chex.assert_trees_all_equal(take(new, ~gone), take(trained, ~gone))


def lost_in(key, groups):
  _, _, info = one_round("fedavg", "dropout", groups, key)
  return {int(c) for i in info for c, size in zip(i.client, i.size, strict=True) if size == 0}


def test_who_is_lost_follows_the_id_and_changes_from_round_to_round():
  moved = cohorts((2, 0, 3, 1), (7, 6, 5, 4), padding=3)
  keys = jax.random.split(KEY, 50)
  draws = [lost_in(key, cohorts()) for key in keys]
  assert [lost_in(key, moved) for key in keys[:3]] == draws[:3]
  assert len(set(map(frozenset, draws))) > 30
  assert abs(np.mean([len(draw) / 8 for draw in draws]) - 0.4) < 0.1  # of 400 draws


def test_if_all_are_lost_the_server_keeps_what_it_had():
  algorithm = with_dropout(ALGORITHMS["fedavg"], jnp.float32(1.0))
  before = algorithm.init(KEY, DATA, cohorts())
  after, _ = jax.jit(algorithm.round)(KEY, before, DATA, cohorts())
  chex.assert_trees_all_equal(after.server, before.server)


def test_the_lost_are_among_those_that_take_part():
  algorithm = with_sampling(with_dropout(ALGORITHMS["fedavg"], 0.4), 0.5)
  before = algorithm.init(KEY, DATA, cohorts())
  counts = []
  for key in jax.random.split(KEY, 20):
    _, info = jax.jit(algorithm.round)(key, before, DATA, cohorts())
    assert [len(i.client) for i in info] == [2, 2]
    counts.append(sum(int(np.sum(i.size > 0)) for i in info))
  assert len(set(counts)) > 1
  assert abs(np.mean(counts) / 4 - 0.6) < 0.2


# --- clients that are slow


def counting(tau):
  """A local round whose carry adds up 1, 10, 100 ..., and whose loss is the step's number."""
  step_fn = lambda carry, step, batch: (carry + 10.0 ** (step - 40), step.astype(jnp.float32))
  return local_round(step_fn, DATA, jnp.int32(10), LocalWork(tau, 4))


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_slow_client_takes_the_first_steps_and_no_more(steps):
  rows = Rows(jnp.arange(12), jnp.int32(12), jnp.int32(steps))
  carry, loss = jax.jit(counting(4))(KEY, jnp.float32(0), rows)
  assert carry == sum(10.0**i for i in range(steps))
  np.testing.assert_allclose(loss, np.mean(40 + np.arange(steps)), rtol=1e-6)


@every_algorithm
def test_as_many_steps_as_there_are_change_nothing(name):
  full = tuple(c._replace(steps=np.full(len(c.size), 4, np.int32)) for c in GROUPS[name])
  a, b = one_round(name, "plain", full), one_round(name, "plain", GROUPS[name])
  chex.assert_trees_all_close(a, b, **TOLERANCE)


def test_slow_clients_train_as_if_the_round_were_shorter():
  """A client of QuPeD that takes 3 steps against a round of 3 steps."""
  (group,) = EIGHT
  slow = group._replace(steps=np.int32([1, 2, 3, 4] * 2))
  before, after, _ = one_round("quped", "plain", (slow,))
  short = quped(MODEL, (MODEL,), QUANTIZER, local_steps=3, batch_size=4)
  expected, _ = jax.jit(short.round)(KEY, before, DATA, EIGHT)
  of_client = lambda state: jax.tree.map(lambda leaf: leaf[2], state.clients)
  chex.assert_trees_all_close(of_client(after), of_client(expected), **TOLERANCE)


def steps_given(key, share, tau, groups):
  """What the wrapper asks of the clients, by id."""
  seen = {}

  def round_fn(key, state, data, cohorts):
    seen.update({int(c): int(s) for g in cohorts for c, s in zip(g.client, g.steps, strict=True)})
    return state, ()

  with_stragglers(ALGORITHMS["fedavg"]._replace(round=round_fn), share, tau).round(
    key, None, None, groups
  )
  return seen


def test_every_number_of_steps_below_all_is_drawn_alike():
  (group,) = (toy.cohort(range(600), [2] * 600),)
  steps = np.array(list(steps_given(KEY, 0.5, 5, (group,)).values()))
  counts = np.bincount(steps, minlength=6)
  assert counts[0] == 0
  assert abs(counts[5] / 600 - 0.5) < 0.08
  np.testing.assert_allclose(counts[1:5] / 600, 0.125, atol=0.05)


def test_who_is_slow_follows_the_id_and_changes_from_round_to_round():
  moved = cohorts((2, 0, 3, 1), (7, 6, 5, 4), padding=3)
  assert steps_given(KEY, 0.5, 5, cohorts()) == steps_given(KEY, 0.5, 5, moved)
  other = jax.random.key(6)
  assert steps_given(KEY, 0.5, 5, cohorts()) != steps_given(other, 0.5, 5, cohorts())


# --- clients that are corrupt

BEFORE = {"w": jnp.float32([1.0, -2.0])}
SENT = tuple({"w": jnp.float32([[2, 0], [3, 1], [0, 0], [5, 5]])} for _ in range(2))


def combine(spoil, corrupt, key=KEY):
  wrapped = corruption.corrupted(aggregators.mean(), jnp.array(corrupt), spoil)
  return wrapped(key, SENT, cohorts(), BEFORE)[0]["w"]


ONE = np.arange(8) == 5  # slot 1 of the second cohort


def test_a_flipped_update_points_the_other_way():
  after = combine(corruption.sign(4.0), ONE)
  table = np.concatenate([s["w"] for s in SENT])
  table[5] = np.float32([1, -2]) - 4 * (table[5] - np.float32([1, -2]))
  np.testing.assert_allclose(after, table.mean(axis=0), rtol=1e-6)


def test_nan_is_dropped():
  after = combine(corruption.nan, ONE)
  others = np.concatenate([s["w"] for s in SENT])[~ONE]
  np.testing.assert_allclose(after, others.mean(axis=0), rtol=1e-6)


def test_noise_has_its_spread_around_the_model_that_the_server_sent():
  round_fn = jax.vmap(lambda key: combine(corruption.noise(3.0), ONE, key))
  draws = np.asarray(round_fn(jax.random.split(KEY, 200)))
  others = np.concatenate([s["w"] for s in SENT])[~ONE].sum(axis=0)
  noise = 8 * draws - others - np.float32([1, -2])
  np.testing.assert_allclose(noise.std(axis=0), 3.0, rtol=0.2)
  np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=0.7)


def test_the_corrupt_are_as_many_as_told_the_same_in_a_run_and_others_in_another():
  chosen = [np.asarray(corruption.choose(jax.random.key(seed), 50, 10)) for seed in (0, 0, 1)]
  assert [mask.sum() for mask in chosen] == [10, 10, 10]
  np.testing.assert_array_equal(chosen[0], chosen[1])
  assert (chosen[0] != chosen[2]).any()
  fewer = np.asarray(corruption.choose(jax.random.key(0), 50, 4))
  assert np.all(chosen[0][fewer])


# --- options


def test_a_method_combines_as_it_does_by_itself_unless_told_otherwise():
  options = Options()
  of = lambda **changes: faults.aggregate_of(replaced(options, **changes), 8, fedavg)
  groups = tuple(c._replace(size=np.int32([1, 2, 3, 4])) for c in cohorts())
  sizes = np.float32([1, 2, 3, 4] * 2)
  table = np.concatenate([s["w"] for s in SENT])
  after = lambda combine: np.asarray(combine(KEY, SENT, groups, BEFORE)[0]["w"])
  np.testing.assert_allclose(after(of()), sizes @ table / sizes.sum(), rtol=1e-6)
  np.testing.assert_allclose(after(of(aggregate="mean")), table.mean(axis=0), rtol=1e-6)
  np.testing.assert_array_equal(after(of(aggregate="median")), np.median(table, axis=0))
  expected = np.sort(table, axis=0)[2:-2].mean(axis=0)
  np.testing.assert_allclose(after(of(aggregate="trimmed_mean", trim=0.25)), expected, rtol=1e-6)
  noisy = of(aggregate="clipped_mean", noise_multiplier=1.0)
  assert not np.allclose(after(noisy), after(of(aggregate="clipped_mean")))
  _, kept = of(corrupt=3, corruption="nan")(KEY, SENT, groups, BEFORE)
  assert np.sum(~np.concatenate(kept)) == 3


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"dropout": 1.0}, "dropout 1.0: allowed is in [0, 1)"),
    ({"stragglers": -0.1}, "stragglers -0.1: allowed is in [0, 1]"),
    ({"stragglers": 0.5, "local_steps": 1}, "stragglers 0.5: allowed is 0 with `local_steps` 1"),
    ({"corrupt": 21}, "corrupt 21: allowed is at most 20, the `clients` that train"),
    ({"corrupt": -1}, "corrupt -1: allowed is a whole number of at least 0"),
    ({"trim": 0.5}, "trim 0.5: allowed is in [0, 0.5)"),
    ({"clip_norm": 0.0}, "clip_norm 0.0: allowed is a finite number above 0"),
    (
      {"noise_multiplier": 1.0},
      "noise_multiplier 1.0: allowed is 0 without `aggregate` clipped_mean",
    ),
    ({"delta": 1.0}, "delta 1.0: allowed is in (0, 1)"),
  ],
)
def test_bad_options_are_refused_in_one_line(values, message):
  with pytest.raises(BadInput) as raised:
    check(replaced(Options(), **values))
  assert str(raised.value) == message


# --- privacy


@pytest.mark.parametrize(("rounds", "multiplier"), [(1, 8.0), (10, 20.0), (60, 60.0)])
def test_with_everybody_taking_part_epsilon_is_that_of_one_gaussian(rounds, multiplier):
  """The best of the Renyi bounds rho a + log(1 - 1/a) - log(delta a) / (a - 1), on a grid."""
  delta, rho = 1e-5, rounds * 0.5 * (2 / multiplier) ** 2
  a = np.linspace(1.01, 300, 400_000)
  expected = np.min(rho * a + np.log1p(-1 / a) - np.log(delta * a) / (a - 1))
  found = privacy.epsilon(multiplier, clients=50, participants=50, rounds=rounds, delta=delta)
  np.testing.assert_allclose(found, expected, rtol=0.02)


def test_epsilon_falls_with_the_noise_and_with_the_share_of_those_who_take_part():
  of = lambda z, n: privacy.epsilon(z, clients=100, participants=n, rounds=20, delta=1e-4)
  assert np.inf == of(0.0, 100) > of(2.0, 100) > of(4.0, 100) > of(4.0, 10) > 0


def test_privacy_counts_the_group_of_which_the_largest_share_takes_part():
  options = replaced(Options(), aggregate="clipped_mean", noise_multiplier=4.0, participation=0.2)
  found = faults.privacy_of(options, [20, 3], rounds=5)  # 4 of 20 and 1 of 3
  assert found["delta"] == pytest.approx(23**-1.1)
  pair = {"clients": 3, "participants": 1, "rounds": 5, "delta": found["delta"]}
  assert found["epsilon"] == privacy.epsilon(4.0, **pair)
  for none in ({"noise_multiplier": 0.0}, {"aggregate": "mean"}):
    assert faults.privacy_of(replaced(options, **none), [20, 3], 5) is None


# --- a study of methods of which some diverge


def test_methods_that_diverge_are_left_out_and_the_others_trained_anew():
  trained = []

  def results_of(job):
    trained.append(list(job.variants))
    for bad in ("b", "d"):
      if bad in job.variants:
        raise Diverged(bad, f"{bad} diverged")
    return {method: {} for method in job.variants}, {}

  console = Console(record=True, file=io.StringIO())
  job = jobs.Job(None, None, dict.fromkeys("abcd"), ())
  assert study.surviving(job, results_of, console) == ({"a": {}, "c": {}}, {})
  assert trained == [list("abcd"), list("acd"), list("ac")]
  assert console.export_text() == "left out: b diverged\nleft out: d diverged\n"
  assert study.surviving(job._replace(variants={"b": None}), results_of, console) == ({}, {})


@pytest.mark.parametrize(
  ("counts", "named"),
  [
    ([(3, 3), (2, 2), (3, 0)], True),  # the last round sends nothing
    ([(3, 3), (0, 0), (3, 0)], True),
    ([(3, 3), (2, 1), (3, 0)], False),
    ([(3, 0), (0, 0), (3, 0)], False),
    ([(0, 0), (0, 0), (0, 0)], False),
  ],
)
def test_methods_whose_every_upload_was_dropped_are_named(counts, named):
  """By what metrics.jsonl has of each round: who took part, and whose upload was dropped."""
  phases = jobs.Phase(2, None, sends=True), jobs.Phase(1, None)
  job = jobs.Job(replaced(Options(), seeds=1), None, {"ours": None}, phases)
  rows = [
    {"method": "ours", "seed": 0, "round": i, "clients": clients, "dropped": dropped}
    for i, (clients, dropped) in enumerate(counts, start=1)
  ]
  assert study.untaught([job], rows) == ["ours"] * named


def test_a_start_without_noise_does_not_wait_for_the_accountant(monkeypatch):
  monkeypatch.setitem(sys.modules, privacy.__name__, None)
  monkeypatch.delattr(federation, "privacy")
  module = importlib.reload(faults)
  assert module.privacy_of(Options(), [3], rounds=2) is None
