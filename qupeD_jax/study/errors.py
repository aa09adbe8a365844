"""What ends an experiment that was asked for rightly; bad input is qupeD_jax.checks.BadInput."""


class Diverged(RuntimeError):
  """A method's loss stopped being finite; the message is one line."""

  def __init__(self, method: str, message: str):
    self.method = method
    super().__init__(message)


class OutOfTime(Exception):
  """The minutes that a run was given are over; it can be continued."""


class Terminated(Exception):
  """A signal asked a run to end; it can be continued."""


class Lost(RuntimeError):
  """Another process of the run is gone; the message is one line."""


class Incomplete(RuntimeError):
  """Parts of the results are gone at the end of a run; the message is one line."""
