"""Runs the jobs of an experiment and writes its results folder."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from experiments.common import federation as fed
from experiments.common.errors import Diverged
from experiments.common.federation import Federation
from experiments.common.methods import Job
from experiments.common.options import Options, check
from experiments.common.progress import Bar
from qupeD_jax import account, checks, engine, export, metrics, models, quantize, report
from qupeD_jax.data import sources, splits
from qupeD_jax.types import FedState

PICTURES = ("clients.png", "curves.png", "weights.png")

MakeJob = Callable[[Options, Federation], Job]


def run(
  name: str,
  options: Options,
  make_jobs: Sequence[MakeJob],
  *,
  split: Callable = fed.split,
  make_model: Callable = models.make,
) -> Path:
  """Trains all jobs, prints the table, draws the pictures.

  Args:
    name: of the experiment; names its results folder.
    options: of the experiment.
    make_jobs: one per job, (options, federation) -> Job.
    split, make_model: a partition and networks of one's own, as in `federation.load`.

  Returns:
    The results folder.

  Raises:
    BadInput: an option is out of range or does not fit the data.
    Diverged: a loss is no longer finite.
  """
  check(options)
  console = Console()
  federation = fed.load(options, split, make_model)
  jobs = [make(options, federation) for make in make_jobs]
  methods = [method for job in jobs for method in job.bits]
  distinct = len(set(methods)) == len(methods)
  checks.require(distinct, "--bits", options.bits, f"other than in {', '.join(methods)}")
  config = {"experiment": name, **dataclasses.asdict(options), "seed_list": [*fed.seeds(options)]}
  folder = metrics.open_results(Path(options.out or Path("results") / name).expanduser(), config)
  remove_results(folder)
  console.print(f"{name}: {describe(options, federation)}")
  report.clients(held_classes(federation), folder / "clients.png")
  summary = {}
  with Bar(sum(phase.rounds for job in jobs for phase in job.phases), console) as bar:
    for job in jobs:
      summary |= run_job(job, options, federation, folder, bar)
      metrics.write_summary(folder, summary)
  report.curves(metrics.read_metrics(folder), folder / "curves.png")
  metrics.print_table(summary, console)
  console.print(f"results in {folder}")
  return folder


def run_job(
  job: Job, options: Options, federation: Federation, folder: Path, bar: Bar
) -> dict[str, dict]:
  """Trains the methods of one job, all seeds and all methods side by side.

  Returns:
    method -> its entry in summary.json.
  """
  methods = [(method, seed) for method in job.bits for seed in fed.seeds(options)]  # of the runs
  snapshots = Snapshots(job, options)
  bar.start(job_name(job))

  def record(done: int, chunk: engine.Report) -> None:
    rows = _rows(methods, chunk, done)
    metrics.append_metrics(folder, rows)
    snapshots.take(chunk.state, done + int(chunk.rounds[-1]))
    bar.advance(len(chunk.rounds), rows)

  runs, state, seconds = train_phases(job, options, federation, methods, record)
  testing = _scored_rows(job, fed.testing(federation, job.groups))
  scores = engine.score(job.phases[-1].build, runs, state, federation.train, testing)
  snapshots.draw(folder)
  save_models(job, options, federation, state, folder)
  return {
    method: _summarise(job, method, federation, options, scores, i, seconds / len(methods))
    for i, method in enumerate(job.bits)
  }


def train_phases(
  job: Job,
  options: Options,
  federation: Federation,
  methods: list[tuple[str, int]],
  record: Callable[[int, engine.Report], None],
) -> tuple[engine.Runs, FedState, float]:
  """Trains through all phases of a job, each from what the one before left.

  Args:
    job: what is trained.
    options: of the experiment.
    federation: the clients.
    methods: method and seed of every run.
    record: called with the rounds done before the phase, and a chunk of it.

  Returns:
    The runs and their states after the last phase, and the seconds spent on rounds.

  Raises:
    Diverged: a loss is no longer finite.
  """
  cohorts = _over_methods(job, lambda bits: fed.training(federation, bits, job.groups))
  validation = _scored_rows(job, fed.validation(federation, job.groups))
  keys = jax.vmap(jax.random.key)(np.array([seed for _, seed in methods], np.uint32))
  state, seconds, done = None, 0.0, 0
  for i, phase in enumerate(job.phases):
    runs = engine.Runs(jax.vmap(jax.random.fold_in, (0, None))(keys, i), cohorts, state)
    try:
      result = engine.run(
        phase.build,
        runs,
        federation.train,
        rounds=phase.rounds,
        every=min(options.eval_every, phase.rounds),
        scored=validation,
        callback=functools.partial(record, done),
      )
    except engine.NonFinite as error:
      method, seed = methods[error.run]
      raise Diverged(
        f"{method}, seed {seed}, round {done + error.round}: the loss or the model of clients "
        f"{error.clients} is not finite; smaller rates may help; what was written before it stays"
      ) from error
    state, seconds, done = result.state, seconds + result.train_seconds, done + phase.rounds
  return runs, state, seconds


def remove_results(folder: Path) -> None:
  """Removes what an earlier run left, and nothing else: it must not pass for this run's."""
  for pattern in ("summary.json", "table.md", *PICTURES, "models/*/client_*.safetensors"):
    for path in filter(Path.is_file, folder.glob(pattern)):
      path.unlink()


def job_name(job: Job) -> str:
  """Names a job by its first method, and counts the others."""
  first, *others = job.bits
  return f"{first} and {len(others)} more" if others else first


def describe(options: Options, federation: Federation) -> str:
  """Says in one line what is about to be trained on."""
  counted = splits.report(
    federation.splits[0], federation.train.y, federation.test.y, federation.num_classes
  )
  facts = [options.dataset, *splits.summary(counted).splitlines()]
  return "; ".join([*facts, f"{options.seeds} seeds", f"models {', '.join(options.models)}"])


