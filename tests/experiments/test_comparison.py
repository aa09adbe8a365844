"""The comparison: tuned hyperparameters, jobs, the search for them, and experiments end to end."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from experiments import (
  ablations,
  cifar10_bits_pareto,
  cifar10_mixed_bits,
  cifar10_mixed_models,
  warm_start,
)
from experiments.recipes import comparison, groups, tuned, tuning
from experiments.recipes.comparison import Comparison
from experiments.recipes.tuning import Tuning
from qupeD_jax.checks import BadInput
from qupeD_jax.engine import loop
from qupeD_jax.results import metrics
from qupeD_jax.study import federation as fed
from qupeD_jax.study import jobs, methods, study, training
from qupeD_jax.study.errors import Incomplete
from qupeD_jax.study.options import Hyperparameters, Options, replaced
from qupeD_jax.types import FedState
from tests import untrained as without_training

SMALL = {
  "dataset": "digits", "models": ("mlp2",), "clients": 6, "rounds": 4, "finetune_rounds": 1,
  "local_steps": 1, "batch_size": 4, "seeds": 2, "eval_every": 4, "inner_steps": 2,
}  # fmt: skip
OPTIONS = replaced(Options(), **SMALL, bits=(2, 1))
EVERY = (*comparison.ENTRIES, *comparison.MORE)
NAMES = [entry.name for entry in EVERY]


@pytest.fixture(scope="module")
def federation():
  return fed.load(OPTIONS)


@pytest.fixture
def values(tmp_path):
  """A file with hyperparameters for every method."""
  path = tmp_path / "values.toml"
  tuned.write(path, "digits_mlp2", {name: {"weights_rate": 0.2} for name in NAMES})
  return str(path)


# --- the methods


def test_every_method_gets_as_many_configurations():
  counts = {entry.name: len(comparison.configurations(entry.grid)) for entry in EVERY}
  assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("entry", EVERY, ids=NAMES)
def test_every_job_trains_for_all_rounds(entry, federation):
  """Shapes only: all phases follow on each other, and every phase's algorithm takes its state."""
  for make in {entry.make, entry.tune}:  # where they are one, once
    job = make(OPTIONS, federation)
    assert sum(phase.rounds for phase in job.phases) == OPTIONS.work.rounds
    assert study.round_traffic(job) >= 0
    bits = next(iter(job.variants.values())).bits
    cohorts = jax.tree.map(
      lambda leaf: leaf[0], fed.training(job.federation, bits, job.federation.groups)
    )
    state, key = None, jax.random.key(0)
    for phase in job.phases:
      step = functools.partial(one_round, phase)
      before, state, shown = jax.eval_shape(step, state, key, federation.train, cohorts)
      assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
      )
      assert "personal" in shown


def one_round(phase, trained, key, data, cohorts):
  """Returns the state before and after a phase's first round, and what is scored after it."""
  algorithm = phase.build(OPTIONS, trained)
  state = algorithm.init(key, data, cohorts)
  after, _ = algorithm.round(key, state, data, cohorts)
  shown = algorithm.personalize(key, after, data, cohorts)
  return state, after, {name: [m.variables for m in models] for name, models in shown.items()}


@pytest.mark.parametrize("entry", EVERY, ids=NAMES)
def test_the_tuned_variant_is_the_one_that_is_named(entry, federation):
  assert tuple(entry.tune(OPTIONS, federation).variants) == (entry.name,)
  assert entry.name in entry.make(OPTIONS, federation).variants
  known = {field.name for field in dataclasses.fields(Hyperparameters)}
  assert set(entry.grid) <= known


def test_all_that_is_compared_is_trained(federation):
  trained = [m for entry in EVERY for m in entry.make(OPTIONS, federation).variants]
  assert len(trained) == len(set(trained))
  for ours, rivals in comparison.pairs(OPTIONS.bits).items():
    assert {ours, *rivals} <= set(trained)
    bits = {ours.split()[-2]} - {"32"}
    assert all(set(name.split()) & bits or "bit" not in name for name in rivals if bits)


