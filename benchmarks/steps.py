"""Times whole training steps of all clients: ours beside what others run, taking turns.

make bench                          # all cases that suit the device
make bench ARGS=--quick             # few of them

docs/speed.md says what is measured and how to read it.
"""

import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from benchmarks import jax_forms, timing, torch_forms, workload
from benchmarks.workload import Case, Form, Task
from qupeD_jax import checks, command_line
from qupeD_jax.checks import BadInput
from qupeD_jax.engine import parallel
from qupeD_jax.io import files
from qupeD_jax.results import tables

OURS, ALONE, LAX = "ours", "ours, one device", "vmap of lax.conv"
MAPPED, LOOPED = "lax.map over clients", "loop over jitted"
TORCH_LOOP, TORCH_VMAP = "PyTorch loop", "torch.func.vmap"
FORMS = (OURS, ALONE, LAX, MAPPED, LOOPED, TORCH_LOOP, TORCH_VMAP)
_MATRIX = {"cpu": 2048, "accelerator": 8192}  # size of the products that show the peak
Flag = Literal["ours", "alone", "lax", "map", "loop", "torch", "torch-vmap"]
_FLAGS = dict(zip(get_args(Flag), FORMS, strict=True))


class Setting(NamedTuple):
  """What a model is timed at, unless options say otherwise."""

  batch_size: int
  quick: tuple[int, ...]  # numbers of clients
  cpu: tuple[int, ...]
  accelerator: tuple[int, ...]
  cpu_steps: int  # tau: on a CPU, where they take long, fewer


