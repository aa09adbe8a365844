"""Trains a job: its variants and seeds side by side, phase after phase."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax import checks, rng
from qupeD_jax.data.cohort import pad_clients
from qupeD_jax.engine import loop, parallel, reports, store, streaming
from qupeD_jax.study import faults
from qupeD_jax.study import federation as fed
from qupeD_jax.study.durability import resume
from qupeD_jax.study.errors import Diverged
from qupeD_jax.study.jobs import Job, Phase, sampled
from qupeD_jax.study.options import Federated, Options, replaced, settled, value_of
from qupeD_jax.types import Algorithm, FedState, PyTree
from qupeD_jax.wrappers.own_statistics import with_own_statistics


class Trained(NamedTuple):
  """What is left of a job's training."""

  build: Callable  # of the last phase, as the engine takes it
  runs: loop.Runs
  state: FedState
  seconds: float  # spent on rounds


class Shipped(NamedTuple):
  """One client's personal model, as it was scored."""

  run: int  # of the job's, counted from 0
  group: int  # of the federation's
  client: int  # its id
  variables: PyTree
  codebooks: dict[str, np.ndarray]  # {} at full precision


def train(
  job: Job,
  record: Callable[[int, loop.Report], None],
  saves: resume.Saves = resume.NOTHING,
  folder: Path = Path(),
) -> Trained:
  """Trains through all phases of a job, each from what the one before left.

  Args:
    job: what is trained.
    record: called with the rounds done before the phase, and a chunk of it.
    saves: where to go on, and when to save.
    folder: that exists, for the file of clients' states, if there is one.

  Raises:
    Diverged: a loss is no longer finite.
    OutOfTime, Terminated: `saves` were told to stop.
  """
  here = saves.restore(functools.partial(_shapes, job))
  done, seconds, start, state = here.done, here.seconds, here.start, here.state
  for i, phase in enumerate(job.phases[here.phase :], start=here.phase):
    stack, copies = _stack(job, i)
    runs = _runs(job, i, stack, start)

    def callback(chunk, i=i, done=done, seconds=seconds, start=start, copies=copies):
      record(done, _repeated(chunk, copies))
      before, rounds = done + int(chunk.rounds[0]) - 1, done + int(chunk.rounds[-1])
      spent = seconds + chunk.seconds
      saves.after_chunk(before, resume.Position(i, done, rounds, spent, start, chunk.state))

    try:
      pause = saves.pace.every or None
      result = _run(job, phase, runs, stack.validation, callback, state, folder, pause)
    except reports.NonFinite as error:
      method, seed = methods_of_runs(job)[error.run]
      raise Diverged(
        method,
        f"{method}, seed {seed}, round {done + error.round}: the loss or the model of clients "
        f"{error.clients} is not finite; smaller rates may help; what was written before it stays",
      ) from error
    start, state = _copied(result.state, copies), None
    seconds, done = seconds + result.train_seconds, done + phase.rounds
  return Trained(functools.partial(_build, job.options, phase), runs, start, seconds)


def shipped(job: Job, trained: Trained, chosen: Sequence[int]) -> Iterator[Shipped]:
  """Yields the personal models of some of a job's runs: those that `score_tests` scores."""
  data, groups = job.federation.train, job.federation.groups
  given = trained.build, trained.runs, trained.state, data
  mesh = parallel.make_mesh(job.options.hardware.devices)
  if job.options.hardware.store == "device":
    for r, models in zip(chosen, loop.personal_models(*given, chosen, mesh), strict=True):
      for i, group in enumerate(groups):
        for k, client in enumerate(group):
          yield Shipped(r, i, int(client), *jax.tree.map(lambda leaf, k=k: leaf[k], models[i]))
    return
  for group, models in streaming.personal_models(*given, job.options.server.participation, mesh):
    for r, i in itertools.product(chosen, range(len(groups))):
      for k in np.flatnonzero(group.takes_part[i][r]):
        one = jax.tree.map(lambda leaf, r=r, k=k: leaf[r, k], models[i])
        yield Shipped(r, i, int(groups[i][group.slots[i][r, k]]), *one)


