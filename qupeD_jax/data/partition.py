"""Deals the training rows of a data set out to clients.

An assignment is `owner` [M] int32: the client of each row, -1 for a row that nobody has. So no two
clients can share a row. Everything follows from an integer seed, and nothing loops over clients.
"""

import numpy as np

from qupeD_jax import shares
from qupeD_jax.checks import at_least, refusal, require
from qupeD_jax.data.ragged import gather, rank, select, sizes

NOBODY = -1  # the owner of unused rows
LEAST = 2  # training rows without which a client cannot both train and validate
AMOUNTS = (0.5, 1.5)  # how unevenly `by_class` deals a class: weights drawn from this range
ALPHA_MAX = 1e6  # proportions are equal to all digits that matter far below


def by_class(
  labels: np.ndarray, num_clients: int, classes_per_client: int, seed: int
) -> np.ndarray:
  """Gives every client examples of a few classes only, in random amounts.

  Classes are dealt like cards, `classes_per_client` to each, from a deck that is shuffled anew as
  soon as it can be without dealing a client the same class twice; so all classes have equally many
  holders, give or take one. The rows of a class go to its holders in proportion to weights drawn
  uniformly from AMOUNTS, at least one to each (two if that is all a client holds). A class without
  a holder stays unused.

  Args:
    labels: [M] int32.
    num_clients: K.
    classes_per_client: how many distinct classes each client holds.
    seed: of everything random here.

  Returns:
    owner [M] int32.

  Raises:
    BadInput: if there are fewer classes than that, or too few rows for so many clients.

  >>> labels = np.repeat([0, 1, 2], 8)
  >>> owner = by_class(labels, num_clients=3, classes_per_client=2, seed=0)
  >>> (np.bincount(owner * 3 + labels).reshape(3, 3) > 0).sum(axis=1)
  array([2, 2, 2])
  """
  _require_rows_for_clients(num_clients, len(labels))  # before there is an array of clients
  at_least("classes_per_client", classes_per_client, 1)
  classes, label_ids = np.unique(labels, return_inverse=True)
  allowed = f"at most {len(classes)}, the number of classes"
  require(classes_per_client <= len(classes), "classes_per_client", classes_per_client, allowed)
  rng = generator(seed, "by_class")
  held = _deal_classes(num_clients, len(classes), classes_per_client, rng)
  least = -(-LEAST // classes_per_client)
  _require_rows_for_holders(num_clients, classes, label_ids, held, least)
  owner = np.full(len(label_ids), NOBODY, np.int32)
  for label_id in np.unique(held):
    rows = rng.permutation(np.flatnonzero(label_ids == label_id))
    holders = np.flatnonzero((held == label_id).any(axis=1))
    shares = _shares(len(rows), rng.uniform(*AMOUNTS, len(holders)), least)
    owner[rows] = np.repeat(holders, shares)
  return owner


def dirichlet(labels: np.ndarray, num_clients: int, alpha: float, seed: int) -> np.ndarray:
  """Divides each class by proportions drawn from a symmetric Dirichlet distribution.

  After Yurochkin et al. 2019 (arXiv 1905.12022): p ~ Dir_K(alpha) for every class. Where others
  draw again until no client is short, which may never end, a client left with fewer than two rows
  is here given some by the largest clients, who are cut down evenly.

  Args:
    labels: [M] int32.
    num_clients: K.
    alpha: concentration; small values give each class to few clients, large ones to all alike.
    seed: of everything random here.

  Returns:
    owner [M] int32, without unused rows.

  Raises:
    BadInput: if alpha is not above 0, or there are too few rows for so many clients.

  >>> owner = dirichlet(np.repeat([0, 1], 50), num_clients=4, alpha=0.1, seed=0)
  >>> bool(np.bincount(owner, minlength=4).min() >= 2)
  True
  """
  require(0 < alpha <= ALPHA_MAX, "alpha", alpha, f"above 0 and at most {ALPHA_MAX:g}")
  _require_rows_for_clients(num_clients, len(labels))
  rng = generator(seed, "dirichlet")
  owner = np.empty(len(labels), np.int32)
  for label in np.unique(labels):
    rows = rng.permutation(np.flatnonzero(labels == label))
    shares = _shares(len(rows), rng.dirichlet(np.full(num_clients, alpha)), 0)
    owner[rows] = np.repeat(np.arange(num_clients), shares)
  return _relieve(owner, num_clients, rng)


def iid(labels: np.ndarray, num_clients: int, seed: int) -> np.ndarray:
  """Deals all rows out at random, equally many to each client, give or take one.

  Args:
    labels: [M] int32; only their number matters.
    num_clients: K.
    seed: of everything random here.

  Returns:
    owner [M] int32, without unused rows.

  Raises:
    BadInput: if there are too few rows for so many clients.

  >>> np.bincount(iid(np.zeros(7), num_clients=3, seed=0))
  array([3, 2, 2])
  """
  _require_rows_for_clients(num_clients, len(labels))
  return generator(seed, "iid").permutation(np.arange(len(labels), dtype=np.int32) % num_clients)


def thin(owner: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
  """Takes rows from every client at random until a share of those of each class is left.

  Args:
    owner: [M] int32, NOBODY for unused rows.
    labels: [M] int32.
    share: in (0, 1], of a client's rows of one class; rounded up, so that no class is lost.
    seed: of everything random here.

  Returns:
    owner [M] int32, with more unused rows.

  Raises:
    BadInput: if the share is out of range.

  >>> thin(np.zeros(8, np.int32), np.repeat([0, 1], 4), share=0.25, seed=0).tolist().count(0)
  2
  """
  require(0 < share <= 1, "share", share, "above 0 and at most 1")
  num_classes = int(labels.max()) + 1
  kind = np.where(owner == NOBODY, NOBODY, owner * num_classes + labels)
  rows = gather(kind, int(kind.max()) + 1, generator(seed, "thin"))
  left = [shares.rounded_up(share, size) for size in sizes(rows)]
  kept = select(rows, rank(rows) < np.repeat(left, sizes(rows)))
  thinned = np.full_like(owner, NOBODY)
  thinned[kept.rows] = owner[kept.rows]
  return thinned


def natural(
  client: np.ndarray | None,
  num_clients: int | None = None,
  *,
  tested: np.ndarray | None = None,
  min_test_rows: int = 1,
) -> np.ndarray:
  """Makes a client of each writer, or whoever else the data set names.

  Args:
    client: [M] int32, the field of that name of a Dataset.
    num_clients: how many of them, the first in their order; None for all.
    tested: [M'] int32, the same of the test part; None does not look at it.
    min_test_rows: whoever has fewer rows there is left out.

  Returns:
    owner [M] int32; rows of those left out stay unused.

  Raises:
    BadInput: if the data set names nobody, or too few.

  >>> natural(np.array([7, 3, 3, 9]), num_clients=2)
  array([ 1,  0,  0, -1], dtype=int32)
  """
  if client is None:
    raise refusal("partition", "natural", "the data set does not say whose its examples are")
  known, owner = np.unique(client, return_inverse=True)
  if tested is not None:
    at_least("min_test_rows", min_test_rows, 1)
    there = tested[np.isin(tested, known)]
    rows = np.bincount(np.searchsorted(known, there), minlength=len(known))
    kept = rows >= min_test_rows
    known, owner = known[kept], np.where(kept, np.cumsum(kept) - 1, NOBODY)[owner]
  if num_clients is not None:
    at_least("num_clients", num_clients, 1)
    require(num_clients <= len(known), "num_clients", num_clients, f"at most {len(known)} here")
    owner = np.where(owner < num_clients, owner, NOBODY)
  return owner.astype(np.int32)


def generator(seed: int, purpose: str) -> np.random.Generator:
  """Returns a generator for one purpose: steps that share a seed must not share their numbers."""
  at_least("seed", seed, 0)
  return np.random.default_rng([seed, *purpose.encode()])


def _deal_classes(
  num_clients: int, num_classes: int, hand: int, rng: np.random.Generator
) -> np.ndarray:
  """Deals `hand` distinct classes to each client: [K, hand]."""
  # After so many clients the deck has been dealt a whole number of times: time to shuffle it.
  clients_per_deck = num_classes // np.gcd(num_classes, hand)
  num_decks = -(-num_clients // clients_per_deck)
  decks = rng.permuted(np.tile(np.arange(num_classes), (num_decks, 1)), axis=1)
  client = np.arange(num_clients)[:, None]
  card = (client % clients_per_deck * hand + np.arange(hand)) % num_classes
  return decks[client // clients_per_deck, card]


def _shares(total: int, weights: np.ndarray, least: int) -> np.ndarray:
  """Divides a number of rows in proportion to weights, at least `least` each: [len(weights)]."""
  edges = np.cumsum(weights)
  edges = np.rint(edges / edges[-1] * (total - least * len(weights))).astype(np.int64)
  return least + np.diff(edges, prepend=0)


def _relieve(owner: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
  """Moves rows from the largest clients to those with fewer than LEAST.

  Think of each client as a stack of rows: what is taken is the highest rows of all.
  """
  stacks = gather(owner, num_clients, rng)
  missing = np.maximum(LEAST - sizes(stacks), 0)
  highest = np.argsort(-rank(stacks), kind="stable")[: missing.sum()]
  owner = owner.copy()
  owner[stacks.rows[highest]] = np.repeat(np.arange(num_clients), missing)
  return owner


def _require_rows_for_clients(num_clients: int, num_rows: int) -> None:
  """Requires at least LEAST rows for every client."""
  at_least("num_clients", num_clients, 1)
  allowed = f"at most {num_rows // LEAST}, so that each has {LEAST} of {num_rows} training rows"
  require(num_clients * LEAST <= num_rows, "num_clients", num_clients, allowed)


def _require_rows_for_holders(
  num_clients: int, classes: np.ndarray, label_ids: np.ndarray, held: np.ndarray, least: int
) -> None:
  """Requires at least `least` rows of every class for each client that holds it."""
  rows = np.bincount(label_ids, minlength=len(classes))
  holders = np.bincount(held.ravel(), minlength=len(classes))
  short = np.flatnonzero(rows < least * holders)
  if short.size:
    label = short[0]
    need = f"{holders[label]} clients need {least} each of the {rows[label]} rows of its class"
    raise refusal("num_clients", num_clients, f"too many, {need} {classes[label]}")
