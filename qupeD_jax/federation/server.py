"""What the server does: combine what its clients send."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from qupeD_jax import checks, rng
from qupeD_jax.federation import client
from qupeD_jax.federation.aggregators import Aggregate
from qupeD_jax.types import Algorithm, Array, Cohort, FedState, Info, Model, PyTree, Scored


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


def score_global(model: Model, variables: PyTree, cohorts: tuple[Cohort, ...]):
  """Returns the server's model as what is scored on every cohort."""
  return tuple(Scored(model, variables, stacked=False) for _ in cohorts)


def scored(
  model: Model,
  variables: PyTree,
  client_models: tuple[Model, ...],
  clients: tuple[PyTree, ...],
  cohorts: tuple[Cohort, ...],
) -> dict[str, tuple[Scored, ...]]:
  """Returns what is scored of full-precision personal models and a global one.

  Args:
    model, variables: of the server.
    client_models: one per cohort.
    clients: their variables, one pytree per cohort, leaves [K, ...].
    cohorts: the clients.
  """
  pairs = zip(client_models, clients, strict=True)
  personal = tuple(Scored(m, v, stacked=True) for m, v in pairs)
  return {"personal": personal, "global": score_global(model, variables, cohorts)}


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
    trains: one per cohort, of `client.local_round`; what they carry is (personal, copy).
    key: of this round.
    state: the clients keep their personal models, the server's is made of the copies.
    cohorts: the clients.
    aggregate: how the copies are combined.
    clients_per_step: clients of a cohort that train side by side; None for all of them.

  Returns:
    The state after the round, and what is reported.
  """

  def client_fn(train):
    def run(key, personal, rows):
      (personal, copy), loss = train(key, (personal, state.server), rows)
      return personal, copy, loss

    return run

  fns = tuple(map(client_fn, trains))
  clients, uploads, info = client.over_clients(fns, key, cohorts, state.clients, clients_per_step)
  copy, info = combine(aggregate, key, uploads, cohorts, state.server, info)
  return FedState(copy, clients, state.round + 1), info


def averaging(
  model: Model,
  objective: Callable,
  *,
  rate: Array | float | Callable,
  optimizer: optax.GradientTransformation,
  local_steps: int,
  batch_size: int,
  augment: Callable | None,
  clients_per_step: int | None,
  aggregate: Aggregate,
  start: PyTree | None,
) -> Algorithm:
  """Builds federated averaging of whatever the clients minimise.

  Args:
    model: the one architecture that all clients train.
    objective: (variables, the server's variables, batch) -> (loss [], stats).
    rate: step size, a number or a schedule of the local step.
    optimizer: of the clients, without its learning rate, started anew every round.
    local_steps: tau, steps of a round.
    batch_size: B.
    augment: (key, x [B, H, W, C]) -> x, for every batch anew; None for none.
    clients_per_step: clients of a cohort that train side by side; None for all of them.
    aggregate: how the server combines the w_i.
    start: the server's first variables; None draws them.

  Returns:
    An Algorithm without state at its clients; scored is the server's model, as "global" and as
    "personal".
  """
  client.check(local_steps, batch_size)
  checks.positive("rate", rate)

  def init(key, data, cohorts):
    del data
    server = model.init(key) if start is None else start
    return FedState(server, tuple(() for _ in cohorts), jnp.int32(0))

  def round_fn(key, state, data, cohorts):
    first_step = state.round * local_steps

    def step_fn(carry, step, batch):
      loss_fn = lambda variables: objective(variables, state.server, batch)
      eta = client.value_at(rate, step)
      *carry, loss = client.gradient_step(*carry, loss_fn, eta, optimizer)
      return tuple(carry), loss

    train = client.local_round(step_fn, data, first_step, local_steps, batch_size, augment=augment)

    def run(key, nothing, rows):
      carry = state.server, optimizer.init(state.server["params"])
      (variables, _), loss = train(key, carry, rows)
      return nothing, variables, loss

    clients, uploads, info = client.over_clients(
      (run,) * len(cohorts), key, cohorts, state.clients, clients_per_step
    )
    server, info = combine(aggregate, key, uploads, cohorts, state.server, info)
    return FedState(server, clients, state.round + 1), info

  def personalize(key, state, data, cohorts):
    del key, data
    shared = score_global(model, state.server, cohorts)
    return {"personal": shared, "global": shared}

  return Algorithm(init, round_fn, personalize)
