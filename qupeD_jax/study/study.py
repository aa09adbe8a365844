"""Runs the jobs of an experiment and writes its results folder."""

import functools
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from qupeD_jax import checks, models
from qupeD_jax.data import catalog, splits
from qupeD_jax.engine import loop
from qupeD_jax.io import files, packing
from qupeD_jax.quantization import ops
from qupeD_jax.results import account, metrics, plots, tables, tensorboard
from qupeD_jax.study import faults, folders, newcomers, parts, portrait, training, watched
from qupeD_jax.study import federation as fed
from qupeD_jax.study.durability import resume, stopping
from qupeD_jax.study.durability.progress import Bar
from qupeD_jax.study.errors import Diverged
from qupeD_jax.study.federation import Federation
from qupeD_jax.study.jobs import Job, MakeJob, is_quantised, job_name
from qupeD_jax.study.options import Federated, Options, check, flat, replaced, settled
from qupeD_jax.wrappers.sampling import num_participants


class Outcome(NamedTuple):
  """What an experiment returns."""

  folder: Path  # of the results
  summary: dict[str, dict]  # of summary.json, by method


def run(
  name: str,
  options: Federated,
  make_jobs: Sequence[MakeJob],
  *,
  comparisons: Callable[[Sequence[str]], Mapping[str, Sequence[str]]] = lambda methods: {},
  taken: Sequence[str] = (),
  pictured: str | None = None,
  keep_going: bool = False,
  split: Callable = fed.split,
  make_model: Callable = models.make,
) -> Outcome:
  """Trains all jobs, prints the table, draws the pictures; goes on with a run that was cut off.

  Args:
    name: of the experiment; names its results folder.
    options: of the experiment.
    make_jobs: one per job, (options, federation) -> Job.
    comparisons: from the methods that were trained, in order, to method -> its rivals, with
      whom it is compared client by client: `with_first`, or `among` told of what.
    taken: results folders of the same experiment; jobs found there are not trained again.
    pictured: the method whose weights and centers are drawn; by default the first quantised one of
      the last job with codebooks.
    keep_going: leave a method out that diverges, where otherwise the study ends.
    split, make_model: a partition and networks of one's own, as in `federation.load`.

  Returns:
    The results folder and what its summary says.

  Raises:
    BadInput: an option is out of range or does not fit the data, the results folder is in use, or
      it holds an unfinished run with other options.
    Diverged: a loss is no longer finite; not if `keep_going`.
    OutOfTime, Terminated: it was told to stop, and can go on from there.
  """
  console, options = Console(), settled(options)
  federation, jobs = prepare(options, make_jobs, split, make_model)
  methods = [method for job in jobs for method in job.variants]
  config, expected = config_of(name, options), expected_rows(jobs)
  found = parts.read(taken, config, expected)
  folder, say = folder_of(name, options), sayer(console)
  recorded = lambda folder: parts.finished(folder, expected).summary.keys()
  with folders.held(folder), stopping.listening() as asked:
    if folders.begin(folder, config, methods, recorded, fresh=options.run.fresh, say=say):
      say(f"{name}: {describe(options, federation)}")
      plots.clients(held_classes(federation), folder / "clients.png")
      saves = folders.saves(options, asked, say)
      with tensorboard.opened(folder, options.run.tensorboard) as board:
        summary, kept = run_jobs(jobs, folder, console, found, saves, pictured, keep_going, board)
        draw(folder)
        board.pictures()
      if pairs := comparisons([*summary]):
        metrics.write_comparisons(folder, pairs)
      expected = {method: expected[method] for method in summary}
      folders.require_whole(folder, expected, {metrics.SUMMARY, metrics.ACCURACIES, *kept})
      folders.end(folder)
      tables.print_table(summary, console)
      print_privacy(summary, console)
      for method in untaught(jobs, metrics.read_metrics(folder)):
        say(f"{method}: the server dropped every upload of every round, none was finite")
      say(f"results in {folder}")
  return Outcome(folder, metrics.read_summary(folder))


def run_all(
  name: str, studies: Sequence[tuple[Federated, Sequence[MakeJob]]], **how: Any
) -> tuple[Outcome, ...]:
  """Runs several studies, one after the other; what one of them refuses is refused at the start.

  Args:
    name: of the experiment.
    studies: the options of each, with a folder of its own, and its jobs.
    how: as of `run`, of all of them.
  """
  for options, make_jobs in studies if len(studies) > 1 else ():
    prepare(settled(options), make_jobs)
  return tuple(run(name, options, make_jobs, **how) for options, make_jobs in studies)


