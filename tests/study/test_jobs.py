"""What jobs take from the options."""

from types import SimpleNamespace

import jax
import pytest

from qupeD_jax import models
from qupeD_jax.study import jobs
from qupeD_jax.study.options import Options, replaced


@pytest.mark.parametrize(
  ("backend", "given", "expected"), [("cpu", None, 29), ("gpu", None, None), ("cpu", 3, 3)]
)
def test_small_clients_train_a_cache_full_at_a_time_unless_the_options_say(
  backend, given, expected, monkeypatch
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  federation = SimpleNamespace(models=(models.make("mlp", 10, (8, 8, 1)),), mean=0.0)
  work = jobs.local_work(replaced(Options(), clients_per_step=given), federation)
  assert work.clients_per_step == expected
