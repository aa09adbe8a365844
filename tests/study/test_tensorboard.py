"""Events for TensorBoard: what was measured, read back."""

import importlib.util
import struct

import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.results import metrics, plots, tensorboard
from qupeD_jax.study import methods, study
from qupeD_jax.study.errors import OutOfTime
from qupeD_jax.study.options import Options, replaced

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")

OPTIONS = replaced(
  Options(), models=("mlp",), clients=2, rounds=2, finetune_rounds=1, local_steps=1, batch_size=4,
  eval_every=1, seeds=2, tensorboard=True,
)  # fmt: skip
JOBS = (methods.federated_averaging, methods.local_training)  # the server's weights, a client's


def events(folder):
  """Reads the events of a folder, file after file, as TensorBoard does, without what was purged."""
  found = []
  for path in sorted(folder.glob("events.out.*"), key=lambda path: path.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])  # with a checksum of 4 bytes, as the event after it
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      if event.HasField("session_log"):
        found = [one for one in found if one.step < event.step]
      found.append(event)
      data = data[16 + length :]
  return [(event.step, value) for event in found for value in event.summary.value]


@pytest.fixture(scope="module")
def stopped_and_continued(tmp_path_factory):
  folder = tmp_path_factory.mktemp("results")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, "curves", lambda *_: None)
    with pytest.raises(OutOfTime):
      study.run("tiny", replaced(OPTIONS, out=str(folder), minutes=1e-9), JOBS)
    study.run("tiny", replaced(OPTIONS, out=str(folder)), JOBS)
  return folder


@pytest.mark.parametrize("method", ["FedAvg", "local"])
def test_events_are_the_rows_of_metrics_also_after_a_stop(stopped_and_continued, method):
  rows = [row for row in metrics.read_metrics(stopped_and_continued) if row["method"] == method]
  assert rows
  for seed in (0, 1):
    (folder,) = stopped_and_continued.glob(f"tensorboard/{method}/seed_{seed}")
    read = [(step, v.tag, v.simple_value) for step, v in events(folder) if not v.HasField("histo")]
    numbers = [
      (row["round"], name, value)
      for row in rows
      for name, value in row.items()
      if row["seed"] == seed and name not in ("method", "seed", "round")
    ]
    told = [(step, name, np.float32(value)) for step, name, value in numbers if value is not None]
    assert sorted(read) == sorted(told)


def test_histograms_count_a_models_weights_at_every_evaluation(stopped_and_continued):
  for run in ("FedAvg", "local"):
    (folder,) = stopped_and_continued.glob(f"tensorboard/{run}/seed_0")
    histograms = [(step, v.tag, v.histo.num) for step, v in events(folder) if v.HasField("histo")]
    kernels = [(step, num) for step, tag, num in histograms if tag == "dense_1/kernel"]
    assert [step for step, _ in kernels] == [1, 2]
    assert len({num for _, num in kernels}) == 1
    (folder,) = stopped_and_continued.glob(f"tensorboard/{run}/seed_1")
    assert not any(v.HasField("histo") for _, v in events(folder))


def test_pictures_are_those_of_the_folder(stopped_and_continued):
  pictures = {v.tag: v.image for _, v in events(stopped_and_continued / "tensorboard")}
  assert pictures.keys() == {path.stem for path in stopped_and_continued.glob("*.png")}
  assert "clients" in pictures
  drawn = (stopped_and_continued / "clients.png").read_bytes()
  assert struct.unpack(">II", drawn[16:24]) == (
    pictures["clients"].width,
    pictures["clients"].height,
  )


def test_without_the_package_nothing_is_begun(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(BadInput, match=r"^tensorboard True: needs tensorboardX"):
    study.run("tiny", replaced(OPTIONS, out=str(tmp_path / "out")), JOBS)
  assert not (tmp_path / "out").exists()


def test_nothing_is_written_unless_it_is_wanted(tmp_path):
  with tensorboard.opened(tmp_path, wanted=False) as board:
    board.rows([{"method": "a", "seed": 0, "round": 1, "loss": 1.0}])
    board.weights(1, lambda: pytest.fail("weights were fetched"))
    board.pictures()
  assert not any(tmp_path.iterdir())
