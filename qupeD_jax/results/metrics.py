"""The results folder: what an experiment was asked, what it measured, and what came of it.

  config.json      the options, the methods to be trained, the versions that ran, and when
  metrics.jsonl    one line per method, seed and round, written as they come; `clients` counts those
                   that took part, and the loss is null where none did; `dropped` counts the updates
                   that were not finite; what an evaluation finds, accuracies and in some
                   experiments the squared gradient mapping, is null in rounds without one
  summary.json     per method: accuracies, bytes, FLOPs, seconds; and where noise was added the
                   privacy that it is worth, and where some clients took part in no round what
                   they made of the server's model (null where it has none)
  table.md         the summary for people
  accuracies.json  per method: the seeds, [S], and the test accuracy of each client's shipped model
                   in each seed, [S, K], clients in the order of their ids; null for a client
                   without test rows
  comparison.json  methods compared with others client by client; see `statistics`
  comparison.md    the comparisons for people

All JSON is strict: a number that is not finite is written as null.
"""

import datetime
import numbers
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax

import qupeD_jax
from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import files
from qupeD_jax.results import statistics, tables

CONFIG, METRICS, SUMMARY, TABLE = "config.json", "metrics.jsonl", "summary.json", "table.md"
ACCURACIES = "accuracies.json"
COMPARISON, COMPARISON_TABLE = "comparison.json", "comparison.md"
UNFINISHED = "checkpoints"  # a folder, there from a run's beginning to its end

# What pictures show of a row of metrics.jsonl, numbers or null where it is there.
_MEASURED = ("loss", "accuracy", "global_accuracy", "gradient_mapping")
# What an entry of summary.json must have, as numbers or null, beside its accuracy and its bits.
_NUMBERS = ("global_accuracy", "bytes_per_model", "bytes_per_round", "seconds")


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
    "platform": f"{platform.system()} {platform.machine()}",
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
  }


def open_results(
  path: str | os.PathLike, config: Any, methods: Sequence[str] = (), *, resume: bool = False
) -> Path:
  """Makes a results folder and writes its config.json: options, environment and date.

  Args:
    path: the folder; its parents are made too.
    config: the experiment's options: a mapping, dataclass or NamedTuple of JSON-like values.
    methods: all that are to be trained.
    resume: keep the rows of an interrupted run, but for a last line cut short; else start anew.

  Returns:
    The folder, as the other functions take it.

  Raises:
    BadInput: the folder cannot be made or written.
  """
  folder = Path(path)
  with files.on_disk(folder):
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    written = {"config": config, "methods": [*methods], "environment": environment()}
    written["date"] = started
    files.write(folder / CONFIG, files.dump(written, indent=2))
    if resume:
      _drop_partial_line(folder / METRICS)
    else:
      (folder / METRICS).write_bytes(b"")
  return folder


def append_metrics(folder: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
  """Appends rows to metrics.jsonl, on disk before this returns: all of them or none.

  Args:
    folder: the results folder.
    rows: one per method, seed and round, with at least these three; numbers may be arrays.

  Raises:
    BadInput: the file cannot be written.
  """
  files.append(Path(folder) / METRICS, "".join(files.dump(row) + "\n" for row in rows))


def keep_rows(folder: str | os.PathLike, keep: Callable[[dict[str, Any]], bool]) -> None:
  """Drops rows of metrics.jsonl, all that are not to be kept or, if that fails, none.

  Args:
    folder: the results folder.
    keep: row -> whether it stays.

  Raises:
    BadInput: the file cannot be read or written, or another line than the last is damaged.
  """
  path = Path(folder) / METRICS
  lines = _complete_lines(path)
  kept = [line for i, line in enumerate(lines) if keep(_row(line, path, i))]
  if len(kept) < len(lines):
    with files.whole(path) as file:
      file.write(b"".join(line + b"\n" for line in kept))


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
  rows = {}
  for i, line in enumerate(_complete_lines(path)):
    row = _row(line, path, i)
    rows[row["method"], row["seed"], row["round"]] = row
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

  The spread is that of the seeds' means (with S - 1 in the denominator; one seed
  has none). The worst
  decile is the mean accuracy of the tenth of the clients that fare worst, at least one of them.

  Args:
    per_client: [S, K] accuracy in [0, 1] of each seed's quantised personal models; NaN for a
      client without test examples, which is left out.
    unquantised: [S, K], the same for x, before it was hardened and with batch statistics of its
      own; None where nothing is quantised, or x cannot be scored.
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
      "std": std_over_seeds(means),
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


