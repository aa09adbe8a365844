"""Asking nodes over Flower's Grid: messages out, replies in, and one line for whatever is wrong."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from qupeD_jax.checks import BadInput

from .messages import Content

POLL = 0.2  # seconds


class Reply(NamedTuple):
  """A reply that can be used."""

  node: int  # Flower's id
  content: Content


def ask(
  grid: Grid,
  kind: str,
  content: RecordDict,
  group: str,
  timeout: float,
  read: Callable[[RecordDict], Content],
  say: Callable[[str], None],
  names: dict[int, int],
) -> list[Reply]:
  """Sends all nodes that are there a message and collects what they reply.

  Args:
    grid: Flower's.
    kind: of the message.
    content: of the message.
    group: what Flower's logs call it.
    timeout: seconds to wait for replies; messages are void after it.
    read: content -> Content; raises BadInput for one that cannot be used.
    say: told in one line of every node that is left out, and why.
    names: client of each node, as far as it is known; those that reply are added.

  Returns:
    Those that can be used, no client twice, in the order of their clients.
  """
  nodes = sorted(grid.get_node_ids())
  called = lambda node: f"client {names[node]}" if node in names else f"node {node}"
  leave_out = lambda node, reason: say(f"{group}: {called(node)} is left out: {reason}")
  messages = [
    Message(content, node, kind, ttl=timeout, group_id=group.replace(" ", "-")) for node in nodes
  ]
  pushed = [ident for ident in grid.push_messages(messages) if ident]
  replies: dict[int, Reply] = {}
  answered = set()
  for message in _pulled(grid, pushed, timeout):
    node = message.metadata.src_node_id
    answered.add(node)
    if message.has_error():
      leave_out(node, _one_line(f"{message.error.reason} (code {message.error.code})"))
      continue
    try:
      reply = Reply(node, read(message.content))
    except BadInput as error:
      leave_out(node, _one_line(str(error)))
      continue
    client = reply.content.counts["client"]
    names[node] = client
    if client in replies:
      leave_out(node, f"node {replies[client].node} is client {client} as well")
      continue
    replies[client] = reply
  for node in set(nodes) - answered:
    leave_out(node, f"no answer within {timeout:g} s")
  return [replies[client] for client in sorted(replies)]


def wait_for(grid: Grid, number: int, least: int, seconds: float, say: Callable) -> None:
  """Waits until so many nodes are there, for so long at most.

  Raises:
    BadInput: not even `least` are.
  """
  end, told = time.monotonic() + seconds, -1
  while True:
    there = len(list(grid.get_node_ids()))
    if there != told:
      say(f"{there} of {number} nodes are there")
      told = there
    if there >= number:
      return
    if time.monotonic() > end:
      break
    time.sleep(POLL)
  if there < least:
    raise BadInput(f"nodes {there}: allowed is at least {least} within {seconds:g} s")


def _pulled(grid: Grid, pushed: Iterable[str], timeout: float):
  """Yields replies as they come, until all are there or the time is up."""
  due, end = set(pushed), time.monotonic() + timeout
  while due:
    for message in grid.pull_messages(due):
      due.discard(message.metadata.reply_to_message_id)
      yield message
    if time.monotonic() > end:
      return
    if due:
      time.sleep(POLL)


def _one_line(text: str) -> str:
  return " ".join(text.split())[:300]
