"""A federation without processes: a Grid that hands messages to the ClientApp in this one."""

import json
from pathlib import Path
from typing import NamedTuple

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from federation_app.loopback import deal
from federation_app.loopback.__main__ import defaults
from federation_app.quped_app import client_app, options, server
from federation_app.quped_app.options import Settings
from qupeD_jax.study.options import Options, replaced

SMALL = {"rounds": 3, "finetune_rounds": 1, "local_steps": 2, "batch_size": 8, "lambda_p": 0.3,
         "temperature": 2.0, "centers_rate": 1e-3, "global_loss_weight": 0.5}  # fmt: skip
EXPERIMENT = replaced(Options(), clients=2, bits=(2, 32), seeds=1, **SMALL)


class Grid:
  """Flower's Grid, as far as the server's loop uses it, over nodes in this process.

  `spoil` maps a node to what becomes of a message to it: (message, answer) -> a reply, or None for
  no answer; answer() is the reply of the app.
  """

  def __init__(self, run_config, node_configs, spoil=None):
    self.run_config, self.node_configs = run_config, dict(node_configs)
    self.spoil, self.replies, self.sent = spoil or {}, {}, []
    # What Flower's processes are told when they start, and messages are made with.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

  def get_node_ids(self):
    return list(self.node_configs)

  def push_messages(self, messages):
    idents = []
    for message in messages:
      ident, node = f"message {len(self.sent)}", message.metadata.dst_node_id
      message.metadata.__dict__["_message_id"] = ident
      self.sent.append(message)
      answer = lambda message=message, node=node: self.answer(message, node)
      reply = self.spoil.get(node, lambda message, answer: answer())(message, answer)
      if reply is not None:
        self.replies[ident] = reply
      idents.append(ident)
    return idents

  def pull_messages(self, idents):
    return [self.replies.pop(ident) for ident in list(idents) if ident in self.replies]

  def answer(self, message, node):
    config = self.node_configs[node]
    context = Context(
      run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config=self.run_config
    )
    return client_app.app(message, context)


class Federation(NamedTuple):
  """A dealt data set and where everything lies."""

  dealt: deal.Dealt
  run_config: dict
  node_configs: dict  # by node: 100 and 101

  @property
  def settings(self) -> Settings:
    return options.read(self.run_config)

  def run(self, spoil=None, **changes):
    """Runs the server's loop; returns what clients report and the lines that were told."""
    told, run_config = [], self.run_config | changes
    grid = Grid(run_config, self.node_configs, spoil)
    return server.run(options.read(run_config), grid, told.append), told


def federation(folder: Path, names=("mlp2", "mlp"), experiment=EXPERIMENT, **changes) -> Federation:
  """Deals an experiment's data to nodes in folders of their own."""
  dealt = deal.deal(experiment, names, folder / "rows")
  run_config = defaults() | dealt.run_config | SMALL | {"out": str(folder / "server")}
  nodes = {}
  for config in dealt.node_configs:
    own = folder / f"node_{config['client']}"
    own.mkdir()
    kept = {"folder": str(own / "kept"), "record": str(own / "messages.jsonl")}
    nodes[100 + config["client"]] = config | kept
  return Federation(dealt, run_config | changes, nodes)


def recorded(config: dict) -> list[dict]:
  """Returns what a node's mod wrote down."""
  return [json.loads(line) for line in Path(config["record"]).read_text().splitlines()]