def new_clients(per_client) -> dict[str, float | None] | None:
  """Sums up what the clients that took part in no round made of the server's model.

  Args:
    per_client: [S, N] accuracy in [0, 1] of each seed's new clients; None where the server has no
      model to start from.

  Returns:
    "mean" and "std" over seeds, as in `summarise`.
  """
  if per_client is None:
    return None
  means = [float(np.mean(seed)) for seed in _scored(per_client)]
  return {"mean": float(np.mean(means)), "std": std_over_seeds(means)}


def std_over_seeds(means: Sequence[float]) -> float | None:
  """Returns the standard deviation of the seeds' means, with S - 1 in the denominator.

  One seed has none.

  >>> std_over_seeds([0.5, 1.0, 1.5]), std_over_seeds([0.5])
  (0.5, None)
  """
  return float(np.std(means, ddof=1)) if len(means) > 1 else None


def write_summary(folder: str | os.PathLike, methods: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes summary.json and table.md.

  Args:
    folder: the results folder.
    methods: name -> what `summarise` returned, in the order of the table.

  Raises:
    BadInput: the files cannot be written.
  """
  files.write(Path(folder) / SUMMARY, files.dump({"methods": methods}, indent=2))
  files.write(Path(folder) / TABLE, tables.markdown_table(methods))


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
  """Reads config.json.

  Args:
    folder: the results folder.

  Returns:
    "config", the options; "environment", the versions that ran; unless it is an old file "date",
    and "methods", the names of all that were to be trained.

  Raises:
    BadInput: the file is missing or not a config.
  """
  path = Path(folder) / CONFIG
  written = files.read(path)
  for name in ("config", "environment"):
    if not isinstance(written.get(name), dict):
      raise BadInput(f'{path}: not a config (it has no "{name}")')
  if not isinstance(written.get("date", ""), str):
    raise BadInput(f'{path}: not a config (its "date" is no text)')
  methods = written.get("methods", [])
  if not (isinstance(methods, list) and all(isinstance(method, str) for method in methods)):
    raise BadInput(f'{path}: not a config (its "methods" are no names)')
  return written


def read_summary(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """Reads summary.json.

  Args:
    folder: the results folder.

  Returns:
    name -> the method's entry.

  Raises:
    BadInput: the file is missing or not a summary.
  """
  return _methods(Path(folder) / SUMMARY, "summary", _is_entry)


def write_accuracies(folder: str | os.PathLike, methods: Mapping[str, Mapping[str, Any]]) -> None:
  """Writes accuracies.json.

  Args:
    folder: the results folder.
    methods: name -> "seeds" [S] and "accuracy" [S, K] in [0, 1], of the clients in the order of
      their ids; NaN or None for a client without test rows.

  Raises:
    BadInput: accuracies are not of these shapes or not in [0, 1], or the file cannot be written.
  """
  path = Path(folder) / ACCURACIES
  for name, entry in methods.items():
    _accuracies(entry, f"{path}: {name}")
  files.write(path, files.dump({"methods": methods}))


def read_accuracies(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
  """Reads accuracies.json.

  Args:
    folder: the results folder.

  Returns:
    name -> "seeds", a list [S], and "accuracy", an array [S, K] with NaN for clients without test
    rows.

  Raises:
    BadInput: the file is missing or damaged.
  """
  path = Path(folder) / ACCURACIES
  methods = _methods(path, "table of accuracies", lambda entry: isinstance(entry, dict))
  return {name: _accuracies(entry, f"{path}: {name}") for name, entry in methods.items()}


def write_comparisons(
  folder: str | os.PathLike, pairs: Mapping[str, Sequence[str]], *, level: float = 0.95
) -> dict[str, dict[str, statistics.Comparison]]:
  """Compares methods by accuracies.json and writes comparison.json and comparison.md.

  Args:
    folder: the results folder.
    pairs: method -> the rivals that it is compared with.
    level: of the intervals.

  Returns:
    Method -> rival -> comparison.

  Raises:
    BadInput: accuracies.json is missing or lacks a method, or the files cannot be written.
  """
  folder, accuracies = Path(folder), read_accuracies(folder)
  comparisons = {
    ours: statistics.compare(accuracies, ours, rivals, level) for ours, rivals in pairs.items()
  }
  written = {"level": level, "comparisons": comparisons}
  files.write(folder / COMPARISON, files.dump(written, indent=2))
  files.write(folder / COMPARISON_TABLE, tables.comparison_table(comparisons, level))
  return comparisons


def read_comparisons(
  folder: str | os.PathLike,
) -> tuple[dict[str, dict[str, statistics.Comparison]], float]:
  """Reads comparison.json.

  Args:
    folder: the results folder.

  Returns:
    Method -> rival -> comparison, and the level of the intervals.

  Raises:
    BadInput: the file is missing or damaged.
  """
  path = Path(folder) / COMPARISON
  written = files.read(path)
  try:
    comparisons = {
      ours: {rival: _comparison(entry) for rival, entry in rivals.items()}
      for ours, rivals in written["comparisons"].items()
    }
    return comparisons, float(written["level"])
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise BadInput(f"{path}: not a comparison ({error!r})") from error


def _methods(path: Path, kind: str, is_entry: Callable[[Any], bool]) -> dict[str, dict[str, Any]]:
  """Reads what a file says of each method, once all of it is what it should be."""
  methods = files.read(path).get("methods")
  if not isinstance(methods, dict):
    raise BadInput(f'{path}: not a {kind} (it has no "methods")')
  for name, entry in methods.items():
    if not is_entry(entry):
      raise BadInput(f"{path}: not a {kind} (see {name})")
  return methods


def _is_entry(entry: Any) -> bool:
  """Tells whether an entry of a summary has what tables and pictures show of it."""
  if not (isinstance(entry, dict) and isinstance(entry.get("accuracy"), dict)):
    return False
  accuracy, bits = entry["accuracy"], entry.get("bits")
  bits = bits if isinstance(bits, list) else [bits]
  values = [accuracy.get(name, "") for name in ("mean", "std", "worst_decile")]
  values += [entry.get(name, "") for name in _NUMBERS]
  if entry.get("new_clients") is not None:
    new = entry["new_clients"] if isinstance(entry["new_clients"], dict) else {}
    values += [new.get(name, "") for name in ("mean", "std")]
  return bool(bits) and all(isinstance(b, int) for b in bits) and all(map(_is_number, values))


def _is_number(value: Any) -> bool:
  """Tells whether a value is a number or, where there is none, null."""
  return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _accuracies(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns a method's seeds, [S], and accuracies, [S, K], once they are known to be such."""
  try:
    seeds, accuracy = list(entry["seeds"]), np.asarray(entry["accuracy"], np.float64)
  except (KeyError, TypeError, ValueError) as error:
    raise BadInput(f"{where}: no seeds with accuracies [seeds, clients]") from error
  fits = accuracy.ndim == 2 and accuracy.size > 0 and len(seeds) == len(accuracy)
  require(
    all(isinstance(seed, numbers.Integral) for seed in seeds),
    f"{where}: seeds",
    seeds,
    "whole numbers",
  )
  allowed = f"[{len(seeds)} seeds, clients]"
  require(fits, f"{where}: accuracies of shape", accuracy.shape, allowed)
  outside = accuracy[~np.isnan(accuracy) & ~((accuracy >= 0) & (accuracy <= 1))]
  require(not outside.size, f"{where}: accuracy", outside[:1], "in [0, 1]")
  return {"seeds": seeds, "accuracy": accuracy}


def _comparison(entry: Mapping[str, Any]) -> statistics.Comparison:
  number = lambda name: None if entry[name] is None else float(entry[name])
  low, high, clients = map(number, ("low", "high", "clients"))
  if (low is None) != (high is None):
    raise ValueError("an interval with one end")
  return statistics.Comparison(float(entry["difference"]), low, high, int(entry["wins"]), clients)


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


def _complete_lines(path: Path) -> list[bytes]:
  """Reads the lines of a file but a last one that was cut short."""
  with files.on_disk(path):
    *complete, _ = path.read_bytes().split(b"\n")
  return complete


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
  """Reads a row of metrics.jsonl, once it says whose it is and holds numbers to draw."""
  where = f"{path}, line {number + 1}"
  row = files.parse(line, where)
  named = isinstance(row.get("method"), str)
  counted = all(isinstance(row.get(name), int) for name in ("seed", "round"))
  measured = all(_is_number(row.get(name)) for name in _MEASURED)
  if not (named and counted and measured):
    raise BadInput(f"{where}: damaged (no text `method`, whole `seed`, `round`, or numbers beside)")
  return row


def _drop_partial_line(path: Path) -> None:
  """Cuts off what follows the last newline: the next row must not be glued to it."""
  with path.open("ab+") as file:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
