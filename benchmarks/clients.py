"""Times rounds of a few among many clients: all on the device, on the host, or on the disk.

python -m benchmarks.clients                 # 10,000 clients, of which 1 % train in a round
python -m benchmarks.clients --model cnn3

docs/scaling.md says what is measured and how to read it.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import steps, timing, workload
from benchmarks.workload import Case, Form
from qupeD_jax import checks, command_line
from qupeD_jax.engine import loop, programs, store, streaming
from qupeD_jax.io import files
from qupeD_jax.results import account, tables
from qupeD_jax.wrappers.sampling import num_participants, with_sampling

RESIDENT, HOST, DISK = "all on the device", "on the host", "on the disk"


@dataclasses.dataclass(frozen=True)
class Options:
  """Times rounds in which a few of many clients train, by where the others lie."""

  model: str = "mlp"
  """Network, one of models.NAMES."""
  method: str = "quped"
  """fedavg, quped or simultaneous."""
  clients: int = 10_000
  """Number of clients."""
  participation: float = 0.01
  """Share of them that trains in a round."""
  batch_size: int = 16
  """Examples of a client's step."""
  local_steps: int = 10
  """Steps of a round."""
  every: int = 10
  """Rounds of a chunk, between which all contenders stop."""
  grown: tuple[int, ...] = (1_000, 10_000, 100_000)
  """Numbers of clients for which memory is counted, as many taking part in each."""
  repeats: int = 15
  """Turns that the contenders take, at most."""
  seconds: float = 120.0
  """Time for the turns, after which no more than three are taken; processor time gets as much."""
  out: Path = Path("results/benchmarks")
  """Folder of the results."""


class Row(NamedTuple):
  """What came of a contender."""

  form: str
  ms: timing.Quartiles  # per participant and round
  throughput: timing.Quartiles  # over that of the resident run, of the same turn
  work: timing.Quartiles  # processor time over that of the resident run, in turns of their own


class Memory(NamedTuple):
  """Bytes on the device, by XLA's count: arguments, results and what lies between."""

  clients: int
  resident: int  # all clients there
  streamed: int  # of a round
  drawing: int  # of who takes part, from ids and sizes of all


def run(options: Options, folder: Path) -> dict[str, Any]:
  """Times and counts; returns what is written down."""
  case = Case(options.model, "float32", options.clients, options.batch_size, options.local_steps)
  forms = {
    RESIDENT: resident(case, options),
    HOST: streamed(case, options, store.on_host),
    DISK: streamed(case, options, store.on_disk(folder)),
  }
  for form in forms.values():
    form.wait(form.run(form.start(), 1))
  count = num_participants(options.clients, options.participation) * options.every
  turns = options.repeats, options.seconds
  times = timing.take_turns(forms, *turns)
  work = timing.take_turns(forms, *turns, clock=time.process_time)
  rows = [
    Row(
      name,
      timing.quartiles(1e3 * t / count),
      timing.quartiles(times[RESIDENT] / t),
      timing.quartiles(work[name] / work[RESIDENT]),
    )
    for name, t in times.items()
  ]
  taking_part = num_participants(options.clients, options.participation)
  return {
    "machine": timing.machine(),
    "options": options,
    "participants": taking_part,
    "bytes_per_client": client_bytes(case, options),
    "turns": len(times[RESIDENT]),
    "rows": rows,
    "memory": [memory(case, options, n, taking_part / n) for n in options.grown],
  }


def build(case: Case, options: Options) -> Callable:
  """Returns the algorithm as both engines take it."""
  return lambda _: workload.algorithm(case, options.method)


def one_run(case: Case) -> tuple[loop.Runs, Any]:
  """Returns one run of all clients, on the host, and its data."""
  data, cohort = jax.tree.map(np.asarray, workload.federation(case))
  key = jax.random.key(workload.KEY)[None]
  return loop.Runs(key, (jax.tree.map(lambda leaf: leaf[None], cohort),)), data


def resident(case: Case, options: Options) -> Form:
  """Keeps all clients on the device, as `loop.run` does."""
  runs, data = one_run(case)
  runs, data = jax.device_put((runs, data))
  program, init = resident_programs(case, options, runs, data, options.participation)

  def advance(state, chunks):
    for _ in range(chunks):
      state = program(runs, state, data, jnp.int32(options.every))[0]
    return state

  return Form(lambda: init(runs, data), advance, jax.block_until_ready, weights=None)


def resident_programs(case: Case, options: Options, runs, data, fraction: float):
  """Compiles a chunk as `loop.run` does, from arrays or their shapes; and what it starts from."""
  sampled = lambda setting: with_sampling(build(case, options)(setting), fraction)
  init = jax.jit(jax.vmap(programs.initialise(sampled), (0, None)))
  state = jax.eval_shape(init, runs, data)
  chunk = jax.vmap(programs.train_chunk(sampled, options.every), (0, 0, None, None))
  return programs.compile_ahead(chunk, runs, state, data, jnp.int32(0), donate=1), init


