"""The results folder: what an experiment was asked, what it measured, and what came of it.

  config.json    the options and the versions that ran
  metrics.jsonl  one line per method, seed and round, written as they come
  summary.json   per method: accuracies, bytes, FLOPs, seconds
  table.md       the summary for people

All JSON is strict: a number that is not finite is written as null.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
import rich.box
import rich.console
import rich.table
import rich.text

import qupeD_jax
from qupeD_jax.checks import BadInput, require

CONFIG, METRICS, SUMMARY, TABLE = "config.json", "metrics.jsonl", "summary.json", "table.md"

_COLUMNS = (
  "Method",
  "Accuracy (%)",
  "Worst decile (%)",
  "Global (%)",
  "Bits",
  "Model",
  "Round traffic",
  "Seconds",
)


def environment() -> dict[str, Any]:
  """Names the versions and the device that run, for config.json.

  >>> environment()["qupeD_jax"] == qupeD_jax.__version__
  True
  """
  return {
    "qupeD_jax": qupeD_jax.__version__,
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "numpy": np.__version__,
    "platform": platform.platform(),
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
  }


def open_results(path: str | os.PathLike, config: Any, *, resume: bool = False) -> Path:
  """Makes a results folder and writes its config.json: the options and the environment.

  Args:
    path: the folder; its parents are made too.
    config: the experiment's options: a mapping, dataclass or NamedTuple of JSON-like values.
    resume: keep the rows of an interrupted run, but for a last line cut short; else start anew.

  Returns:
    The folder, as the other functions take it.

  Raises:
    BadInput: the folder cannot be made or written.
  """
  folder = Path(path)
  with _on_disk(folder):
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CONFIG, _dump({"config": config, "environment": environment()}, indent=2))
    if resume:
      _drop_partial_line(folder / METRICS)
    else:
      (folder / METRICS).write_bytes(b"")
  return folder


def append_metrics(folder: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
  """Appends rows to metrics.jsonl, on disk before this returns.

  Args:
    folder: the results folder.
    rows: one per method, seed and round, with at least these three; numbers may be arrays.

  Raises:
    BadInput: the file cannot be written.
  """
  lines = "".join(_dump(row) + "\n" for row in rows)
  path = Path(folder) / METRICS
  with _on_disk(path), path.open("a", encoding="utf-8") as file:
    file.write(lines)
    _sync(file)


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the rows of metrics.jsonl; a last line that a crash cut short is left out.

  Args:
    folder: the results folder.

  Returns:
    The rows in order. Of rows with the same method, seed and round the last one counts: a resumed
    run measures again what it had not saved.

  Raises:
    BadInput: the file cannot be read, or another line than the last is damaged.
  """
  path = Path(folder) / METRICS
  with _on_disk(path):
    complete, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
  rows = {}
  for number, line in enumerate(complete.splitlines(), start=1):
    row = _parse(line, f"{path}, line {number}")
    rows[row.get("method"), row.get("seed"), row.get("round")] = row
  return list(rows.values())


def summarise(
  per_client,
  *,
  unquantised=None,
  global_model=None,
  bits: int | Sequence[int],
  bytes_per_model: float,
  bytes_per_round: float,
  flops_per_example: float,
  seconds: float,
) -> dict[str, Any]:
  """Sums up one method: first over clients, then over seeds.

  The spread is that of the seeds' means (with S - 1 in the denominator; 0 for one seed). The worst
  decile is the mean accuracy of the tenth of the clients that fare worst, at least one of them.

  Args:
    per_client: [S, K] accuracy in [0, 1] of each seed's quantised personal models; NaN for a
      client without test examples, which is left out.
    unquantised: [S, K], the same for the full-precision personal models, if there are any.
    global_model: [S, K], the same for the global model, if there is one.
    bits: precision of the clients; the distinct ones where they differ.
    bytes_per_model: what a personal model weighs, mean over clients.
    bytes_per_round: what all clients send and receive in one round.
    flops_per_example: cost of one forward pass.
    seconds: wall-clock time of one run.

  Returns:
    The method's entry in summary.json.

  Raises:
    BadInput: accuracies are not [S, K], or a seed has no client with an accuracy.

  >>> costs = dict(bytes_per_model=40, bytes_per_round=160, flops_per_example=10, seconds=2.0)
  >>> summarise([[0.5, 0.7], [0.7, 0.9]], bits=2, **costs)["accuracy"]["worst_decile"]
  0.6
  """
  seeds = _scored(per_client)
  means = [float(np.mean(seed)) for seed in seeds]
  return {
    "accuracy": {
      "mean": float(np.mean(means)),
      "std": float(np.std(means, ddof=1)) if len(means) > 1 else 0.0,
      "worst_decile": float(np.mean([_worst_decile(seed) for seed in seeds])),
      "per_seed": means,
    },
    "unquantised_accuracy": _mean_of_means(unquantised),
    "global_accuracy": _mean_of_means(global_model),
    "bits": bits,
    "bytes_per_model": bytes_per_model,
    "bytes_per_round": bytes_per_round,
    "flops_per_example": flops_per_example,
    "seconds": seconds,
  }


