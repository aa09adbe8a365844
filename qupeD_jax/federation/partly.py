"""Models of which a part is averaged by the server, while the rest stays with its client."""

from collections.abc import Callable

import flax.traverse_util
import jax.numpy as jnp

from qupeD_jax.federation import server, tree
from qupeD_jax.federation.aggregators import Aggregate
from qupeD_jax.federation.clients import LocalWork, check_work, local_round
from qupeD_jax.types import Algorithm, Array, FedState, Model, PyTree, Scored

Parts = tuple[dict[str, Array], dict[str, Array]]  # by path: what travels, and what stays


def averaging(
  model: Model,
  stays: Callable[[PyTree], set[str]],
  step_fn: Callable,
  *,
  work: LocalWork,
  aggregate: Aggregate,
  start: PyTree | None,
) -> Algorithm:
  """Builds federated averaging of a part of the model.

  Args:
    model: the one architecture that all clients train.
    stays: variables -> the paths in them, such as "params/head/bias", of what stays with a client.
    step_fn: (variables, step [] int32, batch) -> (variables, loss []), a client's local step.
    work: local steps, batches and augmentation.
    aggregate: how the server combines what travels.
    start: the first variables of all clients; None draws them.

  Returns:
    An Algorithm; scored are, as "personal", the server's part with each client's own. There is no
    model that is the server's alone.
  """
  check_work(work)

  def init(key, data, cohorts):
    del data
    shared, own = _parted(model.init(key) if start is None else start, stays)
    clients = tuple(tree.repeat(own, len(cohort.size)) for cohort in cohorts)
    return FedState(shared, clients, jnp.int32(0))

  def round_fn(key, state, data, cohorts):
    train = local_round(step_fn, data, state.round, work)

    def run(key, own, rows):
      variables, loss = train(key, _whole(state.server, own), rows)
      shared, own = _parted(variables, stays)
      return own, shared, loss

    fns = (run,) * len(cohorts)
    return server.run_round(fns, key, state, cohorts, aggregate, work.clients_per_step)

  def personalize(key, state, data, cohorts):
    del key, data
    shown = [
      _whole(tree.repeat(state.server, len(cohort.size)), own)
      for own, cohort in zip(state.clients, cohorts, strict=True)
    ]
    return {"personal": tuple(Scored(model, variables, stacked=True) for variables in shown)}

  return Algorithm(init, round_fn, personalize)


def paths(variables: PyTree) -> list[str]:
  """Lists the paths of all tensors, as in "params/head/bias"."""
  return [*flax.traverse_util.flatten_dict(variables, sep="/")]


def _parted(variables: PyTree, stays: Callable[[PyTree], set[str]]) -> Parts:
  own, flat = stays(variables), flax.traverse_util.flatten_dict(variables, sep="/")
  shared = {path: leaf for path, leaf in flat.items() if path not in own}
  return shared, {path: leaf for path, leaf in flat.items() if path in own}


def _whole(shared: dict[str, Array], own: dict[str, Array]) -> PyTree:
  """Puts the parts together; a network without statistics has {} of them."""
  return {"stats": {}} | flax.traverse_util.unflatten_dict(shared | own, sep="/")