def expected_rows(jobs: Iterable[Job]) -> dict[str, int]:
  """Counts the rows that metrics.jsonl has of each method: one a seed and round."""
  rows = lambda job: sum(phase.rounds for phase in job.phases) * job.options.run.seeds
  return {method: rows(job) for job in jobs for method in job.variants}


def prepare(
  options: Federated,
  make_jobs: Sequence[MakeJob],
  split: Callable = fed.split,
  make_model: Callable = models.make,
) -> tuple[Federation, list[Job]]:
  """Checks the options, loads the data and makes the jobs; raises BadInput as `run` does."""
  check(options)
  if options.run.tensorboard:
    tensorboard.require_installed()
  federation = fed.load(options, split, make_model)
  jobs = [make(options, federation) for make in make_jobs]
  for job in jobs:
    check(job.options)
  methods = [method for job in jobs for method in job.variants]
  # Some file systems do not tell upper case from lower.
  distinct = len({files.name_of(method).casefold() for method in methods}) == len(methods)
  checks.require(distinct, "bits", options.bits, f"other than in {', '.join(methods)}")
  return federation, jobs


def run_jobs(
  jobs: Sequence[Job],
  folder: Path,
  console: Console,
  found: Sequence[parts.Part],
  saves: resume.Saves,
  pictured: str | None,
  keep_going: bool,
  board: tensorboard.Board,
) -> tuple[dict[str, dict], set[str]]:
  """Trains the jobs that are not finished in the folder, one after the other.

  Args:
    jobs, pictured, keep_going: as in `run`.
    folder: of the results.
    console: to print on.
    found: what is taken over from other runs.
    saves: when jobs are saved.
    board: where events go.

  Returns:
    The summary, by method, and the paths of the clients' models that were there after any job.
  """
  finished, kept = parts.finished(folder, expected_rows(jobs)), folders.models(folder)
  methods = [method for job in jobs for method in job.variants]
  in_order = lambda of: {method: of[method] for method in methods if method in of}
  summary, accuracies, before = finished.summary, finished.accuracies, 0
  with Bar(sum(phase.rounds for job in jobs for phase in job.phases), console) as bar:

    def results_of(job):
      sitter = None
      if job.options.hardware.store == "device":
        taken = folder / portrait.FOLDER / files.name_of(job_name(job))
        sitter = portrait.of_job(job, taken, pictured)
      own = folders.of_job(saves, job, folder, sitter)
      return (
        recall(job, finished)
        or take_over(job, found, folder, own, board)
        or run_job(job, folder, bar, own, sitter, board)
      )

    for job in jobs:
      bar.start(job_name(job), before)
      before += sum(phase.rounds for phase in job.phases)
      entries, scores = surviving(job, results_of, console) if keep_going else results_of(job)
      summary, accuracies = in_order(summary | entries), in_order(accuracies | scores)
      # The summary last: what it has is finished.
      metrics.write_accuracies(folder, accuracies)
      metrics.write_summary(folder, summary)
      shutil.rmtree(folder / folders.CHECKPOINTS / files.name_of(job_name(job)), ignore_errors=True)
      kept |= folders.models(folder)
  return summary, kept


def untaught(jobs: Sequence[Job], rows: Sequence[Mapping]) -> list[str]:
  """Names the methods whose server got uploads, in some seed, and took none of them.

  Args:
    jobs: what was trained.
    rows: of metrics.jsonl.
  """
  found = []
  for job in jobs:
    sends = [phase.sends for phase in job.phases for _ in range(phase.rounds)]
    for method, seed in training.methods_of_runs(job):
      own = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
      sent = [row for row in own if sends[row["round"] - 1]]
      in_vain = all(row.get("dropped") == row.get("clients") for row in sent)
      if in_vain and any(row.get("dropped") for row in sent) and method not in found:
        found.append(method)
  return found


def print_privacy(summary: Mapping[str, dict], console: Console) -> None:
  """Prints what noise is worth, where there is any."""
  for method, entry in summary.items():
    if found := entry.get("privacy"):
      bound = f"epsilon {found['epsilon']:.3g} at delta {found['delta']:.2g}"
      line = f"{method}: {bound}, for neighbours that differ in what one client holds"
      sayer(console)(line)


def sayer(console: Console) -> Callable[[str], None]:
  """Returns a function that prints a text as one line, however wide the console."""
  return functools.partial(console.print, soft_wrap=True, highlight=False, markup=False)


def draw(folder: Path) -> None:
  """Draws what metrics.jsonl tells."""
  rows = metrics.read_metrics(folder)
  plots.curves(rows, folder / "curves.png")
  if plots.has_stationarity(rows):
    plots.stationarity(rows, folder / "stationarity.png")


def config_of(name: str, options: Federated) -> dict:
  """Returns what config.json says an experiment was asked for."""
  return {"experiment": name, **flat(options), "seed_list": [*fed.seeds(options)]}


