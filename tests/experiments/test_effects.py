"""What a command accepts has an effect: every option of every experiment, one by one.

Experiments run as they are, down to what would train, write or meet other processes: there it is
noted what arrives, and an option that arrives nowhere is found out.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import re
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments import warm_start
from experiments.recipes import central, groups, tuned, tuning
from qupeD_jax import command_line, models, rng
from qupeD_jax.checks import BadInput
from qupeD_jax.data import sources
from qupeD_jax.engine import loop, streaming
from qupeD_jax.federation import privacy
from qupeD_jax.results import metrics, plots, tables, tensorboard
from qupeD_jax.study import cli, folders, parts, study, training
from qupeD_jax.study import federation as fed
from qupeD_jax.study.durability import hosts, resume
from qupeD_jax.study.jobs import Job
from qupeD_jax.study.options import Federated, check_effect, replaced, value_of
from qupeD_jax.types import Dataset, FedState

SMALL = {
  "dataset": "emnist/tiny", "models": ("mlp",), "clients": 8, "batch_size": 4, "seeds": 1,
  "partial_batches": False,
}  # fmt: skip
TWO = {"models": ("mlp", "mlp2")}
MODELS_OF = {"cifar10_mixed_models": TWO, "quickstart": TWO}
HOSTS = {"coordinator": "localhost:1", "processes": 3, "process": 0}

# What an option needs beside it, before it is changed and after.
BESIDE = {
  "alpha": {"partition": "dirichlet"},
  "classes_per_client": {"partition": "by_class"},
  "clip_norm": {"aggregate": "clipped_mean"},
  "corruption": {"corrupt": 1},
  "delta": {"aggregate": "clipped_mean", "noise_multiplier": 1.0},
  "join_timeout": HOSTS,
  "min_test_rows": {"partition": "natural"},
  "new_clients": {"clients": 9},
  "noise_multiplier": {"aggregate": "clipped_mean"},
  "noise_seed": {"aggregate": "clipped_mean", "noise_multiplier": 1.0},
  "partial_batches": {"batch_size": 500},
  "process": HOSTS,
  "processes": HOSTS,
  "store": {"participation": 0.5},
  ("ablations", "store"): {"participation": 0.5, "topics": ("lambda_p",)},
  "trim": {"aggregate": "trimmed_mean"},
}

# Other values of those that are no numbers, or None by default; numbers are changed by `other`.
OTHERS = {
  "aggregate": "median", "batch_size": 3, "bits": (3,), "checkpoint_every": 7,
  "clients_per_step": 2, "coordinator": "auto", "corruption": "nan", "data_dir": ".",
  "dataset": "other", "delta": 0.01, "devices": 3, "dtype": "float32", "eval_every": 3,
  "finetune_rounds": 1, "input_std": (9.0,), "max_test_rows": 1, "min_test_rows": 3, "minutes": 5.0,
  "new_clients": 1,
  "noise_seed": 3, "only": ("FedAvg",), "out": "elsewhere", "partition": "iid", "shares": (0.5,),
  "start": "network.safetensors", "store": "host", "topics": ("dropout",),
  "tuned_on": "cifar10_cnn3",
}  # fmt: skip
OWN = {
  "ablations": {"topics": ("centers",)},
  "cifar10_resnet20_table": {"only": ("STE",)},
  "cifar10_resnet32_table": {"only": ("STE",)},
}


def other(experiment, name, value, folder):
  """Returns another value of an option."""
  if name in ("parts", "tuned"):
    return {"parts": (str(folder),), "tuned": str(folder / "tuned.toml")}[name]
  if name in OWN.get(experiment, {}):
    return OWN[experiment][name]
  if name == "dtype":
    return "bfloat16" if value == "float32" else "float32"
  if name in OTHERS:
    return OTHERS[name]
  if name == "classes_per_client":
    return (2,) if isinstance(value, tuple) else 2
  if isinstance(value, bool):
    return not value
  if name == "models":
    return value[::-1] if len(value) > 1 else ("mlp2",)
  return value + 1 if isinstance(value, int) else value / 2 or 0.25


# --- what is noted


class Differs(Exception):
  """What is noted is no longer what was expected: all there was to be shown."""


class Met(Exception):
  """Processes would meet here."""


class Notes:
  """Notes what an experiment does; stops it where that is not what was expected."""

  def __init__(self):
    self.start()

  def start(self, expected=None):
    self.seen, self.expected = [], expected

  def __call__(self, what, *facts):
    self.seen.append((what, plain(facts)))
    last = len(self.seen) - 1
    if self.expected is not None and self.expected[last : last + 1] != self.seen[last:]:
      raise Differs


def plain(value):
  """Returns what a value is made of: of a function its code and all that it closes over."""
  if isinstance(value, (Federated, fed.Federation, Job, types.ModuleType)):
    return type(value).__name__  # what is taken from them is found where it arrives
  if isinstance(value, jax.core.Tracer):
    return "traced", value.shape, str(value.dtype)
  if isinstance(value, (np.ndarray, jax.Array)):
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
      value = jax.random.key_data(value)
    return value.shape, str(value.dtype), np.asarray(value).tobytes()
  if isinstance(value, functools.partial):
    return "partial", plain(value.func), plain(value.args), plain(value.keywords)
  if isinstance(value, types.FunctionType):
    own = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    return value.__module__, value.__qualname__, plain(own), plain(value.__defaults__)
  if isinstance(value, types.MethodType):
    return "method", plain(value.__func__), plain(value.__self__)
  if isinstance(value, (dict, types.MappingProxyType)):
    return tuple((str(key), plain(entry)) for key, entry in value.items())
  if isinstance(value, (tuple, list)):
    return type(value).__name__, *map(plain, value)
  if hasattr(value, "__wrapped__"):
    return plain(value.__wrapped__)
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    own = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return type(value).__name__, plain(own)
  if isinstance(value, (bool, int, float, np.generic, str, Path, Mesh, np.dtype, type(None))):
    return str(value)
  return getattr(value, "__qualname__", type(value).__name__)


def tiny():
  """400 images of 8x8 pixels in 10 classes, by 16 writers, some of them with few test rows."""
  draw = np.random.default_rng(0)
  parts = []
  few = np.append(np.arange(16), 4 + np.arange(104) % 12)
  for rows, writers in ((400, np.arange(400) % 16), (120, few)):
    x = draw.integers(0, 256, (rows, 8, 8, 1), np.uint8)
    parts.append(Dataset(x, np.arange(rows, dtype=np.int32) * 7 % 10, writers.astype(np.int32)))
  return sources.Source(*parts, 10)


@pytest.fixture(scope="module")
def notes():
  """Has experiments note what they do, where they would do it."""
  note, data = Notes(), tiny()
  doing_nothing, nothing = lambda *_, **__: {}, (None, None, None)
  nobody = lambda *_, **__: contextlib.nullcontext(lambda: False)
  load, make = fed.load, functools.cache(models.make)

  def read(*source):
    note("source", source)
    return data

  def dealt(options, *own):
    federation = load(options, fed.split, make)
    seen = [(split.train, split.validation) for split in federation.splits]
    note("federation", seen, federation.groups, federation.models, federation.train.x.shape)
    return federation

  def begin(folder, config, methods, recorded, *, fresh, say):
    note("folder", folder, methods, fresh)
    return True

  def run_jobs(jobs, folder, console, found, saves, *shown):
    note("saves", saves.pace, saves.deadline)
    note("test rows", [split.test for split in jobs[0].federation.splits])
    for job in jobs:
      note("privacy", [study.about_privacy(job, method) for method in job.variants])
      note_job(job, folder, saves)
    return {}, set()

  def search(jobs, options, folder, console, saves, *shown):
    note("saves", saves.pace, saves.deadline)
    for job in jobs.values():
      note_job(job, folder, saves)
    return collections.Counter()

  def note_job(job, folder, saves):
    note("variants", job.variants, training._keys(job))
    for phase in job.phases:
      note("phase", phase._replace(build=None, measures=[*phase.measures]))
      changed = next(iter(job.variants.values())).changes
      setting = {name: np.float32(value) for name, value in changed.items()}
      # What a federation of several servers or one leaves, and nobody looks into yet.
      left = FedState(("server",) * len(job.federation.groups), ("client",), 0)
      left = left._replace(clients=left.clients * len(left.server))
      training._run(job, phase, (setting, left), *nothing, folder, saves.pace.every or None)

  def resident(build, runs, data, *, measure=None, **how):
    note_algorithm(build, runs)
    if measure:
      measure(runs, None, None, None)
    note("engine", how)

  def streamed(build, runs, data, **how):
    note_algorithm(build, runs)
    note("streaming", how)
    return loop.Result(None, 0.0, 0.0)

  def note_algorithm(build, runs):
    changed, left = runs

    def built(changed):
      note("algorithm", build(({**changed, "seed": 0}, left)))
      return ()

    jax.eval_shape(built, changed)

  def opened(folder, wanted):
    note("tensorboard", wanted)
    return contextlib.nullcontext(tensorboard.NOBODY)

  def measuring(*given, **how):
    note("measure", given, how)
    return doing_nothing

  def meet(**how):
    note("hosts", how)
    raise Met

  with pytest.MonkeyPatch.context() as patch:
    for place, name, instead in (
      (sources, "read", read), (fed, "load", dealt), (fed, "forward_flops", lambda *_: 0),
      (models, "same_outputs", doing_nothing),
      (folders, "held", nobody), (folders, "begin", begin), (folders, "end", doing_nothing),
      (folders, "require_whole", doing_nothing), (resume, "deadline", lambda minutes: minutes),
      (study, "run_jobs", run_jobs), (study, "draw", doing_nothing),
      (parts, "read", lambda taken, *_: note("parts", taken)),
      (plots, "clients", doing_nothing), (plots, "pareto", doing_nothing),
      (warm_start, "draw", doing_nothing),
      (groups, "write", doing_nothing), (metrics, "read_metrics", lambda folder: []),
      (metrics, "read_summary", doing_nothing), (tables, "print_table", doing_nothing),
      (tuned, "read", functools.cache(tuned.read)), (tuning, "_search", search),
      (tuning, "read_scores", doing_nothing), (hosts, "usual_devices", lambda options: 1),
      (loop, "run", resident), (streaming, "run", streamed),
      (streaming, "completed", doing_nothing), (rng, "secret", lambda: 0),
      (privacy, "epsilon", lambda *given, **how: note("epsilon", given, how) or 0.0),
      (central.stationarity, "of_clients", measuring),
      (central.import_torch, "read_variables", lambda *given: note("start", given)),
      (jax.distributed, "initialize", meet), (tensorboard, "opened", opened),
      (tensorboard, "require_installed", doing_nothing),
      (hosts, "_end_with_watcher", doing_nothing),
    ):  # fmt: skip
      patch.setattr(place, name, instead)
    yield note


def small(experiment, **values):
  """Returns the module of an experiment and its options at a small scale."""
  module = importlib.import_module(f"experiments.{experiment}")
  chosen = {**SMALL, **MODELS_OF.get(experiment, {}), **values}
  offered = command_line.leaves(type(module.DEFAULTS))
  known = {name: value for name, value in chosen.items() if name in offered}
  return module, replaced(module.DEFAULTS, **known)


def run(note, module, name, options, expected=None):
  """Returns what a run is refused for, or None; stops it where it is not what was expected."""
  note.start(expected)
  try:
    check_effect(options, module.DEFAULTS)
    hosts.run(name, module.main, options)
  except BadInput as error:
    return str(error)
  except (Met, Differs):
    pass
  return None


def kinds():
  """Names one experiment of those that have the same options and differ in default values alone."""
  return {type(small(name)[0].DEFAULTS): name for name in reversed(cli.names())}.values()


@pytest.mark.parametrize("experiment", kinds())
def test_every_option_has_an_effect(experiment, notes, tmp_path):
  shutil.copy(tuned.FILE, tmp_path)
  written = (tmp_path / "tuned.toml").read_text("utf-8")
  (tmp_path / "tuned.toml").write_text(re.sub("(?m)^(centers_rate = ).*", r"\g<1>1e-3", written))
  module, options = small(experiment)
  run(notes, module, experiment, options)
  idle, before = {}, {options: (None, notes.seen)}
  run(notes, module, experiment, options)
  assert notes.seen == before[options][1]  # else all would seem to have an effect
  for name in command_line.leaves(type(module.DEFAULTS)):
    _, options = small(experiment, **BESIDE.get((experiment, name), BESIDE.get(name, {})))
    if options not in before:
      before[options] = run(notes, module, experiment, options), notes.seen
    refused, seen = before[options]
    value = other(experiment, name, value_of(options, name), tmp_path)
    changed = replaced(options, **{name: value})
    if reason := run(notes, module, experiment, changed, seen):
      idle[name] = reason
    elif notes.seen == seen and not refused:
      idle[name] = f"{value}: nothing differs"
  assert not idle