def write_summary(folder: str | os.PathLike, methods: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes summary.json and table.md.

  Args:
    folder: the results folder.
    methods: name -> what `summarise` returned, in the order of the table.

  Raises:
    BadInput: the files cannot be written.
  """
  folder = Path(folder)
  with _on_disk(folder):
    _write(folder / SUMMARY, _dump({"methods": methods}, indent=2))
    _write(folder / TABLE, markdown_table(methods))


def read_summary(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """Reads summary.json.

  Args:
    folder: the results folder.

  Returns:
    name -> the method's entry.

  Raises:
    BadInput: the file is missing or not a summary.
  """
  path = Path(folder) / SUMMARY
  with _on_disk(path):
    text = path.read_text(encoding="utf-8", errors="replace")
  summary = _parse(text, path)
  if "methods" not in summary:
    raise BadInput(f'{path}: not a summary (it has no "methods")')
  return summary["methods"]


def markdown_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
  """Lays the summary out as a Markdown table that reads well unrendered, too.

  Args:
    methods: name -> what `summarise` returned.

  Returns:
    The table, ending in a newline.
  """
  table = [[cell.replace("|", r"\|") for cell in row] for row in [_COLUMNS, *_cells(methods)]]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
  table.insert(1, rule)
  return "".join(_markdown_row(row, widths) for row in table)


def print_table(
  methods: Mapping[str, Mapping[str, Any]], console: rich.console.Console | None = None
) -> None:
  """Prints the summary to the terminal.

  Args:
    methods: name -> what `summarise` returned.
    console: where to, if not standard output.
  """
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
  table.add_column(_COLUMNS[0], overflow="fold", min_width=11)
  for column in _COLUMNS[1:]:
    table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
  for row in _cells(methods):
    table.add_row(*map(rich.text.Text, row))  # a plain string's [brackets] would be read as markup
  (console or rich.console.Console()).print(table)


def _scored(per_client) -> list[np.ndarray]:
  """Returns each seed's accuracies, without the clients that have none."""
  accuracy = np.asarray(per_client, np.float64)
  require(accuracy.ndim == 2, "per-client accuracies of shape", accuracy.shape, "[seeds, clients]")
  seeds = [row[~np.isnan(row)] for row in accuracy]
  enough = bool(seeds) and all(row.size for row in seeds)
  require(enough, "per-client accuracies", "without numbers", "at least one client in each seed")
  return seeds


def _mean_of_means(per_client) -> float | None:
  if per_client is None:
    return None
  return float(np.mean([np.mean(seed) for seed in _scored(per_client)]))


def _worst_decile(accuracy: np.ndarray) -> float:
  return float(np.mean(np.sort(accuracy)[: max(1, accuracy.size // 10)]))


def _cells(methods: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
  """Returns the table's text, a row per method."""
  return [
    (
      name,
      f"{_percent(entry['accuracy']['mean'])} ± {_percent(entry['accuracy']['std'])}",
      _percent(entry["accuracy"]["worst_decile"]),
      _percent(entry["global_accuracy"]),
      ", ".join(map(str, np.ravel(entry["bits"]))),
      _bytes(entry["bytes_per_model"]),
      _bytes(entry["bytes_per_round"]),
      f"{entry['seconds']:,.1f}" if _is_number(entry["seconds"]) else "-",
    )
    for name, entry in methods.items()
  ]


def _markdown_row(cells: Sequence[str], widths: Sequence[int]) -> str:
  first, *rest = zip(cells, widths, strict=True)
  texts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
  return "| " + " | ".join(texts) + " |\n"


def _is_number(value) -> bool:
  return value is not None and math.isfinite(value)


def _percent(value: float | None) -> str:
  return f"{100 * value:.1f}" if _is_number(value) else "-"


def _bytes(value: float | None) -> str:
  """Writes a number of bytes for people, in decimal units.

  >>> [_bytes(n) for n in (999, 1_500, 999_950, 12_000_000)]
  ['999 B', '1.5 kB', '1.0 MB', '12.0 MB']
  """
  if not _is_number(value):
    return "-"
  for unit in ("B", "kB", "MB", "GB"):
    text = f"{value:.0f}" if unit == "B" else f"{value:.1f}"
    if float(text) < 1000:
      return f"{text} {unit}"
    value /= 1000
  return f"{value:,.1f} TB"


def _plain(value: Any) -> Any:
  """Turns a value into what strict JSON can hold."""
  match value:
    case float():
      return float(value) if math.isfinite(value) else None
    case None | bool() | int() | str():
      return value
    case np.ndarray() | np.generic() | jax.Array():
      return _plain(np.asarray(value).tolist())
    case Mapping():
      return {str(key): _plain(entry) for key, entry in value.items()}
    case tuple() if hasattr(value, "_asdict"):
      return _plain(value._asdict())
    case list() | tuple():
      return [_plain(entry) for entry in value]
    case os.PathLike():
      return os.fspath(value)
  if dataclasses.is_dataclass(value):
    names = [field.name for field in dataclasses.fields(value)]
    return {name: _plain(getattr(value, name)) for name in names}
  raise TypeError(f"{value!r} has no place in a JSON file")


def _dump(value: Any, indent: int | None = None) -> str:
  return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _parse(text: str, where: object) -> dict[str, Any]:
  """Reads one JSON object; `where` names its place in the error."""
  try:
    value = json.loads(text)
  except ValueError as error:
    raise BadInput(f"{where}: damaged ({error})") from error
  if not isinstance(value, dict):
    raise BadInput(f"{where}: damaged (not a JSON object)")
  return value


@contextlib.contextmanager
def _on_disk(path: Path):
  """Turns what the file system refuses into one line that names the file."""
  try:
    yield
  except OSError as error:
    raise BadInput(f"{error.filename or path}: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
  """Writes all of a file or nothing of it."""
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("w", encoding="utf-8") as file:
      file.write(text if text.endswith("\n") else text + "\n")
      _sync(file)
    os.replace(partial, path)
  except OSError:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise


def _sync(file) -> None:
  file.flush()
  os.fsync(file.fileno())


def _drop_partial_line(path: Path) -> None:
  """Cuts off what follows the last newline: the next row must not be glued to it."""
  with path.open("ab+") as file:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
