"""What the host is told of a chunk of rounds: losses, counts, scores, and losses gone wrong."""

from typing import NamedTuple

import numpy as np

from qupeD_jax.engine import parallel
from qupeD_jax.types import Array, Cohort, FedState, Info


class NonFinite(FloatingPointError):
  """A training loss that is no longer finite; says in which run, round and clients first."""

  def __init__(self, run: int, round_: int, clients: list[int]):
    self.run, self.round, self.clients = run, round_, clients
    super().__init__(f"run {run}, round {round_}: the loss of clients {clients} is not finite")


class Chunk(NamedTuple):
  """What training tells of a chunk of r rounds: numpy arrays, one entry per cohort."""

  infos: tuple[Info, ...]  # leaves [R, r, k]
  client: tuple[np.ndarray, ...]  # [R, n] ids of the clients that were trained, -1 for padding
  holds_nan: tuple[np.ndarray, ...]  # [R, n] bool, which of these the chunk left with a NaN


class Report(NamedTuple):
  """What a callback gets after a chunk of r rounds."""

  state: FedState  # leaves [R, ...]; to be read during the callback only
  rounds: np.ndarray  # [r] int32, the rounds of this chunk, counted from 1
  loss: np.ndarray  # [R, r] float32, mean over the clients that took part; NaN where none did
  clients: np.ndarray  # [R, r] int, how many took part
  dropped: np.ndarray  # [R, r] int, uploads that the server did not take: they were not finite
  seconds: float  # spent on rounds until now, neither on compilation nor on scoring
  scores: dict[str, np.ndarray]  # name -> [R, clients] float32, after the chunk, in client order
  measures: dict[str, np.ndarray]  # likewise, of what else was measured; both {} at a mere pause


def require_finite(chunk: Chunk, rounds: np.ndarray) -> None:
  """Raises NonFinite if a loss of the chunk is not finite, or if it left a client with a NaN.

  Args:
    chunk: of r rounds.
    rounds: [r], their numbers.
  """
  bad = [~np.isfinite(info.loss) & (info.size > 0) for info in chunk.infos]
  client = [info.client for info in chunk.infos]
  if not any(map(np.any, bad)):  # no loss has shown yet what the last update did
    bad = [
      (nan & (ids >= 0))[:, None] for nan, ids in zip(chunk.holds_nan, chunk.client, strict=True)
    ]
    client = [ids[:, None] for ids in chunk.client]
    rounds = rounds[-1:]
  bad, client = np.concatenate(bad, axis=-1), np.concatenate(client, axis=-1)  # [R, r, k]
  if bad.any():
    round_ = int(bad.any(axis=(0, 2)).argmax())
    run_ = int(bad[:, round_].any(axis=-1).argmax())
    clients = sorted(set(client[run_, round_][bad[run_, round_]].tolist()))
    raise NonFinite(run_, int(rounds[round_]), clients)


def mean_loss(infos: tuple[Info, ...]) -> np.ndarray:
  """Averages over the clients that took part, of all cohorts: [R, r], NaN where none did."""
  total = sum(np.sum(np.where(info.size > 0, info.loss, 0.0), axis=-1) for info in infos)
  count = num_clients(infos)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def num_clients(infos: tuple[Info, ...]) -> np.ndarray:
  """Counts the clients that took part, of all cohorts: [R, r]."""
  return sum(np.sum(info.size > 0, axis=-1) for info in infos)


def num_dropped(infos: tuple[Info, ...]) -> np.ndarray:
  """Counts the uploads that servers did not take, of all cohorts: [R, r]."""
  return sum(np.sum(info.dropped, axis=-1) for info in infos)


def by_client(
  per_cohort: dict[str, tuple[Array, ...]], cohorts: tuple[Cohort, ...]
) -> dict[str, np.ndarray]:
  """Joins per-cohort results [R, K] in the order of client ids, without padding: [R, clients]."""
  client = np.concatenate([np.asarray(cohort.client)[0] for cohort in cohorts])
  order = np.argsort(client, kind="stable")[np.sum(client < 0) :]
  return {
    name: np.concatenate(parts, axis=1)[:, order]
    for name, parts in parallel.fetch(per_cohort).items()
  }
