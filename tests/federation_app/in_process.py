"""A federation without processes: a Grid that hands messages to the ClientApp in this one."""

import json
import tomllib
from pathlib import Path
from typing import NamedTuple

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from federation_app.loopback import deal
from federation_app.quped_app import client_app
from qupeD_jax.study.options import Options, replaced

ROOT = Path(__file__).parent.parent.parent
DEFAULTS = tomllib.loads((ROOT / "federation_app/pyproject.toml").read_text())
DEFAULTS = DEFAULTS["tool"]["flwr"]["app"]["config"]
SMALL = {"rounds": 3, "finetune_rounds": 1, "local_steps": 2, "batch_size": 8, "lambda_p": 0.3,
         "temperature": 2.0, "centers_rate": 1e-3, "global_loss_weight": 0.5}  # fmt: skip
EXPERIMENT = replaced(
  Options(), clients=4, classes_per_client=3, models=("mlp2", "mlp"), bits=(2, 32), seeds=1, **SMALL
)


class Grid:
  """Flower's Grid, as far as the server's loop uses it, over nodes in this process.

  `spoil` maps a node to what becomes of its messages: (message, answer) -> reply or None, where
  answer() is the app's reply.
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
      ident = f"message {len(self.sent)}"
      message.metadata.__dict__["_message_id"] = ident
      self.sent.append(message)
      node = message.metadata.dst_node_id
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

  folder: Path
  run_config: dict
  node_configs: dict  # by node

  def grid(self, spoil=None):
    return Grid(self.run_config, self.node_configs, spoil)


def federation(folder: Path, options: Options = EXPERIMENT, **changes) -> Federation:
  """Deals an experiment's data to nodes in folders of their own."""
  dealt = deal.deal(options, folder / "rows")
  run_config = DEFAULTS | dealt.run_config | SMALL
  run_config |= {"out": str(folder / "server"), "nodes": len(dealt.node_configs)}
  nodes = {}
  for config in dealt.node_configs:
    own = folder / f"node_{config['client']}"
    own.mkdir()
    kept = {"folder": str(own / "kept"), "record": str(own / "messages.jsonl")}
    nodes[100 + config["client"]] = config | kept
  return Federation(folder, run_config | changes, nodes)


def recorded(config: dict) -> list[dict]:
  """Returns what a node's mod wrote down."""
  return [json.loads(line) for line in Path(config["record"]).read_text().splitlines()]
