"""The command `quped report`: a page that also says what the experiment is about."""

import importlib.util
from collections.abc import Sequence

from qupeD_jax.results import page


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""
  return page.main(arguments, about)


def about(name: str) -> str:
  """Returns the first line of an experiment's docstring; "" where it is not at hand."""
  if importlib.util.find_spec("experiments") is None:  # the package is installed without them
    return ""
  cli = importlib.import_module("qupeD_jax.study.cli")
  return cli.first_line(name) if name in cli.names() else ""
