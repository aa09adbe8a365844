"""The server's part: rounds over Flower's Grid, combined by the library's aggregators."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.serverapp import Grid

from qupeD_jax import rng
from qupeD_jax.checks import BadInput, place
from qupeD_jax.io import files
from qupeD_jax.io.personal import PersonalModel, save_model
from qupeD_jax.study import faults
from qupeD_jax.types import FULL_PRECISION, Cohort, PyTree

from . import asking, checkpoint, messages, node, streams
from .algorithms import aggregate, exchange_rounds, first_state
from .asking import Question, Reply
from .checkpoint import Checkpoint
from .options import Settings, network

ATTEMPTS, PAUSE = 5, 2.0  # at a round that too few answer, and the seconds between them


class Client(NamedTuple):
  """What a client's node reports at the end."""

  client: int
  rows: int
  tested: int
  right: dict[str, int]  # of the tested rows, by "personal" and "global"


def run(settings: Settings, grid: Grid, say: Callable[[str], None] = print) -> list[Client]:
  """Runs a federation, or what is left of it: rounds, then every node's finished model.

  Args:
    settings: of the run.
    grid: Flower's.
    say: told in one line of every round, and of every node that is left out.

  Returns:
    What the clients report. In the server's folder lie a checkpoint, clients.json and, where the
    method has a server, w as model.safetensors.

  Raises:
    BadInput: there are too few nodes, the folder is of a run with other options or cannot be
      written, or a round was not answered by enough clients in so many attempts.
  """
  folder, about = place("out", settings.options.run.out), node.about_run(settings)
  held = None if settings.options.run.fresh else checkpoint.load(folder, about)
  if held is not None:
    say(f"going on after round {held.rounds}, from {folder / checkpoint.NAME}")
  held = _begin(settings) if held is None else held
  checkpoint.save(folder, held, about)
  options, names = settings.options, {}
  least, seconds = settings.min_clients, options.hardware.join_timeout
  asking.wait_for(grid, settings.nodes, least, seconds, say)
  rounds, key = exchange_rounds(settings), _noise_key(settings)
  for round_ in range(held.rounds, rounds):
    start = time.monotonic()
    replies = _answered(settings, grid, held, round_, names, say)
    variables, dropped = combine(settings, key, round_, held.variables, replies)
    for client in dropped:
      say(f"round {round_ + 1}: client {client} is left out: its upload is not finite")
    moved = _distance(variables, held.variables)
    held = Checkpoint(held.run, round_ + 1, variables)
    checkpoint.save(folder, held, about)
    say(_progress(round_ + 1, rounds, replies, dropped, moved, time.monotonic() - start))
  if worth := faults.privacy_of(options, [settings.nodes], rounds):
    say(f"the noise on w is worth epsilon {worth['epsilon']:.3g} at delta {worth['delta']:.3g}")
  clients = _finished(settings, grid, held, names, say)
  _write(settings, folder, held, clients)
  return clients


def combine(
  settings: Settings, key, round_: int, before: PyTree | None, replies: list[Reply]
) -> tuple[PyTree | None, list[int]]:
  """Combines a round's uploads as the simulation does.

  Args:
    settings: of the run.
    key: of the first phase.
    round_: from 0.
    before: the server's variables; None where there is no server, and nothing to combine.
    replies: of different clients.

  Returns:
    The server's new variables, and the clients whose upload did not count.
  """
  if before is None:
    return None, []
  counts = [reply.content.counts for reply in replies]
  client, size = (np.array([c[name] for c in counts], np.int32) for name in ("client", "rows"))
  ones = np.full(len(replies), FULL_PRECISION, np.int32)
  cohort = Cohort(np.zeros((len(replies), 1), np.int32), size, client, ones)
  uploads = jax.tree.map(lambda *leaves: np.stack(leaves), *(r.content.variables for r in replies))
  key = rng.stream(rng.stream(key, "rounds", round_), "aggregate")
  together = jax.jit(aggregate(settings, len(replies)))
  after, (kept,) = together(key, (uploads,), (cohort,), before)
  return jax.device_get(after), client[~np.asarray(kept)].tolist()


def table(settings: Settings, clients: list[Client]) -> str:
  """Returns what the clients report, as lines of text."""
  names = node.scored(settings)
  lines = [f"{'client':>6} {'rows':>6} {'tested':>6} " + " ".join(f"{name:>8}" for name in names)]
  for c in clients:
    shares = " ".join(f"{100 * c.right[name] / c.tested:8.1f}" for name in names)
    lines.append(f"{c.client:6} {c.rows:6} {c.tested:6} {shares}")
  means = (np.mean([100 * c.right[name] / c.tested for c in clients]) for name in names)
  if clients:
    lines.append(f"{'mean':>6} {'':6} {'':6} " + " ".join(f"{mean:8.1f}" for mean in means))
  return "\n".join(lines)


