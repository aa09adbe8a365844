"""The regulariser and its proximal maps: against grids, optimality and recorded outputs."""

import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qupeD_jax.checks import BadInput
from qupeD_jax.quantization import codebook, ops, prox

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "data" / "prox_golden_m4.npz")

finite = st.floats(-4, 4, width=32, allow_subnormal=False)
sizes = st.sampled_from([1, 2, 5, 12])  # few, since each is compiled
tensors = hnp.arrays(np.float32, sizes, elements=finite)
# Duplicates, single centers and codebooks without any are all allowed.
codebooks = st.lists(finite, min_size=0, max_size=8).map(sorted)
thresholds = st.floats(0, 3, width=32)
norms = st.sampled_from(["l1", "l2"])


def pad(centers, slots=8):
  return np.array([*centers, *[np.inf] * (slots - len(centers))], np.float32)


def scalar_regularizer(x, centers, norm):
  """R by definition, entry by entry, in double precision."""
  if not len(centers):
    return 0.0
  power = 1 if norm == "l1" else 2
  return sum(min(abs(float(v) - float(c)) ** power for c in centers) for v in x.ravel())


def forms(fn):
  """A one-tensor function as it is, compiled, and vmapped: all have to agree."""
  return {
    "plain": fn,
    "jit": jax.jit(fn),
    "vmap": lambda *args: jax.jit(jax.vmap(fn))(*[np.stack([a, a]) for a in args])[1],
  }


@given(tensors, codebooks, norms)
def test_regularizer_equals_its_definition(x, centers, norm):
  actual = prox.regularizer(x, pad(centers), norm)
  np.testing.assert_allclose(actual, scalar_regularizer(x, centers, norm), rtol=1e-5, atol=1e-6)


@given(tensors, codebooks, thresholds, norms)
def test_prox_weights_is_at_least_as_good_as_a_grid(y, centers, t, norm):
  z = np.asarray(prox.prox_weights(y, pad(centers), t, norm), np.float64)
  grid = np.concatenate([np.linspace(-5, 5, 2001), np.asarray(centers, np.float64)])
  power = 1 if norm == "l1" else 2
  for entry, value in zip(y.astype(np.float64), z, strict=True):

    def cost(v, entry=entry):
      distance = min((np.abs(v - c) for c in centers), key=np.min, default=0 * v)
      distance = np.min([np.abs(v - c) for c in centers], axis=0) if centers else distance
      return t * distance**power + (v - entry) ** 2 / 2

    assert cost(value) <= np.min(cost(np.append(grid, entry))) + 1e-4


@given(tensors, codebooks, thresholds, norms)
def test_prox_weights_is_firm(y, centers, t, norm):
  """Every entry moves toward its nearest center, never past it, and by at most t for l1."""
  z = np.asarray(prox.prox_weights(y, pad(centers), t, norm))
  q = np.asarray(codebook.nearest(y, pad(centers)))
  assert np.all((z - q) * (y - q) >= 0)
  assert np.all(np.abs(z - q) <= np.abs(y - q) + 1e-6)
  if norm == "l1":
    assert np.all(np.abs(z - y) <= t + 1e-5)


@given(tensors, codebooks, norms)
def test_infinite_threshold_snaps_to_the_centers(y, centers, norm):
  snapped = prox.prox_weights(y, pad(centers), np.inf, norm)
  np.testing.assert_array_equal(snapped, ops.hard_quantize(y, pad(centers)))


@given(tensors, codebooks, st.floats(0, 0.5, width=32), norms)
def test_prox_centers_equals_a_scalar_loop(x, centers, t, norm):
  padded = pad(centers)
  expected = []
  owner = [int(np.sum(v > np.asarray(codebook.midpoints(padded)))) for v in x]
  for j, c in enumerate(centers):
    own = [float(v) for v, o in zip(x, owner, strict=True) if o == j]
    if norm == "l1":
      expected.append(float(c) + t * (sum(v > c for v in own) - sum(v < c for v in own)))
    else:
      expected.append((float(c) + 2 * t * sum(own)) / (1 + 2 * t * len(own)))
  actual = np.asarray(prox.prox_centers(padded, x, t, norm))
  np.testing.assert_allclose(actual[: len(centers)], sorted(expected), rtol=1e-5, atol=1e-5)
  assert np.all(np.isinf(actual[len(centers) :]))


