"""Algorithm 1 on one machine: its quantisers, its schedules, its start, and what it leaves."""

import functools

import chex
import jax
import numpy as np
import pytest

from experiments import cifar10_resnet20_table
from experiments.recipes import central
from qupeD_jax.algorithms.local import local
from qupeD_jax.checks import BadInput
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.io import import_torch
from qupeD_jax.quantization import ops, quantizers
from qupeD_jax.results import metrics
from qupeD_jax.study import federation as fed
from qupeD_jax.study import folders, study, training
from qupeD_jax.study.options import replaced

SMALL = {
  "dataset": "digits", "models": ("mlp2",), "dtype": "float32", "bits": (2,), "rounds": 3,
  "finetune_rounds": 1, "local_steps": 2, "batch_size": 16, "eval_every": 1, "seeds": 1,
  "augment": False, "measured_rows": 0,
}  # fmt: skip
OPTIONS = replaced(cifar10_resnet20_table.DEFAULTS, **SMALL)
KEY = jax.random.key(5)


@functools.cache
def federation():
  return fed.load(OPTIONS)


def job_of(method, **changes):
  return central._job(method, replaced(OPTIONS, **changes), federation())


def cohorts_of(job):
  (bits,) = (variant.bits for variant in job.variants.values())
  cohorts = fed.training(federation(), bits, federation().groups)
  return jax.tree.map(lambda leaf: leaf[0], cohorts)


def trained(job):
  """Trains one round of each phase; returns the last state, and what the first phase measures."""

  @jax.jit
  def run(data, cohorts):
    state, measured = None, {}
    for phase in job.phases:
      algorithm = phase.build(job.options, state)
      state, _ = algorithm.round(KEY, algorithm.init(KEY, data, cohorts), data, cohorts)
      for name, measure in phase.measures.items():
        measured[name] = measure(job.options, state, data, cohorts)
    return state, measured

  return run(federation().train, cohorts_of(job))


# --- quantisers


@pytest.mark.parametrize("method", central.QUANTIZERS)
def test_every_quantiser_trains_a_model_of_few_values(method):
  job = job_of(method)
  assert list(job.variants) == [f"{method} 2 bit"]
  assert [phase.rounds for phase in job.phases] == [2, 1]
  state, measured = trained(job)
  (personal,) = state.clients
  params = ops.flatten(personal.variables["params"])
  for path, tensor in params.items():
    assert np.isfinite(tensor).all()
    if ops.is_quantised(path):
      assert 2 <= len(np.unique(tensor)) <= 4
  assert personal.codebooks.keys() == {path for path in params if ops.is_quantised(path)}
  assert not measured


def test_full_precision_is_trained_to_the_end():
  job = job_of("full precision")
  assert [phase.rounds for phase in job.phases] == [3]
  assert not trained(job)[0].clients[0].codebooks


def test_the_gradient_mapping_is_measured_along_training_alone():
  for method in ("full precision", "Algorithm 1"):
    first, *rest = job_of(method, measured_rows=20).phases
    assert list(first.measures) == ["gradient_mapping"]
    assert not any(phase.measures for phase in rest)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_algorithm_1_is_local_training_of_one_client(share):
  plain = {"finetune_rounds": 0, "momentum": 0.0, "weight_decay": 0.0, "straight_through": share}
  options, job = replaced(OPTIONS, **plain), job_of("Algorithm 1", **plain)
  quantizer = quantizers.learned_codebook(max_bits=2, clip=10.0, clip_weights=1.0)
  alone = local(
    federation().models,
    quantizer,
    rates=central.rates(options),
    straight_through=share,
    work=LocalWork(steps=2, batch_size=16),
  )

  @jax.jit
  def run(data, cohorts):
    state = alone.init(KEY, data, cohorts)
    return alone.round(KEY, state, data, cohorts)[0]

  expected = run(federation().train, cohorts_of(job)).clients[0]
  found = trained(job)[0].clients[0]
  assert federation().num_clients == 1
  chex.assert_trees_all_close(found.variables, expected.variables, rtol=1e-6, atol=1e-7)
  chex.assert_trees_all_close(found.codebooks, expected.codebooks, rtol=1e-6)


# --- schedules

LONG = replaced(OPTIONS, rounds=250, local_steps=4)  # an epoch is 4 steps
STEPS = np.arange(LONG.work.rounds * LONG.work.local_steps)


def over_steps(schedule):
  return np.asarray(jax.vmap(schedule)(STEPS))


@pytest.mark.parametrize(("name", "epochs"), [("weights", (100, 150)), ("centers", (80, 140))])
def test_rates_fall_to_a_tenth_twice(name, epochs):
  first = getattr(LONG.hyper, f"{name}_rate")
  falls = np.searchsorted(np.multiply(4, epochs), STEPS, side="right")
  rate = over_steps(getattr(central.rates(LONG), name))
  np.testing.assert_allclose(rate, first / 10.0**falls, rtol=1e-5)


