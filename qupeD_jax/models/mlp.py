"""A multilayer perceptron."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from qupeD_jax.models import layers
from qupeD_jax.types import Array


class MLP(nn.Module):
  """Dense layers with ReLU between them: "stem", "dense_1", ..., "head"."""

  num_classes: int
  widths: Sequence[int] = (64, 64)
  dtype: jnp.dtype = jnp.float32  # of the computation; parameters are float32

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps x [B, H, W, C] to logits [B, num_classes] float32."""
    del train  # nothing here behaves differently
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.widths):
      x = nn.relu(layers.dense(x, width, name=f"dense_{i}" if i else "stem", dtype=self.dtype))
    return layers.head(x, self.num_classes)
