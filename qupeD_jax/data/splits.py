"""Divides each client's rows into training and validation, and finds rows to test it on."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qupeD_jax import shares
from qupeD_jax.checks import at_least, refusal, require
from qupeD_jax.data.partition import LEAST, NOBODY, generator
from qupeD_jax.data.ragged import Ragged, class_counts, gather, offsets, rank, select, sizes
from qupeD_jax.types import Dataset

# (train, test, held: the training rows of each client, max_rows, rng) -> test rows of each client
TestRows = Callable[[Dataset, Dataset, Ragged, int | None, np.random.Generator], Ragged]


class Split(NamedTuple):
  """What each client trains on, validates on and is tested on."""

  train: Ragged  # rows of the training part
  validation: Ragged  # rows of the training part, none of them in `train`
  test: Ragged  # rows of the test part; clients may share them


def split(
  train: Dataset,
  test: Dataset,
  owner: np.ndarray,
  test_rows: TestRows,
  *,
  validation: float = 0.1,
  max_test_rows: int | None = None,
  seed: int = 0,
) -> Split:
  """Divides each client's rows into training and validation, and finds its test rows.

  Args:
    train: the training part.
    test: the test part.
    owner: [M] int32, the client of each training row.
    test_rows: own_classes, own_proportions or own_rows.
    validation: the share of its training rows that a client validates on: at least one row, and
      at least one is left to train on.
    max_test_rows: where a client would have more test rows, a random choice of so many.
    seed: of everything random here.

  Returns:
    the rows of every client, in random order.

  Raises:
    BadInput: if a client has too few rows to train and validate, or no test rows.

  >>> from qupeD_jax.data.partition import iid
  >>> parts = Dataset(np.zeros((20, 8, 8, 1), np.uint8), np.arange(20, dtype=np.int32) % 2)
  >>> found = split(parts, parts, iid(parts.y, 2, seed=0), own_classes, validation=0.2)
  >>> [sizes(ragged).tolist() for ragged in found]
  [[8, 8], [2, 2], [20, 20]]
  """
  require(0 < validation < 1, "validation", validation, "above 0 and below 1")
  if max_test_rows is not None:
    at_least("max_test_rows", max_test_rows, 1)
  rng = generator(seed, "split")
  held = gather(owner, int(owner.max(initial=NOBODY)) + 1, rng)
  _require_each(sizes(held), LEAST, "training")
  held_out = np.array([shares.rounded(validation, size) for size in sizes(held)], np.int64)
  held_out = held_out.clip(1, sizes(held) - 1)
  validates = rank(held) < np.repeat(held_out, sizes(held))
  tested = test_rows(train, test, held, max_test_rows, rng)
  _require_each(sizes(tested), 1, "test")
  return Split(select(held, ~validates), select(held, validates), tested)


def own_classes(
  train: Dataset, test: Dataset, held: Ragged, max_rows: int | None, rng: np.random.Generator
) -> Ragged:
  """Tests every client on all test rows of the classes it holds; goes with `by_class`."""
  counts, available = _holdings(train, test, held)
  return _draw(np.where(counts > 0, available, 0), test.y, max_rows, rng)


def own_proportions(
  train: Dataset, test: Dataset, held: Ragged, max_rows: int | None, rng: np.random.Generator
) -> Ragged:
  """Tests every client on test rows in its own class proportions; goes with `dirichlet` and `iid`.

  As many rows of each class as it holds training rows; all in proportion fewer where the test part
  has not that many. Classes that the test part lacks are left out.
  """
  counts, available = _holdings(train, test, held)
  counts = np.where(available > 0, counts, 0)
  scale = (available / np.maximum(counts, 1)).min(axis=1, where=counts > 0, initial=1)
  wanted = np.ceil(counts * scale[:, None]).astype(np.int64)
  return _draw(np.minimum(wanted, available), test.y, max_rows, rng)


def own_rows(
  train: Dataset, test: Dataset, held: Ragged, max_rows: int | None, rng: np.random.Generator
) -> Ragged:
  """Tests every client on the test rows of the same writer; goes with `natural`."""
  writer = train.client[held.rows[held.offsets[:-1]]]
  order = np.argsort(writer)
  near = order[np.searchsorted(writer, test.client, sorter=order).clip(max=len(writer) - 1)]
  owner = np.where(writer[near] == test.client, near, NOBODY)
  found = gather(owner, len(writer), rng)
  return found if max_rows is None else select(found, rank(found) < max_rows)


class Report(NamedTuple):
  """What every client got."""

  train_classes: np.ndarray  # [K, C] int64, training rows of each class
  test_classes: np.ndarray  # [K, C] int64, test rows of each class
  train: np.ndarray  # [K] int64, training rows
  validation: np.ndarray  # [K] int64, validation rows
  test: np.ndarray  # [K] int64, test rows


def report(
  found: Split, train_labels: np.ndarray, test_labels: np.ndarray, num_classes: int
) -> Report:
  """Counts what every client got.

  Args:
    found: the rows of K clients.
    train_labels: [M] int32, of the training part.
    test_labels: [M'] int32, of the test part.
    num_classes: C.

  Returns:
    the counts of all K clients.
  """
  return Report(
    class_counts(found.train, train_labels, num_classes),
    class_counts(found.test, test_labels, num_classes),
    *map(sizes, found),
  )


def summary(counted: Report) -> str:
  """Tells a Report in a few lines of text."""
  classes = (counted.train_classes > 0).sum(axis=1)
  lines = [f"{len(classes)} clients with {_spread(classes)} classes each"]
  for part in ("train", "validation", "test"):
    lines.append(f"{part} rows per client: {_spread(getattr(counted, part))}")
  return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
  """Tells the smallest, the largest and the mean value."""
  low, high = values.min(), values.max()
  return f"{low}" if low == high else f"{low} to {high} (mean {values.mean():.1f})"


def _holdings(train: Dataset, test: Dataset, held: Ragged) -> tuple[np.ndarray, np.ndarray]:
  """Counts rows of each class: each client's training rows [K, C], and all test rows [C]."""
  num_classes = int(max(train.y.max(), test.y.max())) + 1
  counts = class_counts(held, train.y, num_classes)
  return counts, np.bincount(test.y, minlength=num_classes)


def _draw(
  counts: np.ndarray, labels: np.ndarray, max_rows: int | None, rng: np.random.Generator
) -> Ragged:
  """Draws so many rows of each class for each client, no row twice for one client.

  Each class is shuffled once and laid in a circle; each client takes a stretch that begins
  anywhere.

  Args:
    counts: [K, C] int64, at most the number of rows of each class.
    labels: [M] int32.
    max_rows: the most rows that a client gets, or None.
    rng: source of randomness.
  """
  if max_rows is not None:
    counts = _capped(counts, max_rows, rng)
  classes = gather(labels, counts.shape[1], rng)
  twice_round = [np.tile(rows, 2) for rows in np.split(classes.rows, classes.offsets[1:-1])]
  begin = 2 * classes.offsets[:-1] + rng.integers(0, np.maximum(sizes(classes), 1), counts.shape)
  length = counts.ravel()
  place = np.arange(length.sum()) + np.repeat(begin.ravel() - offsets(length)[:-1], length)
  return Ragged(np.concatenate(twice_round)[place], offsets(counts.sum(axis=1)))


def _capped(counts: np.ndarray, max_rows: int, rng: np.random.Generator) -> np.ndarray:
  """Lowers counts [K, C] in proportion to `max_rows` a client, rounding up or down at random.

  Systematic sampling: a client's rows lie in a line, class after class, and those at equal
  distances are counted, from a random beginning. In integers, so that the sum is exact.
  """
  total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
  kept = np.minimum(total, max_rows)
  edges = (np.cumsum(counts, axis=1) * kept + rng.integers(0, total)) // total
  return np.diff(edges, axis=1, prepend=0)


def _require_each(counts: np.ndarray, least: int, kind: str) -> None:
  """Requires every client to have at least `least` rows of some kind."""
  short = np.flatnonzero(counts < least)
  if short.size or not counts.size:
    who = f"client {short[0]} has {counts[short[0]]}" if short.size else "no client has"
    reason = f"{who} {kind} rows; allowed is at least {least}"
    raise refusal("num_clients", counts.size, reason)