def test_what_a_step_pulls_grows_without_a_jump():
  rates = central.rates(LONG)
  pull = over_steps(lambda step: rates.proximity(step) * rates.weights(step))
  first = LONG.hyper.proximity * LONG.hyper.weights_rate
  np.testing.assert_allclose(pull, first * (1 + 249 * STEPS / len(STEPS)), rtol=1e-4)


def test_relaxation_grows_by_a_fiftieth_every_epoch():
  relaxation = over_steps(central._relaxation(LONG))
  np.testing.assert_allclose(relaxation, 1.02 ** (STEPS / 4), rtol=1e-4)


def test_schedules_stretch_to_the_rounds_there_are():
  short = replaced(LONG, rounds=25)
  rates = central.rates(short), central.rates(LONG)
  for step in (0, 39, 40, 59, 60, 99):
    assert rates[0].weights(step) == pytest.approx(float(rates[1].weights(10 * step)))
    assert rates[0].proximity(step) == pytest.approx(float(rates[1].proximity(10 * step)), rel=1e-4)


# --- the start


def test_a_network_of_another_run_is_the_start(tmp_path):
  job = job_of("full precision")
  state, _ = trained(job)
  (before,) = state.clients
  save_models(job, seeds_of(state), tmp_path)
  (path,) = tmp_path.rglob("*.safetensors")
  shapes = federation().num_classes, federation().train.x.shape[1:]
  written = import_torch.read_variables(str(path), "mlp2", *shapes)
  for method in ("full precision", "Algorithm 1"):
    started = job_of(method, start=str(path))
    algorithm = started.phases[0].build(started.options, None)
    (personal,) = algorithm.init(KEY, federation().train, cohorts_of(started)).clients
    chex.assert_trees_all_equal(personal.variables, jax.tree.map(lambda x: x[None], written))
    chex.assert_trees_all_equal(personal.variables, before.variables)


def save_models(job, state, folder):
  stack, _ = training._stack(job, 0)
  build = functools.partial(training._build, job.options, job.phases[0])
  runs = training._runs(job, 0, stack, None)
  study.save_models(job, training.Trained(build, runs, state, 0.0), folder)


def seeds_of(state):
  """Gives a state the leading axis of seeds."""
  return jax.tree.map(lambda leaf: leaf[None], state)


def test_a_start_that_is_no_network_is_refused(tmp_path):
  (tmp_path / "start").write_text("no network")
  for name in ("start", "missing"):
    with pytest.raises(BadInput, match=name):
      job_of("Algorithm 1", start=str(tmp_path / name))


# --- options

BAD = {
  "only": ("Adam",), "bits": (0,), "weights_rate": 0.0, "momentum": 1.0, "weight_decay": -1.0,
  "proximity": 0.0, "centers_rate": -1.0, "centers_clip": 0.0, "weights_clip": 0.0,
  "sharpness": float("nan"), "relaxation": -1.0, "measured_rows": -1, "minutes": 0.0,
  "straight_through": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_refused_before_any_data_is_read(name, monkeypatch):
  monkeypatch.setattr(fed, "load", None)
  options = replaced(OPTIONS, **{name: BAD[name]})
  with pytest.raises(BadInput, match=f"^{name} "):
    central.run("table", options)


# --- what a study leaves


def test_a_study_leaves_its_table_and_pictures(tmp_path):
  options = replaced(
    OPTIONS, only=("ProxQuant",), eval_every=2, rounds=4, measured_rows=20, out=str(tmp_path)
  )
  assert central.run("table", options).folder == tmp_path
  assert list(metrics.read_summary(tmp_path)) == ["ProxQuant 2 bit"]
  for row in metrics.read_metrics(tmp_path):
    # Chunks of 2 rounds, then one of 1, and the fine-tuning.
    assert (row["accuracy"] is not None) == (row["round"] in (2, 3, 4))
    measured = row["gradient_mapping"]
    assert measured > 0 if row["round"] in (2, 3) else measured is None
  pictures = {path.name for path in tmp_path.glob("*.png")}
  assert pictures == {*folders.PICTURES}
  assert not (tmp_path / "snapshots").exists()


def test_pictures_are_of_2_bits_where_there_are_any():
  assert central._pictured(["full precision", "STE", "Algorithm 1"], (1, 2)) == "STE 2 bit"
  assert central._pictured(["Algorithm 1"], (4, 1)) == "Algorithm 1 4 bit"
  assert central._pictured(["full precision"], (1,)) is None
