"""Output that is lost costs a run nothing."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from qupeD_jax.study import terminal


@pytest.fixture
def pipe():
  """Returns the ends of a pipe: (to read from, to write to)."""
  ends = os.pipe()
  yield ends
  for end in ends:
    with contextlib.suppress(OSError):
      os.close(end)


def test_a_character_that_the_terminal_lacks_is_no_reason_to_end(pipe):
  near, far = pipe
  print("95.0 ± 0.3", file=terminal.lasting(far, "ascii"))
  assert os.read(near, 100) == b"95.0 ? 0.3\n"


def test_a_reader_that_has_gone_is_told_of_once(pipe, capsys):
  near, far = pipe
  out = terminal.lasting(far)
  os.close(near)
  for line in range(3):
    print(line, file=out)
  assert capsys.readouterr().err == "standard output: Broken pipe; the run goes on without it\n"


def test_a_full_disk_is_told_of_once(capsys):
  full = os.open("/dev/full", os.O_WRONLY)
  out = terminal.lasting(full)
  for line in range(3):
    print(line, file=out)
  os.close(full)
  said = "standard output: No space left on device; the run goes on without it\n"
  assert capsys.readouterr().err == said


def test_where_output_is_closed_no_other_file_takes_its_place(pipe, tmp_path):
  _, far = pipe
  os.close(far)
  out = terminal.lasting(far)
  with (tmp_path / "metrics.jsonl").open("w") as other:
    assert other.fileno() != far
    print("hello", file=out)


def test_an_interrupt_before_the_beginning_is_one_line():
  code = "from qupeD_jax.study import terminal; import os, signal; "
  code += "signal.signal(2, terminal.end); "
  code += "exec('try: os.kill(os.getpid(), 2)\\nexcept BaseException: pass')"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
  assert done.stderr == "error: interrupted before anything was begun\n"
