"""The command line: `python -m experiments NAME [OPTIONS]`; without a name it lists them."""

import sys

from qupeD_jax.study import cli

if __name__ == "__main__":
  sys.exit(cli.main(sys.argv[1:]))
