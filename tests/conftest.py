"""Set-up that has to happen before jax is imported: several devices on one CPU, for sharding."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

from hypothesis import settings

# Compilation makes a first example slow; no test asserts a time.
settings.register_profile("qupeD", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("qupeD")