def held_classes(federation: Federation) -> np.ndarray:
  """Counts the training rows of each class at each client, first seed: [clients, classes]."""
  split = federation.splits[0]
  return splits.report(split, federation.train.y, federation.test.y, federation.num_classes)[0]


def server_shapes(job: Job, federation: Federation):
  """Returns shapes and dtypes of what travels: the server's part of the state."""
  cohorts = fed.training(federation, next(iter(job.bits.values())), job.groups)
  one_run = jax.tree.map(lambda leaf: leaf[0], cohorts)
  init = job.phases[0].build(None).init
  return jax.eval_shape(lambda key: init(key, federation.train, one_run), jax.random.key(0)).server


def about_inputs(options: Options, federation: Federation) -> dict:
  """Returns what a shipped model needs to be made anew with `models.make`, and on what."""
  mean, std = sources.statistics(federation.train)
  return {
    "dataset": options.dataset,
    "num_classes": federation.num_classes,
    "image_shape": federation.train.x.shape[1:],
    "mean": mean,
    "std": std,
  }


def save_models(
  job: Job, options: Options, federation: Federation, state: FedState, folder: Path
) -> None:
  """Writes the quantised personal models of the first seed, one file per client."""
  if not any(_codebooks(clients) for clients in state.clients):
    return
  inputs = about_inputs(options, federation)
  for i, method in enumerate(job.bits):
    target = folder / "models" / method.replace(" ", "_")
    for group, name, clients in zip(job.groups, options.models, state.clients, strict=True):
      first_seed = jax.device_get(jax.tree.map(lambda leaf, r=i * options.seeds: leaf[r], clients))
      for k, client_id in enumerate(group):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], first_seed)
        metadata = {
          "client": int(client_id),
          "bits": int(job.bits[method][client_id]),
          "seed": options.seed,
          "model": name,
          "input": inputs,
        }
        packed = export.pack(one.variables, one.codebooks)
        export.save(target / f"client_{client_id:04d}.safetensors", packed, metadata)


class Snapshots:
  """Collects one quantised tensor of one client over the rounds, for weights.png."""

  def __init__(self, job: Job, options: Options, count: int = 5):
    total = sum(phase.rounds for phase in job.phases)
    self.due = [round(total * i / (count - 1)) for i in range(count)]
    self.taken = []
    self.method = next(iter(job.bits))
    self.client = int(job.groups[0][0])
    self.path = ""

  def take(self, state: FedState, done: int) -> None:
    """Keeps the tensor if a snapshot is due."""
    books = _codebooks(state.clients[0])
    if not books or not self.due or done < self.due[0]:
      return
    self.due = [due for due in self.due if due > done]
    flat = quantize.flatten(state.clients[0].variables["params"])
    self.path = max(books, key=lambda path: flat[path].size)
    values, centers = (np.asarray(leaf[self.path][0, 0]) for leaf in (flat, books))
    self.taken.append((done, values.ravel(), centers[np.isfinite(centers)]))

  def draw(self, folder: Path) -> None:
    """Draws what was taken, if anything."""
    if self.taken:
      title = f"{self.method}, client {self.client}: {self.path}"
      report.weights(self.taken, folder / "weights.png", title)


def _codebooks(clients) -> dict:
  return getattr(clients, "codebooks", {})


def _over_methods(job: Job, cohorts_of: Callable) -> tuple:
  """Joins the runs of all methods: cohorts [methods * seeds, K, ...]."""
  parts = [cohorts_of(bits) for bits in job.bits.values()]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _scored_rows(job: Job, scored):
  data, cohorts = scored
  return data, _over_methods(job, lambda bits: cohorts)


def _rows(methods, chunk: engine.Report, first: int) -> list[dict]:
  """Writes a chunk as rows of metrics.jsonl; its last round was evaluated."""
  rows = []
  for (run_, (method, seed)), (j, round_) in itertools.product(
    enumerate(methods), enumerate(chunk.rounds)
  ):
    row = {"method": method, "seed": seed, "round": first + int(round_)}
    row |= {"loss": float(chunk.loss[run_, j]), "accuracy": None, "global_accuracy": None}
    if j == len(chunk.rounds) - 1:
      row["accuracy"] = float(np.mean(chunk.scores["personal"][run_]))
      if "global" in chunk.scores:
        row["global_accuracy"] = float(np.mean(chunk.scores["global"][run_]))
    rows.append(row)
  return rows


def _summarise(
  job: Job, method: str, federation: Federation, options: Options, scores, i: int, seconds: float
) -> dict:
  own = slice(i * options.seeds, (i + 1) * options.seeds)
  of_method = {name: values[own] for name, values in scores.items()}
  bits = job.bits[method]
  sizes, flops = [], []
  for group, model, cost in zip(job.groups, job.models, federation.flops, strict=False):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    paths = [p for p in quantize.flatten(shapes["params"]) if quantize.is_quantised(p)]
    sizes += [
      account.model_bytes(shapes["params"], paths, int(bits[c]), shapes["stats"]) for c in group
    ]
    flops += [cost] * len(group)
  taking_part = sum(max(1, round(options.participation * len(group))) for group in job.groups)
  traffic = account.round_bytes(server_shapes(job, federation), taking_part)
  return metrics.summarise(
    of_method["personal"],
    unquantised=of_method.get("unquantised"),
    global_model=of_method.get("global"),
    bits=sorted({int(b) for b in bits}),
    bytes_per_model=float(np.mean(sizes)),
    bytes_per_round=sum(traffic),
    flops_per_example=float(np.mean(flops)),
    seconds=seconds,
  )
