"""Runs a federation on this machine, each node in processes of its own, and simulates it as well.

SuperLink and SuperNodes talk over 127.0.0.1 with TLS and node authentication. What they need lies
in a temporary folder that goes with them; the models stay.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from federation_app.quped_app import options as app_options
from qupeD_jax import checks, command_line
from qupeD_jax.checks import BadInput
from qupeD_jax.command_line import fail
from qupeD_jax.io import files
from qupeD_jax.study import options as study
from qupeD_jax.study.errors import Diverged
from qupeD_jax.study.options import Names, replaced
from qupeD_jax.types import FULL_PRECISION

from . import deal, parity, processes
from .deal import Dealt

PROG = "make federation ARGS="
FAILED, INTERRUPTED = 1, 130
OF_SERVER = ("clients.json", "log.txt", "model.safetensors")


@dataclasses.dataclass(frozen=True)
class Loopback:
  """Options of `make federation`."""

  out: str = "results/federation"
  """Folder for the models and the table."""
  method: str = "quped"
  """quped, fedavg, ditto or local."""
  nodes: int = 4
  """Number of nodes, of one client each."""
  bits: study.Bits = (2, 2, 4, 32)
  """Precisions, dealt over the clients: 1 to 8, or 32 (full precision)."""
  models: Names = ("mlp", "mlp2")
  """Architectures, dealt over the clients; the first is the server's."""
  rounds: int = 5
  """Rounds in all, fine-tuning among them."""
  finetune_rounds: int = 1
  """Rounds at the end in which each client fine-tunes its frozen model alone."""
  dataset: str = "digits"
  """Data set, as of an experiment."""
  local_steps: int = 10
  """Steps of a client in a round."""
  seed: int = 0
  """Seed of the data's division, the weights and the batches."""
  timeout: int = 120
  """Seconds in which a node has to answer."""
  deal: str | None = None
  """Folder: only write each client's rows there, the run's config, and the nodes' configs."""
  cold: bool = False
  """Begin without compiled programs, as on a machine that has never run the app."""
  minutes: float = 30.0
  """Minutes after which the run is given up."""


def run(options: Loopback, folder: Path, stack: contextlib.ExitStack) -> bool:
  """Runs the federation and says how far it is from its simulation; returns whether it is as near.

  Args:
    options: as typed.
    folder: for what goes with the processes.
    stack: what ends them.

  Raises:
    BadInput: an option is out of range, or the federation does not come to its end.
  """
  options = settled(options)
  if options.cold:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
  experiment, dealt = prepared(options, folder)
  run_config = defaults() | shared(options) | dealt.run_config
  run_config |= {"nodes": options.nodes, "min_clients": options.nodes}
  run_config |= {"timeout": options.timeout, "out": str(folder / "server")}
  settings = app_options.read(run_config)
  simulated = parity.simulate(options.method, experiment, dealt)
  print("starting a SuperLink and", options.nodes, "SuperNodes", flush=True)
  link = stack.enter_context(processes.superlink(folder / "superlink"))
  nodes = []
  for config in dealt.node_configs:
    own = folder / f"node_{config['client']}"
    config = config | {"folder": str(own / "kept"), "record": str(folder / f"{own.name}.jsonl")}
    print("node:", " ".join(f"{n}={config[n]}" for n in ("client", "bits", "model")), flush=True)
    nodes.append((stack.enter_context(processes.supernode(link, own, config)), own))
  for node in nodes:
    processes.joined(*node)
  # The server's last line names a folder that goes; an error's is told when all have ended.
  last = ("finished", "error: ")
  tell = lambda line: None if line.startswith(last) else print(line, flush=True)
  processes.run(link, run_config, tell, 60 * options.minutes)
  far = parity.difference(settings, folder / "server", simulated)
  near = max(far) <= parity.TOLERANCE
  print(f"from its simulation: w within {far.w:.1e}, accuracies within {far.accuracy:.1e}")
  print(costs(folder, simulated.seconds))
  collect(folder, checks.place("out", options.out))
  return near


def settled(options: Loopback) -> Loopback:
  """Leaves fine-tuning out where nothing is quantised, as an experiment does."""
  quantised = set(options.bits) != {FULL_PRECISION}
  return options if quantised else dataclasses.replace(options, finetune_rounds=0)


