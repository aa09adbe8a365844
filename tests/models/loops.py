"""A convolution as loops in double precision."""

import numpy as np


def loop_convolution(x, kernel):
  x, kernel = np.asarray(x), np.asarray(kernel)
  size, low = kernel.shape[0], kernel.shape[0] // 2
  y = np.zeros((*x.shape[:3], kernel.shape[-1]))
  for row, column in np.ndindex(*x.shape[1:3]):
    for down, right in np.ndindex(size, size):
      i, j = row + down - low, column + right - low
      if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
        y[:, row, column] += x[:, i, j] @ kernel[down, right]
  return y
