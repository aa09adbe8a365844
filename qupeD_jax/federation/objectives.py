"""What a personal model minimises: its data's loss, and how far it is from its teacher."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qupeD_jax import checks
from qupeD_jax.federation import losses
from qupeD_jax.federation.batches import Batch, Rows, train_pass
from qupeD_jax.types import Array, Dataset, Model, PyTree


class Distillation(NamedTuple):
  """How personal models learn from the global one, and it from them.

  The defaults are the paper's: one temperature and one divergence for both directions, over all
  classes.
  """

  lambda_p: Array | float = 0.5  # p in [0, 1); 0 is local training
  temperature: Array | float = 1.0  # T > 0
  own_classes: bool = False  # distil over the classes that the client has training rows of
  # What w minimises, (global logits, personal logits, T, mask) -> []: `losses.kl`, or
  # `losses.reverse_kl`, in which x teaches w as w teaches x.
  global_divergence: Callable = losses.kl
  global_temperature: Array | float | None = None  # T of w's loss; None for x's


class Teaching(NamedTuple):
  """A batch's lesson: what the teacher says of it, and how much that counts."""

  logits: Array  # [B, classes] float32, of the teacher
  lambda_p: Array | float
  temperature: Array | float
  classes: Array | None = None  # [classes] bool, those that are distilled; None for all


def check(distillation: Distillation) -> None:
  """Requires sensible distillation; traced values pass.

  Raises:
    BadInput: p or a temperature is out of range.
  """
  checks.fraction("lambda_p", distillation.lambda_p, closed=False)
  checks.positive("temperature", distillation.temperature)
  if distillation.global_temperature is not None:
    checks.positive("global_temperature", distillation.global_temperature)


def personal_loss(model: Model, batch: Batch, teaching: Teaching | None = None) -> Callable:
  """Returns variables -> (`batch_loss` [], stats) of a model on a batch, in training mode."""

  def loss_fn(variables):
    logits, stats = train_pass(model, variables, batch)
    return batch_loss(logits, batch, teaching), stats

  return loss_fn


def batch_loss(logits: Array, batch: Batch, teaching: Teaching | None = None) -> Array:
  """Returns (1 - p) f + p KD of a model's logits, [] float32; f alone without a teacher.

  Args:
    logits: [B, classes] float32.
    batch: B examples.
    teaching: of the same batch.
  """
  loss = losses.cross_entropy(logits, batch.y, batch.mask)
  if teaching is None:
    return loss
  student = losses.restrict(logits, teaching.classes)
  teacher = losses.restrict(teaching.logits, teaching.classes)
  distance = losses.distillation(student, teacher, teaching.temperature, batch.mask)
  return (1 - teaching.lambda_p) * loss + teaching.lambda_p * distance


def held_classes(model: Model, variables: PyTree, data: Dataset, rows: Rows) -> Array:
  """Tells which classes a client has training rows of.

  Args:
    model, variables: any network over the classes; only the number of its outputs matters.
    data: the training examples of all clients.
    rows: the client's.

  Returns:
    [classes] bool.
  """
  logits, _ = jax.eval_shape(lambda v: model.apply(v, data.x[:1], False), variables)
  counts = jnp.arange(len(rows.index)) < rows.size
  return jnp.zeros(logits.shape[-1], bool).at[data.y[rows.index]].max(counts)
