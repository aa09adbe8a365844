"""One whole run in one call: what a notebook trains, scores and takes models from.

Whoever wants runs side by side, over seeds or hyperparameters, finds what this is made of in
`loop`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from qupeD_jax import checks, rng
from qupeD_jax.data import cohort
from qupeD_jax.data import federation as federations
from qupeD_jax.data.federation import Federation
from qupeD_jax.engine import loop, reports
from qupeD_jax.io.personal import PersonalModel
from qupeD_jax.types import FULL_PRECISION, Algorithm, FedState, Scored


class Progress(NamedTuple):
  """What `run` tells after each evaluation."""

  round: int  # rounds done
  loss: float  # of the last round, mean over the clients that took part
  accuracy: dict[str, float]  # on the clients' validation rows, means over clients


class Result(NamedTuple):
  """What is left of a run."""

  accuracy: dict[str, np.ndarray]  # "personal", "global", ... -> [clients], on their test rows
  loss: np.ndarray  # [rounds] float32, mean over the clients that took part
  history: tuple[Progress, ...]
  state: FedState
  shipped: tuple[Scored, ...]  # the personal models, one per cohort, leaves [K, ...]
  groups: tuple[np.ndarray, ...]  # client ids of each cohort
  bits: np.ndarray  # [clients] int32

  def personal(self, client: int) -> PersonalModel:
    """Returns a client's model as it ships.

    Raises:
      BadInput: there is no such client.
    """
    checks.require(0 <= client < len(self.bits), "client", client, f"0 to {len(self.bits) - 1}")
    group = next(i for i, ids in enumerate(self.groups) if client in ids)
    scored, slot = self.shipped[group], int(np.flatnonzero(self.groups[group] == client)[0])
    own = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf[slot]), tree)
    variables = own(scored.variables) if scored.stacked else jax.device_get(scored.variables)
    codebooks = own(scored.codebooks or {})
    return PersonalModel(scored.model, variables, codebooks, client, int(self.bits[client]))


def run(
  algorithm: Algorithm,
  federation: Federation,
  *,
  rounds: int,
  bits: int | Sequence[int] = FULL_PRECISION,
  seed: int = 0,
  groups: Sequence[np.ndarray] | None = None,
  eval_every: int | None = None,
  callback: Callable[[Progress], None] = lambda progress: None,
) -> Result:
  """Trains a federation, scores it, and hands its models out.

  Args:
    algorithm: such as `quped(...)`, with one client model per group.
    federation: the clients and their data, as of `data.federate`.
    rounds: how many.
    bits: precision of the clients, 1 to 8, or 32 for full precision; several are dealt over them
      one after the other.
    seed: of the first weights and the batches.
    groups: client ids of each architecture, such as `data.assign_groups` makes; None where all
      clients have the same one.
    eval_every: rounds between evaluations on the clients' validation rows; None for a single one,
      at the end.
    callback: told of each evaluation.

  Raises:
    BadInput: an argument is out of range.
    NonFinite: a loss is no longer finite.
  """
  cohorts = federations.training(federation, bits, groups)
  alone = lambda cohorts: cohort.stack([cohorts])  # runs side by side: this is one
  runs = loop.Runs(jax.random.key(seed)[None], alone(cohorts))
  history, losses = [], []

  def rows(part):
    data, cohorts = federations.scored(federation, part, groups)
    return data, alone(cohorts)

  def record(chunk: loop.Report) -> None:
    accuracy = {name: float(values.mean()) for name, values in chunk.scores.items()}
    losses.append(chunk.loss[0])
    history.append(Progress(int(chunk.rounds[-1]), float(chunk.loss[0, -1]), accuracy))
    callback(history[-1])

  trained = loop.run(
    lambda _: algorithm,
    runs,
    federation.train,
    rounds=rounds,
    every=rounds if eval_every is None else eval_every,
    scored=rows("validation"),
    callback=record,
  )
  scores = loop.score(lambda _: algorithm, runs, trained.state, federation.train, rows("test"))
  state = jax.tree.map(lambda leaf: leaf[0], trained.state)
  key = rng.stream(runs.key[0], "evaluate")  # that of the scores
  data = jax.device_put(federation.train)
  shown = algorithm.personalize(key, state, data, cohorts)
  bits = tuple(cohort.bits[None] for cohort in cohorts)
  return Result(
    accuracy={name: values[0] for name, values in scores.items()},
    loss=np.concatenate(losses),
    history=tuple(history),
    state=state,
    shipped=shown["personal"],
    groups=tuple(c.client for c in cohorts),
    bits=reports.by_client({"bits": bits}, alone(cohorts))["bits"][0],
  )
