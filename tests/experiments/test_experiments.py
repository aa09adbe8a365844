"""Experiments from end to end, very small: what lies in the results folder, and how runs end."""

import functools
import io
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import rich.text

from experiments import quickstart
from qupeD_jax import models
from qupeD_jax.checks import BadInput
from qupeD_jax.data import ragged, sources
from qupeD_jax.engine import loop
from qupeD_jax.io import packing, predict
from qupeD_jax.results import metrics
from qupeD_jax.study import cli, example, methods, study
from qupeD_jax.study import federation as fed
from qupeD_jax.study.durability.progress import Bar
from qupeD_jax.study.options import flat, replaced

OPTIONS = replaced(
  quickstart.DEFAULTS,
  clients=8,
  models=("mlp", "mlp2"),
  bits=(1, 2, 32),
  rounds=3,
  finetune_rounds=0,
  local_steps=2,
  eval_every=2,
  seeds=2,
)
SMALLER = replaced(OPTIONS, models=("mlp",), rounds=2, seeds=1)
TYPED = ("--clients", "8", "--models", "mlp", "--rounds", "4", "--finetune-rounds", "1")
TYPED += ("--local-steps", "1", "--eval-every", "1", "--seed", "5", "--seeds", "1")
JOBS = (
  functools.partial(methods.quped_quantised, bits=(2,), mixed=True),
  methods.federated_averaging,
)
METHODS = ("QuPeD 2 bit", "QuPeD mixed", "FedAvg")
COSTS = {"bits", "bytes_per_model", "bytes_per_round", "flops_per_example", "seconds"}


def run(folder, options=OPTIONS, jobs=JOBS):
  return study.run("tiny", replaced(options, out=str(folder)), jobs).folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  return run(tmp_path_factory.mktemp("results") / "of" / "tiny")


def read(path):
  """Parses strict JSON."""
  return json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)


def rebuilt(config):
  """Makes Options of a config.json."""
  as_tuple = lambda value: tuple(value) if isinstance(value, list) else value
  values = {name: as_tuple(config["config"][name]) for name in flat(OPTIONS)}
  return replaced(quickstart.DEFAULTS, **values)


# --- what a run leaves


def test_the_folder_holds_what_was_promised(results):
  names = {path.name for path in results.iterdir()}
  files = {"config.json", "metrics.jsonl", "accuracies.json", "summary.json", "table.md"}
  pictures = {"curves.png", "clients.png", "weights.png", "centers.png"}
  assert names == files | pictures | {"models"}
  for name in pictures:
    assert (results / name).read_bytes().startswith(b"\x89PNG")


def test_the_config_tells_options_seeds_and_versions(results):
  config = read(results / "config.json")
  assert rebuilt(config) == replaced(OPTIONS, out=str(results))
  assert config["config"]["experiment"] == "tiny"
  assert config["config"]["seed_list"] == [0, 1]
  assert {"qupeD_jax", "jax", "python"} <= set(config["environment"])


@pytest.mark.usefixtures("no_pictures")
def test_a_config_runs_again_to_the_last_bit(results, tmp_path):
  """One method of three, and by itself."""
  again = run(tmp_path, rebuilt(read(results / "config.json")), JOBS[1:])
  ours = lambda folder: [row for row in metrics.read_metrics(folder) if row["method"] == "FedAvg"]
  assert ours(again) == ours(results) != []
  accuracies = (metrics.read_accuracies(path)["FedAvg"]["accuracy"] for path in (again, results))
  np.testing.assert_array_equal(*accuracies)


def test_there_is_one_row_a_method_seed_and_round(results):
  lines = (results / "metrics.jsonl").read_text("utf-8").splitlines()
  rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
  found = sorted((row["method"], row["seed"], row["round"]) for row in rows)
  assert found == sorted((m, s, r) for m in METHODS for s in (0, 1) for r in (1, 2, 3))
  for row in rows:
    counts = {"clients", "dropped"}
    assert set(row) == {"method", "seed", "round", "loss", "accuracy", "global_accuracy"} | counts
    assert row["loss"] > 0
    evaluated = row["round"] >= 2  # after two rounds, and at the end
    assert (row["accuracy"] is not None) == evaluated
    assert (row["global_accuracy"] is not None) == evaluated


def test_the_summary_has_the_promised_form(results):
  summary = read(results / "summary.json")
  assert set(summary) == {"methods"}
  assert tuple(summary["methods"]) == METHODS
  for entry in summary["methods"].values():
    assert set(entry) == {"accuracy", "unquantised_accuracy", "global_accuracy"} | COSTS
    accuracy = entry["accuracy"]
    assert set(accuracy) == {"mean", "std", "worst_decile", "per_seed"}
    assert len(accuracy["per_seed"]) == 2
    assert accuracy["mean"] == pytest.approx(np.mean(accuracy["per_seed"]))
    assert accuracy["std"] == pytest.approx(np.std(accuracy["per_seed"], ddof=1))
    assert 0 <= accuracy["worst_decile"] <= accuracy["mean"] <= 1
    assert 0 <= entry["global_accuracy"] <= 1
    assert entry["seconds"] > 0
  assert [summary["methods"][m]["bits"] for m in METHODS] == [[2], [1, 2, 32], [32]]


