"""A study for tests to kill: real from end to end, but for networks that walk at random.

What a step computes is next to nothing, so that most of a run is rounds, rows and saves.
"""

import ctypes
import os
import pathlib
import signal
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets  # noqa: F401  before the study is forked

from qupeD_jax import rng
from qupeD_jax.federation.algorithm1 import Personal
from qupeD_jax.results import plots
from qupeD_jax.study import jobs, study
from qupeD_jax.study.durability import stopping
from qupeD_jax.study.options import Options, replaced
from qupeD_jax.types import Algorithm, FedState, Info, Model, Scored

OPTIONS = replaced(
  Options(),
  dataset="digits", models=("linear",), clients=4, bits=(1, 2), rounds=32, finetune_rounds=8,
  local_steps=1, batch_size=4, eval_every=5, seeds=2, checkpoint_every=1,
)  # fmt: skip
KERNEL = "dense_1/kernel"


def linear(name, num_classes, image_shape, **_) -> Model:
  """One kernel; takes and leaves out what `models.make` takes."""
  shape = int(np.prod(image_shape)), num_classes

  def init(key):
    return {"params": {"dense_1": {"kernel": jax.random.normal(key, shape)}}, "stats": {}}

  def apply(variables, x, train, mask=None):
    del train, mask
    return x.reshape(len(x), -1) / 16.0 @ variables["params"]["dense_1"]["kernel"], {}

  return Model(init, apply)


def walk(model: Model, centers: int, trained: FedState | None) -> Algorithm:
  """Every client's kernel walks at random, with momentum, near the server's: their mean."""

  def init(key, data, cohorts):
    del data
    if trained is not None and (not centers or trained.clients[0].codebooks):
      return trained._replace(round=jnp.int32(0))
    (cohort,), server = cohorts, model.init(key) if trained is None else trained.server
    slots = jnp.arange(centers)
    book = lambda bits: jnp.where(slots < 2.0**bits, 0.5 * slots - 0.7, jnp.inf)
    personal = Personal(
      jax.tree.map(lambda leaf: jnp.stack([leaf] * len(cohort.client)), server),
      {KERNEL: jax.vmap(book)(cohort.bits)} if centers else {},
      jnp.zeros((len(cohort.client), *server["params"]["dense_1"]["kernel"].shape)),
    )
    return FedState(server, (personal,), jnp.int32(0))

  def round_(key, state, data, cohorts):
    del data
    (personal,), (cohort,) = state.clients, cohorts
    keys = rng.client_keys(key, "clients", cohort.client)
    kernel, common = (of["params"]["dense_1"]["kernel"] for of in (personal[0], state.server))
    noise = jax.vmap(lambda key: jax.random.normal(key, common.shape))(keys)
    moments = 0.9 * personal.moments + 0.01 * noise
    kernel = kernel + moments + 0.1 * (common - kernel)
    books = {path: book + jnp.mean(moments) for path, book in personal.codebooks.items()}
    variables = {"params": {"dense_1": {"kernel": kernel}}, "stats": {}}
    server = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), variables)
    loss, dropped = jnp.mean(jnp.abs(kernel), (1, 2)), jnp.zeros(len(kernel), bool)
    info = Info(cohort.client, cohort.size, loss, dropped)
    clients = (Personal(variables, books, moments),)
    return FedState(server, clients, state.round + 1), (info,)

  def personalize(key, state, data, cohorts):
    del key, data, cohorts
    own = (Scored(model, state.clients[0].variables, True),)
    return {"personal": own, "global": (Scored(model, state.server, False),)}

  return Algorithm(init, round_, personalize)


def alone(options, federation) -> jobs.Job:
  """Makes a job of one phase."""
  build = lambda options, trained: walk(federation.models[0], 0, trained)
  phases = jobs.one_phase(options, build)
  return jobs.Job(options, federation, jobs.full_precision("alone", federation), phases)


def in_phases(options, federation) -> jobs.Job:
  """Makes a job of a phase that two variants share, one with codebooks, and one more."""
  build = lambda centers: lambda options, trained: walk(federation.models[0], centers, trained)
  variants = jobs.precisions("walk", options, federation, (2, 1), mixed=False)
  phases = (
    jobs.Phase(options.work.rounds - 2 * options.work.finetune_rounds, build(0), shared=True),
    jobs.Phase(options.work.finetune_rounds, build(4)),
    jobs.Phase(options.work.finetune_rounds, build(4)),
  )
  return jobs.Job(options, federation, variants, phases)


def run(folder: str | pathlib.Path, **changes) -> None:
  """Runs the study; in the place of pictures it writes down what they would show."""
  options = replaced(OPTIONS, out=str(folder), **changes)
  written = lambda shown, path, *_: pathlib.Path(path).write_text(repr(shown), "utf-8")
  with mock.patch.multiple(
    plots,
    weights=written,
    centers=lambda rounds, tensors, path, *_: written((rounds, tensors), path),
    clients=lambda *_: None,
    curves=lambda *_: None,
  ), np.printoptions(threshold=10**9):  # fmt: skip
    study.run("tiny", options, (alone, in_phases), make_model=linear)


def run_quietly(folder: str, log: str, **changes) -> None:
  """Runs the study in a process of its own; what it says goes into a file."""
  with open(log, "a") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  run(folder, **changes)


def deaf(second: str) -> None:
  """Gets two signals while the main thread runs no code of Python's, as during a long program."""
  signal.signal(signal.SIGINT, lambda *_: None)  # or it might be heard before the sleep begins
  with stopping.listening():
    both = lambda: [signal.raise_signal(number) for number in (signal.SIGTERM, int(second))]
    threading.Thread(target=both).start()
    ctypes.CDLL(None).sleep(60)
