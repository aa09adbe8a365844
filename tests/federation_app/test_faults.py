"""Whatever a node does, the server says it in one line and the federation goes on."""

import io
import time

import jax
import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: make federation-tools")

from flwr.app import Context, Error, Message, RecordDict

from federation_app.loopback.__main__ import defaults
from federation_app.quped_app import checkpoint, client_app, messages, node, options, server
from qupeD_jax.checks import BadInput
from tests.federation_app.in_process import Grid

NODES = {node: {} for node in (100, 101, 102)}
W = {100: 1.0, 101: 2.0, 102: 6.0}  # by how much a node moves w


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Returns a function: what nodes do, options -> how far w moved, lines told."""
  monkeypatch.setattr(server, "PAUSE", 0.0)
  config = defaults() | {"method": "fedavg", "model": "mlp2", "rounds": 1, "finetune_rounds": 0}
  config |= {"out": str(tmp_path / "server"), "nodes": 3, "min_clients": 1, "timeout": 0.1}
  config |= {"aggregate": "mean"}

  def run(spoil=None, **changes):
    moves, told = moved_by(spoil, **changes)
    moved = moves[0].ravel()[0]
    for leaf in moves:
      np.testing.assert_allclose(leaf, moved, rtol=1e-5)
    return moved, told

  def moved_by(spoil=None, **changes):
    settings, told = options.read(config | changes), []
    grid = Grid({}, NODES, dict.fromkeys(NODES, good) | (spoil or {}))
    server.run(settings, grid, told.append)
    before = server._begin(settings).variables
    after = checkpoint.load(tmp_path / "server", node.about_run(settings)).variables
    return jax.tree.leaves(jax.tree.map(lambda a, b: a - b, after, before)), told

  run.moved_by = moved_by
  return run


def good(message, answer=None, **changes):
  """Replies as a sound client does, or with other counts."""
  ident = message.metadata.dst_node_id
  counts = {"client": ident - 100, "rows": 10}
  if message.metadata.message_type == "evaluate":
    counts |= {"tested": 4, "personal": 3, "global": 1}
    return Message(messages.write(counts | changes), reply_to=message)
  counts |= {"round": message.content["counts"]["round"]}
  return Message(messages.write(counts | changes, moved(message, W[ident])), reply_to=message)


def moved(message, by):
  arrays = message.content["w"]
  return {path: array.numpy() + np.float32(by) for path, array in arrays.items()}


def in_training(act):
  """Lets a node do something in rounds alone: at the end it is sound."""
  return lambda message, answer: (good if message.metadata.message_type != "train" else act)(
    message
  )


def raises(message):
  def act(message, context):
    raise ZeroDivisionError("a secret")

  return client_app._answered(act, message, None)


def hangs(message):
  def act(message, context):
    time.sleep(60)

  context = Context(1, 102, {}, RecordDict(), {"timeout": 0.05})
  answered = lambda message, context: client_app._answered(act, message, context)
  return client_app.limited(message, context, answered)


def wrong_shape(message):
  reply = good(message)
  reply.content["w"]["params/head/bias"] = messages.Array(np.zeros(3, np.float32))
  return reply


def pickled(message):
  reply = good(message)
  array = messages.Array(np.zeros(10, np.float32))
  file = io.BytesIO()
  np.save(file, np.array([print], object), allow_pickle=True)
  array.data = file.getvalue()
  reply.content["w"]["params/head/bias"] = array
  return reply


def not_finite(message):
  reply = good(message)
  reply.content["w"]["params/head/bias"] = messages.Array(np.full(10, np.nan, np.float32))
  return reply


LEFT_OUT = {
  "it raises": (raises, "ZeroDivisionError; the node's log has more (code 2)"),
  "it dies": (lambda message: None, "no answer within 0.1 s"),
  "it hangs": (hangs, "TimeoutError; the node's log has more (code 2)"),
  "the time is up": (
    lambda message: Message(Error(3, "Message Unavailable"), reply_to=message),
    "no answer within 0.1 s",
  ),
  "Flower lost it": (
    lambda message: Message(Error(5, "Node\nunavailable"), reply_to=message),
    "Node unavailable (code 5)",
  ),
  "a wrong shape": (wrong_shape, "params/head/bias: float32 [3] where float32 [10] is due"),
  "a pickle": (pickled, "params/head/bias: cannot be read"),
  "another round": (lambda m: good(m, round=7), "round 7: allowed is 0"),
  "no rows": (lambda m: good(m, rows=0), "rows 0: allowed is at least 1"),
  "a number more": (lambda m: good(m, x=1), "counts client, rows, round, x: allowed is client, "
                    "round, rows"),
  "no w": (
    lambda m: Message(messages.write({"client": 2, "rows": 1, "round": 0}), reply_to=m),
    "records counts: allowed is counts, w",
  ),
  "someone else's number": (
    lambda m: good(m, client=1),
    "node 102 is left out: node 101 is client 1 as well",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_node_that_fails_is_left_out_of_the_round(run, name):
  act, reason = LEFT_OUT[name]
  far, told = run({102: in_training(act)})
  assert far == pytest.approx(1.5)  # the mean of the others' 1 and 2
  (line,) = (line for line in told if "is left out" in line)
  assert line.startswith("round 1: ")
  assert line.endswith(f" {reason}")
  assert told[-1].startswith("round 1/1: 2 clients with 20 rows, w moved by ")


def test_what_is_not_finite_is_dropped_by_the_aggregate(run):
  far, told = run({102: in_training(not_finite)})
  assert far == pytest.approx(1.5)
  assert told[1] == "round 1: client 2 is left out: its upload is not finite"
  assert told[-1].startswith("round 1/1: 3 clients with 30 rows, 1 dropped, w moved by ")


def test_all_together_is_the_mean_of_all(run):
  far, told = run()
  assert far == pytest.approx(3)
  assert len(told) == 2


def test_a_round_that_too_few_answer_is_repeated(run):
  first = iter([None])
  once = lambda message: next(first, good(message))
  far, told = run({102: in_training(once)}, min_clients=3)
  assert far == pytest.approx(3)
  assert "round 1: 2 answered, min_clients is 3: attempt 1/5" in told


def test_a_round_that_nobody_answers_ends_the_run_which_then_goes_on(run):
  silent = dict.fromkeys(NODES, lambda message, answer: None)
  with pytest.raises(BadInput, match=r"round 1: not answered by min_clients 2 in 5 attempts; the "):
    run(silent, min_clients=2)
  far, told = run()
  assert told[0].startswith("going on after round 0, from ")
  assert far == pytest.approx(3)


def test_without_enough_nodes_nothing_begins(run):
  with pytest.raises(BadInput, match="nodes 3: allowed is at least 4 within 1 s"):
    run(nodes=4, min_clients=4, join_timeout=1)


def test_who_has_another_s_number_has_it_in_no_round(run):
  """Also where it is the first to reply, once it is known whose number it is."""
  late = lambda message, answer: good(message, client=1)
  _, told = run({102: late}, rounds=2)
  lines = [line for line in told if "is left out" in line]
  assert len(lines) == 3
  assert {line.partition(": ")[2] for line in lines} == {
    "node 102 is left out: node 101 is client 1 as well"
  }


def test_a_run_that_nobody_finishes_goes_on(run):
  silent = lambda message, answer: (
    good(message) if message.metadata.message_type == "train" else None
  )
  with pytest.raises(
    BadInput, match="finish: not answered by min_clients 2 in 2 attempts; the same"
  ):
    run(dict.fromkeys(NODES, silent), min_clients=2)
  far, told = run()
  assert told[0].startswith("going on after round 1, from ")
  assert far == pytest.approx(3)


def test_who_does_not_finish_is_asked_again(run):
  first = iter([None])
  once = lambda message, answer: (
    good(message) if message.metadata.message_type == "train" else next(first, good(message))
  )
  _, told = run({102: once})
  assert told[-1] == "finish: client 2 is left out: no answer within 0.1 s"


def test_noise_is_secret_and_its_worth_is_told(run):
  noisy = {"aggregate": "clipped_mean", "noise_multiplier": 5.0, "fresh": True}
  (first, *_), told = run.moved_by(**noisy)
  (other, *_), _ = run.moved_by(**noisy)
  assert np.abs(first - other).min() > 0
  assert told[-1].startswith("the noise on w is worth epsilon ")