def test_the_table_has_a_line_for_each_method(results):
  lines = (results / "table.md").read_text("utf-8").splitlines()
  assert [line.split("|")[1].strip() for line in lines[2:]] == list(METHODS)


# --- the models it ships


def test_a_clients_model_is_set_out_with_images_and_a_command_that_predicts(
  results, tmp_path, capsys
):
  shutil.copytree(results / "models", tmp_path / "models")
  *_, model, images = example.ship(tmp_path, OPTIONS, client=0).split()
  assert predict.main([model, images, "--json"]) == 0
  said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  named = [re.search(r"test_(\d+)_of_class_(\d)\.png$", one["image"]).groups() for one in said]
  test = dealt().test
  assert 0 < len(named) == len(list((tmp_path / "example").glob("*.png")))
  assert all(int(test.y[int(row)]) == int(label) for row, label in named)


def shipped(results, method):
  """Yields client, its packed model and its metadata."""
  folder = results / "models" / method.replace(" ", "_")
  files = sorted(folder.iterdir())
  assert [file.name for file in files] == [f"client_{k:04d}.safetensors" for k in range(8)]
  yield from ((k, *packing.load(file)) for k, file in enumerate(files))


@functools.cache
def dealt():
  """Returns the data as dealt to the clients; the same in every run."""
  return fed.load(OPTIONS)


def accuracy_of_shipped(packed, name, client):
  """Scores a shipped model on a client's test rows of the first seed."""
  train, test = dealt().train, dealt().test
  mean, std = sources.statistics(train)
  model = models.make(name, 10, test.x.shape[1:], mean=mean, std=std)
  rows = dealt().splits[0].test
  rows = rows.rows[rows.offsets[client] : rows.offsets[client + 1]]
  logits, _ = model.apply(packing.unpack(packed), jnp.asarray(test.x[rows]), False)
  return np.mean(np.argmax(logits, axis=-1) == test.y[rows]), len(rows)


@pytest.mark.parametrize("method", ["QuPeD 2 bit", "QuPeD mixed"])
def test_shipped_models_score_what_the_summary_says(results, method):
  scored = [
    accuracy_of_shipped(packed, metadata["model"], client)
    for client, packed, metadata in shipped(results, method)
  ]
  accuracy, rows = np.transpose(scored)
  reported = metrics.read_summary(results)[method]["accuracy"]["per_seed"][0]
  # Another program rounds otherwise: one example of one client may lie on the boundary.
  assert np.mean(accuracy) == pytest.approx(reported, abs=1.01 / rows.min() / len(rows))


def test_shipped_models_have_the_precision_they_say(results):
  dealt_bits = [1, 2, 32, 1, 2, 32, 1, 2]
  for client, packed, metadata in shipped(results, "QuPeD mixed"):
    bits = dealt_bits[client]
    assert metadata["client"] == client
    assert metadata["bits"] == bits
    assert {len(centers) for centers in packed.centers.values()} == ({2**bits} - {2**32})
    assert metadata["model"] == ("mlp", "mlp2")[client // 3 % 2]


# --- other federations


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
  "changes",
  [
    {"partition": "dirichlet", "alpha": 0.3, "partial_batches": True, "batch_size": 64},
    {"participation": 0.5},
  ],
  ids=lambda changes: "-".join(changes),
)
def test_another_federation_trains(tmp_path, changes):
  folder = run(tmp_path, replaced(SMALLER, **changes), [methods.federated_averaging])
  rows = metrics.read_metrics(folder)
  assert [row["round"] for row in rows] == [1, 2]
  assert all(np.isfinite(row["loss"]) for row in rows)
  entry = metrics.read_summary(folder)["FedAvg"]
  assert 0 < entry["accuracy"]["mean"] <= 1
  up_and_down = 2 * entry["bytes_per_model"]
  assert entry["bytes_per_round"] == up_and_down * 8 * changes.get("participation", 1)


@pytest.mark.usefixtures("no_pictures")
def test_where_clients_lie_changes_nothing_but_the_place(tmp_path):
  """FedAvg of half the clients, once for two methods, then all of them alone."""
  written = []
  for store in ("device", "disk"):
    options = replaced(SMALLER, participation=0.5, finetune_rounds=1, store=store)
    job = functools.partial(methods.averaging_then_local, bits=(2,))
    folder = run(tmp_path / store, options, [job])
    written.append([(folder / name).read_bytes() for name in ("metrics.jsonl", "accuracies.json")])
  assert written[0] == written[1]
  assert {p.name for p in folder.iterdir()} <= {
    "config.json", "metrics.jsonl", "accuracies.json", "summary.json", "table.md", "curves.png",
    "clients.png", "models",
  }  # fmt: skip


