"""Asking nodes over Flower's Grid: messages out, replies in, and one line for whatever is wrong."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from qupeD_jax.checks import BadInput

from .messages import Content

POLL = 0.2  # seconds
VOID = (3, 4)  # Flower's codes of a message, or its reply, that was not there in time


class Question(NamedTuple):
  """What nodes are asked."""

  group: str  # "round 3": what lines call it
  kind: str  # of the messages, as of `messages`
  content: RecordDict
  timeout: float  # seconds to wait for replies; messages are void after it
  read: Callable[[RecordDict], Content]  # raises BadInput for a reply that cannot be used


class Reply(NamedTuple):
  """A reply that can be used."""

  node: int  # Flower's id
  content: Content


def ask(
  grid: Grid,
  question: Question,
  heard: dict[int, Reply],
  *,
  names: dict[int, int],
  say: Callable[[str], None],
) -> dict[int, Reply]:
  """Asks all nodes that are there and have not been heard yet.

  Args:
    grid: Flower's.
    question: what to ask.
    heard: replies to the same question, by client.
    names: client of each node, as far as it is known; those that reply are added. While a node is
      there its client is nobody else's.
    say: told in one line of every node that is left out, and why.

  Returns:
    `heard` and the replies that can be used, by client, in the order of clients.
  """
  replies, there = dict(heard), set(grid.get_node_ids())
  nodes = there - {reply.node for reply in heard.values()}
  owners = {client: node for node, client in names.items() if node in there}
  unheard = set(nodes)
  called = lambda node: f"client {names[node]}" if node in names else f"node {node}"
  leave_out = lambda node, why: say(f"{question.group}: {called(node)} is left out: {why}")
  for node, message in _replies(grid, question, sorted(nodes)):
    if message.has_error() and message.error.code in VOID:
      continue
    unheard.discard(node)
    try:
      content = _content(question, message)
    except BadInput as error:
      leave_out(node, " ".join(str(error).split())[:300])
      continue
    client = content.counts["client"]
    if owners.setdefault(client, node) != node:
      leave_out(node, f"node {owners[client]} is client {client} as well")
      continue
    names[node], replies[client] = client, Reply(node, content)
  for node in sorted(unheard):
    leave_out(node, f"no answer within {question.timeout:g} s")
  return dict(sorted(replies.items()))


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


def _replies(grid: Grid, question: Question, nodes: list[int]) -> Iterator[tuple[int, Message]]:
  """Sends the messages; yields node and reply as they come, until all are there or time is up.

  Of a message that is void it is the SuperLink that replies, so nodes are told by what they were
  asked.
  """
  group = question.group.removeprefix("round ")  # Flower's logs put the word before it
  about = {"ttl": float(question.timeout), "group_id": group}
  messages = [Message(question.content, node, question.kind, **about) for node in nodes]
  due = dict(zip(grid.push_messages(messages), nodes, strict=True))
  due.pop(None, None)  # what Flower could not push
  end = time.monotonic() + question.timeout
  while due:
    for message in grid.pull_messages(due):
      yield due.pop(message.metadata.reply_to_message_id), message
    if time.monotonic() > end:
      return
    if due:
      time.sleep(POLL)


def _content(question: Question, message: Message) -> Content:
  if message.has_error():
    raise BadInput(f"{message.error.reason} (code {message.error.code})")
  return question.read(message.content)
