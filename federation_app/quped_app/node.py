"""A client's part: a round on its own rows, and at the end its model, packed and scored.

The round is the simulation's, `Algorithm.round`, on a cohort of this one client.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax import rng
from qupeD_jax.checks import BadInput, require
from qupeD_jax.data import sources
from qupeD_jax.engine import evaluate, programs
from qupeD_jax.io.personal import PersonalModel, save_model
from qupeD_jax.study.options import flat
from qupeD_jax.types import Cohort, Dataset, FedState, PyTree

from . import kept, streams
from .algorithms import Phase, exchange_rounds, phases, state_of
from .kept import Kept
from .options import Node, Settings, network

PASSING = ("out", "fresh", "join_timeout", "bits")  # options that may change while a run lasts
TO_NODE = ("run", "round")  # the counts of a message, and of the replies to a round and to the end
OF_ROUND = ("client", "round", "rows")
OF_FINISH = ("client", "rows", "tested")  # and those of `scored`


class Rows(NamedTuple):
  """A client's own rows, all there are on its node."""

  train: Dataset
  test: Dataset
  cohort: Cohort  # the client, alone, and its training rows: leaves [1, ...]
  tested: Cohort


class Answer(NamedTuple):
  """What a node sends."""

  counts: dict[str, int]
  variables: PyTree | None = None


def train(settings: Settings, node: Node, run: int, round_: int, variables: PyTree) -> Answer:
  """Trains the client for a round.

  A message that comes again changes nothing: what it was answered with is answered again.

  Args:
    settings: of the run.
    node: this one.
    run: number of the run.
    round_: number of the round, from 0.
    variables: the server's, None where there is no server.

  Returns:
    The client's number, the round's, how many rows it has, and its upload.

  Raises:
    BadInput: options or rows cannot be used, what is kept is of a later round, or the loss or the
      model is not finite any more: what was kept before stays.
  """
  rows = read_rows(settings, node)
  path = kept.path_of(node.folder, run) / "client.safetensors"
  phase = phases(settings, node.model, node.bits)[0]
  algorithm, seed = phase.build(None), settings.options.run.seed
  before = _load(path, settings, node, algorithm, rows, variables)
  counts = {"client": node.client, "round": round_, "rows": len(rows.train.y)}
  if before.rounds == round_ + 1:
    return Answer(counts, before.upload)
  allowed = f"at least {before.rounds - 1}: this client has had {before.rounds} rounds of the run"
  require(before.rounds <= round_, "round", round_, allowed)
  given = (
    streams.of_round(seed, round_),
    state_of(variables, before.own, round_),
    rows.train,
    (rows.cohort,),
  )
  state, (info,) = jax.device_get(programs.compile_ahead(algorithm.round, *given)(*given))
  upload = None if variables is None else state.server
  _require_finite(node, round_, info.loss, state.clients[0])
  kept.save(path, Kept(round_ + 1, state.clients[0], upload), _about(settings, node))
  return Answer(counts, upload)


def finish(settings: Settings, node: Node, run: int, variables: PyTree) -> Answer:
  """Fine-tunes the client alone where the method does, packs its model and scores it.

  Args:
    settings, node, run, variables: as of `train`; the variables are the server's last.

  Returns:
    The client's number, how many rows it trained on and how many it was tested on, and how many of
    these its personal and the server's model got right.

  Raises:
    BadInput: as of `train`.
  """
  rows = read_rows(settings, node)
  folder = kept.path_of(node.folder, run)
  stretches = phases(settings, node.model, node.bits)
  algorithm = stretches[0].build(None)
  before = _load(folder / "client.safetensors", settings, node, algorithm, rows, variables)
  if before.scores is None:
    state = state_of(variables, before.own, exchange_rounds(settings))
    model, scores = jax.device_get(_finished(settings, stretches, rows)(state))
    architecture = network(settings, node.model)
    personal = PersonalModel(architecture, *model, node.client, node.bits)
    save_model(folder / "model.safetensors", personal)
    before = before._replace(scores={name: int(scores[name]) for name in scored(settings)})
    kept.save(folder / "client.safetensors", before, _about(settings, node))
  counts = {"client": node.client, "rows": len(rows.train.y), "tested": len(rows.test.y)}
  return Answer(counts | before.scores)