def test_partitions_deal_differently():
  classes = {}
  for partition in ("by_class", "dirichlet", "iid"):
    options = replaced(SMALLER, partition=partition, alpha=0.3, batch_size=1)
    classes[partition] = (study.held_classes(fed.load(options)) > 0).sum(axis=1)
  assert set(classes["by_class"]) == {3}
  assert set(classes["iid"]) == {10}
  assert len(set(classes["dirichlet"])) > 1


def test_partial_batches_let_a_small_client_in():
  options = replaced(SMALLER, partition="dirichlet", alpha=0.3, batch_size=64)
  with pytest.raises(BadInput, match="batch_size 64"):
    fed.load(options)
  admitted = fed.load(replaced(options, partial_batches=True))
  assert ragged.sizes(admitted.splits[0].train).min() < 64


def test_two_methods_of_one_name_are_refused(tmp_path):
  jobs = (
    functools.partial(methods.quped_quantised, bits=(32,)),
    functools.partial(methods.quped_quantised, mixed=True),
  )
  with pytest.raises(BadInput, match=r"^bits"):
    run(tmp_path, replaced(SMALLER, bits=(32,)), jobs)


ROWS = [{"loss": 1.5, "accuracy": None}, {"loss": 12.5, "accuracy": 0.987}]


def test_the_bar_shows_the_numbers_in_80_columns():
  console = rich.console.Console(width=80, file=io.StringIO(), force_terminal=True)
  with Bar(360, console) as bar:
    bar.start("QuPeD 2 bit, QuPeD 1 bit, QuPeD mixed", before=100)
    bar.advance(5, ROWS, done=20)  # 15 rounds were done by an earlier start
  shown = rich.text.Text.from_ansi(console.file.getvalue()).plain
  assert re.search(
    r"QuPeD 2 bit.* 120/360 loss 12\.500  accuracy 98\.7 % [-\d]:[-\d]+:[-\d]+", shown
  )


def test_where_there_is_no_terminal_every_evaluation_is_a_line():
  console = rich.console.Console(width=20, file=io.StringIO())
  with Bar(360, console) as bar:
    bar.start("FedAvg [/x]", before=100)
    bar.advance(5, ROWS, done=20)
    bar.advance(1, ROWS[:1], done=21)
    bar.advance(5, ROWS, done=26)
  first, second = console.file.getvalue().splitlines()
  assert first == "FedAvg [/x]: round 20, loss 12.500, accuracy 98.7 %; 120 of 360"
  assert re.fullmatch(r"FedAvg .*: round 26, .* %; 126 of 360, \d+:\d\d:\d\d left", second)


# --- how a run ends before its end


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
  """Returns a function: arguments -> exit code, the line on stderr, the folder."""
  monkeypatch.setattr(quickstart, "JOBS", (methods.local_training,))

  def command(*arguments):
    code = cli.main(["quickstart", *TYPED, "--out", str(tmp_path), *arguments])
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: .+\n", line)
    return code, line, tmp_path

  return command


def test_a_run_that_diverges_says_where_and_leaves_what_was_written(command):
  # The first round's only loss is that of the initial weights.
  code, line, folder = command("--weights-rate", "1e30", "--models", "mlp", "mlp2")
  assert code == 1
  clients = r"\[0, 1, 2, 3, 4, 5, 6, 7\]"
  where = rf"local, seed 5, round 2: the loss.* of clients {clients} is not finite"
  assert re.match("error: " + where, line)
  assert [row["round"] for row in metrics.read_metrics(folder)] == [1]
  assert read(folder / "config.json")["config"]["weights_rate"] == 1e30


def test_a_model_that_its_last_step_breaks_is_not_shipped(command, monkeypatch):
  monkeypatch.setattr(quickstart, "JOBS", (functools.partial(methods.local_quantised, bits=(2,)),))
  once = ("--rounds", "1", "--finetune-rounds", "0")
  code, line, folder = command("--weights-rate", "1e30", *once)
  assert code == 1
  assert line.startswith("error: local 2 bit, seed 5, round 1: ")
  assert not (folder / "models").exists()


def test_a_run_that_is_interrupted_leaves_what_was_written(command, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(Bar, "advance", interrupted)
  code, line, folder = command()
  assert code == 130
  assert "interrupted" in line
  assert [row["round"] for row in metrics.read_metrics(folder)] == [1]
  assert read(folder / "config.json")["config"]["seed"] == 5


def test_a_new_run_does_not_stand_beside_results_of_the_last(results, command, monkeypatch):
  folder = shutil.copytree(results, results.parent / "copy")

  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, "run", interrupted)
  command("--out", str(folder))
  left = {path.name for path in folder.rglob("*") if path.is_file()}
  assert left == {"config.json", "metrics.jsonl", "clients.png"}
