"""What every contender of the benchmark computes: a case, its data, its network, its algorithm."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from qupeD_jax import models, rng
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.quped import GlobalStep, quped
from qupeD_jax.federation import aggregators
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.batches import draw_rows
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.models.flops import forward_flops
from qupeD_jax.quantization import quantizers
from qupeD_jax.types import Algorithm, Array, Cohort, Dataset, FedState, Model, PyTree

CLASSES = 10
RATE = 0.02  # of all gradient steps: small enough for hundreds of rounds on noise
BITS = 2
METHODS = ("fedavg", "quped", "simultaneous")
KEY = 0

# Forward passes of the network that one step costs, a backward pass counting as two. FedAvg: one
# forward and backward. QuPeD: one each for w, for x, for Q at the old x and for Q at the new x,
# whence the centers' gradient; and a forward each for x and Q after both moved, which teach w.
# Taken at once, its gradients are one forward and backward each of w, x and Q.
FORWARDS = {"fedavg": 3, "quped": 4 * 3 + 2, "simultaneous": 3 * 3}


class Case(NamedTuple):
  """One federation in which contenders meet."""

  model: str  # one of models.NAMES
  dtype: str  # of the computation, one of models.DTYPES
  clients: int  # K
  batch_size: int  # B
  local_steps: int  # tau, steps of a round

  @property
  def image(self) -> models.ImageShape:
    """Digits for an MLP, small photographs for a convolutional network."""
    return (8, 8, 1) if self.model.startswith("mlp") else (32, 32, 3)


class Task(NamedTuple):
  """A case and a method, with the data and the model to start from that all contenders share."""

  case: Case
  method: str  # one of METHODS
  data: Dataset
  cohort: Cohort
  state: FedState
  key: Array  # of the run


class Form(NamedTuple):
  """One way of carrying a task out; its state is its own affair."""

  start: Callable  # () -> state
  run: Callable  # (state, rounds) -> state; takes its argument's memory over, and may not wait
  wait: Callable  # state -> None, once it has been computed
  weights: Callable  # state -> (the server's parameters, the clients' states), numpy arrays as ours
  conv: str | None = None  # form of the convolutions, one of conv.FORMS or "ours"
  program: Compiled | None = None  # compiled, where it is one
  cost: "Cost | None" = None  # what the compiler says of its program, if it says something


class Cost(NamedTuple):
  """What XLA says of a compiled program."""

  flops: float | None  # of one step of all clients
  bytes_per_client: float | None  # temporary memory and arguments


def federation(case: Case) -> tuple[Dataset, Cohort]:
  """Makes random images, whose classes differ in their mean, and deals them out.

  Every client has four batches' worth of rows; where that makes too many, clients share rows.
  """
  rng = np.random.default_rng(0)
  rows_per_client = 4 * case.batch_size
  num_rows = min(case.clients * rows_per_client, 20_000)
  y = rng.integers(0, CLASSES, num_rows).astype(np.int32)
  x = rng.integers(0, 128, (num_rows, *case.image)) + 12 * y[:, None, None, None]
  index = np.arange(case.clients * rows_per_client).reshape(case.clients, -1) % num_rows
  of_all = lambda value: np.full(case.clients, value, np.int32)
  cohort = Cohort(
    index.astype(np.int32), of_all(rows_per_client), np.arange(case.clients), of_all(BITS)
  )
  data = Dataset(x.astype(np.uint8), y)
  return jax.tree.map(jnp.asarray, (data, cohort))


def network(case: Case, conv_form: str | None = None) -> Model:
  """Makes the network of a case."""
  return models.make(case.model, CLASSES, case.image, dtype=case.dtype, conv_form=conv_form)


def algorithm(
  case: Case,
  method: str,
  conv_form: str | None = None,
  *,
  clients_per_step: int | None = None,
) -> Algorithm:
  """Builds the algorithm that a case is timed with; in QuPeD every model is of one architecture.

  Args:
    case, method: what is computed.
    conv_form: one of conv.FORMS; None is ours.
    clients_per_step: clients that train side by side; None for all.
  """
  model = network(case, conv_form)
  work = LocalWork(case.local_steps, case.batch_size, clients_per_step=clients_per_step)
  if method == "fedavg":
    return fedavg(model, rate=RATE, work=work, aggregate=aggregators.mean())
  return quped(
    model,
    (model,),
    quantizers.learned_codebook(max_bits=BITS),
    rates=Rates(weights=RATE),
    global_step=GlobalStep(rate=RATE),
    simultaneous=method == "simultaneous",
    work=work,
  )


def make_task(case: Case, method: str, data: Dataset, cohort: Cohort) -> Task:
  """Draws the model to start from."""
  key = jax.random.key(KEY)
  init = jax.jit(algorithm(case, method).init)
  return Task(case, method, data, cohort, init(key, data, (cohort,)), key)


def round_key(key: Array, round_: Array | int) -> Array:
  """Returns the key of a round, made of that of the run as the engine makes it."""
  return rng.stream(key, "rounds", round_)


def first_rows(task: Task) -> np.ndarray:
  """Returns the rows that the clients draw in their first round: [K, tau, B] int32."""
  case, cohort = task.case, task.cohort

  keys = rng.client_keys(round_key(task.key, 0), "clients", cohort.client)

  def draw(key, index, size):
    key = rng.stream(rng.stream(key, "batches", 0), "rows")
    return draw_rows(key, index, size, case.local_steps, case.batch_size)[0]

  return np.asarray(jax.jit(jax.vmap(draw))(keys, cohort.index, cohort.size))


def step_flops(case: Case, method: str) -> float:
  """Counts one step of all clients by its mathematics; see FORWARDS."""
  one = forward_flops(network(case, "lax"), case.image)
  return float(FORWARDS[method] * one * case.batch_size * case.clients)


def client_bytes(task: Task) -> float:
  """Sums the arrays that one client must hold: its state, its copy of w and one batch."""
  copy, personal = task.state.server, task.state.clients[0]
  batch = task.data.x[: task.case.batch_size], task.data.y[: task.case.batch_size]
  return _bytes(copy) + _bytes(personal) / task.case.clients + _bytes(batch)


def _bytes(tree: PyTree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
