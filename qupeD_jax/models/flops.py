"""How many floating-point operations a network's forward pass takes, by its mathematics."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend import core

from qupeD_jax.types import Model


def forward_flops(model: Model, image_shape: tuple[int, int, int]) -> int:
  """Counts the forward pass of one example: two per multiply-add of its products.

  Matrix products and convolutions are counted by their shapes, SAME padding included as is usual;
  elementwise work, a few percent, is not. What is counted is what `model` carries out, and some
  forms of a convolution pad their kernels with zeros: pass a network built with conv_form="lax".

  Args:
    model: the network.
    image_shape: (H, W, C).

  >>> from qupeD_jax import models
  >>> forward_flops(models.make("mlp", 10, (28, 28, 1), conv_form="lax"), (28, 28, 1))
  109824
  """
  variables = jax.eval_shape(model.init, jax.random.key(0))
  x = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
  traced = jax.make_jaxpr(lambda variables, x: model.apply(variables, x, False))(variables, x)
  return _count(traced.jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  """Sums over equations; the body of a scan counts once per step, every branch of a cond once."""
  return sum(_count_one(eqn) for eqn in jaxpr.eqns)


def _count_one(eqn: core.JaxprEqn) -> int:
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
  if eqn.primitive.name == "conv_general_dilated":
    kernel = eqn.invars[1].aval
    features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * eqn.outvars[0].aval.size * (kernel.size // features)
  steps = eqn.params.get("length", 1)
  return steps * sum(_count(inner) for inner in _inner(eqn))


def _inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
  """Yields the jaxprs an equation carries: of a jit, a custom gradient, a loop."""
  kinds = (core.Jaxpr, core.ClosedJaxpr)
  for leaf in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: isinstance(leaf, kinds)):
    if isinstance(leaf, kinds):
      yield leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
