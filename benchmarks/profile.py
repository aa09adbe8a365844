"""Where the time of a training step goes: kernel by kernel, and the JAX operation behind each.

make profile                                            # FedAvg with CNN1
make profile ARGS="--method quped --dtype bfloat16"     # QuPeD at 2 bits

docs/speed.md says how to read it.
"""

import collections
import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from benchmarks import jax_forms, steps, timing, workload
from benchmarks.workload import Case
from qupeD_jax import checks, command_line
from qupeD_jax.results import tables

# What only carries others out, which are events of their own.
_CONTAINERS = ("while", "call", "conditional")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_LAYOUT = re.compile(r"\{[^{}]*\}|/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Options:
  """Says where the time of a step of all clients goes, kernel by kernel, on one device."""

  model: Literal["mlp", "cnn1", "cnn2", "resnet20"] = "cnn1"
  """Network."""
  method: Literal["fedavg", "quped", "simultaneous"] = "fedavg"
  """FedAvg, QuPeD at 2 bits, or QuPeD with all gradients of a step taken at once."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  clients: int | None = None
  """Number of clients; by default 50, or 4 on a CPU."""
  batch_size: int = 50
  """Examples of a client's step."""
  local_steps: int = 10
  """Steps of a round."""
  rounds: int = 2
  """Rounds that are traced, after one that is not."""
  top: int = 30
  """Kernels that are listed, those with most time."""


class Instruction(NamedTuple):
  """What a compiled program says of one of its instructions."""

  shape: str  # of the output, as in f32[50,10]
  opcode: str
  operation: str  # of JAX, as in jvp(CNN)/stem/dot_general; "" where none is told


class Event(NamedTuple):
  """A kernel that ran once."""

  kernel: str
  instruction: str  # of the program; "" where none is told
  seconds: float


class Row(NamedTuple):
  """What a kernel comes to in a step of all clients."""

  kernel: str
  ms: float
  calls: float
  shape: str
  operation: str


class Profile(NamedTuple):
  """A step, by its kernels."""

  wall: float  # ms of a step
  busy: float  # ms of all kernels of a step, those that run side by side added up
  rows: list[Row]  # most time first


def profile(case: Case, method: str, rounds: int) -> Profile:
  """Traces rounds of a case on one device, after one that compiles.

  Args:
    case, method: what is computed.
    rounds: how many are traced.
  """
  form = jax_forms.vmapped(workload.make_task(case, method, *workload.federation(case)))
  state = form.run(form.start(), 1)
  form.wait(state)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      start = time.perf_counter()
      form.wait(form.run(state, rounds))
      seconds = time.perf_counter() - start
    traced = list(events(Path(folder)))
  known, count = instructions(form.program.as_text()), rounds * case.local_steps
  rows = by_kernel(traced, known, count)
  return Profile(1e3 * seconds / count, sum(row.ms for row in rows), rows)


def events(folder: Path) -> Iterator[Event]:
  """Reads the kernels that a trace in a folder tells of, of devices or of a CPU's threads."""
  (path,) = folder.rglob("*.xplane.pb")
  planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  devices = [plane for plane in planes if plane.name.startswith("/device:")]
  for plane in devices or planes:
    for line in plane.lines:
      # Beside the streams, some devices' traces sum up what these hold.
      if devices and not line.name.startswith(("Stream", "XLA Ops")):
        continue
      for event in line.events:
        instruction = dict(event.stats).get("hlo_op", "")
        if devices or instruction:
          yield Event(event.name, str(instruction), 1e-9 * event.duration_ns)


def instructions(text: str) -> dict[str, Instruction]:
  """Reads the instructions of an optimised program, by name.

  A fusion that tells no operation has the last one that is told inside it, or what XLA calls it.

  >>> instructions('  %add.1 = f32[2,3]{1,0} add(%a, %b), metadata={op_name="jit(f)/add"}')
  {'add.1': Instruction(shape='f32[2,3]', opcode='add', operation='jit(f)/add')}
  """
  found, fused, computation = {}, {}, ""
  told, plain = {}, {}  # of each computation: its last operation with a name, its last opcode
  for line in text.splitlines():
    if match := _INSTRUCTION.match(line):
      name, shape, opcode = match.groups()
      named = re.search(r'op_name="([^"]*)"', line)
      plain[computation] = opcode
      if named:
        told[computation] = named[1]
      if called := re.search(r"calls=%?([\w.-]+)", line):
        fused[name] = called[1]
      found[name] = Instruction(_LAYOUT.sub("", shape), opcode, named[1] if named else "")
    elif header := _COMPUTATION.match(line):
      computation = header[1]
  inside = plain | told
  return {
    name: one if one.operation else one._replace(operation=inside.get(fused.get(name), ""))
    for name, one in found.items()
  }


def by_kernel(traced: Iterable[Event], known: dict[str, Instruction], steps: int) -> list[Row]:
  """Adds up the events of each kernel and instruction, per step; most time first.

  Args:
    traced: what ran.
    known: the program's instructions.
    steps: how many were traced.
  """
  unknown = Instruction("", "", "")
  spent = collections.defaultdict(list)
  for event in traced:
    if known.get(event.instruction, unknown).opcode not in _CONTAINERS:
      spent[event.kernel, event.instruction].append(event.seconds)
  rows = []
  for (kernel, instruction), seconds in spent.items():
    found = known.get(instruction, unknown)
    ms, calls = 1e3 * sum(seconds) / steps, len(seconds) / steps
    rows.append(Row(kernel, ms, calls, found.shape, _without_loops(found.operation)))
  return sorted(rows, key=lambda row: -row.ms)


def _without_loops(operation: str) -> str:
  """Leaves out of an operation's name what all of them are inside.

  >>> _without_loops("jit(chunk)/vmap()/while/body/vmap(jvp(CNN))/stem/dot_general")
  'vmap(jvp(CNN))/stem/dot_general'
  """
  outer = re.compile(r"(jit\(\w+\)|vmap\(\)|while|body|cond|closed_call)/")
  while match := outer.match(operation):
    operation = operation[match.end() :]
  return operation


def report(found: Profile, top: int) -> str:
  """Lays a profile out as Markdown: the step's time, and the kernels with most of it."""
  shown = found.rows[:top]
  rest = sum(row.ms for row in found.rows[top:])
  head = ("Kernel", "Operation", "Output", "ms per step", "calls")
  rows = [
    (row.kernel, row.operation or "-", row.shape or "-", f"{row.ms:.4f}", f"{row.calls:.2f}")
    for row in shown
  ]
  return (
    f"{found.wall:.2f} ms per step, {found.busy:.2f} ms in kernels; {len(found.rows)} kernels, "
    f"{rest:.2f} ms in those that are not listed.\n\n{tables.markdown([head, *rows], texts=3)}"
  )


def check(options: Options) -> None:
  """Requires numbers that can be traced."""
  for name in ("batch_size", "local_steps", "rounds", "top"):
    checks.at_least(name, getattr(options, name), 1)
  checks.whole("rounds", options.rounds, 1, jax_forms.MOST_ROUNDS)
  if options.clients is not None:
    checks.at_least("clients", options.clients, 1)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""

  def work():
    options = command_line.parse(Options, arguments, prog="make profile ARGS=")
    check(options)
    clients = options.clients or (4 if jax.default_backend() == "cpu" else 50)
    shape = clients, options.batch_size, options.local_steps
    found = profile(Case(options.model, options.dtype, *shape), options.method, options.rounds)
    machine = timing.machine()
    title = f"{options.method}, {options.model}, {clients} x {options.batch_size}, {options.dtype}"
    return f"{title}; {machine['device']}, jax {machine['jax']}.", report(found, options.top)

  return steps.carry_out(work, Options)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