def folder_of(name: str, options: Federated) -> Path:
  """Returns the results folder of an experiment."""
  return checks.place("out", options.run.out or Path("results") / name)


def recall(job: Job, finished: parts.Part) -> tuple[dict[str, dict], dict[str, dict]] | None:
  """Returns a job's results, as `run_job` does, if they were in the folder before."""
  part = parts.of_job(job, [finished])
  return part and (part.summary, part.accuracies)


def take_over(
  job: Job,
  found: Sequence[parts.Part],
  folder: Path,
  saves: resume.Saves,
  board: tensorboard.Board,
) -> tuple[dict[str, dict], dict[str, dict]] | None:
  """Copies a job's results from another run into the folder; returns them as `run_job` does."""
  part = parts.of_job(job, found)
  if part is None:
    return None
  saves.cut_back(0)
  metrics.append_metrics(folder, part.rows)
  board.rows(part.rows)
  return part.summary, part.accuracies


def run_job(
  job: Job,
  folder: Path,
  bar: Bar,
  saves: resume.Saves,
  sitter: portrait.Portrait | None,
  board: tensorboard.Board,
) -> tuple[dict[str, dict], dict[str, dict]]:
  """Trains the methods of one job, all seeds and all methods side by side.

  Args:
    job: what is trained.
    folder: of the results.
    bar: shows how far it is.
    saves: where to go on, and when to save.
    sitter: whose weights and centers are drawn; None for nobody's.
    board: where events go.

  Returns:
    Two dicts by method: the entries of summary.json and those of accuracies.json.
  """
  options = job.options

  def record(done: int, chunk: loop.Report) -> None:
    rows = training.rows_of(job, chunk, done)
    metrics.append_metrics(folder, rows)
    board.rows(rows)
    if chunk.scores:
      board.weights(done + int(chunk.rounds[-1]), lambda: watched.weights(job, chunk.state))
    if sitter and chunk.scores:
      sitter.take(chunk.state, done + int(chunk.rounds[-1]))
    bar.advance(len(chunk.rounds), rows, done + int(chunk.rounds[-1]))

  trained = training.train(job, record, saves, folder)
  scores = training.score_tests(job, trained)
  if len(job.federation.new) and (found := newcomers.score(job, trained)) is not None:
    scores["new_clients"] = found
  if sitter:
    sitter.draw(folder, evaluated(folder, sitter.method, options.run.seed), saves.warn)
  save_models(job, trained, folder)
  entries, accuracies = {}, {}
  seconds = trained.seconds / len(training.methods_of_runs(job))
  for i, method in enumerate(job.variants):
    own = {name: values[training.runs_of(i, options)] for name, values in scores.items()}
    entries[method] = summarise(job, method, own, seconds) | about_privacy(job, method)
    if len(job.federation.new):
      entries[method] |= {"new_clients": metrics.new_clients(own.get("new_clients"))}
    accuracies[method] = {"seeds": [*fed.seeds(options)], "accuracy": own["personal"]}
  return entries, accuracies


def evaluated(folder: Path, method: str, seed: int) -> list[int]:
  """Returns the rounds after which a method was scored, by metrics.jsonl."""
  rows = (row for row in metrics.read_metrics(folder) if row["accuracy"] is not None)
  return [row["round"] for row in rows if (row["method"], row["seed"]) == (method, seed)]


def surviving(
  job: Job, results_of: Callable, console: Console
) -> tuple[dict[str, dict], dict[str, dict]]:
  """Trains a job without its methods that diverge, which takes a start anew for each of them.

  Args:
    job: what is trained.
    results_of: job -> what `run_job` returns.
    console: told who is left out.
  """
  try:
    return results_of(job)
  except Diverged as error:
    sayer(console)(f"left out: {error}")
    left = {name: variant for name, variant in job.variants.items() if name != error.method}
    return surviving(job._replace(variants=left), results_of, console) if left else ({}, {})


def among(
  comparisons: Mapping[str, Sequence[str]], methods: Container[str]
) -> dict[str, list[str]]:
  """Returns those of the comparisons whose methods there are."""
  pairs = {
    ours: [rival for rival in rivals if rival in methods]
    for ours, rivals in comparisons.items()
    if ours in methods
  }
  return {ours: rivals for ours, rivals in pairs.items() if rivals}


def with_first(methods: Sequence[str]) -> dict[str, list[str]]:
  """Returns the comparisons of every method with the first."""
  return {method: [methods[0]] for method in methods[1:]}


