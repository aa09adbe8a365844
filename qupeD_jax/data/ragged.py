"""Rows of a data set by client, where clients differ in how many they have."""

from typing import NamedTuple

import numpy as np


class Ragged(NamedTuple):
  """Rows of a data set for each of K clients, one client after the other.

  Client k has rows[offsets[k]:offsets[k + 1]].
  """

  rows: np.ndarray  # [total] int32
  offsets: np.ndarray  # [K + 1] int64


def sizes(ragged: Ragged) -> np.ndarray:
  """Returns the number of rows of each client, [K] int64.

  >>> sizes(Ragged(np.array([4, 0, 2]), np.array([0, 1, 3])))
  array([1, 2])
  """
  return np.diff(ragged.offsets)


def gather(owner: np.ndarray, num_clients: int, rng: np.random.Generator) -> Ragged:
  """Collects the rows of each owner, in random order."""
  rows = rng.permutation(len(owner)).astype(np.int32)
  rows = rows[np.argsort(owner[rows], kind="stable")]
  counts = np.bincount(owner[owner >= 0], minlength=num_clients)
  return Ragged(rows[len(rows) - counts.sum() :], offsets(counts))


def select(ragged: Ragged, keep: np.ndarray) -> Ragged:
  """Keeps the rows that a mask [total] bool says."""
  return Ragged(ragged.rows[keep], offsets(keep)[ragged.offsets])


def rank(ragged: Ragged) -> np.ndarray:
  """Returns the place of each row among its client's, [total] int64, from 0."""
  return np.arange(len(ragged.rows)) - np.repeat(ragged.offsets[:-1], sizes(ragged))


def class_counts(ragged: Ragged, labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts the rows of each class that each client has, [K, C] int64."""
  num_clients = len(ragged.offsets) - 1
  client = np.repeat(np.arange(num_clients), sizes(ragged))
  pairs = client * num_classes + np.asarray(labels)[ragged.rows]
  return np.bincount(pairs, minlength=num_clients * num_classes).reshape(num_clients, num_classes)


def offsets(counts: np.ndarray) -> np.ndarray:
  """Returns where each of consecutive groups begins, and where the last ends."""
  return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
