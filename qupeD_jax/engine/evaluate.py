"""Scores on the device: the accuracy of every client's model on the client's own rows."""

import jax
import jax.numpy as jnp

from qupeD_jax.federation.clients import map_clients
from qupeD_jax.types import Algorithm, Array, Cohort, Dataset, FedState, Scored

_EXAMPLES = 5_000  # in one pass, of as many clients as that allows: memory stays bounded


def accuracies(
  algorithm: Algorithm,
  key: Array,
  state: FedState,
  data: Dataset,
  cohorts: tuple[Cohort, ...],
  scored_data: Dataset,
  scored_cohorts: tuple[Cohort, ...],
  rows_per_step: int = 50,
) -> dict[str, tuple[Array, ...]]:
  """Scores all that an algorithm has to show.

  Args:
    algorithm: what trained `state`.
    key: for algorithms that personalise at random.
    state: of the federation.
    data, cohorts: the training rows, for algorithms that adapt before they are scored.
    scored_data, scored_cohorts: the rows to score on; the same clients in the same slots.
    rows_per_step: rows of each client, or of the data set for a shared model, in one pass, which
      takes in so many clients as make it 5,000 rows.

  Returns:
    By name ("personal", ...), per cohort: [K] float32, in [0, 1]; 0 for a client without rows.
  """
  shown = algorithm.personalize(key, state, data, cohorts)
  return {
    name: tuple(
      accuracy(scored, scored_data, cohort, rows_per_step)
      for scored, cohort in zip(models, scored_cohorts, strict=True)
    )
    for name, models in shown.items()
  }


def accuracy(scored: Scored, data: Dataset, cohort: Cohort, rows_per_step: int = 50) -> Array:
  """Scores the models of one cohort: the share of a client's rows classified right, [K] float32."""
  if not scored.stacked:
    # Clients share rows: one pass over the data set answers for all of them.
    right = _is_right(scored, scored.variables, data, jnp.arange(len(data.y)), rows_per_step)
    hits = right[cohort.index]
  else:
    hits = map_clients(
      lambda v, rows: _is_right(scored, v, data, rows, rows_per_step),
      (scored.variables, cohort.index),
      max(1, _EXAMPLES // rows_per_step),
    )
  counts = jnp.arange(cohort.index.shape[1]) < cohort.size[:, None]
  return jnp.sum(hits * counts, axis=1) / jnp.maximum(cohort.size, 1)


def _is_right(scored: Scored, variables, data: Dataset, rows: Array, rows_per_step: int) -> Array:
  """Classifies rows [N] int32 of a data set in pieces: 1.0 where the label is hit, [N] float32."""
  num_rows = len(rows)
  size = min(rows_per_step, num_rows)
  pieces = jnp.pad(rows, (0, -num_rows % size)).reshape(-1, size)

  def classify(piece):
    logits, _ = scored.model.apply(variables, data.x[piece], False)
    return (jnp.argmax(logits, -1) == data.y[piece]).astype(jnp.float32)

  return jax.lax.map(classify, pieces).ravel()[:num_rows]
