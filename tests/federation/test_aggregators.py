"""How a server combines uploads, against numpy and against itself spread over devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.federation import aggregators, corruption, exchange, server
from qupeD_jax.types import Info
from tests import toy

KEY = jax.random.key(3)
SIZES = ((5, 0, 3, 12), (7, 1))  # two cohorts, a slot without a client among them
SHAPES = {"kernel": (3, 2), "bias": (2,), "scale": ()}
AGGREGATES = {
  "mean": aggregators.mean,
  "weighted_mean": aggregators.weighted_mean,
  "median": aggregators.median,
  "trimmed_mean": functools.partial(aggregators.trimmed_mean, 0.25),
  "clipped_mean": functools.partial(aggregators.clipped_mean, 1.5),
  "noisy_mean": functools.partial(aggregators.clipped_mean, 1.5, 0.5),
}
every_aggregate = pytest.mark.parametrize("name", AGGREGATES)
# A few float32 terms of size 1, added in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def groups(sizes=SIZES):
  cohorts, first = [], 0
  for size in sizes:
    cohort = toy.cohort(range(first, first + len(size)), [32] * len(size))
    cohorts.append(cohort._replace(size=np.array(size, np.int32)))
    first += len(size)
  return tuple(cohorts)


def draw(rng, *lead):
  return {n: rng.normal(size=(*lead, *shape)).astype(np.float32) for n, shape in SHAPES.items()}


def uploads(sizes=SIZES):
  rng = np.random.default_rng(0)
  return tuple(draw(rng, len(s)) for s in sizes)


BEFORE = draw(np.random.default_rng(1))


@functools.cache
def compiled(name):
  return jax.jit(AGGREGATES[name]())


def combine(name, sent, cohorts):
  return jax.device_get(compiled(name)(KEY, sent, cohorts, BEFORE))


def flat(sent):
  """All clients in one table, [clients, entries] float64."""
  rows = [np.concatenate([u[n].reshape(len(u[n]), -1) for n in SHAPES], axis=1) for u in sent]
  return np.concatenate(rows).astype(np.float64)


def start():
  return flat([{n: BEFORE[n][None] for n in SHAPES}])[0]


def oracle(name, table, size):
  """The same of clients that all send something finite, in numpy."""
  match name:
    case "mean":
      return table.mean(axis=0)
    case "weighted_mean":
      return size @ table / size.sum()
    case "median":
      return np.median(table, axis=0)
    case "trimmed_mean":
      cut = len(table) // 4
      return np.sort(table, axis=0)[cut : len(table) - cut].mean(axis=0)
    case "clipped_mean":
      updates = table - start()
      norms = np.sqrt((updates**2).sum(axis=1))
      assert (norms > 1.5).any()
      return start() + (updates * np.minimum(1, 1.5 / norms)[:, None]).mean(axis=0)


@pytest.mark.parametrize("name", sorted(AGGREGATES.keys() - {"noisy_mean"}))
@pytest.mark.parametrize("extra", [0, 1])
def test_numpy_finds_the_same_of_those_who_sent_something(name, extra):
  """Among 5 clients and among 6: medians differ in whether one or two stand in the middle."""
  sizes = (SIZES[0], SIZES[1] + (4,) * extra)
  found, kept = combine(name, uploads(sizes), groups(sizes))
  size = np.concatenate(sizes)
  expected = oracle(name, flat(uploads(sizes))[size > 0], size[size > 0])
  np.testing.assert_allclose(flat([jax.tree.map(lambda x: x[None], found)])[0], expected, rtol=2e-6)
  np.testing.assert_array_equal(np.concatenate(kept), size > 0)


def plain_mean(sent, weights, before):
  """The mean as it is without a thought of faults."""
  total = sum(jnp.sum(w) for w in weights)
  sums = [
    jax.tree.map(lambda leaf, w=w: jnp.tensordot(w, leaf, axes=1), u)
    for u, w in zip(sent, weights, strict=True)
  ]
  divide = lambda *leaves: sum(leaves) / jnp.where(total > 0, total, 1.0)
  mean = jax.tree.map(divide, *sums)
  return jax.tree.map(lambda m, b: jnp.where(total > 0, m, b).astype(b.dtype), mean, before)


@pytest.mark.parametrize(
  ("name", "weigh"), [("mean", aggregators.uniform), ("weighted_mean", aggregators.by_size)]
)
def test_without_faults_a_mean_is_the_plain_one_to_the_bit(name, weigh):
  rng = np.random.default_rng(2)
  sent = tuple(
    {"kernel": rng.normal(size=(len(s), 40, 30)).astype(np.float32), **u}
    for s, u in zip(SIZES, uploads(), strict=True)
  )
  before = jax.tree.map(lambda leaf: leaf[0], sent[0])
  weights = tuple(map(weigh, groups()))
  expected = jax.jit(plain_mean)(sent, weights, before)
  found, _ = jax.jit(AGGREGATES[name]())(KEY, sent, groups(), before)
  chex.assert_trees_all_equal(found, expected)


BAD = ((0, 2), (1, 0))  # cohort and slot


def without(clients, name):
  """Uploads and cohorts in which these clients did not come, or stayed where they were."""
  sent, cohorts = uploads(), groups()
  for i, slot in clients:
    if name in ("clipped_mean", "noisy_mean"):
      for leaf, was in zip(sent[i].values(), BEFORE.values(), strict=True):
        leaf[slot] = was
    else:
      cohorts[i].size[slot] = 0
  return sent, cohorts


@every_aggregate
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_dropped_and_counted(name, value):
  """One entry is enough."""
  sent, cohorts = uploads(), groups()
  for i, slot in BAD:
    sent[i]["bias"][slot, 1] = value
  info = tuple(Info(c.client, c.size, c.size * 0.0, c.size < 0) for c in cohorts)
  of_key = lambda _, *rest: compiled(name)(KEY, *rest)
  after, noted = server.combine(of_key, KEY, sent, cohorts, BEFORE, info)
  assert [i.dropped.tolist() for i in noted] == [[False, False, True, False], [True, False]]
  expected, _ = combine(name, *without(BAD, name))
  chex.assert_trees_all_close(after, expected, **TOLERANCE)


@every_aggregate
def test_if_nothing_came_the_server_keeps_what_it_had(name):
  nobody = groups(((0, 0, 0, 0), (0, 0)))
  after, kept = combine(name, uploads(), nobody)
  chex.assert_trees_all_equal(after, BEFORE)
  assert not np.any(np.concatenate(kept))


@every_aggregate
def test_the_order_of_clients_changes_nothing(name):
  order = np.array([2, 0, 3, 1])
  sent, cohorts = uploads(), groups()
  moved = [jax.tree.map(lambda leaf: leaf[order], part[0]) for part in (sent, cohorts)]
  found, kept = combine(name, (moved[0], sent[1]), (moved[1], cohorts[1]))
  expected, as_sent = combine(name, sent, cohorts)
  exact = name in ("median", "trimmed_mean")  # sorted before they are added
  chex.assert_trees_all_close(found, expected, **({"rtol": 0, "atol": 0} if exact else TOLERANCE))
  np.testing.assert_array_equal(kept[0], as_sent[0][order])


@every_aggregate
def test_clients_spread_over_devices_give_what_they_give_together(name):
  """Two devices, with two clients of the first cohort and one of the second; one is corrupt."""
  sent, cohorts = uploads(), groups()
  sent[0]["bias"][0, 0] = np.nan
  corrupt = corruption.corrupted(AGGREGATES[name](), jnp.arange(6) == 3, corruption.sign())
  expected, together = jax.jit(corrupt)(KEY, sent, cohorts, BEFORE)
  spread = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), tree)
  apart = jax.jit(jax.vmap(corrupt, (None, 0, 0, None), axis_name=exchange.AXIS))
  found, kept = jax.device_get(apart(KEY, spread(sent), spread(cohorts), BEFORE))
  for device in range(2):
    here = jax.tree.map(lambda leaf, d=device: leaf[d], found)
    chex.assert_trees_all_close(here, expected, **TOLERANCE)
  for one, other in zip(kept, together, strict=True):
    np.testing.assert_array_equal(one.ravel(), other)


def test_the_noise_has_the_stated_spread_and_another_key_other_noise():
  """Nobody moves, so that what comes out is noise: z S / n = 0.5 * 1.5 / 5."""
  before = {"kernel": jnp.zeros((100, 100)), "bias": jnp.zeros((100, 100))}
  repeated = lambda n: jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape)), before)
  sent = tuple(repeated(len(sizes)) for sizes in SIZES)
  keys = jax.random.split(KEY, 2)
  run = jax.jit(jax.vmap(AGGREGATES["noisy_mean"](), (0, None, None, None)))
  drawn = np.stack(jax.tree.leaves(run(keys, sent, groups(), before)[0]))  # [leaves, keys, ...]
  np.testing.assert_allclose(drawn.std(axis=(2, 3)), 0.15, rtol=0.03)
  np.testing.assert_allclose(drawn.mean(axis=(2, 3)), 0, atol=0.006)
  assert len(np.unique(drawn)) > 0.99 * drawn.size


def test_a_wide_bound_and_no_trimming_are_the_mean():
  expected, _ = combine("mean", uploads(), groups())
  for other in (aggregators.clipped_mean(1e3), aggregators.trimmed_mean(0.0)):
    found, _ = jax.jit(other)(KEY, uploads(), groups(), BEFORE)
    chex.assert_trees_all_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(
  ("share", "number", "cut"), [(0.1, 50, 5), (0.3, 10, 3), (0.42, 150, 63), (0.49999, 2, 0)]
)
def test_a_share_of_the_clients_is_counted_as_one_would(share, number, cut):
  sent = ({"scale": np.arange(number, dtype=np.float32) ** 2},)
  (cohort,) = groups(((1,) * number,))
  found, _ = aggregators.trimmed_mean(share)(KEY, sent, (cohort,), {"scale": np.float32(0)})
  expected = np.mean(sent[0]["scale"][cut : number - cut])
  np.testing.assert_allclose(found["scale"], expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: aggregators.trimmed_mean(0.5), "share 0.5: allowed is in [0, 0.5)"),
    (lambda: aggregators.clipped_mean(0.0), "bound 0.0: allowed is a finite number above 0"),
    (
      lambda: aggregators.clipped_mean(1.0, -1.0),
      "noise_multiplier -1.0: allowed is a finite number of at least 0",
    ),
  ],
)
def test_bad_arguments_are_refused_in_one_line(build, message):
  with pytest.raises(BadInput) as raised:
    build()
  assert str(raised.value) == message
