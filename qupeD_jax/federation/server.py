"""What the server does: combine what its clients send."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qupeD_jax import checks, rng
from qupeD_jax.federation import gradients, scoring, tree
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


def run_round(
  client_fns: tuple[Callable, ...],
  key: Array,
  state: FedState,
  cohorts: tuple[Cohort, ...],
  aggregate: Aggregate,
  clients_per_step: int | None = None,
) -> tuple[FedState, tuple[Info, ...]]:
  """Runs a round: every client trains, and the server combines what all of them send.

  Args:
    client_fns: one per cohort, as of `clients.over_clients`.
    key: of this round.
    state: before it; what a server keeps has the form of an upload.
    cohorts: the clients.
    aggregate: how uploads are combined.
    clients_per_step: as of LocalWork.

  Returns:
    The state after the round, and what is reported.
  """
  clients, uploads, info = over_clients(client_fns, key, cohorts, state.clients, clients_per_step)
  kept, info = combine(aggregate, key, uploads, cohorts, state.server, info)
  return FedState(kept, clients, state.round + 1), info


def beside_copy(train: Callable, server_variables: PyTree) -> Callable:
  """Makes a client function that trains a client's own model beside a copy of the server's.

  Args:
    train: of `clients.local_round`; what it carries is (personal, copy).
    server_variables: what the copy begins as.

  Returns:
    A client function, as of `run_round`: it keeps its personal model, and sends the copy.
  """

  def run(key, personal, rows):
    (personal, copy), loss = train(key, (personal, server_variables), rows)
    return personal, copy, loss

  return run


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
    return run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)

  def personalize(key, state, data, cohorts):
    del key, data
    shared = scoring.shared(model, state.server, cohorts)
    return {"personal": shared, "global": shared}

  return Algorithm(init, round_fn, personalize)


def averaging_beside(
  model: Model,
  step_fn: Callable,
  *,
  own: Callable[[PyTree], PyTree] = lambda variables: variables,
  personal: Callable[[PyTree, PyTree], PyTree] = lambda own, server_variables: own,
  work: LocalWork,
  aggregate: Aggregate,
  start: PyTree | None,
) -> Algorithm:
  """Builds federated averaging beside which every client trains a model of its own.

  Args:
    model: the one architecture that all clients train, twice.
    step_fn: ((own, copy), the server's variables, step [] int32, batch) -> ((own, copy), loss []),
      a client's local step.
    own: the first variables -> what a client keeps at first; by default these.
    personal: (what a client keeps, the server's variables) -> the variables of its personal model;
      by default what it keeps.
    work: local steps, batches and augmentation.
    aggregate: how the server combines the copies.
    start: the first variables; None draws them.

  Returns:
    An Algorithm; scored are the personal models and the server's, as "global".
  """
  check_work(work)

  def init(key, data, cohorts):
    del data
    variables = model.init(key) if start is None else start
    clients = tuple(tree.repeat(own(variables), len(cohort.size)) for cohort in cohorts)
    return FedState(variables, clients, jnp.int32(0))

  def round_fn(key, state, data, cohorts):
    step = lambda carry, number, batch: step_fn(carry, state.server, number, batch)
    fn = beside_copy(local_round(step, data, state.round, work), state.server)
    fns = (fn,) * len(cohorts)
    return run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)

  def personalize(key, state, data, cohorts):
    del key, data
    show = jax.vmap(personal, (0, None))
    shown = tuple(show(clients, state.server) for clients in state.clients)
    return scoring.beside(model, state.server, (model,) * len(cohorts), shown, cohorts)

  return Algorithm(init, round_fn, personalize)