SETTINGS = {
  "mlp": Setting(16, (50,), (1, 10, 50, 1000), (1, 10, 50, 1000), 10),
  "cnn1": Setting(50, (4,), (1, 4), (1, 10, 50, 200), 1),
  "cnn2": Setting(50, (), (4,), (1, 10, 50, 1000), 1),
  "resnet20": Setting(128, (), (1,), (1, 4, 12), 1),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Times whole training steps of all clients; what is not given is chosen by the device."""

  quick: bool = False
  """Few cases; their results are written beside those of the others."""
  models: tuple[Literal["mlp", "cnn1", "cnn2", "resnet20"], ...] = ()
  """Networks."""
  methods: tuple[Literal["fedavg", "quped", "simultaneous"], ...] = workload.METHODS
  """FedAvg, QuPeD at 2 bits, and QuPeD with all gradients of a step taken at once."""
  forms: tuple[Flag, ...] = get_args(Flag)
  """Contenders."""
  clients: tuple[int, ...] = ()
  """Numbers of clients."""
  batch_size: int | None = None
  """Examples of a client's step."""
  local_steps: int | None = None
  """Steps of a round; a step is a round's share, with its mean and its drawing of batches."""
  clients_per_step: int | None = None
  """Clients that a device of ours trains side by side, and then the next; by default all."""
  dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
  """Of the computation: float32 on a CPU, else both."""
  repeats: int = 10
  """Turns that the contenders take, at most."""
  seconds: float = 15.0
  """Time for the turns of a case, after which no more than three are taken."""
  slow: bool = False
  """On a CPU, also run convolutions of XLA in a loop, over 100 times as long."""
  out: Path = Path("results/benchmarks")
  """Folder of the results."""


class Row(NamedTuple):
  """What came of a contender in a case: numbers, or the reason why there are none."""

  case: Case
  method: str
  form: str
  conv: str | None = None
  ms: timing.Quartiles | None = None  # of one step of all clients
  turns: int = 0
  times_ours: float | None = None  # its time over ours, median over the turns
  examples_per_second: float | None = None
  flops: float | None = None  # of a step, by formula
  xla_flops: float | None = None  # by XLA's cost analysis
  flops_per_second: float | None = None  # by formula
  share_of_peak: float | None = None
  bytes_per_client: float | None = None
  array_bytes_per_client: float | None = None
  skipped: str | None = None


class Ratio(NamedTuple):
  """QuPeD's step over FedAvg's, of the same form in the same turns."""

  case: Case
  method: str
  form: str
  ratio: timing.Quartiles


def run(options: Options, say: Callable = print) -> Iterator[dict[str, Any]]:
  """Times everything that was asked for, case by case.

  Args:
    options: what to time.
    say: is told what is going on, a line at a time.

  Yields:
    After each case what is written as JSON, with all cases so far: "machine", "options", "peak"
    (FLOP/s of matrix products by dtype), "rows", "ratios", "peak_bytes".
  """
  check(options)
  size = _MATRIX["cpu" if _on_cpu() else "accelerator"]
  peak = {dtype: timing.matmul_peak(dtype, size) for dtype in ("float32", "bfloat16")}
  rows, ratios = [], []
  for case in cases(options):
    say(f"{_title(case)} ...")
    more_rows, more_ratios = time_case(case, options, peak[case.dtype])
    rows += more_rows
    ratios += more_ratios
    yield {
      "machine": timing.machine(),
      "options": options,
      "peak": peak,
      "rows": rows,
      "ratios": ratios,
      "peak_bytes": timing.peak_bytes(),
    }


def check(options: Options) -> None:
  """Requires numbers that can be timed."""
  for clients in options.clients:
    checks.at_least("clients", clients, 1)
  for name in ("batch_size", "local_steps", "clients_per_step"):
    if (value := getattr(options, name)) is not None:
      checks.at_least(name, value, 1)
  checks.at_least("repeats", options.repeats, 1)
  checks.positive("seconds", options.seconds)


def cases(options: Options) -> Iterator[Case]:
  """Yields the cases that options, and where they are silent the device, ask for."""
  quick = [name for name, setting in SETTINGS.items() if setting.quick]
  names = options.models or (quick if options.quick else tuple(SETTINGS))
  dtypes = options.dtypes or (("float32",) if _on_cpu() else ("float32", "bfloat16"))
  for name, dtype in itertools.product(names, dtypes):
    setting = SETTINGS[name]
    by_device = setting.cpu if _on_cpu() else setting.accelerator
    clients = options.clients or (options.quick and setting.quick) or by_device
    steps = options.local_steps or (setting.cpu_steps if _on_cpu() else 10)
    for count in clients:
      yield Case(name, dtype, count, options.batch_size or setting.batch_size, steps)


def time_case(case: Case, options: Options, peak: float) -> tuple[list[Row], list[Ratio]]:
  """Times all contenders of a case, all methods in the same turns."""
  shared = workload.federation(case)
  tasks = {method: workload.make_task(case, method, *shared) for method in options.methods}
  wanted = [_FLAGS[flag] for flag in _FLAGS if flag in options.forms]
  made, rows = {}, {}
  for method, form in itertools.product(options.methods, wanted):
    reason = unavailable(case, method, form, options.slow)
    made_or_reason = reason or _ready(tasks[method], form, options.clients_per_step)
    if isinstance(made_or_reason, str):
      rows[method, form] = Row(case, method, form, skipped=made_or_reason)
    else:
      made[method, form] = made_or_reason
  times = timing.take_turns(made, options.repeats, options.seconds)
  for (method, form), seconds in times.items():
    ours = times.get((method, OURS))
    rows[method, form] = _row(tasks[method], form, made[method, form], seconds, ours, peak)
  ratios = [
    Ratio(case, method, form, timing.quartiles(seconds / times["fedavg", form]))
    for (method, form), seconds in times.items()
    if method != "fedavg" and ("fedavg", form) in times
  ]
  return [rows[key] for key in itertools.product(options.methods, wanted)], ratios


def unavailable(case: Case, method: str, form: str, slow: bool) -> str | None:
  """Says why a contender does not take part, if it does not."""
  if form in (TORCH_LOOP, TORCH_VMAP):
    if method != "fedavg":
      return "PyTorch runs FedAvg only"
    if not torch_forms.is_installed():
      return "PyTorch is not installed"
    if not torch_forms.can_see_device():
      return "this PyTorch does not run on the device"
  if form == ALONE and (not _on_cpu() or case.clients == 1):
    return "ours is on one device"
  if form == LAX and case.model == "mlp":
    return "without a convolution it is ours"
  if form == LAX and _on_cpu() and not slow:
    return "over 100 times as long on a CPU; --slow runs it"
  return None


def _ready(task: Task, form: str, clients_per_step: int | None) -> Form | str:
  """Compiles a contender and runs it once, or says that the device's memory is too small."""
  try:
    made = _make(task, form, clients_per_step)
    made.wait(made.run(made.start(), 1))
  except RuntimeError as error:  # of JAX and PyTorch alike
    if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
      raise
    return "out of memory"
  return made


def _make(task: Task, form: str, clients_per_step: int | None) -> Form:
  # One client at a time needs no grouped convolution. XLA's own is then the usual choice; on a CPU,
  # where it is slow in a loop, these contenders get ours.
  alone = None if _on_cpu() or task.case.model == "mlp" else "lax"
  makers = {
    # As experiments have it by default: of a CPU a device for each core.
    OURS: functools.partial(jax_forms.vmapped, spread=_on_cpu(), clients_per_step=clients_per_step),
    ALONE: functools.partial(jax_forms.vmapped, clients_per_step=clients_per_step),
    LAX: lambda task: jax_forms.vmapped(task, "lax"),
    MAPPED: lambda task: jax_forms.mapped(task, alone),
    LOOPED: lambda task: jax_forms.looped(task, alone),
    TORCH_LOOP: torch_forms.looped,
    TORCH_VMAP: torch_forms.vmapped,
  }
  return makers[form](task)


def _row(task: Task, form: str, made: Form, seconds, ours, peak: float) -> Row:
  """Turns a contender's times per round, [turns], into what is reported."""
  case = task.case
  step = timing.quartiles(1e3 * seconds / case.local_steps)
  flops = workload.step_flops(case, task.method)
  rate = flops / step.median * 1e3
  return Row(
    case,
    task.method,
    form,
    conv=None if case.model == "mlp" else made.conv,
    ms=step,
    turns=len(seconds),
    times_ours=None if ours is None else timing.quartiles(seconds / ours).median,
    examples_per_second=case.clients * case.batch_size / step.median * 1e3,
    flops=flops,
    xla_flops=made.cost and made.cost.flops,
    flops_per_second=rate,
    share_of_peak=rate / peak,
    bytes_per_client=made.cost and made.cost.bytes_per_client,
    array_bytes_per_client=workload.client_bytes(task),
  )


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


# --- what is shown

_COLUMNS = (
  "Case",
  "Method",
  "Contender",
  "ms per step",
  "quartiles",
  "times ours",
  "examples/s",
  "GFLOP/s",
  "of peak",
  "XLA/formula",
  "MB per client",
  "of arrays",
)
_METHODS = {
  "fedavg": "FedAvg",
  "quped": "QuPeD 2 bit",
  "simultaneous": "QuPeD 2 bit, at once",
}


def report(result: dict[str, Any]) -> str:
  """Lays a result out as Markdown: the machine, the rows, the ratios, and what was left out."""
  rows, ratios = result["rows"], result["ratios"]
  timed = [row for row in rows if row.skipped is None]
  parts = [_heading(result)]
  if timed:
    parts.append(tables.markdown([_COLUMNS, *map(_cells, timed)], texts=3))
  if ratios:
    head = ("Step over FedAvg's", "Method", "Contender", "ratio", "quartiles")
    lines = [
      (_title(r.case), _METHODS[r.method], r.form, f"{r.ratio.median:.2f}", _spread(r.ratio))
      for r in ratios
    ]
    parts.append(tables.markdown([head, *lines], texts=3))
  left_out = dict.fromkeys(
    f"- {_METHODS[row.method]}, {row.form}, {row.case.model}: {row.skipped}.\n"
    for row in rows
    if row.skipped
  )
  if left_out:
    parts.append("Not timed:\n\n" + "".join(left_out))
  return "\n".join(parts)


def _heading(result: dict[str, Any]) -> str:
  facts, peak = result["machine"], result["peak"]
  torch = f"PyTorch {facts['torch']}" if facts["torch"] else "without PyTorch"
  products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in peak.items())
  return (
    f"{facts['device']} ({facts['processor']}, {facts['cores']} cores), jax {facts['jax']}, "
    f"{torch}. Matrix products: {products}.\n"
  )