def _run(
  job: Job,
  phase: Phase,
  runs: loop.Runs,
  scored,
  callback: Callable,
  state: FedState | None,
  folder: Path,
  pause: int | None,
) -> loop.Result:
  """Trains a phase, on the devices or with clients' states elsewhere."""
  options, build = job.options, functools.partial(_build, job.options, phase)
  common = {"rounds": phase.rounds, "every": min(settled(options).run.eval_every, phase.rounds)}
  mesh = parallel.make_mesh(options.hardware.devices)
  common |= {"scored": scored, "callback": callback, "mesh": mesh}
  given, fraction = (runs, job.federation.train), options.server.participation
  if options.hardware.store == "device":
    resident = lambda setting: sampled(options, phase, build(setting))
    measure = functools.partial(_measure, options, phase) if phase.measures else None
    return loop.run(resident, *given, measure=measure, state=state, pause=pause, **common)
  allowed = f"device, where {', '.join(phase.measures)} is measured"
  checks.require(not phase.measures, "store", options.hardware.store, allowed)
  place = store.on_host if options.hardware.store == "host" else store.on_disk(folder)
  result = streaming.run(build, *given, fraction=fraction, alone=phase.alone, place=place, **common)
  # Those that never trained are needed too: to start the next phase, and as models to be shipped.
  state = streaming.completed(build, runs, result.state, job.federation.train, fraction, mesh)
  return result._replace(state=state)


class _Stack(NamedTuple):
  """The runs of a job, variant by variant, of each all seeds: leaves [variants * seeds, ...]."""

  keys: jax.Array
  cohorts: tuple
  validation: tuple
  changes: dict[str, np.ndarray]
  seeds: np.ndarray


def _stack(job: Job, phase: int) -> tuple[_Stack, int]:
  """Returns the runs that train in a phase, and for how many variants each stands.

  Where variants do not differ, one trains for all; in the end each is scored by itself.
  """
  changes, federation, copies = _changes(job), job.federation, 1
  if job.phases[phase].shared and not changes and phase < len(job.phases) - 1:
    (method, variant), *others = job.variants.items()
    job, copies = job._replace(variants={method: variant}), 1 + len(others)
  seeds = np.array([seed for _, seed in methods_of_runs(job)], np.uint32)
  training = _over_variants(job, lambda bits: fed.training(federation, bits, federation.groups))
  validation = _scored_rows(job, fed.validation(federation, federation.groups))
  return _Stack(_keys(job), training, validation, changes, seeds), copies


def _keys(job: Job) -> jax.Array:
  """Returns the keys of a job's runs, [runs]: those of their seeds, or secret ones.

  Where any run adds noise, what happens in the rounds of all follows from a secret: the noise, and
  who takes part. It differs between runs and is drawn anew whenever a phase starts or goes on, so
  that no noise is ever added twice.
  """
  runs, options = methods_of_runs(job), job.options
  changed = (replaced(options, **v.changes) for v in job.variants.values())
  if not any(map(faults.adds_noise, changed)):
    return jax.vmap(jax.random.key)(np.array([seed for _, seed in runs], np.uint32))
  secret = rng.secret() if options.server.noise_seed is None else options.server.noise_seed
  words = np.stack([rng.derived_seed(secret, *run) for run in runs])
  return jax.random.wrap_key_data(parallel.from_first_process(words))


def _runs(job: Job, phase: int, stack: _Stack, start: FedState | None) -> loop.Runs:
  keys = jax.vmap(lambda key: rng.stream(key, "phases", phase))(stack.keys)
  own = {**stack.changes, "seed": stack.seeds}  # the options of a run name its own seed
  return loop.Runs(keys, stack.cohorts, (own, start))


def _shapes(job: Job, last: int) -> tuple[FedState | None, FedState]:
  """Returns the shapes of what a phase starts from and of its own state."""
  start, state, copies = None, None, 1
  for i, phase in enumerate(job.phases[: last + 1]):
    start = None if i == 0 else jax.eval_shape(lambda s, n=copies: _copied(s, n), state)
    stack, copies = _stack(job, i)
    build = functools.partial(_build, job.options, phase)
    state = loop.initial_shapes(build, _runs(job, i, stack, start), job.federation.train)
  return start, state


def _copied(state: FedState, copies: int) -> FedState:
  """Hands what one variant's runs learned to as many variants."""
  several = lambda tree: jax.tree.map(lambda leaf: jnp.concatenate([leaf] * copies), tree)
  if store.is_streamed(state):  # its stores serve several runs each
    return FedState(several(state.server), state.clients, several(state.round))
  return several(state)


def _repeated(chunk: loop.Report, copies: int) -> loop.Report:
  """Reports what one variant's runs did as what as many variants did; the state stays theirs."""
  again = lambda of_runs: {name: np.concatenate([v] * copies) for name, v in of_runs.items()}
  of_rounds = ("loss", "clients", "dropped")
  numbers = again({name: getattr(chunk, name) for name in of_rounds})
  scores, measures = again(chunk.scores), again(chunk.measures)
  return chunk._replace(**numbers, scores=scores, measures=measures)


