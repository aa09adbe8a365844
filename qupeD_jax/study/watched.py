"""Whose weights TensorBoard shows: of each method's first seed, one model."""

from collections.abc import Iterator, Mapping

import jax

from qupeD_jax.engine import parallel, store
from qupeD_jax.results.tensorboard import Weights
from qupeD_jax.study.jobs import Job
from qupeD_jax.types import FedState


def weights(job: Job, state: FedState) -> Iterator[Weights]:
  """Yields a model of each method, first seed: its first client's, or the server's without one.

  Args:
    job: that trains.
    state: of all its runs, leaves [R, ...]; nothing is shown of states that are not on the device.
  """
  if store.is_streamed(state):
    return
  of_client = bool(jax.tree.leaves(state.clients[0]))
  held = state.clients[0] if of_client else state.server
  tree = getattr(held, "variables", held)
  params = tree["params"] if isinstance(tree, Mapping) and "params" in tree else tree
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for i, method in enumerate(job.variants):
    run = i * job.options.run.seeds
    if run < leaves[0][1].shape[0]:  # the first variant trains for all where they do not differ yet
      place = (run, 0) if of_client else (run,)
      tensors = {
        jax.tree_util.keystr(path, simple=True, separator="/"): parallel.fetch(leaf[place])
        for path, leaf in leaves
      }
      yield Weights(method, job.options.run.seed, tensors)
