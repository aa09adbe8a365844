"""The command `quped`: what is done with results and models once they are trained.

quped COMMAND [ARGUMENTS]        quped COMMAND --help explains one
"""

import importlib
import sys
from collections.abc import Sequence

from qupeD_jax import command_line

_COMMANDS = {
  "report": ("qupeD_jax.study.report", "a results folder as a page and LaTeX tables"),
  "import-torch": ("qupeD_jax.io.import_torch", "a PyTorch network as one to start from"),
  "export": ("qupeD_jax.io.export", "a client's model as ONNX, Core ML, StableHLO or a web page"),
  "predict": ("qupeD_jax.io.predict", "the classes of images, by a client's model"),
  "inspect": ("qupeD_jax.io.inspect", "what a model's file holds: layers, bits, bytes, codebooks"),
  "serve": ("qupeD_jax.io.web", "a model's web page, on this machine alone"),
  "data": ("qupeD_jax.data.prepare", "a data set, downloaded and prepared"),
}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns its exit code."""
  typed = sys.argv[1:] if arguments is None else arguments
  if not typed or typed[0] in command_line.HELP:
    print(usage())
    return 0
  name, *rest = typed
  if name not in _COMMANDS:
    hint = command_line.nearest(name, _COMMANDS)
    return command_line.fail(f"{name}: no such command{hint}; all: {', '.join(_COMMANDS)}")
  module, _ = _COMMANDS[name]
  return importlib.import_module(module).main(rest)


def usage() -> str:
  """Returns what `quped --help` prints."""
  width = max(map(len, _COMMANDS))
  lines = (f"  {name:{width}}  {about}" for name, (_, about) in _COMMANDS.items())
  return "\n".join([(__doc__ or "").strip(), "", *lines])


if __name__ == "__main__":
  sys.exit(main())
