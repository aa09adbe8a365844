"""One of two processes of a small study, a program for tests to start; or the study alone.

It draws no pictures, which cost more than the training. Arguments: the results folder, HOST:PORT,
the number of this process, and options as name=value.
"""

import functools
import sys
from unittest import mock

from qupeD_jax.checks import BadInput
from qupeD_jax.results import plots
from qupeD_jax.study import cli, methods, study
from qupeD_jax.study.durability import hosts
from qupeD_jax.study.errors import Lost
from qupeD_jax.study.options import Options, replaced

OPTIONS = replaced(
  Options(),
  models=("mlp2",), clients=5, rounds=60, finetune_rounds=0, local_steps=1, batch_size=4,
  eval_every=5, seeds=2, checkpoint_every=5, participation=0.6,
)  # fmt: skip
JOBS = (functools.partial(methods.quped_quantised, bits=(2,)),)


def run(folder, **changes) -> None:
  """Runs the study."""
  nothing = dict.fromkeys(("curves", "clients", "weights", "centers"), lambda *_, **__: None)
  with mock.patch.multiple(plots, **nothing):
    options = replaced(OPTIONS, out=str(folder), **changes)
    hosts.run("tiny", lambda options: study.run("tiny", options, JOBS), options)


def main(folder: str, coordinator: str, process: str, *changes: str) -> None:
  """Runs the study, and says so if the other process is gone or another is refused."""
  values = {name: int(value) for name, value in (change.split("=") for change in changes)}
  where = {"coordinator": coordinator, "processes": 2, "process": int(process)}
  try:
    run(folder, **where, **values)
  except (Lost, BadInput) as error:
    print("error:", error, file=sys.stderr)
    cli.leave(1)
    sys.exit(1)


if __name__ == "__main__":
  main(*sys.argv[1:])
