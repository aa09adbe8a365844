"""Lays the rows of clients out as Cohorts: rectangular arrays, one for each architecture."""

from collections.abc import Sequence

import jax
import numpy as np

from qupeD_jax import checks
from qupeD_jax.checks import BadInput
from qupeD_jax.data.ragged import Ragged, sizes
from qupeD_jax.types import FULL_PRECISION, Cohort

NO_CLIENT = -1  # the id of a slot that only fills up


def assign_groups(num_clients: int, num_groups: int, num_bits: int = 1) -> tuple[np.ndarray, ...]:
  """Deals architectures out to clients so that each architecture meets each precision.

  Goes with `assign_bits`, which gives neighbours different precisions: architectures change only
  after each run through the precisions.

  Args:
    num_clients: K.
    num_groups: number of architectures.
    num_bits: number of precisions that `assign_bits` deals out.

  Returns:
    the client ids of each architecture, int32, increasing.

  Raises:
    BadInput: if there are too few clients for that.

  >>> assign_groups(8, num_groups=2, num_bits=2)
  (array([0, 1, 4, 5], dtype=int32), array([2, 3, 6, 7], dtype=int32))
  """
  if num_groups > 1:
    enough = num_groups * num_bits
    allowed = f"at least {enough}, so that each of {num_groups} models meets {num_bits} precisions"
    checks.require(num_clients >= enough, "num_clients", num_clients, allowed)
  client = np.arange(num_clients, dtype=np.int32)
  group = client // num_bits % num_groups
  return tuple(client[group == i] for i in range(num_groups))


def assign_bits(choices: Sequence[int], num_clients: int) -> np.ndarray:
  """Deals precisions out to clients, one after the other: [K] int32.

  Raises:
    BadInput: if a precision is not 1 to 8 or 32, or there is none.

  >>> assign_bits((2, 32), num_clients=5)
  array([ 2, 32,  2, 32,  2], dtype=int32)
  """
  checks.require(len(choices) > 0, "bits", "()", "at least one precision")
  checks.bits("bits", choices)
  return np.resize(np.asarray(choices, np.int32), num_clients)


def cohorts(
  ragged: Ragged, groups: Sequence[np.ndarray], bits: np.ndarray, pad_to: int | None = None
) -> tuple[Cohort, ...]:
  """Makes one Cohort of each group of clients.

  Args:
    ragged: the rows of K clients.
    groups: the client ids of each architecture; no client twice.
    bits: [K] int32, precision of each client.
    pad_to: N of every cohort; None for the most rows that a client of it has.

  Returns:
    one Cohort for each group, in numpy arrays. Where a client has fewer than N rows, its first one
    fills up `index`.

  Raises:
    BadInput: if a client has no rows or more than `pad_to`, or a group is empty or not of clients.

  >>> ragged = Ragged(np.array([5, 6, 7], np.int32), np.array([0, 1, 3]))
  >>> (cohort,) = cohorts(ragged, [np.array([0, 1])], bits=np.array([2, 32]))
  >>> cohort.index
  array([[5, 5],
         [6, 7]], dtype=int32)
  """
  num_clients = len(ragged.offsets) - 1
  _require_clients(groups, num_clients)
  checks.require(len(bits) == num_clients, "bits", len(bits), f"{num_clients}, one a client")
  return tuple(_cohort(ragged, np.asarray(group), bits, pad_to) for group in groups)


def stack(runs: Sequence[tuple[Cohort, ...]]) -> tuple[Cohort, ...]:
  """Stacks the cohorts of several runs, such as seeds: every field gets a leading run axis.

  Args:
    runs: R times the same number of cohorts, with the same number of clients each. Where N
      differs, `index` is filled up to the largest by repeating its last column.

  Returns:
    cohorts with index [R, K, N], the other fields [R, K].

  Raises:
    BadInput: if runs differ in their numbers of cohorts or clients.
  """
  shapes = {tuple(len(cohort.size) for cohort in run) for run in runs}
  checks.require(len(shapes) == 1, "clients of each run", sorted(shapes), "the same for all runs")
  return tuple(_stack(same) for same in zip(*runs, strict=True))