@pytest.mark.parametrize(
  "group", ["cifar10_cnn1", "mnist_cnn1", "cifar10_cnn3", "fashion_mnist_cnn3"]
)
def test_the_file_has_hyperparameters_for_every_method(group):
  values = tuned.read(tuned.FILE)
  for entry in comparison.ENTRIES:
    found = tuned.of(values, group, entry.name)
    for name, tried in entry.grid.items():
      chosen = found.get(name, tuned.DEFAULTS[name])
      assert any(chosen == pytest.approx(value) for value in tried), (entry.name, name)


def test_rivals_beyond_the_tables_are_trained_when_named_with_defaults_that_the_run_speaks_of(
  federation, values, monkeypatch, capsys
):
  made = []
  take = lambda name, tables, **how: made.extend(make(OPTIONS, federation) for make in tables[0][1])
  monkeypatch.setattr(study, "run_all", take)
  options = replaced(Comparison(), classes_per_client=(3,))
  assert not {entry.name for entry in comparison.chosen(())} & {e.name for e in comparison.MORE}
  comparison.run("table", replaced(options, only=("FedAvg", "SCAFFOLD")))
  assert capsys.readouterr().out == "SCAFFOLD: its hyperparameters are not tuned, but defaults\n"
  comparison.run(
    "table", replaced(options, only=("SCAFFOLD",), tuned=values, tuned_on="digits_mlp2")
  )
  assert capsys.readouterr().out == ""
  assert [made[i].options.hyper.weights_rate for i in (1, 2)] == [
    Hyperparameters().weights_rate,
    0.2,
  ]


# --- jobs


def test_variants_differ_in_what_they_change_alone(federation):
  make = jobs.changed(methods.local_training, {"slow": {"weights_rate": 1e-6}, "fast": {}})
  trained = train(make(OPTIONS, federation))
  job = methods.local_training(OPTIONS, federation)
  alone = train(job)
  runs = jax.tree.map(np.asarray, trained.state.clients[0].variables["params"]["head"]["kernel"])
  expected = np.asarray(alone.state.clients[0].variables["params"]["head"]["kernel"])
  np.testing.assert_allclose(runs[2:], expected, rtol=1e-5, atol=1e-6)
  assert np.abs(runs[:2] - expected).max() > 1e-3


def train(job):
  return training.train(job, lambda done, chunk: None)


def test_phases_follow_on_each_other(federation):
  """FedAvg + fine-tuning is FedAvg for the first rounds, then local training from its model."""
  job = methods.averaging_then_local(OPTIONS, federation)
  first = job._replace(phases=job.phases[:1])
  server = train(first).state.server
  still = replaced(OPTIONS, fedavg_finetune_rate=1e-9)
  (clients,) = train(job._replace(options=still)).state.clients
  for one, all_ in zip(
    jax.tree.leaves(server[0]["params"]), jax.tree.leaves(clients.variables["params"]), strict=True
  ):
    np.testing.assert_allclose(np.asarray(all_), np.asarray(one)[:, None] + np.zeros(all_.shape),
                               atol=1e-6)  # fmt: skip


def test_traffic_is_that_of_the_servers_that_there_are(federation):
  def bytes_of(job):
    return study.round_traffic(job)

  together = bytes_of(methods.federated_averaging(OPTIONS, federation))
  assert bytes_of(methods.averaging_then_local(OPTIONS, federation)) == together
  assert bytes_of(methods.local_training(OPTIONS, federation)) == 0
  two = fed.load(replaced(OPTIONS, models=("mlp2", "mlp"), bits=(2,)))
  half = len(two.groups[0])
  small, large = (
    bytes_of(methods.federated_averaging(OPTIONS, fed.of_server(two._replace(models=(m,)))))
    for m in two.models
  )
  apart = bytes_of(methods.averaging_then_local(OPTIONS, two))
  assert apart == small * half // 6 + large * (6 - half) // 6