def streamed(case: Case, options: Options, place: store.Place) -> Form:
  """Keeps on the device who trains. All clients have a state before the first turn."""
  runs, data = one_run(case)
  given = build(case, options), runs
  sizes = {"fraction": options.participation, "every": options.every}
  prepared = streaming.prepare(*given, data, **sizes, place=place)

  def advance(state, chunks):
    for _ in range(chunks):
      state = prepared.train(state, options.every)[0]
    return state

  start = lambda: streaming.completed(*given, prepared.state, data, options.participation)
  return Form(start, advance, lambda state: jax.block_until_ready(state.server), weights=None)


def client_bytes(case: Case, options: Options) -> int:
  """Weighs one client's state."""
  runs, data = one_run(case._replace(clients=1))
  shapes = loop.initial_shapes(build(case, options), runs, data)
  return account.tree_bytes(shapes.clients)


def memory(case: Case, options: Options, clients: int, fraction: float) -> Memory:
  """Counts what the device holds with so many clients; none of the rounds is run."""
  case = case._replace(clients=clients)
  runs, data = one_run(case)
  shapes = jax.eval_shape(lambda: (runs, data))
  program, _ = resident_programs(case, options, *shapes, fraction)
  sizes = {"fraction": fraction, "every": options.every}
  prepared = streaming.prepare(build(case, options), runs, data, **sizes)
  return Memory(clients, *map(held, (program, prepared.program, prepared.drawing)))


def held(program) -> int:
  """Sums XLA's count of a program's memory; results that take over an argument's count once."""
  counts = program.memory_analysis()
  new = counts.output_size_in_bytes - counts.alias_size_in_bytes
  return counts.argument_size_in_bytes + counts.temp_size_in_bytes + new


# --- what is shown


def report(result: dict[str, Any]) -> str:
  """Lays a result out as Markdown."""
  facts, options = result["machine"], result["options"]
  title = (
    f"{facts['device']} ({facts['processor']}, {facts['cores']} cores), jax {facts['jax']}. "
    f"{options.model}, {options.method}, {options.clients:,} clients of "
    f"{result['bytes_per_client']:,} bytes, {result['participants']} of them in a round, "
    f"{options.local_steps} steps of {options.batch_size}; {result['turns']} turns of "
    f"{options.every} rounds.\n"
  )
  spread = lambda q, digits: f"{q.low:.{digits}f} to {q.high:.{digits}f}"
  head_row = ("Clients", "ms per participant", "quartiles", "throughput", "quartiles")
  rows = [(*head_row, "processor time", "quartiles")]
  rows += [
    (
      row.form,
      f"{row.ms.median:.3f}",
      spread(row.ms, 3),
      f"{100 * row.throughput.median:.1f} %",
      " to ".join(f"{100 * q:.1f}" for q in row.throughput[1:]),
      f"{row.work.median:.2f}",
      spread(row.work, 2),
    )
    for row in result["rows"]
  ]
  megabytes = lambda number: f"{number / 1e6:,.2f}"
  counted = [("Number of clients", "MB, all there", "MB, a round's", "MB to draw them")]
  counted += [(f"{m.clients:,}", *map(megabytes, m[1:])) for m in result["memory"]]
  return "\n".join([title, tables.markdown(rows, texts=1), tables.markdown(counted, texts=1)])


def save(result: dict[str, Any], options: Options) -> Path:
  """Writes DEVICE-clients.json and .md, or DEVICE-clients-MODEL; returns the former's path."""
  device = re.sub(r"\W+", "-", result["machine"]["device"].lower()).strip("-")
  model = "" if options.model == Options.model else f"-{options.model}"
  path = options.out / f"{device}-clients{model}.json"
  files.write(path, files.dump(result, indent=1))
  files.write(path.with_suffix(".md"), report(result))
  return path


def check(options: Options) -> None:
  """Raises BadInput for the first option that is out of range."""
  checks.require(options.method in workload.METHODS, "method", options.method,
                 " or ".join(workload.METHODS))  # fmt: skip
  for name in ("clients", "batch_size", "local_steps", "every", "repeats"):
    checks.at_least(name, getattr(options, name), 1)
  for number in options.grown:
    least = num_participants(options.clients, options.participation)
    checks.at_least("grown", number, least)
  checks.fraction("participation", options.participation, closed=True)
  checks.positive("seconds", options.seconds)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""

  def work():
    options = command_line.parse(Options, arguments, prog="python -m benchmarks.clients")
    check(options)
    with files.on_disk(options.out):
      options.out.mkdir(parents=True, exist_ok=True)
    result = run(options, options.out)
    return report(result), save(result, options)

  return steps.carry_out(work, Options)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
