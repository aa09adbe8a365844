"""A quadratic whose curvature is known, as a client's loss."""

import jax.numpy as jnp
import numpy as np

from qupeD_jax.federation.algorithm1 import Rule, init_personal


def quadratic(seed=0, rows=12, columns=6):
  """f(x) = ||A x - b||^2 / (2 rows), its smoothness L, and where to start."""
  rng = np.random.default_rng(seed)
  a = rng.normal(size=(rows, columns)).astype(np.float32)
  b = rng.normal(size=rows).astype(np.float32)
  smoothness = float(np.linalg.eigvalsh(a.T @ a / rows).max())
  value = lambda x: jnp.sum((a @ x - b) ** 2) / (2 * rows)
  return value, smoothness, jnp.asarray(rng.normal(size=columns).astype(np.float32))


def personal(x, quantizer, bits=1):
  variables = {"params": {"dense_1": {"kernel": x}}, "stats": {}}
  return init_personal(variables, jnp.int32(bits), Rule(quantizer))


def on_kernel(value):
  return lambda variables: (value(variables["params"]["dense_1"]["kernel"]), {})