def _begin(settings: Settings) -> Checkpoint:
  key = rng.stream(streams.of_phase(settings.options.run.seed, 0), "initialise")
  return checkpoint.begin(jax.device_get(first_state(settings, key)))


def _noise_key(settings: Settings):
  """Returns the key of the first phase, a secret one where noise is added."""
  if not faults.adds_noise(settings.options):
    return streams.of_phase(settings.options.run.seed, 0)
  return jax.random.wrap_key_data(jnp.asarray(rng.derived_seed(rng.secret(), "server")))


def _answered(settings, grid, held, round_, names, say) -> list[Reply]:
  """Asks for a round until enough clients have answered."""
  group, least = f"round {round_ + 1}", settings.min_clients
  content = messages.write({"run": held.run, "round": round_}, held.variables)
  read = partial(_read_round, like=held.variables, round_=round_)
  question = Question(group, messages.TRAIN, content, settings.timeout, read)
  replies: dict[int, Reply] = {}
  for attempt in range(1, ATTEMPTS + 1):
    replies = asking.ask(grid, question, replies, names=names, say=say)
    if len(replies) >= least:
      break
    say(f"{group}: {len(replies)} answered, min_clients is {least}: attempt {attempt}/{ATTEMPTS}")
    time.sleep(PAUSE)
  _require_enough(settings, group, replies, ATTEMPTS)
  return list(replies.values())


def _require_enough(settings, group: str, replies: dict[int, Reply], attempts: int) -> None:
  if len(replies) < settings.min_clients:
    raise BadInput(
      f"{group}: not answered by min_clients {settings.min_clients} in {attempts} attempts; the "
      "same command goes on from here"
    )


def _read_round(content, like: PyTree | None, round_: int) -> messages.Content:
  found = messages.read(content, node.OF_ROUND, like)
  if found.counts["round"] != round_:
    raise BadInput(f"round {found.counts['round']}: allowed is {round_}")
  if not 1 <= found.counts["rows"] < 2**31:
    raise BadInput(f"rows {found.counts['rows']}: allowed is at least 1")
  return found


def _finished(settings, grid, held, names, say) -> list[Client]:
  """Asks for the finished models; who did not answer is asked again, once."""
  content = messages.write({"run": held.run, "round": held.rounds}, held.variables)
  scored = node.scored(settings)
  read = partial(_read_finish, scored=scored)
  question = Question("finish", messages.FINISH, content, settings.timeout, read)
  replies = asking.ask(grid, question, {}, names=names, say=say)
  if len(replies) < settings.min_clients or not set(names.values()) <= set(replies):
    time.sleep(PAUSE)
    replies = asking.ask(grid, question, replies, names=names, say=say)
  _require_enough(settings, "finish", replies, 2)
  counts = (reply.content.counts for reply in replies.values())
  return [
    Client(c["client"], c["rows"], c["tested"], {name: c[name] for name in scored}) for c in counts
  ]


def _read_finish(content, scored: tuple[str, ...]) -> messages.Content:
  found = messages.read(content, (*node.OF_FINISH, *scored))
  most = found.counts["tested"]
  if most < 1 or any(found.counts[name] > most for name in scored):
    raise BadInput(f"tested {most}: allowed is at least 1 and what was right")
  return found


def _write(settings: Settings, folder: Path, held: Checkpoint, clients: list[Client]) -> None:
  files.write(folder / "clients.json", files.dump({"clients": clients}, indent=2))
  if held.variables is not None:
    model = network(settings, settings.model)
    whole = PersonalModel(model, held.variables, {}, None, FULL_PRECISION)
    save_model(folder / "model.safetensors", whole)


def _distance(after: PyTree | None, before: PyTree | None) -> float | None:
  """Returns the L2 norm of the move of w."""
  if before is None:
    return None
  squares = jax.tree.map(lambda a, b: np.sum(np.square(a - b), dtype=np.float64), after, before)
  return float(np.sqrt(sum(jax.tree.leaves(squares))))


def _progress(number, rounds, replies, dropped, moved, seconds) -> str:
  rows = sum(reply.content.counts["rows"] for reply in replies)
  parts = [f"{len(replies)} clients with {rows:,} rows"]
  parts += [f"{len(dropped)} dropped"] if dropped else []
  parts += [] if moved is None else [f"w moved by {moved:.4f}"]
  return f"round {number}/{rounds}: {', '.join(parts)}, {seconds:.1f} s"