# --- the file


def test_the_file_reads_as_it_was_written(tmp_path):
  path = tmp_path / "values.toml"
  tuned.write(path, "emnist/letters", {"QuPeD 2 bit": {"lambda_p": 0.25, "mu": 0.01}, "local": {}})
  assert tuned.read(path) == {"emnist/letters": {"QuPeD 2 bit": {"lambda_p": 0.25}, "local": {}}}


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("[digits", "damaged"),
    ('[digits."local"]\nrate = 1', r'\[digits."local"\] rate: allowed is'),
    ('[digits."local"]\nmu = "x"', "mu x: allowed is a number"),
    ("digits = 1", "allowed is"),
    ("[digits]\nlocal = 1", "allowed is"),
  ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text, line):
  path = tmp_path / "values.toml"
  path.write_text(text)
  with pytest.raises(BadInput, match=line) as refused:
    tuned.read(path)
  assert "\n" not in str(refused.value)


def test_a_missing_file_or_method_is_refused(tmp_path):
  with pytest.raises(BadInput, match=r"values\.toml"):
    tuned.read(tmp_path / "values.toml")
  with pytest.raises(BadInput, match=r'no \[digits."FedAvg"\]'):
    tuned.of({"digits": {"local": {}}}, "digits", "FedAvg")


# --- the search


def test_the_search_takes_the_best_on_validation_rows_and_never_tests(tmp_path, monkeypatch):
  def tested(*_, **__):
    raise AssertionError("test rows were looked at")

  monkeypatch.setattr(loop, "score", tested)
  monkeypatch.setattr(fed, "testing", tested)
  first, second = comparison.chosen(("local", "FedProx"))
  second = second._replace(grid=second.grid | {"weights_rate": (0.05,)})  # not tried, but set
  monkeypatch.setattr(comparison, "ENTRIES", (first, second))
  options = replaced(Tuning(), **SMALL, out=str(tmp_path), only=("local", "FedProx"))
  folder, _ = tuning.run("search", options)
  rows = metrics.read_metrics(folder)
  last = {}
  for row in rows:
    if row["round"] == options.work.rounds:
      last.setdefault(row["method"], []).append(row["accuracy"])
  assert len(last) == 8
  values = tuned.read(folder / "tuned.toml")["digits_mlp2"]
  for entry in comparison.chosen(options.only):
    scores = [np.mean(last[f"{entry.name} #{i}"]) for i in range(4)]
    winner = comparison.configurations(entry.grid)[int(np.argmax(scores))]
    for name, value in winner.items():
      assert values[entry.name].get(name, tuned.DEFAULTS[name]) == pytest.approx(value)
  table = (folder / "tuning.md").read_text("utf-8")
  assert table.count("yes") == 2


def test_a_configuration_that_diverges_is_left_out(tmp_path, monkeypatch, capsys):
  grid = {"weights_rate": (0.1, 1e30)}
  entry = comparison.ENTRIES[0]._replace(grid=grid)
  monkeypatch.setattr(comparison, "ENTRIES", (entry,))
  folder, _ = tuning.run("search", replaced(Tuning(), **SMALL, out=str(tmp_path)))
  assert "left out: local #1" in " ".join(capsys.readouterr().out.split())
  assert tuned.read(folder / "tuned.toml") == {"digits_mlp2": {"local": {}}}  # 0.1 is the default
  assert "diverged" in (folder / "tuning.md").read_text("utf-8").splitlines()[-1]