def pad_clients(cohort: Cohort, num_clients: int) -> Cohort:
  """Adds slots without data until there are `num_clients`, so that devices get equally many.

  Args:
    cohort: with K clients, with or without a leading run axis.
    num_clients: at least K.

  Returns:
    the cohort with slots of size 0, client -1 and full precision at its end.

  >>> full = Cohort(np.array([[5], [6]]), np.ones(2), np.array([0, 1]), np.array([2, 2]))
  >>> pad_clients(full, 3).client
  array([ 0,  1, -1])
  """
  checks.at_least("clients to pad to", num_clients, cohort.size.shape[-1])
  extra = num_clients - cohort.size.shape[-1]
  return Cohort(
    index=_append(cohort.index, extra, axis=-2, value=0),  # row 0 exists in every data set
    size=_append(cohort.size, extra, axis=-1, value=0),
    client=_append(cohort.client, extra, axis=-1, value=NO_CLIENT),
    bits=_append(cohort.bits, extra, axis=-1, value=FULL_PRECISION),
    steps=None if cohort.steps is None else _append(cohort.steps, extra, axis=-1, value=1),
  )


def smallest(cohorts: Sequence[Cohort]) -> tuple[int, int]:
  """Returns the id and the number of rows of the client that has the fewest.

  Slots without data do not count; the first of equals does.
  """
  size = np.concatenate([cohort.size.ravel() for cohort in cohorts])
  client = np.concatenate([cohort.client.ravel() for cohort in cohorts])
  least = np.where(size > 0, size, size.max() + 1).argmin()
  return int(client[least]), int(size[least])


def _cohort(ragged: Ragged, group: np.ndarray, bits: np.ndarray, pad_to: int | None) -> Cohort:
  """Makes the Cohort of one group."""
  size = sizes(ragged)[group]
  if not size.all():
    raise BadInput(f"client {group[size.argmin()]}: it has no rows")
  width = size.max() if pad_to is None else pad_to
  checks.require(size.max() <= width, "pad_to", pad_to, f"at least {size.max()}, the most rows")
  step = np.arange(width)
  place = ragged.offsets[group, None] + np.where(step < size[:, None], step, 0)
  return Cohort(
    index=ragged.rows[place].astype(np.int32),
    size=size.astype(np.int32),
    client=group.astype(np.int32),
    bits=np.asarray(bits)[group].astype(np.int32),
  )


def _stack(cohorts: Sequence[Cohort]) -> Cohort:
  """Stacks the cohorts that several runs have for one architecture."""
  width = max(cohort.index.shape[-1] for cohort in cohorts)
  filled = [
    cohort._replace(
      index=np.pad(cohort.index, [(0, 0), (0, width - cohort.index.shape[-1])], mode="edge")
    )
    for cohort in cohorts
  ]
  return jax.tree.map(lambda *fields: np.stack(fields), *filled)


def _append(values: np.ndarray, extra: int, axis: int, value: int) -> np.ndarray:
  """Appends a constant `extra` times along an axis."""
  widths = [(0, 0)] * values.ndim
  widths[axis] = (0, extra)
  return np.pad(values, widths, constant_values=value)


def _require_clients(groups: Sequence[np.ndarray], num_clients: int) -> None:
  """Requires groups of at least one client, all of them among K, and none twice."""
  for i, group in enumerate(groups):
    checks.require(len(group) > 0, f"group {i}", "of no clients", "at least one client")
  ids = np.concatenate(groups)
  good = ids.min() >= 0 and ids.max() < num_clients and len(np.unique(ids)) == len(ids)
  checks.require(good, "groups", ids.tolist(), f"client ids below {num_clients}, none twice")
