"""Local work: the scan over one client's steps, and the one place that vmaps clients."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qupeD_jax import checks, rng
from qupeD_jax.federation.batches import Batch, Rows, draw_rows
from qupeD_jax.types import Array, Cohort, Dataset, Info, Model, PyTree

_CACHED_BYTES = 2**20  # of weights of clients side by side on a CPU, as measured
_WORTH_A_LOOP = (
  5  # clients; fewer side by side, one step after another, are slower than all at once
)


class LocalWork(NamedTuple):
  """How much each client does in a round, and on what batches."""

  steps: int = 10  # tau, local steps of a round
  batch_size: int = 50  # B; a batch is no wider than the rows of the largest client
  augment: Callable | None = None  # (key, x [B, H, W, C]) -> x, for every batch anew; None for none
  # Clients of a cohort that train side by side, and then the next so many: what a step needs in
  # memory is that of so many. None for all of them.
  clients_per_step: int | None = None


def check_work(work: LocalWork) -> None:
  """Requires local work to be possible.

  Raises:
    BadInput: a number is not whole, or below 1.
  """
  checks.at_least("local_steps", work.steps, 1)
  checks.at_least("batch_size", work.batch_size, 1)
  if work.clients_per_step is not None:
    checks.at_least("clients_per_step", work.clients_per_step, 1)


def usual_clients_per_step(models: tuple[Model, ...], backend: str) -> int | None:
  """Chooses how many clients train side by side, for the sake of speed alone; None for all.

  Clients side by side share what each operation costs to start; but on a CPU their weights have to
  stay in the cache from one local step to the next. As measured (docs/speed.md), as many are the
  fastest there as have 1 MB of weights, or nearly so; of networks of which not even five fit, all.

  Args:
    models: one per cohort, of which the largest counts.
    backend: of JAX; an accelerator takes all.

  >>> from qupeD_jax.models import make
  >>> usual_clients_per_step((make("mlp", 10, (8, 8, 1)),), "cpu")
  29
  """
  if backend != "cpu":
    return None
  fitting = _CACHED_BYTES // max(_weights_bytes(model.init) for model in models)
  return fitting if fitting >= _WORTH_A_LOOP else None


@functools.lru_cache(maxsize=64)
def _weights_bytes(init: Callable) -> int:
  shapes = jax.eval_shape(init, jax.random.key(0))["params"]
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def local_round(
  step_fn: Callable,
  data: Dataset,
  rounds_done: Array | int,
  work: LocalWork,
  batches_per_step: int = 1,
) -> Callable:
  """Returns a client's round: its local steps, scanned over freshly drawn batches.

  Args:
    step_fn: (carry, step [] int32, *batches) -> (carry, loss []).
    data: the training examples of all clients.
    rounds_done: [] int32, before this one; steps are counted over all rounds, as schedules are.
    work: how many steps, on what batches.
    batches_per_step: how many batches a step gets, drawn independently of each other; the first
      is the same however many there are.

  Returns:
    (key of this client and round, carry, Rows) -> (carry after the client's last step, mean loss []
    over its steps).
  """
  first_step = rounds_done * work.steps

  def batch(key, step, rows, mask):
    x = data.x[rows]
    if work.augment is not None:
      x = work.augment(rng.stream(key, "augment", step), x)
    return Batch(x, data.y[rows], mask, rng.stream(key, "layers", step))

  def run(key, carry, rows):
    keys = tuple(rng.stream(key, "batches", i) for i in range(batches_per_step))
    index, size, steps = Rows(*rows)
    drawn = tuple(
      draw_rows(rng.stream(k, "rows"), index, size, work.steps, work.batch_size) for k in keys
    )

    def body(carry, inputs):
      step, drawn = inputs
      batches = (batch(k, step, *d) for k, d in zip(keys, drawn, strict=True))
      after, loss = step_fn(carry, step, *batches)
      if steps is None:
        return after, loss
      goes_on = step - first_step < steps
      after = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), after, carry)
      return after, jnp.where(goes_on, loss, 0.0)

    carry, loss = jax.lax.scan(body, carry, (first_step + jnp.arange(work.steps), drawn))
    return carry, jnp.mean(loss) if steps is None else jnp.sum(loss) / steps

  return run


def over_clients(
  client_fns: tuple[Callable, ...],
  key: Array,
  cohorts: tuple[Cohort, ...],
  clients: PyTree,
  clients_per_step: int | None = None,
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...], tuple[Info, ...]]:
  """Runs a round of all clients, those of a cohort side by side: the one place that vmaps them.

  Args:
    client_fns: one per cohort, (key, client state, Rows) -> (client state, upload, loss []).
    key: of this round; each client gets its own by its id.
    cohorts: the clients.
    clients: their states, one pytree per cohort, leaves [K, ...].
    clients_per_step: as of LocalWork.

  Returns:
    Per cohort: new states, uploads (leaves [K, ...]) and what is reported.
  """

  def run(client_fn, cohort, states):
    keys = rng.client_keys(key, "clients", cohort.client)
    rows = Rows(cohort.index, cohort.size, cohort.steps)
    states, uploads, loss = map_clients(client_fn, (keys, states, rows), clients_per_step)
    none_dropped = jnp.zeros(cohort.size.shape, bool)
    return states, uploads, Info(cohort.client, cohort.size, loss, none_dropped)

  return tuple(zip(*map(run, client_fns, cohorts, clients), strict=True))


def map_clients(client_fn: Callable, arguments: tuple[PyTree, ...], per_step: int | None) -> PyTree:
  """Applies a function of one client to arguments with leaves [K, ...], so many at a time."""
  count = len(jax.tree.leaves(arguments)[0])
  if per_step is None or per_step >= count:
    return jax.vmap(client_fn)(*arguments)
  # All steps are of about one size, and the last is filled up with clients that were computed
  # before: with a shorter one the program would hold two.
  per_step = -(-count // -(-count // per_step))
  more = -count % per_step
  filled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:more]]), arguments)
  results = jax.lax.map(lambda one: client_fn(*one), filled, batch_size=per_step)
  return jax.tree.map(lambda leaf: leaf[:count], results)
