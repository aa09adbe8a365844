"""Counts that are shares: exact for the decimals that are typed, and derived once."""

import decimal
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import shares
from qupeD_jax.federation import aggregators, privacy
from qupeD_jax.study import faults
from qupeD_jax.study.options import Options, replaced
from qupeD_jax.wrappers import sampling
from tests import toy

WAYS = {
  decimal.ROUND_HALF_EVEN: shares.rounded,
  decimal.ROUND_CEILING: shares.rounded_up,
  decimal.ROUND_FLOOR: shares.rounded_down,
}


@pytest.mark.parametrize("way", WAYS)
def test_counts_are_those_of_decimal_arithmetic(way):
  """Shares of up to four digits, of which floats reach the wrong side of many."""
  rng = np.random.default_rng(0)
  typed = [f"0.{percent:02}" for percent in range(1, 100)]
  typed += [f"0.{rng.integers(1, 10_000):04}" for _ in range(100)]
  for text in typed:
    for count in rng.integers(1, 2_000, 40):
      expected = (Decimal(text) * int(count)).quantize(Decimal(1), way)
      assert WAYS[way](float(text), count) == expected, (text, count)


@pytest.mark.parametrize("fraction", [0.09, 0.07, 0.35, 0.5, 0.999, 1e-4])
def test_as_many_are_drawn_as_are_accounted_for(fraction, monkeypatch):
  """Of 1 to 700 true clients, of which 650 at 0.09 are 58.5."""
  slots = 700

  def drawn(number):
    cohort = toy.cohort(range(slots), [32] * slots, rows_per_client=1)
    cohort = cohort._replace(size=(jnp.arange(slots) < number).astype(jnp.int32))
    return jnp.sum(sampling.draw_slots(jax.random.key(0), cohort, fraction)[1])

  numbers = np.arange(1, slots + 1)
  found = jax.jit(lambda numbers: jax.lax.map(drawn, numbers))(numbers)
  accounted = []
  monkeypatch.setattr(
    privacy, "epsilon", lambda _, participants, **rest: accounted.append(participants) or 0.0
  )
  options = replaced(
    Options(), aggregate="clipped_mean", noise_multiplier=1.0, participation=fraction
  )
  faults.privacy_of(options, numbers.tolist(), rounds=1)
  np.testing.assert_array_equal(found, accounted)


@pytest.mark.parametrize(
  ("share", "number"), [(0.42, 150), (0.49999, 2), (0.1, 50), (0.3, 10), (0.07, 100)]
)
def test_a_traced_share_is_counted_alike(share, number):
  """Variants of a job may differ in it: float32 knows 0.42 of 150 as a little less than 63."""
  cohort = toy.cohort(range(number), [32] * number, 1)
  sent = ({"scale": jnp.arange(number, dtype=jnp.float32) ** 2},)

  def combine(share):
    trimmed = aggregators.trimmed_mean(share)
    return trimmed(None, sent, (cohort,), {"scale": jnp.float32(0)})[0]["scale"]

  np.testing.assert_allclose(combine(jnp.float32(share)), combine(share), rtol=1e-6)
