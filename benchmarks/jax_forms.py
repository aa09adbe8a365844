"""Ways to carry out a round of many clients in JAX: ours, and those that others take.

All run the same algorithm on the same batches, so that they differ by rounding alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workload import Cost, Form, Task, algorithm, round_key
from qupeD_jax.engine import loop, parallel, programs
from qupeD_jax.types import Array, Cohort, Dataset, FedState, PyTree

MOST_ROUNDS = 64  # that one call of `run` may ask for


def vmapped(
  task: Task,
  conv_form: str | None = None,
  *,
  spread: bool = False,
  clients_per_step: int | None = None,
) -> Form:
  """Trains all clients side by side, rounds looped on the device, as `loop.run` has it.

  Args:
    task: what is computed.
    conv_form: one of conv.FORMS; None, the fastest, is ours.
    spread: the clients lie on several devices, as many as there are that divide their number.
    clients_per_step: clients that each device trains side by side; None for all of its own.
  """
  clients = task.case.clients
  mesh = parallel.make_mesh(_dividing(clients) if spread else 1)
  algo = algorithm(task.case, task.method, conv_form, clients_per_step=clients_per_step)
  of_one_run = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
  keys, cohorts, first = map(of_one_run, (task.key, (task.cohort,), task.state))
  data, cohorts = parallel.spread(task.data, cohorts, mesh)
  first, keys = parallel.place(first, mesh), parallel.place(keys, mesh)
  runs = loop.Runs(keys, cohorts)
  program = loop.compile_chunk(lambda _: algo, MOST_ROUNDS, runs, first, data, mesh)
  devices = mesh.size if mesh else 1
  return Form(
    start=lambda: _copied(first),
    run=lambda state, rounds: program(runs, state, data, np.int32(rounds))[0],
    wait=jax.block_until_ready,
    weights=lambda state: _weights(jax.tree.map(lambda leaf: leaf[0], state)),
    conv=conv_form or "ours",
    program=program,
    cost=_cost(program, copies=devices, clients=clients // devices),
  )


def _dividing(clients: int) -> int:
  """Returns the most devices that get equally many clients each."""
  return max(n for n in range(1, jax.local_device_count() + 1) if clients % n == 0)


def mapped(task: Task, conv_form: str | None = None) -> Form:
  """Trains client after client on the device, by `lax.map`."""
  one_client = _one_client(task, conv_form)

  def one_round(key, state, data, cohort):
    def train(inputs):
      return one_client(key, state.server, state.round, data, *inputs)

    uploads, personal = jax.lax.map(train, (_alone(cohort), _alone(state.clients[0])))
    server = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), uploads)
    personal = jax.tree.map(lambda leaf: leaf[:, 0], personal)
    return FedState(server, (personal,), state.round + 1)

  program = programs.compile_ahead(
    one_round, task.key, task.state, task.data, task.cohort, donate=1
  )
  return Form(
    start=lambda: _copied(task.state),
    run=_repeat(lambda state: program(task.key, state, task.data, task.cohort)),
    wait=jax.block_until_ready,
    weights=_weights,
    conv=conv_form or "ours",
    cost=_cost(program, copies=task.case.clients, clients=task.case.clients),
  )


def looped(task: Task, conv_form: str | None = None) -> Form:
  """Calls a compiled round of one client for each client, from Python, and adds up what they send.

  Client states are kept apart, as a framework does whose clients are objects.
  """
  one_client = _one_client(task, conv_form)
  clients = range(task.case.clients)

  def train(total, key, server, round_, data, cohort, personal):
    upload, personal = one_client(key, server, round_, data, cohort, personal)
    return jax.tree.map(lambda t, u: t + u / len(clients), total, upload), personal

  def separate(tree):
    return [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], tree) for i in clients]

  cohorts = separate(task.cohort)
  zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, task.state.server))
  shared = task.key, task.state.server, task.state.round, task.data
  first = separate(task.state.clients[0])[0]
  program = programs.compile_ahead(train, zeros(), *shared, cohorts[0], first, donate=(0, 6))

  def one_round(state):
    server, personal, round_ = state
    total = zeros()
    for i in clients:
      given = task.key, server, round_, task.data, cohorts[i], personal[i]
      total, personal[i] = program(total, *given)
    return total, personal, round_ + 1

  return Form(
    # A slice of all is no copy, and what is given is taken over.
    start=lambda: (task.state.server, separate(_copied(task.state.clients[0])), task.state.round),
    run=_repeat(one_round),
    wait=jax.block_until_ready,
    weights=lambda state: _weights(FedState(state[0], (_together(state[1]),), state[2])),
    conv=conv_form or "ours",
    cost=_cost(program, copies=task.case.clients, clients=1),
  )


def _one_client(task: Task, conv_form: str | None) -> Callable:
  """Returns a round of a federation of one client: what it would send, and its new state.

  Its leaves have a client axis of 1, as algorithms want them.
  """
  algo = algorithm(task.case, task.method, conv_form)

  def run(
    key: Array, server: PyTree, round_: Array, data: Dataset, cohort: Cohort, personal: PyTree
  ) -> tuple[PyTree, PyTree]:
    state = FedState(server, (personal,), round_)
    after, _ = algo.round(round_key(key, round_), state, data, (cohort,))
    return after.server, after.clients[0]

  return run


def _alone(tree: PyTree) -> PyTree:
  """Makes K federations of one client of one with K: leaves [K, ...] to [K, 1, ...]."""
  return jax.tree.map(lambda leaf: leaf[:, None], tree)


def _together(trees: list[PyTree]) -> PyTree:
  """Undoes `_alone` and what took the clients apart: leaves [1, ...] each to [K, ...] in all."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _weights(state: FedState) -> tuple[PyTree, PyTree]:
  return jax.device_get((state.server["params"], state.clients[0]))


def _copied(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.copy, tree)


def _repeat(one_round: Callable) -> Callable:
  def run(state, rounds: int):
    for _ in range(rounds):
      state = one_round(state)
    return state

  return run


def _cost(program, *, copies: int, clients: int) -> Cost:
  """Reads what XLA says of a program.

  Args:
    program: compiled; XLA counts the body of a loop once, whether over rounds, steps or clients.
    copies: how often its body runs in a step of all clients.
    clients: how many it holds.
  """
  flops = (program.cost_analysis() or {}).get("flops", 0)
  memory = program.memory_analysis()
  held = memory and (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / clients
  return Cost(copies * flops or None, held or None)
