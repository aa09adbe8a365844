"""A federation over messages is the simulation, message by message, and tells nothing else."""

from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: make federation-tools")

from flwr.app import Message

from federation_app.loopback import parity
from federation_app.quped_app import checkpoint, messages, node
from qupeD_jax.checks import BadInput
from qupeD_jax.data import sources
from qupeD_jax.io.personal import load_model
from qupeD_jax.study.options import replaced
from tests.federation_app.in_process import EXPERIMENT, Grid, federation, recorded

PLAIN = replaced(EXPERIMENT, bits=(32,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of QuPeD, two architectures, 2 and 32 bits, the server's lines and clients' reports."""
  made = federation(tmp_path_factory.mktemp("quped"))
  return made, *made.run()


def packed(config) -> Path:
  (path,) = Path(config["folder"]).glob("run-*/model.safetensors")
  return path


def test_quped_is_the_simulation(finished):
  made, clients, told = finished
  far = parity.difference(
    made.settings, Path(made.run_config["out"]), parity.simulate("quped", EXPERIMENT, made.dealt)
  )
  assert max(far) < 1e-5
  assert [c.client for c in clients] == [0, 1]
  assert [line.split(":")[0] for line in told] == [
    "2 of 2 nodes are there",
    "round 1/2",
    "round 2/2",
  ]


@pytest.mark.parametrize(
  ("method", "names", "experiment"),
  [
    ("fedavg", ("mlp2", "mlp2"), PLAIN),
    ("ditto", ("mlp2", "mlp2"), PLAIN),
    ("local", ("mlp2", "mlp"), EXPERIMENT),
  ],
)
def test_rivals_are_the_simulation(tmp_path, method, names, experiment):
  made = federation(tmp_path, names, experiment, method=method, rounds=2)
  made.run()
  simulated = parity.simulate(method, replaced(experiment, rounds=2), made.dealt)
  assert max(parity.difference(made.settings, Path(made.run_config["out"]), simulated)) < 1e-5


def test_only_w_the_round_and_counts_travel(finished):
  made, _, _ = finished
  held = checkpoint.load(Path(made.run_config["out"]), node.about_run(made.settings))
  shapes = {
    f"params/{layer}/{name}": ["float32", list(leaf.shape)]
    for layer, tensors in held.variables["params"].items()
    for name, leaf in tensors.items()
  }
  for config in made.node_configs.values():
    lines = recorded(config)
    assert [(line["way"], line["type"]) for line in lines] == [
      (way, kind) for kind in ("train", "train", "evaluate") for way in ("received", "sent")
    ]
    for line in lines:
      records = line["records"]
      sends_w = (line["way"], line["type"]) != ("sent", "evaluate")
      assert set(records) == ({"counts", "w"} if sends_w else {"counts"})
      if sends_w:
        assert {path: about[:2] for path, about in records["w"].items()} == shapes
        assert all(size - 4 * np.prod(shape) <= 128 for _, shape, size in records["w"].values())
      assert all(type(value) is int for value in records["counts"].values())
    received, sent, *_, scores = (set(line["records"]["counts"]) for line in lines)
    assert received == {"run", "round"}
    assert sent == {"client", "round", "rows"}
    assert scores == {"client", "rows", "tested", "personal", "global"}


def test_nodes_hold_packed_models_that_score_as_told_and_the_server_holds_w(finished):
  made, clients, _ = finished
  whole = load_model(Path(made.run_config["out"]) / "model.safetensors")
  for config, client in zip(made.node_configs.values(), clients, strict=True):
    _, test, _ = sources.read(config["rows"])
    personal = load_model(packed(config))
    assert (personal.client, personal.bits) == (config["client"], config["bits"])
    assert personal.model.about["model"] == config["model"]
    assert bool(personal.codebooks) == (config["bits"] == 2)
    for name, model in (("personal", personal), ("global", whole)):
      logits, _ = model.model.apply(model.variables, test.x, False)
      assert int((np.argmax(logits, -1) == test.y).sum()) == client.right[name]


def test_a_message_that_comes_again_changes_nothing(finished):
  made, _, _ = finished
  grid = Grid(made.run_config, made.node_configs)
  config = made.node_configs[100]
  (path,) = Path(config["folder"]).glob("run-*/client.safetensors")
  kept, model = path.read_bytes(), packed(config).read_bytes()
  run = int(path.parent.name.removeprefix("run-"), 16)
  w = checkpoint.load(Path(made.run_config["out"]), node.about_run(made.settings)).variables
  first = [line["records"] for line in recorded(config)]
  for kind, round_ in (("train", 1), ("evaluate", 2)):
    content = messages.write({"run": run, "round": round_}, w)
    grid.push_messages([Message(content, 100, kind)])
  again = [line["records"] for line in recorded(config)][len(first) :]
  assert again[1] == first[3]
  assert again[3] == first[5]
  assert (path.read_bytes(), packed(config).read_bytes()) == (kept, model)


def test_a_run_that_was_cut_off_goes_on_to_the_same_numbers(finished, tmp_path):
  made, clients, _ = finished
  cut = federation(tmp_path)

  def stop(message, answer):
    """Trains, and lets the server die before it has the reply of its second round."""
    reply = answer()
    if message.content["counts"]["round"] == 1:
      raise KeyboardInterrupt
    return reply

  with pytest.raises(KeyboardInterrupt):
    cut.run({100: stop})
  again, told = cut.run()
  assert told[0].startswith("going on after round 1, from ")
  assert again == clients
  of = lambda one: checkpoint.load(Path(one.run_config["out"]), node.about_run(one.settings))
  jax.tree.map(np.testing.assert_array_equal, of(cut).variables, of(made).variables)
  with pytest.raises(BadInput, match=r"seed 7: was 0 when the run in .* began; fresh=true begins"):
    cut.run(seed=7)
