"""What runs on a node: Flower starts a process for every message and calls one of these."""

import faulthandler
import signal
import sys
import traceback
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from qupeD_jax.checks import BadInput
from qupeD_jax.study.compiled import keep_compiled

from .recording import record

FAILED = 2  # Flower's code of an app that raises


def limited(message: Message, context: Context, call_next) -> Message:
  """Gives up what takes longer than the server waits: a mod.

  What hangs would hold its node up in all rounds to come. First it is interrupted; where that does
  not help, in compiled code, the process ends. What the client keeps is written whole or not at
  all, so it is there for the next one.
  """
  seconds = float(context.run_config["timeout"])
  before = signal.signal(signal.SIGALRM, _interrupt)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
  try:
    return call_next(message, context)
  finally:
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _interrupt(number, frame):
  raise TimeoutError("takes longer than the server waits")


app = ClientApp(mods=[limited, record])


@app.train()
def train(message: Message, context: Context) -> Message:
  """Trains the client for a round."""
  return _answered(_train, message, context)


@app.evaluate()
def finish(message: Message, context: Context) -> Message:
  """Finishes the client's model."""
  return _answered(_finish, message, context)


def _answered(act: Callable, message: Message, context: Context) -> Message:
  """Replies with what a function finds, or with an error in one line.

  An exception's own text may hold anything, so it stays in the node's log: only the kind of
  exception travels.
  """
  try:
    keep_compiled()  # before jax is imported
    return Message(act(message, context), reply_to=message)
  except BadInput as error:
    print("error:", " ".join(str(error).split()), flush=True)
    return Message(Error(FAILED, str(error)), reply_to=message)
  except Exception as error:
    traceback.print_exc()
    reason = f"{type(error).__name__}; the node's log has more"
    return Message(Error(FAILED, reason), reply_to=message)


def _train(message: Message, context: Context) -> RecordDict:
  from . import kept, messages, node

  settings, own, (counts, variables) = _read(message, context)
  with kept.held(own.folder):
    answer = node.train(settings, own, counts["run"], counts["round"], variables)
  return messages.write(*answer)


def _finish(message: Message, context: Context) -> RecordDict:
  from . import kept, messages, node

  settings, own, (counts, variables) = _read(message, context)
  with kept.held(own.folder):
    answer = node.finish(settings, own, counts["run"], variables)
  return messages.write(*answer)


def _read(message: Message, context: Context):
  """Reads the configs of the run and of the node, and what the message holds."""
  import jax

  from . import algorithms, messages, node, options

  settings, own = options.read(context.run_config), options.read_node(context.node_config)
  like = jax.eval_shape(lambda: algorithms.first_state(settings, jax.random.key(0)))
  return settings, own, messages.read(message.content, node.TO_NODE, like)