def test_a_search_that_crashed_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
  second = comparison.ENTRIES[0]._replace(grid={"weights_rate": (0.1, 1e30, 0.2)})
  first = second._replace(name="same", grid={"weights_rate": (0.1, 0.2)})
  monkeypatch.setattr(comparison, "ENTRIES", (first, second))
  options = replaced(Tuning(), **SMALL, checkpoint_every=1, out=str(tmp_path / "crashed"))
  whole, _ = tuning.run("search", replaced(options, out=str(tmp_path / "whole")))
  with monkeypatch.context() as patch:
    # 4 chunks of the first; 1 of the second until #1 diverges, 2 of 4 when it trains anew.
    chunks = iter(range(6))
    advance = lambda *_: next(chunks)
    patch.setattr(tuning.Bar, "advance", advance)
    with pytest.raises(StopIteration):
      tuning.run("search", options)
  capsys.readouterr()
  trained, train = [], training.train
  count = lambda job, *rest: trained.append(list(job.variants)) or train(job, *rest)
  monkeypatch.setattr(training, "train", count)
  folder, _ = tuning.run("search", options)
  assert trained == [["local #0", "local #2"]]
  for name in ("metrics.jsonl", "tuned.toml", "tuning.md", "tuning.json"):
    assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
  assert "goes on" in capsys.readouterr().out
  tuning.run("search", options)
  assert "finished already" in capsys.readouterr().out
  assert len(trained) == 1


def test_a_search_whose_rows_went_is_made_again_or_missed(tmp_path, monkeypatch):
  entry = comparison.ENTRIES[0]._replace(grid={"weights_rate": (0.1, 0.2)})
  monkeypatch.setattr(comparison, "ENTRIES", (entry,))
  options = replaced(Tuning(), **SMALL, out=str(tmp_path))

  def train(job, record, saves, folder):
    del record
    saves.cut_back(0)
    every = itertools.product(training.methods_of_runs(job), range(options.work.rounds))
    row = {"loss": 1.0, "dropped": 0, "accuracy": 0.5}
    metrics.append_metrics(
      folder, [row | {"method": m, "seed": seed, "round": done + 1} for (m, seed), done in every]
    )

  monkeypatch.setattr(training, "train", train)
  tuning.run("search", options)
  whole = (tmp_path / "metrics.jsonl").read_bytes()
  (tmp_path / "metrics.jsonl").write_bytes(b"")
  tuning.run("search", options)
  assert (tmp_path / "metrics.jsonl").read_bytes() == whole
  monkeypatch.setattr(tuning, "_write_table", lambda *_: None)
  with pytest.raises(Incomplete, match=r"are tuning\.md; "):
    tuning.run("search", replaced(options, fresh=True))


def test_an_unknown_method_is_refused():
  with pytest.raises(BadInput, match="only 'fedavg': allowed is 'local'"):
    comparison.chosen(("fedavg",))


# --- experiments from end to end


@pytest.fixture
def untrained(monkeypatch, no_pictures):
  """Lets studies go through all but the training, and the pictures that every study draws."""
  monkeypatch.setattr(study, "run_job", without_training.run_job)


def test_a_table_for_every_number_of_classes(untrained, tmp_path, values):
  own = {"classes_per_client": (2, 3), "only": ("local", "QuPeD 32 bit"), "rounds": 1}
  own["finetune_rounds"] = 0
  changes = SMALL | own
  options = replaced(Comparison(), **changes, tuned=values, out=str(tmp_path))
  comparison.run("table", options)
  for count in (2, 3):
    folder = tmp_path / f"{count}_classes"
    assert set(metrics.read_summary(folder)) == {"local", "QuPeD 32 bit"}
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["config"]["classes_per_client"] == count
    compared, _ = metrics.read_comparisons(folder)
    assert list(compared["QuPeD 32 bit"]) == ["local"]
    found = metrics.read_accuracies(folder)
    difference = np.mean(found["QuPeD 32 bit"]["accuracy"] - found["local"]["accuracy"])
    assert compared["QuPeD 32 bit"]["local"].difference == pytest.approx(difference)