def prepared(options: Loopback, folder: Path) -> tuple[study.Options, Dealt]:
  """Returns the experiment that the federation is a form of, and its data, dealt."""
  checks.at_least("nodes", options.nodes, 1)
  checks.require(options.method in parity.JOBS, "method", options.method, ", ".join(parity.JOBS))
  checks.require(len(options.models) > 0, "models", "()", "at least one")
  quantised = options.method in ("quped", "local")
  kinds = options.models if quantised else options.models[:1]
  names = [kinds[i % len(kinds)] for i in range(options.nodes)]
  own = shared(options)
  own.pop("method")
  experiment = replaced(
    study.Options(),
    **own,
    clients=options.nodes,
    bits=options.bits if quantised else (32,),
    dataset=options.dataset,
    seeds=1,
  )
  study.check(experiment)
  return experiment, deal.deal(experiment, names, folder / "rows")


def shared(options: Loopback) -> dict[str, Any]:
  """Returns the options that the app has as well."""
  names = ("method", "rounds", "finetune_rounds", "local_steps", "seed")
  return {name: getattr(options, name) for name in names}


def defaults() -> dict[str, Any]:
  """Returns the app's own options with their defaults."""
  content = tomllib.loads((processes.APP / "pyproject.toml").read_text())
  return content["tool"]["flwr"]["app"]["config"]


def write_configs(options: Loopback, folder: Path) -> None:
  """Writes what a federation on several machines takes: rows, run.toml, and nodes.txt."""
  options = settled(options)
  _, dealt = prepared(options, folder)
  number = options.nodes
  run_config = shared(options) | dealt.run_config | {"nodes": number, "min_clients": number}
  files.write(folder / "run.toml", processes.toml(run_config))
  nodes = (processes.words(config) for config in dealt.node_configs)
  files.write(folder / "nodes.txt", "\n".join(nodes))
  print(f"{folder}: rows of {options.nodes} clients, run.toml and nodes.txt")


def costs(folder: Path, simulated: float) -> str:
  """Says what messages have cost the nodes, and the same rounds in simulation.

  Args:
    folder: where the nodes' mods have written.
    simulated: seconds.
  """
  nodes = [
    [line["cpu_seconds"] for line in map(json.loads, path.open()) if line["way"] == "sent"]
    for path in sorted(folder.glob("node_*.jsonl"))
  ]
  by_message = [sum(seconds) / len(seconds) for seconds in zip(*nodes, strict=False)]
  listed = " ".join(f"{seconds:.1f}" for seconds in by_message)
  told = f"CPU-seconds of a node's process, message by message: {listed}"
  return f"{told}; all rounds of all clients in simulation: {simulated:.2f} s"


def collect(folder: Path, out: Path) -> None:
  """Copies what a federation has made to the results: the table, w and every client's model."""
  copies = {name: folder / "server" / name for name in OF_SERVER}
  for path in sorted(folder.glob("node_*/kept/run-*/model.safetensors")):
    client = path.parent.parent.parent.name.removeprefix("node_")
    copies[f"client_{client}.safetensors"] = path
  with files.writing(out):
    out.mkdir(parents=True, exist_ok=True)
    for name, path in copies.items():
      if path.exists():
        shutil.copyfile(path, out / name)
  print(f"models: {out}; quped predict reads them", flush=True)


def main(arguments: list[str]) -> int:
  """Carries the command out; returns the exit code."""
  for number in (signal.SIGINT, signal.SIGTERM):  # the first may be ignored by whoever starts this
    signal.signal(number, signal.default_int_handler)
  with tempfile.TemporaryDirectory(prefix="quped-federation-") as folder:
    try:
      options = command_line.parse(Loopback, arguments, prog=PROG, description=__doc__)
      if options.deal is not None:
        write_configs(options, checks.place("deal", options.deal))
        return 0
      with contextlib.ExitStack() as stack:
        try:
          return 0 if run(options, Path(folder), stack) else fail("not as simulated", FAILED)
        finally:  # a second Ctrl-C must not leave processes behind
          signal.signal(signal.SIGINT, signal.SIG_IGN)
          signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except BadInput as error:
      known = command_line.leaves(Loopback)
      return fail(command_line.in_flags(error, known))
    except Diverged as error:
      return fail(error, FAILED)
    except KeyboardInterrupt:
      return fail("interrupted; all processes are ended", INTERRUPTED)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