@given(tensors, st.lists(finite, min_size=1, max_size=4).map(sorted), st.floats(0, 1, width=32))
def test_l2_prox_centers_is_at_least_as_good_as_a_grid(x, centers, t):
  centers = np.asarray(centers, np.float32)
  moved = np.asarray(prox.prox_centers(centers, x, t, "l2"), np.float64)
  owner = np.asarray(codebook.assign(x, centers))
  for j, c in enumerate(centers.astype(np.float64)):
    own = x[owner == j].astype(np.float64)
    cost = lambda z, own=own, c=c: t * np.sum((own - z) ** 2) + (z - c) ** 2 / 2
    # Sorting may hand a center to its neighbour's slot, so the best of all slots counts.
    best = min(cost(z) for z in moved)
    assert best <= min(cost(z) for z in np.linspace(-5, 5, 1001)) + 1e-4


@given(tensors, codebooks, st.floats(0, 0.5, width=32))
def test_gradient_step_is_taken_from_the_owners_before_it(x, centers, t):
  before = pad(centers)
  shifted = before + np.float32(0.25)
  expected = np.asarray(prox.prox_centers(before, x, t)) + np.float32(0.25)
  actual = prox.prox_centers(shifted, x, t, before=before)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_idle_and_unused_centers_keep_their_values():
  centers = np.array([-1.0, 0.0, 5.0, np.inf], np.float32)
  x = np.array([-0.9, 0.2], np.float32)
  for norm in ("l1", "l2"):
    moved = np.asarray(prox.prox_centers(centers, x, 0.1, norm))
    assert moved[2] == 5.0
    assert np.isinf(moved[3])
    assert moved[0] > -1.0
    assert moved[1] > 0.0


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("num_centers", [2, 64])  # each form of the search
def test_plain_jit_and_vmap_agree(norm, num_centers):
  x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
  centers = np.sort(np.random.default_rng(1).normal(size=num_centers)).astype(np.float32)
  t = np.float32(0.05)
  for fn, args in (
    (lambda x, c: prox.regularizer(x, c, norm), (x, centers)),
    (lambda x, c, t: prox.prox_weights(x, c, t, norm), (x, centers, t)),
    (lambda c, x, t: prox.prox_centers(c, x, t, norm), (centers, x, t)),
  ):
    results = [np.asarray(form(*args)) for form in forms(fn).values()]
    for result in results[1:]:
      np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", range(18))
def test_prox_weights_matches_the_authors_implementation(k):
  name = str(GOLDEN["names"][k])
  t = float(GOLDEN["lamb"] * GOLDEN["lr1"])
  actual = np.asarray(prox.prox_weights(GOLDEN[f"x0/{name}"], GOLDEN["c0"][k], t))
  np.testing.assert_allclose(actual, GOLDEN[f"x1/{name}"], atol=1e-6, rtol=0)
  members = np.bincount(np.asarray(codebook.assign(actual, GOLDEN["c0"][k])).ravel(), minlength=4)
  np.testing.assert_array_equal(members, GOLDEN["members"][k])


@pytest.mark.parametrize("k", range(18))
def test_init_centers_matches_the_authors_implementation(k):
  x = GOLDEN[f"x0/{GOLDEN['names'][k]}"]
  np.testing.assert_allclose(ops.init_centers(x, 4), GOLDEN["c0"][k], atol=1e-6, rtol=0)


def test_unknown_norm_is_refused():
  with pytest.raises(BadInput, match="norm 'l3': allowed is 'l1' or 'l2'"):
    prox.regularizer(np.zeros(2, np.float32), np.zeros(2, np.float32), "l3")
