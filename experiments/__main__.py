"""The command line: `python -m experiments NAME [OPTIONS]`; without a name it lists them."""

import signal
import sys

from qupeD_jax.study import terminal

if __name__ == "__main__":
  signal.signal(signal.SIGINT, terminal.end)
  sys.stdout = terminal.lasting()

  from qupeD_jax.study import cli

  sys.exit(cli.main(sys.argv[1:]))
