"""What the package's algorithms are given, and how their results are held against the oracle's."""

import numpy as np

from qupeD_jax.federation.clients import LocalWork
from tests import oracle, toy

MODEL = toy.linear()
STEPS = {"work": LocalWork(steps=oracle.STEPS, batch_size=oracle.ROWS)}
PERSONAL = {"rates": oracle.RATES, **STEPS}  # of the algorithms by proximal steps
BOTH = {"rate": oracle.ETA, "global_rate": oracle.GLOBAL_RATE, **STEPS}  # of x and w by gradients


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def assert_model(variables, expected):
  for actual, tensor in zip(oracle.tensors(variables), expected, strict=True):
    close(actual, tensor)


def assert_models(variables, expected):
  """One model per client."""
  for actual, tensors in zip(oracle.tensors(variables), zip(*expected, strict=True), strict=True):
    close(actual, np.stack(tensors))


def assert_personal(personal, xs, cs):
  assert_models(personal.variables, xs)
  for i, centers in enumerate(cs):
    if centers is not None:
      close(personal.codebooks["dense_1/kernel"][i][: len(centers)], centers)