def test_parts_are_taken_over_and_not_trained_again(untrained, tmp_path, values, monkeypatch):
  def table(folder, only=(), parts=()):
    own = SMALL | {"classes_per_client": (3,), "only": only, "parts": parts}
    comparison.run("table", replaced(Comparison(), **own, tuned=values, out=str(tmp_path / folder)))
    return tmp_path / folder

  entries = tuple(e for e in comparison.ENTRIES if e.name in ("local", "FedAvg", "QuPeD 32 bit"))
  monkeypatch.setattr(comparison, "ENTRIES", entries)
  first, second = table("first", ("QuPeD 32 bit", "local")), table("second", ("FedAvg",))
  monkeypatch.setattr(study, "run_job", None)
  both = table("both", parts=(str(first), str(second)))
  expected = metrics.read_summary(first) | metrics.read_summary(second)
  assert metrics.read_summary(both) == expected
  assert list(metrics.read_summary(both)) == ["local", "FedAvg", "QuPeD 32 bit"]
  compared, _ = metrics.read_comparisons(both)
  assert list(compared["QuPeD 32 bit"]) == ["local", "FedAvg"]
  assert {row["method"] for row in metrics.read_metrics(both)} == set(expected)


def test_results_without_all_of_their_rows_are_trained_again_and_not_taken_over(
  untrained, tmp_path, values
):
  own = SMALL | {"classes_per_client": (3,), "only": ("local",)}
  options = replaced(Comparison(), **own, tuned=values, out=str(tmp_path / "one"))
  rows = tmp_path / "one" / "metrics.jsonl"
  comparison.run("table", options)
  whole = rows.read_bytes()
  rows.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))
  other = replaced(options, out=str(tmp_path / "two"), parts=(str(tmp_path / "one"),))
  with pytest.raises(BadInput, match=r"parts .*one: 1 of 8 rows of local are missing there"):
    comparison.run("table", other)
  comparison.run("table", options)
  assert sorted(rows.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_models_that_went_while_a_run_was_at_work_are_missed(
  untrained, tmp_path, values, monkeypatch
):
  own = SMALL | {"classes_per_client": (3,), "only": ("local", "FedAvg")}
  model, run_job = tmp_path / "models" / "local" / "client_0000.safetensors", study.run_job

  def then_lost(job, *rest):
    if "local" in job.variants:
      model.parent.mkdir(parents=True)
      model.touch()
    else:
      model.unlink()
    return run_job(job, *rest)

  monkeypatch.setattr(study, "run_job", then_lost)
  with pytest.raises(Incomplete, match=r"are models/local/client_0000\.safetensors; "):
    comparison.run("table", replaced(Comparison(), **own, tuned=values, out=str(tmp_path)))


def test_a_table_has_the_precisions_that_are_asked_for(untrained, tmp_path, values):
  """And takes over, of a table of more of them, those that it has."""

  def table(folder, bits, parts=()):
    only = ("FedAvg + fine-tuning", "QuPeD 2 bit", "QuPeD 32 bit")
    own = SMALL | {"classes_per_client": (3,), "bits": bits, "only": only, "parts": parts}
    comparison.run("table", replaced(Comparison(), **own, tuned=values, out=str(tmp_path / folder)))
    return metrics.read_summary(tmp_path / folder)

  both, one = table("both", (3, 1)), table("one", (3,), (str(tmp_path / "both"),))
  assert [*one] == [
    "FedAvg + fine-tuning", "FedAvg + k-means 3 bit", "QuPeD 3 bit", "QuPeD 32 bit"
  ]  # fmt: skip
  assert set(both) == {*one, "FedAvg + k-means 1 bit", "QuPeD 1 bit"}
  assert all(one[method] == both[method] for method in one)
  compared, _ = metrics.read_comparisons(tmp_path / "one")
  assert [*compared["QuPeD 3 bit"]] == ["FedAvg + k-means 3 bit"]


@pytest.mark.parametrize("bits", [(2, 32), (0,), (9,)])
def test_a_table_has_quantised_models_of_1_to_8_bits(bits):
  with pytest.raises(BadInput, match=f"bits {bits[-1]}: allowed is a whole number") as refused:
    comparison.run("table", replaced(Comparison(), **SMALL, bits=bits))
  assert refused.value.name == "bits"


def test_parts_of_another_experiment_are_refused(untrained, tmp_path, values):
  own = SMALL | {"classes_per_client": (3,), "only": ("local",)}
  first = replaced(Comparison(), **own, tuned=values, out=str(tmp_path / "first"))
  comparison.run("table", first)
  other = {"out": str(tmp_path / "other"), "parts": (str(tmp_path / "first"),), "batch_size": 5}
  with pytest.raises(BadInput, match="first: made with `batch_size` 4; allowed is 5, as here"):
    comparison.run("table", replaced(first, **other))


def options_of(experiment, folder, values, **changes):
  own = SMALL | {"tuned": values, "out": str(folder)} | changes
  return replaced(experiment.DEFAULTS, **own)


def test_mixed_bits(untrained, tmp_path, values):
  cifar10_mixed_bits.main(options_of(cifar10_mixed_bits, tmp_path, values))
  table = (tmp_path / "groups.md").read_text("utf-8")
  assert [table.count(f"| {b} bit ") for b in (1, 2, 32)] == [4, 4, 4]


def test_mixed_models(untrained, tmp_path, values):
  models = {"models": ("mlp2", "mlp")}
  cifar10_mixed_models.main(options_of(cifar10_mixed_models, tmp_path, values, **models))
  table = (tmp_path / "groups.md").read_text("utf-8")
  assert [table.count(f"| {name} ") for name in models["models"]] == [8, 8]


def test_pareto(untrained, tmp_path, values):
  few = {"bits": (1, 3)}
  cifar10_bits_pareto.main(options_of(cifar10_bits_pareto, tmp_path, values, **few))
  assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
  assert len(metrics.read_summary(tmp_path)) == 6


def test_ablations(untrained, tmp_path, values):
  topics = {"topics": ("centers", "local_steps", "data"), "rounds": 8, "finetune_rounds": 2}
  topics["local_steps"] = 5
  ablations.main(options_of(ablations, tmp_path, values, **topics))
  found = {path.parent.name: metrics.read_summary(path.parent)
           for path in tmp_path.glob("*/summary.json")}  # fmt: skip
  assert set(found) == {"centers", "local_steps", "data_10", "data_30", "data_100"}
  assert list(found["centers"]) == ["learned centers", "fixed centers"]
  assert list(found["local_steps"]) == [f"{n} local steps" for n in (5, 10, 20)]
  for topic, (ours, rival) in {
    "centers": ("fixed centers", "learned centers"),
    "data_10": ("QuPeD 2 bit", "local 2 bit"),
  }.items():
    comparisons, _ = metrics.read_comparisons(tmp_path / topic)
    assert {name: list(rivals) for name, rivals in comparisons.items()} == {ours: [rival]}


def test_warm_start(untrained, tmp_path, values):
  warm_start.main(options_of(warm_start, tmp_path, values, shares=(0.0, 0.5)))
  assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
  finetuned, *others = metrics.read_summary(tmp_path)
  begun = [f"{who} after {share} FedAvg" for share in ("0%", "50%") for who in warm_start.TEACHERS]
  assert (finetuned, others) == ("FedAvg + fine-tuning", begun)
  comparisons, _ = metrics.read_comparisons(tmp_path)
  assert list(comparisons["lambda_p 0.4 after 50% FedAvg"]) == ["alone after 50% FedAvg", finetuned]
  assert list(comparisons["alone after 0% FedAvg"]) == [finetuned]


@pytest.mark.parametrize(
  ("share", "rounds", "phases"),
  [(0.8, 20, [16, 2, 2]), (0.6, 20, [12, 4, 4]), (0.0, 20, [16, 4]), (0.8, 3, [1, 1, 1])],
)
def test_after_averaging_models_are_frozen_for_at_most_half_of_what_is_left(
  federation, share, rounds, phases
):
  options = replaced(
    OPTIONS, averaging_share=share, rounds=rounds, finetune_rounds=rounds // 5 or 1
  )
  for make in (methods.quped_from_averaging, methods.averaging_then_quantised):
    assert [phase.rounds for phase in make(options, federation, bits=(2,)).phases] == phases


def test_averaging_what_starts_from_it_and_fine_tuning_take_a_round_each(federation):
  two = replaced(OPTIONS, rounds=2, finetune_rounds=1)
  with pytest.raises(BadInput, match="rounds 2: allowed is above 2"):
    methods.quped_from_averaging(two, federation, bits=(2,))
  cold = methods.quped_from_averaging(replaced(two, averaging_share=0.0), federation, bits=(2,))
  assert [phase.rounds for phase in cold.phases] == [1, 1]


@pytest.mark.parametrize("make", [methods.quped_from_averaging, methods.averaging_then_quantised])
def test_what_starts_from_averaging_starts_from_drawn_weights_without_it(federation, make):
  job = make(replaced(OPTIONS, averaging_share=0.0), federation, bits=(2,))
  assert [phase.rounds for phase in job.phases] == [3, 1]
  (variant,) = job.variants.values()
  rows = fed.training(federation, variant.bits, federation.groups)
  rows, key = jax.tree.map(lambda leaf: leaf[0], rows), jax.random.key(0)
  drawn = job.phases[0].build(OPTIONS, None).init(key, federation.train, rows)
  averaged = FedState((federation.models[0].init(jax.random.key(1)),), (), 0)
  started = job.phases[0].build(OPTIONS, averaged).init(key, federation.train, rows)
  first = lambda state: jax.tree.leaves(state.clients[0].variables["params"])[0]
  assert np.any(first(drawn) != first(started))


def test_other_local_steps_are_as_many_in_all(federation, values):
  options = options_of(ablations, None, values, rounds=8, finetune_rounds=2, local_steps=5)
  jobs_ = [make(options, federation) for make in ablations.local_steps(options)]
  assert [job.options.work.local_steps for job in jobs_] == [5, 10, 20]
  assert [[phase.rounds for phase in job.phases] for job in jobs_] == [[6, 2], [3, 1], [2]]


def test_groups_compare_their_own_clients(tmp_path):
  scores = {"local": [[0.5, 0.25, 0.0]], "QuPeD": [[0.75, 0.5, 1.0]]}
  entries = {name: {"seeds": [0], "accuracy": rows} for name, rows in scores.items()}
  metrics.write_accuracies(tmp_path, entries)
  groups.write(tmp_path, {"low": np.array([0, 1]), "high": np.array([2])}, ("local",))
  rows = [line.split("|")[1:-1] for line in (tmp_path / "groups.md").read_text().splitlines()[2:]]
  cells = [tuple(cell.strip() for cell in row) for row in rows]
  assert cells == [
    ("low", "local", "37.5", ""),
    ("low", "QuPeD", "62.5", "+25.0 one seed; clients ± 0.0"),
    ("high", "local", "0.0", ""),
    ("high", "QuPeD", "100.0", "+100.0 one seed"),
  ]


def test_own_statistics_wrap_what_is_scored(federation, monkeypatch):
  wrapped = []
  monkeypatch.setattr(training, "with_own_statistics", lambda a: wrapped.append(a) or a)
  (phase,) = methods.federated_averaging(OPTIONS, federation).phases
  for on in (False, True):
    training._build(replaced(OPTIONS, own_statistics=on), phase, ({}, None))
    assert len(wrapped) == on