def _build(options: Options, phase: Phase, setting) -> Algorithm:
  """Builds a phase's algorithm for one run: its changes to the options, and where it starts."""
  changes, trained = setting
  algorithm = phase.build(replaced(options, **changes), trained)
  return with_own_statistics(algorithm) if options.server.own_statistics else algorithm


def _measure(options: Options, phase: Phase, setting, state: FedState, data, cohorts) -> dict:
  """Takes a phase's measures of one run."""
  changes, _ = setting
  own = replaced(options, **changes)
  return {name: measure(own, state, data, cohorts) for name, measure in phase.measures.items()}


def _changes(job: Job) -> dict[str, np.ndarray]:
  """Returns the values of the hyperparameters in which variants differ, [variants * seeds]."""
  names = {name for variant in job.variants.values() for name in variant.changes}
  return {
    name: np.repeat(
      np.float32([v.changes.get(name, value_of(job.options, name)) for v in job.variants.values()]),
      job.options.run.seeds,
    )
    for name in sorted(names)
  }


def runs_of(variant: int, options: Federated) -> slice:
  """Returns which runs are those of a job's variant, counted from 0: all its seeds."""
  return slice(variant * options.run.seeds, (variant + 1) * options.run.seeds)


def methods_of_runs(job: Job) -> list[tuple[str, int]]:
  """Returns method and seed of every run of a job, in their order."""
  return [(method, seed) for method in job.variants for seed in fed.seeds(job.options)]


def score_tests(job: Job, trained: Trained) -> dict[str, np.ndarray]:
  """Scores what a job has trained on the clients' test rows: name -> [runs, clients]."""
  options, federation = job.options, job.federation
  testing = _scored_rows(job, fed.testing(federation, federation.groups))
  given = trained.build, trained.runs, trained.state, federation.train, testing
  mesh = parallel.make_mesh(options.hardware.devices)
  if options.hardware.store == "device":
    return loop.score(*given, mesh)
  return streaming.score(*given, options.server.participation, mesh)


def _over_variants(job: Job, cohorts_of: Callable) -> tuple:
  """Joins the runs of all variants: cohorts [variants * seeds, K, ...], K filled up for devices."""
  parts = [cohorts_of(variant.bits) for variant in job.variants.values()]
  joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
  if job.options.hardware.store != "device":
    return joined  # each group is filled up by itself
  mesh = parallel.make_mesh(job.options.hardware.devices)
  slots = lambda cohort: parallel.slots(cohort.size.shape[-1], mesh)
  return tuple(pad_clients(cohort, slots(cohort)) for cohort in joined)


def _scored_rows(job: Job, scored):
  """Repeats data and cohorts [seeds, ...] to score on for the runs of all variants."""
  data, cohorts = scored
  return data, of_runs(job, cohorts)


def of_runs(job: Job, cohorts: tuple) -> tuple:
  """Repeats cohorts [seeds, K, ...] for the runs of all variants, K filled up for devices."""
  return _over_variants(job, lambda bits: cohorts)


def rows_of(job: Job, chunk: loop.Report, first: int) -> list[dict]:
  """Writes a chunk as rows of metrics.jsonl; its last round may have been evaluated.

  Args:
    job: whose chunk it is.
    chunk: of one phase.
    first: rounds done before the phase.
  """
  measured = {name: None for phase in job.phases for name in phase.measures}
  rows = []
  for (j, round_), (run_, (method, seed)) in itertools.product(
    enumerate(chunk.rounds), enumerate(methods_of_runs(job))
  ):
    row = {"method": method, "seed": seed, "round": first + int(round_)}
    row |= {"loss": float(chunk.loss[run_, j])}
    row |= {"clients": int(chunk.clients[run_, j]), "dropped": int(chunk.dropped[run_, j])}
    row |= {"accuracy": None, "global_accuracy": None}
    row |= measured
    if j == len(chunk.rounds) - 1:
      row |= _evaluation(chunk, run_)
    rows.append(row)
  return rows


def _evaluation(chunk: loop.Report, run_: int) -> dict[str, float]:
  """Returns what a chunk's evaluation found of a run, means over its clients."""
  names = {"personal": "accuracy", "global": "global_accuracy"}
  found = {names[name]: values for name, values in chunk.scores.items() if name in names}
  return {name: float(np.mean(values[run_])) for name, values in (found | chunk.measures).items()}
