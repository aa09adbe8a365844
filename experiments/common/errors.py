"""What ends an experiment that was asked for rightly; bad input is qupeD_jax.checks.BadInput."""


class Diverged(RuntimeError):
  """A method's loss stopped being finite; the message is one line."""
