"""What the server does: combine what its clients send."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from qupeD_jax import checks, rng
from qupeD_jax.federation import gradients, scoring
from qupeD_jax.federation.aggregators import Aggregate
from qupeD_jax.federation.clients import LocalWork, check_work, local_round, over_clients
from qupeD_jax.types import Algorithm, Array, Cohort, FedState, Info, Model, PyTree


def combine(
  aggregate: Aggregate,
  key: Array,
  uploads: tuple[PyTree, ...],
  cohorts: tuple[Cohort, ...],
  before: PyTree,
  info: tuple[Info, ...],
) -> tuple[PyTree, tuple[Info, ...]]:
  """Combines what the clients send, and notes whose upload was not taken.

  Args:
    aggregate: how, see `aggregate`.
    key: of the round.
    uploads: one pytree per cohort, leaves [K, ...].
    cohorts: the clients that sent them.
    before: what the server keeps if nothing came that counts.
    info: what the clients report.

  Returns:
    The server's new variables, leaves [...], and what is reported.
  """
  after, kept = aggregate(rng.stream(key, "aggregate"), uploads, cohorts, before)
  noted = tuple(i._replace(dropped=(i.size > 0) & ~k) for i, k in zip(info, kept, strict=True))
  return after, noted


def train_beside(
  trains: tuple[Callable, ...],
  key: Array,
  state: FedState,
  cohorts: tuple[Cohort, ...],
  aggregate: Aggregate,
  clients_per_step: int | None = None,
) -> tuple[FedState, tuple[Info, ...]]:
  """Runs a round in which clients train a personal model beside a copy of the server's.

  Args:
    trains: one per cohort, of `clients.local_round`; what they carry is (personal, copy).
    key: of this round.
    state: the clients keep their personal models, the server's is made of the copies.
    cohorts: the clients.
    aggregate: how the copies are combined.
    clients_per_step: as of LocalWork.

  Returns:
    The state after the round, and what is reported.
  """

  def client_fn(train):
    def run(key, personal, rows):
      (personal, copy), loss = train(key, (personal, state.server), rows)
      return personal, copy, loss

    return run

  fns = tuple(map(client_fn, trains))
  clients, uploads, info = over_clients(fns, key, cohorts, state.clients, clients_per_step)
  copy, info = combine(aggregate, key, uploads, cohorts, state.server, info)
  return FedState(copy, clients, state.round + 1), info


def averaging(
  model: Model,
  objective: Callable,
  *,
  rate: Array | float | Callable,
  optimizer: optax.GradientTransformation,
  work: LocalWork,
  aggregate: Aggregate,
  start: PyTree | None,
) -> Algorithm:
  """Builds federated averaging of whatever the clients minimise.

  Args:
    model: the one architecture that all clients train.
    objective: (variables, the server's variables, batch) -> (loss [], stats).
    rate: step size, a number or a schedule of the local step.
    optimizer: of the clients, without its learning rate, started anew every round.
    work: local steps, batches and augmentation.
    aggregate: how the server combines the w_i.
    start: the server's first variables; None draws them.

  Returns:
    An Algorithm without state at its clients; scored is the server's model, as "global" and as
    "personal".
  """
  check_work(work)
  checks.positive("rate", rate)

  def init(key, data, cohorts):
    del data
    server = model.init(key) if start is None else start
    return FedState(server, tuple(() for _ in cohorts), jnp.int32(0))

  def round_fn(key, state, data, cohorts):
    def step_fn(carry, step, batch):
      loss_fn = lambda variables: objective(variables, state.server, batch)
      eta = gradients.value_at(rate, step)
      *carry, loss = gradients.gradient_step(*carry, loss_fn, eta, optimizer)
      return tuple(carry), loss

    train = local_round(step_fn, data, state.round, work)

    def run(key, nothing, rows):
      carry = state.server, optimizer.init(state.server["params"])
      (variables, _), loss = train(key, carry, rows)
      return nothing, variables, loss

    fns = (run,) * len(cohorts)
    clients, uploads, info = over_clients(fns, key, cohorts, state.clients, work.clients_per_step)
    server, info = combine(aggregate, key, uploads, cohorts, state.server, info)
    return FedState(server, clients, state.round + 1), info

  def personalize(key, state, data, cohorts):
    del key, data
    shared = scoring.shared(model, state.server, cohorts)
    return {"personal": shared, "global": shared}

  return Algorithm(init, round_fn, personalize)
