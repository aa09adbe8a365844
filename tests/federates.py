"""One of several processes of a small study, or the only one; a program for tests to start.

Arguments: the results folder, HOST:PORT or -, the number of this process of two, and options as
name=value.
"""

import functools
import sys

from qupeD_jax.checks import BadInput
from qupeD_jax.study import cli, methods, study
from qupeD_jax.study.durability import hosts
from qupeD_jax.study.errors import Lost
from qupeD_jax.study.options import Options, replaced

OPTIONS = replaced(
  Options(),
  models=("mlp2",), clients=5, rounds=60, finetune_rounds=20, local_steps=1, batch_size=4,
  eval_every=5, seeds=2, checkpoint_every=5, participation=0.6,
)  # fmt: skip
JOBS = (functools.partial(methods.quped_quantised, bits=(2,)),)


def main(folder: str, coordinator: str, process: str, *changes: str) -> None:
  """Runs the study, and says so if the other process is gone or another is refused."""
  values = {name: int(value) for name, value in (change.split("=") for change in changes)}
  options = replaced(OPTIONS, out=folder, **values)
  if coordinator != "-":
    where = {"coordinator": coordinator, "processes": 2, "process": int(process)}
    options = replaced(options, **where)
  try:
    hosts.run("tiny", lambda options: study.run("tiny", options, JOBS), options)
  except (Lost, BadInput) as error:
    print("error:", error, file=sys.stderr)
    cli.leave(1)
    sys.exit(1)


if __name__ == "__main__":
  main(*sys.argv[1:])
