"""Clients that take part in no round: what the server's model is worth to them.

After training each starts from the server's model, at full precision, goes on alone for the rounds
of fine-tuning and is scored on its own test rows.
"""

import jax
import numpy as np

from qupeD_jax import rng
from qupeD_jax.algorithms.local import local
from qupeD_jax.engine import loop, parallel, reports
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.quantization import quantizers
from qupeD_jax.study import federation as fed
from qupeD_jax.study import training
from qupeD_jax.study.errors import Diverged
from qupeD_jax.study.jobs import Job, decayed, local_work
from qupeD_jax.study.options import replaced, settled
from qupeD_jax.types import PyTree


def score(job: Job, trained: training.Trained) -> np.ndarray | None:
  """Fine-tunes and scores the clients that took part in no round.

  Args:
    job: what was trained; its federation has such clients.
    trained: what is left of that.

  Returns:
    [runs, new clients] accuracies, clients in the order of their ids; None where no one model at
    the server is scored: it has none, a part of one, or one for each group.

  Raises:
    Diverged: a loss is no longer finite.
  """
  servers = _servers_models(job, trained)
  if servers is None:
    return None
  options, federation = job.options, fed.of_new(job.federation)
  rounds, bits = settled(options).work.finetune_rounds, np.full(federation.num_clients, 32)

  def build(setting):
    changes, variables = setting
    own = replaced(options, **changes)
    return local(
      federation.models,
      quantizers.full_precision(),
      rates=Rates(decayed(own, own.hyper.fedavg_finetune_rate, rounds)),
      start=(variables,),
      work=local_work(own, federation),
    )

  cohorts = training.of_runs(job, fed.training(federation, bits, federation.groups))
  testing, rows = fed.testing(federation, federation.groups)
  changes, _ = trained.runs.setting
  key = jax.vmap(lambda key: rng.stream(key, "phases", len(job.phases)))(trained.runs.key)
  runs = loop.Runs(key, cohorts, (changes, servers))
  mesh = parallel.make_mesh(options.hardware.devices)
  given = build, runs
  try:
    state = loop.run(*given, federation.train, rounds=rounds, every=rounds, mesh=mesh).state
  except reports.NonFinite as error:
    method, seed = training.methods_of_runs(job)[error.run]
    reason = "the loss of new clients is not finite; a smaller fedavg_finetune_rate may help"
    raise Diverged(method, f"{method}, seed {seed}: {reason}") from error
  scored = testing, training.of_runs(job, rows)
  return loop.score(*given, state, federation.train, scored, mesh)["personal"]


def _servers_models(job: Job, trained: training.Trained) -> PyTree | None:
  """Returns the server's model of every run, leaves [runs, ...], or None where none is scored."""
  phase = job.phases[-1]
  if phase.separate:
    return None

  def of_run(runs, state, data):
    changes, start = runs.setting
    algorithm = phase.build(replaced(job.options, **changes), start)
    shown = algorithm.personalize(runs.key, state, data, runs.cohorts)
    return shown["global"][0].variables if "global" in shown else None

  given = trained.runs, trained.state, job.federation.train
  return parallel.fetch(jax.jit(jax.vmap(of_run, (0, 0, None)))(*given))
