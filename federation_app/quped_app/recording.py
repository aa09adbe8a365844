"""A Flower mod that writes down what a node received and sent: names, shapes, counts, no weights.

It is at work where the node's config has `record`, a file that a line is appended to for each. A
line also says how many CPU-seconds the process, which Flower starts for every message, has taken.
"""

import json
import time
from pathlib import Path

from flwr.app import Context, Message


def record(message: Message, context: Context, call_next) -> Message:
  """Passes a message on to the app and its reply back, and appends a line of JSON for either."""
  path = context.node_config.get("record")
  if path is None:
    return call_next(message, context)
  _append(Path(path), "received", message)
  reply = call_next(message, context)
  _append(Path(path), "sent", reply)
  return reply


def contents(message: Message) -> dict:
  """Describes all that is in a message.

  Returns:
    By record: of arrays their type, shape and bytes, of any other record its values; or the error.
  """
  if message.has_error():
    return {"error": [message.error.code, message.error.reason]}
  found = {}
  for name, record_ in message.content.array_records.items():
    arrays = record_.items()
    found[name] = {path: [a.dtype, list(a.shape), len(a.data)] for path, a in arrays}
  for name, record_ in message.content.metric_records.items():
    found[name] = dict(record_)
  for name, record_ in message.content.config_records.items():
    found[name] = {key: str(value) for key, value in record_.items()}
  return found


def _append(path: Path, way: str, message: Message) -> None:
  line = {"way": way, "type": message.metadata.message_type, "cpu_seconds": time.process_time()}
  line |= {"records": contents(message)}
  with path.open("a") as file:
    file.write(json.dumps(line) + "\n")
