"""What is refused of a user's numbers, and that traced ones pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import checks


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(1.0), jnp.float32(7.0)])
def test_a_share_may_be_0_1_or_between_or_an_array(value):
  checks.share("part", value)


@pytest.mark.parametrize("value", [-0.1, 1.01, np.float32(2.0), float("nan"), float("inf")])
def test_what_is_no_share_is_refused_in_one_line(value):
  with pytest.raises(checks.BadInput) as raised:
    checks.share("part", value)
  assert str(raised.value) == f"part {value}: allowed is in [0, 1]"
