"""How far a personal model is from a stationary point of QuPeD's objective."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from qupeD_jax import client, tree
from qupeD_jax.types import Array, Quantizer


def gradient_mapping(
  personal: client.Personal,
  loss_fn: Callable,
  step: Array,
  *,
  quantizer: Quantizer,
  rates: client.Rates,
  quantised_loss_fn: Callable | None = None,
) -> Array:
  """Measures stationarity by the squared gradient mapping of Algorithm 1.

  G = ||x - x'||^2 / eta1^2 + ||c - c'||^2 / eta2^2, where x' and c' are what one step of plain
  proximal gradient descent makes of x and, at x', of c. Without a proximal term it is the squared
  norm of the gradient; it is 0 where the step leaves the model as it is. Along the iterates, with
  step sizes below the inverse curvature, its mean falls as 1 / T (Ozkara et al., "QuPeD", NeurIPS
  2021, section 4).

  Args:
    personal: a client's x and c.
    loss_fn: variables -> (loss [], stats), the smooth loss, of all of the client's data.
    step: [] int32, at which schedules are read.
    quantizer, rates, quantised_loss_fn: as in `client.proximal_step`.

  Returns:
    G, [] float32.
  """
  optimizer = optax.identity()
  params, codebooks = personal.variables["params"], personal.codebooks
  after, _ = client.proximal_step(
    personal._replace(moments=optimizer.init(params)),
    loss_fn,
    step,
    quantizer=quantizer,
    optimizer=optimizer,
    rates=rates,
    quantised_loss_fn=quantised_loss_fn,
  )
  moved = tree.squared_distance(params, after.variables["params"])
  mapping = moved / client.value_at(rates.weights, step) ** 2
  if not codebooks:
    return mapping
  # Unused slots hold +inf, before and after.
  used = lambda books: {path: jnp.where(jnp.isfinite(c), c, 0.0) for path, c in books.items()}
  moved = tree.squared_distance(used(codebooks), used(after.codebooks))
  return mapping + moved / client.value_at(rates.centers, step) ** 2