def _cells(row: Row) -> tuple[str, ...]:
  xla = "-" if row.xla_flops is None else f"{row.xla_flops / row.flops:.2f}"
  held = "-" if row.bytes_per_client is None else f"{row.bytes_per_client / 1e6:,.2f}"
  return (
    _title(row.case),
    _METHODS[row.method],
    row.form,
    _digits(row.ms.median),
    _spread(row.ms),
    "-" if row.times_ours is None else f"{row.times_ours:.2f}",
    f"{row.examples_per_second:,.0f}",
    _digits(row.flops_per_second / 1e9),
    f"{100 * row.share_of_peak:.1f} %",
    xla,
    held,
    f"{row.array_bytes_per_client / 1e6:,.2f}",
  )


def _title(case: Case) -> str:
  return f"{case.model}, {case.clients} x {case.batch_size}, {case.dtype}"


def _spread(numbers: timing.Quartiles) -> str:
  return f"{_digits(numbers.low)} to {_digits(numbers.high)}"


def _digits(number: float) -> str:
  """Writes a number with about three digits.

  >>> [_digits(n) for n in (0.2551, 9.31, 210.4, 12345.6)]
  ['0.255', '9.31', '210', '12,346']
  """
  decimals = 3 if number < 1 else 2 if number < 10 else 1 if number < 100 else 0
  return f"{number:,.{decimals}f}"


# --- the command line


def save(result: dict[str, Any], options: Options) -> Path:
  """Writes DEVICE.json and DEVICE.md, or DEVICE-quick; returns the path of the former."""
  device = re.sub(r"\W+", "-", result["machine"]["device"].lower()).strip("-")
  path = options.out / f"{device}{'-quick' if options.quick else ''}.json"
  with files.on_disk(options.out):
    options.out.mkdir(parents=True, exist_ok=True)
  files.write(path, files.dump(result, indent=1))
  files.write(path.with_suffix(".md"), report(result))
  return path


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""

  def work():
    options = command_line.parse(Options, arguments, prog="make bench ARGS=")
    parallel.split_processor(parallel.cores())
    for result in run(options, say=lambda line: print(line, file=sys.stderr, flush=True)):
      path = save(result, options)  # after each case: nothing is lost if it is cut off
    return report(result), path

  return carry_out(work, Options)


def carry_out(work: Callable[[], tuple[str, Path]], kind: type) -> int:
  """Prints the report and the path that a benchmark comes to, or why it cannot be done.

  Args:
    work: returns them.
    kind: of the options, to name them in what is refused.
  """
  try:
    print(*work(), sep="\n")
  except BadInput as error:
    options = command_line.leaves(kind)
    return command_line.fail(command_line.in_flags(error, options))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
