"""Tensors of a small model."""

import numpy as np


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
  "stem": {"kernel": normal(0, 3, 5), "bias": normal(1, 5)},
  "dense_1": {"kernel": normal(2, 5, 5), "bias": normal(3, 5)},
  "norm_1": {"scale": normal(4, 5)},
  "head": {"kernel": normal(5, 5, 2), "bias": normal(6, 2)},
}