def scored(settings: Settings) -> tuple[str, ...]:
  """Returns the names of the models that clients score: their own and, if there is one, w."""
  return ("personal",) if settings.method == "local" else ("personal", "global")


def read_rows(settings: Settings, node: Node) -> Rows:
  """Reads the client's rows.

  Raises:
    BadInput: the file cannot be read, or its rows are not what the run is of.
  """
  train, test, _ = sources.read(str(node.rows))
  shape, classes = settings.inputs["image_shape"], settings.inputs["num_classes"]
  require(train.x.shape[1:] == shape, "image_shape", train.x.shape[1:], f"{shape}, the run's")
  most = int(max(train.y.max(), test.y.max()))
  require(most < classes, "label", most, f"below {classes}, the run's number of classes")
  size, work = len(train.y), settings.options.work
  allowed = f"at most {size}, the client's rows; with `partial_batches` it trains on all of them"
  require(work.partial_batches or work.batch_size <= size, "batch_size", work.batch_size, allowed)
  return Rows(train, test, _alone(node, size), _alone(node, len(test.y)))


def _alone(node: Node, size: int) -> Cohort:
  """Makes a cohort of one client of all the rows there are."""
  one = lambda value: np.array([value], np.int32)
  return Cohort(np.arange(size, dtype=np.int32)[None], one(size), one(node.client), one(node.bits))


def _load(path: Path, settings: Settings, node: Node, algorithm, rows: Rows, variables) -> Kept:
  """Returns what was kept, or what every client starts from."""

  def start():
    key = rng.stream(streams.of_phase(settings.options.run.seed, 0), "initialise")
    return algorithm.init(key, rows.train, (rows.cohort,)).clients[0]

  like = Kept(0, jax.eval_shape(start), variables)
  found = kept.load(path, like, _about(settings, node))
  return Kept(0, jax.jit(start)(), None) if found is None else found


def _finished(settings: Settings, stretches: tuple[Phase, ...], rows: Rows) -> Callable:
  """Returns state after the rounds -> ((variables, codebooks) of the model, how many are right)."""
  seed, cohorts = settings.options.run.seed, (rows.cohort,)

  def run(state: FedState, data: Dataset, tested: Dataset):
    algorithm, key = stretches[0].build(None), streams.of_phase(seed, 0)
    for i, phase in enumerate(stretches[1:], start=1):
      algorithm, key = phase.build(state), streams.of_phase(seed, i)
      start = algorithm.init(rng.stream(key, "initialise"), data, cohorts)
      state, _ = programs.simulate(algorithm, key, start, data, cohorts, phase.rounds, phase.rounds)
    key = rng.stream(key, "evaluate")
    (shown,) = algorithm.personalize(key, state, data, cohorts)["personal"]
    own = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    model = own(shown.variables) if shown.stacked else shown.variables, own(shown.codebooks or {})
    given = key, state, data, cohorts, tested, (rows.tested,)
    accuracy = evaluate.accuracies(algorithm, *given)
    hits = {name: jnp.rint(a[0] * len(tested.y)) for name, (a,) in accuracy.items()}
    return model, hits

  def finished(state):
    given = state, rows.train, rows.test
    return programs.compile_ahead(run, *given)(*given)

  return finished


def _require_finite(node: Node, round_: int, loss, own: PyTree) -> None:
  """Raises BadInput if the loss is not finite or the client's state holds a NaN."""
  floats = [x for x in jax.tree.leaves(own) if np.issubdtype(x.dtype, np.floating)]
  if not np.isfinite(loss).all() or any(np.isnan(x).any() for x in floats):
    raise BadInput(
      f"client {node.client}, round {round_ + 1}: the loss or the model is not finite; smaller "
      "rates may help; what was kept before stays"
    )


def _about(settings: Settings, node: Node) -> dict:
  """Returns the options that must not change while a run lasts."""
  ours = {"client": node.client, "bits": node.bits, "own_model": node.model}
  return ours | about_run(settings)


def about_run(settings: Settings) -> dict:
  """Returns the options of a run that must not change while it lasts, by name."""
  options = flat(settings.options).items()
  lasting = {name: value for name, value in options if name not in PASSING}
  return {"method": settings.method, "model": settings.model} | settings.inputs | lasting
