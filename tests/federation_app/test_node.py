"""What a node refuses, and that it loses nothing of what it has."""

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: make federation-tools")

from federation_app.quped_app import kept, node, options
from federation_app.quped_app.algorithms import first_state
from federation_app.quped_app.options import Node
from qupeD_jax.checks import BadInput
from qupeD_jax.types import FULL_PRECISION
from tests.federation_app.in_process import federation


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return federation(tmp_path_factory.mktemp("node"), ("mlp2", "mlp2"))


def own_of(made, **changes) -> Node:
  return options.read_node(
    {k: v for k, v in made.node_configs[101].items() if k != "record"}
  )._replace(**changes)


def settings_of(made, **changes):
  return options.read(made.run_config | changes)


@pytest.mark.parametrize(
  ("changes", "own", "message"),
  [
    ({"method": "fedavg"}, {"model": "mlp"}, "model mlp: allowed is mlp2, the server's, in fedavg"),
    ({"method": "ditto"}, {"bits": 2}, "bits 2: allowed is 32 in ditto, which quantises nothing"),
    ({"batch_size": 9999}, {}, r"batch_size 9999: allowed is at most \d+, the client's rows; with"),
    ({"image_shape": "8 8 3"}, {}, r"image_shape \(8, 8, 1\): allowed is \(8, 8, 3\), the run's"),
    ({"num_classes": 2}, {}, "label 9: allowed is below 2, the run's number of classes"),
  ],
)
def test_what_does_not_fit_the_run_is_one_line(made, changes, own, message):
  with pytest.raises(BadInput, match="^" + message):
    node.train(settings_of(made, **changes), own_of(made, **own), 1, 0, None)


def test_two_messages_at_a_time_are_one_too_many(tmp_path):
  with (
    kept.held(tmp_path / "kept"),
    pytest.raises(BadInput, match=r"^still at work on an earlier m"),
    kept.held(tmp_path / "kept"),
  ):
    pass
  with kept.held(tmp_path / "kept"):
    pass


def test_what_diverges_or_comes_too_late_changes_nothing(made):
  own, settings = own_of(made, bits=FULL_PRECISION), settings_of(made, finetune_rounds=0)
  w = first_state(settings, node.streams.of_phase(0, 0))
  answer = node.train(settings, own, 1, 1, w)  # it missed round 0
  path = kept.path_of(own.folder, 1) / "client.safetensors"
  before = path.read_bytes()
  assert answer.counts == {"client": 1, "round": 1, "rows": answer.counts["rows"]}
  with pytest.raises(
    BadInput, match=r"^round 0: allowed is at least 1: this client has had 2 round"
  ):
    node.train(settings, own, 1, 0, w)
  with pytest.raises(BadInput, match=r"^client 1, round 3: the loss or the model is not finite; "):
    node.train(settings, own, 1, 2, {**w, "params": {**w["params"], "head": broken(w)}})
  with pytest.raises(BadInput, match=r"^weights_rate: is not what it was in the rounds before; "):
    node.train(settings_of(made, finetune_rounds=0, weights_rate=0.2), own, 1, 2, w)
  assert path.read_bytes() == before
  path.write_bytes(before[:-1] + b"?")
  with pytest.raises(
    BadInput, match=r"client\.safetensors: damaged \(its checksum does not match\)"
  ):
    node.train(settings, own, 1, 2, w)


def broken(w):
  return {name: np.full_like(leaf, np.nan) for name, leaf in w["params"]["head"].items()}
