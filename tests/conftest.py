"""Set-up that has to happen before jax is imported."""

import os

# Several devices on one CPU, for sharding. And programs of the tests run for milliseconds but take
# seconds to compile: LLVM's costly passes, which change speed alone, are left out.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
)

from hypothesis import settings

# No test asserts a time.
settings.register_profile("qupeD", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("qupeD")
