"""What runs on the server, in a process of its own for every `flwr run`."""

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import ExitCode, flwr_exit

from qupeD_jax.checks import BadInput, place
from qupeD_jax.io import files
from qupeD_jax.study.compiled import keep_compiled

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
  """Runs a federation and prints what its clients report."""
  keep_compiled()  # before jax is imported
  from . import options, server

  say = print
  try:
    settings = options.read(context.run_config)
    say = _teller(settings)
    clients = server.run(settings, grid, say)
    say(server.table(settings, clients))
    say(f"finished: {settings.options.run.out}")
  except BadInput as error:
    say(f"error: {' '.join(str(error).split())}")
    flwr_exit(ExitCode.SERVERAPP_EXCEPTION, str(error))  # Flower's own way adds a traceback


def _teller(settings) -> Callable[[str], None]:
  """Returns a function that prints a text and appends it to log.txt in the server's folder."""
  folder = place("out", settings.options.run.out)
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)

  def say(text: str) -> None:
    print(text, flush=True)
    with (folder / "log.txt").open("a") as log:
      log.write(text + "\n")

  return say
