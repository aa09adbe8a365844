"""Set-up that has to happen before jax is imported."""

import gc
import importlib.metadata
import os
import tempfile

import pytest
from hypothesis import settings

# Several devices on one CPU, for sharding. And programs of the tests run for milliseconds but take
# seconds to compile: LLVM's costly passes, which change speed alone, are left out, each program is
# one unit of LLVM's, and where XLA still has them, older emitters of fused operations compile in
# half the time. A flag that XLA does not know ends the process.
_OLDER_EMITTERS = int(importlib.metadata.version("jaxlib").split(".")[1]) < 11
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if _OLDER_EMITTERS else []),
  ]
)

# Tracing makes many objects and hardly any garbage: looking for it took an eighth of the time.
gc.set_threshold(50_000, 20, 100)

# Many tests compile the same programs: for as long as they run, what one has compiled serves all.
_PROGRAMS = tempfile.TemporaryDirectory(prefix="programs-")
for name, value in {
  "JAX_COMPILATION_CACHE_DIR": _PROGRAMS.name,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
  os.environ.setdefault(name, value)  # a worker has its parent's

# Where in Python an operation comes from is written beside each one; no test reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Tests compare what float32 gives; by default an accelerator's products round their factors first.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

# No test asserts a time.
settings.register_profile("qupeD", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=20_000)  # for hours
settings.load_profile("qupeD")


@pytest.fixture
def no_pictures(monkeypatch):
  """Leaves out pictures at which a test does not look: they cost more than a small training."""
  from qupeD_jax.results import plots

  for name in ("clients", "curves", "weights", "centers"):
    monkeypatch.setattr(plots, name, lambda *_: None)
