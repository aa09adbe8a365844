"""Signals: SIGTERM asks a run to save and end, and a second signal ends it at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from qupeD_jax.study import terminal
from qupeD_jax.study.errors import Terminated


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], bool]]:
  """Yields what tells whether SIGTERM came; where signals are not heard, in a thread, it never did.

  After a first signal, SIGTERM or the SIGINT of Ctrl-C, a second one ends the process, even while
  a program runs on the device and Python hears nothing: the second is heard by a thread.

  Raises:
    Terminated: in the end, if SIGTERM came.
  """
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False
    return
  asked = threading.Event()
  near, far = socket.socketpair()
  near.setblocking(False)  # as set_wakeup_fd wants it
  threading.Thread(target=_end_at_second, args=(far,), daemon=True).start()
  wakeup = signal.set_wakeup_fd(near.fileno(), warn_on_full_buffer=False)
  handler = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  interrupt = signal.getsignal(signal.SIGINT)
  if interrupt is terminal.end:  # from now on there is something to be saved
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield asked.is_set
  finally:
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, interrupt)
    signal.set_wakeup_fd(wakeup)
    near.close()
  if asked.is_set():
    raise Terminated("finished what was begun and stopped, as SIGTERM has it; the same command "
                     "goes on from here")  # fmt: skip


def _end_at_second(heard: socket.socket) -> None:
  with heard:
    if heard.recv(1) and (second := heard.recv(1)):
      os._exit(128 + second[0])