def describe(options: Federated, federation: Federation) -> str:
  """Says in one line what is about to be trained on."""
  counted = splits.report(
    federation.splits[0], federation.train.y, federation.test.y, federation.num_classes
  )
  facts = [options.data.dataset, *splits.summary(counted).splitlines()]
  if options.division.min_test_rows is not None:
    owner = fed.natural(options, federation.train, federation.test)
    writers = len(np.unique(federation.train.client))
    left_out = f"{writers - owner.max() - 1} of {writers} writers"
    facts.append(f"{left_out} left out, with fewer than {options.division.min_test_rows} test rows")
  if options.division.new_clients:
    facts.append(f"the last {options.division.new_clients} of them new: in no round")
  count, names = options.run.seeds, ", ".join(options.networks.models)
  seeds = f"{count} seed{'s' * (count > 1)}"
  return "; ".join([*facts, seeds, f"models {names}"])


def held_classes(federation: Federation) -> np.ndarray:
  """Counts the training rows of each class at each client, first seed: [clients, classes]."""
  split = federation.splits[0]
  return splits.report(split, federation.train.y, federation.test.y, federation.num_classes)[0]


def round_traffic(job: Job) -> int:
  """Counts what all clients send and receive in a round, in bytes, in the phase with most of it."""
  federation, options = job.federation, job.options
  bits = next(iter(job.variants.values())).bits
  cohorts = jax.tree.map(lambda leaf: leaf[0], fed.training(federation, bits, federation.groups))
  share = options.server.participation
  participants = [num_participants(len(group), share) for group in federation.groups]
  state, most = None, 0
  for phase in job.phases:
    init = lambda state, key, phase=phase: phase.build(options, state).init(
      key, federation.train, cohorts
    )
    state = jax.eval_shape(init, state, jax.random.key(0))
    servers = state.server if phase.separate else (state.server,)
    taking_part = participants if phase.separate else [sum(participants)]
    pairs = zip(servers, taking_part, strict=True)
    most = max(most, sum(sum(account.round_bytes(*pair)) for pair in pairs))
  return most


def about_privacy(job: Job, method: str) -> dict:
  """Returns what summary.json says of a method's privacy; nothing where no noise is added."""
  options = replaced(job.options, **job.variants[method].changes)
  rounds = sum(phase.rounds for phase in job.phases if phase.sends)
  found = faults.privacy_of(options, [len(group) for group in job.federation.groups], rounds)
  return {"privacy": found} if found else {}


def about_inputs(options: Options, federation: Federation) -> dict:
  """Returns what a shipped model needs to be made anew with `models.make`, and on what."""
  return {
    "dataset": options.data.dataset,
    "num_classes": federation.num_classes,
    "image_shape": federation.train.x.shape[1:],
    "mean": federation.mean,
    "std": federation.std,
    "white": catalog.white(options.data.dataset),
    "classes": catalog.class_names(options.data.dataset, federation.num_classes),
  }


def save_models(job: Job, trained: training.Trained, folder: Path) -> None:
  """Writes the personal models of the first seed, one file per client: those that were scored.

  Methods at full precision have large ones, written only where there is but one client.
  """
  options, federation = job.options, job.federation
  written = {
    i * options.run.seeds: (method, variant)
    for i, (method, variant) in enumerate(job.variants.items())
    if federation.num_clients == 1 or is_quantised({method: variant})
  }
  inputs = about_inputs(options, federation)
  for one in training.shipped(job, trained, [*written]) if written else ():
    method, variant = written[one.run]
    metadata = {
      "client": one.client,
      "bits": int(variant.bits[one.client]),
      "seed": options.run.seed,
      "model": federation.names[one.group],
      "input": inputs,
    }
    path = folder / "models" / files.name_of(method) / f"client_{one.client:04d}.safetensors"
    packing.save(path, packing.pack(one.variables, one.codebooks), metadata)


def summarise(job: Job, method: str, scores: dict[str, np.ndarray], seconds: float) -> dict:
  """Sums up a method: its scores [seeds, clients] and what its models and rounds cost."""
  federation, bits = job.federation, job.variants[method].bits
  sizes, flops = [], []
  for group, model, cost in zip(
    federation.groups, federation.models, federation.flops, strict=True
  ):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    paths = [p for p in ops.flatten(shapes["params"]) if ops.is_quantised(p)]
    sizes += [
      account.model_bytes(shapes["params"], paths, int(bits[c]), shapes["stats"]) for c in group
    ]
    flops += [cost] * len(group)
  return metrics.summarise(
    scores["personal"],
    unquantised=scores.get("unquantised"),
    global_model=scores.get("global"),
    bits=sorted({int(b) for b in bits}),
    bytes_per_model=float(np.mean(sizes)),
    bytes_per_round=round_traffic(job),
    flops_per_example=float(np.mean(flops)),
    seconds=seconds,
  )
