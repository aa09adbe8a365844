"""What one client trains on: its rows of a round, and the batches drawn from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qupeD_jax.types import Array, Model, PyTree


class Rows(NamedTuple):
  """One client's training rows in a round, and how far it gets."""

  index: Array  # [N] int32, padded
  size: Array  # [] int32, how many of them are true
  steps: Array | None = None  # [] int32, local steps that it takes; None: all


class Batch(NamedTuple):
  """One step's examples of one client."""

  x: Array  # [B, H, W, C] uint8 or float32
  y: Array  # [B] int32
  mask: Array  # [B] float32, 1 for an example that counts
  key: Array | None = None  # [] of what networks draw; the same for all passes of a step


def train_pass(model: Model, variables: PyTree, batch: Batch) -> tuple[Array, PyTree]:
  """Runs a model on a batch in training mode: logits [B, classes] float32, and statistics."""
  key = (batch.key,) if model.draws else ()
  return model.apply(variables, batch.x, True, batch.mask, *key)


def draw_rows(
  key: Array, index: Array, size: Array, num_steps: int, batch_size: int
) -> tuple[Array, Array]:
  """Draws the rows of a round's batches without replacement, starting over when they run out.

  A client with fewer rows than a batch has slots sees all of its rows in every batch, once.

  Args:
    key: of this client and round.
    index: [N] int32, the client's rows, padded.
    size: [] int32, how many of them are true.
    num_steps: tau.
    batch_size: B.

  Returns:
    rows [tau, min(B, N)] int32 and mask likewise float32: slots beyond N are none that any client
    could fill. They do not depend on the padding: entry i of the random order is a function of the
    key and i alone.
  """
  slots = jnp.arange(len(index))
  order = jnp.argsort(jnp.where(slots < size, jax.random.uniform(key, slots.shape), jnp.inf))
  within = slots[:batch_size] < size
  positions = batch_size * jnp.arange(num_steps)[:, None] + slots[:batch_size]
  rows = index[order[positions % jnp.maximum(size, 1)]]
  return rows, jnp.broadcast_to(within, rows.shape).astype(jnp.float32)
