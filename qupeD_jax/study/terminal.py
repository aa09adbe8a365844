"""Standard output that may be lost, and Ctrl-C before there is anything to save.

Neither a full disk nor a pipe whose reader has gone may cost a run what it has trained.
"""

import io
import os
import sys

INTERRUPTED = 130  # exit code


class _Output(io.FileIO):
  """Bytes to a file descriptor; once it refuses any, all that follow go nowhere."""

  def write(self, data) -> int:
    try:
      return super().write(data)
    except OSError as error:
      nothing = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nothing, self.fileno())
      os.close(nothing)
      print(f"standard output: {error.strerror}; the run goes on without it", file=sys.stderr)
      return len(data)


def lasting(descriptor: int = 1, encoding: str | None = None) -> io.TextIOWrapper:
  """Returns a text file to print on: it takes every character, and fails for no reason.

  Args:
    descriptor: where to write, which need not be open.
    encoding: of the text, by default that of standard output; what it lacks is printed as "?".
  """
  try:
    os.fstat(descriptor)
  except OSError:  # else the next file that is opened would be standard output
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
  encoding = encoding or getattr(sys.stdout, "encoding", "utf-8")
  raw = _Output(descriptor, "wb", closefd=False)
  return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="replace", line_buffering=True)


def end(*_) -> None:
  """Ends the process in one line: Ctrl-C as long as nothing is there to be saved.

  An exception would be lost, or printed with its stack, where a library is being imported.
  """
  os.write(2, b"error: interrupted before anything was begun\n")
  os._exit(INTERRUPTED)
