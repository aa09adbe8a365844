"""Drawn command lines, sensible and not: each trains, or ends in one line that says why.

The suite draws a few; `pytest tests/test_fuzz.py --hypothesis-profile=thorough` draws 5,000, which
takes hours.
"""

import functools
import math
import tempfile
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import quickstart
from qupeD_jax import command_line
from qupeD_jax.results import metrics, plots
from qupeD_jax.study import cli, methods, rivals, study
from qupeD_jax.study.options import Options, flat, replaced

TRAINED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75
LONGEST = 300  # characters of a line that refuses

# By option: what makes sense, and what does not, at least not everywhere.
RATE = (("0.1", "0.0001"), ("0", "-1", "nan", "inf", "1e30", "fast"))
SHARE = (("0.5", "1"), ("0", "1.5", "-0.1", "nan"))
WEIGHT = (("0", "0.3"), ("1", "-0.1", "nan"))
FLAG = (("",), ("yes",))
COUNT = (("1", "2"), ("0", "-3", "2.5", "many", "99999999999999999999"))
VALUES = {
  "dataset": (("digits",), ("digit", "femnist", "emnist/", "")),
  "data_dir": ((), ("/nowhere", "")),
  "downsample": (("1", "2", "4"), ("3", "0", "8", "-1")),
  "minutes": (("10", "0.00001"), ("0", "-1", "nan")),
  "devices": (("1", "2"), ("0", "99", "-1")),
  "coordinator": ((), ("nowhere", ":1", "host:port", "host:99999999")),
  "processes": ((), ("2", "0")),
  "process": ((), ("0", "-1")),
  "join_timeout": ((), ("9", "0", "-1", "x")),
  "clients_per_step": (("1", "2", "None"), ("0", "-1", "x")),
  "store": (("device", "host", "disk"), ("cloud",)),
  "checkpoint_every": (("0", "1", "None"), ("-1", "x")),
  "fresh": FLAG,
  "tensorboard": FLAG,
  "clients": (("3", "4", "5"), ("0", "-1", "5000", "1e3")),
  "new_clients": (("None", "1", "2"), ("0", "5", "x")),
  "partition": (("by_class", "dirichlet", "iid"), ("natural", "by-class")),
  "classes_per_client": (("2", "10"), ("0", "11", "-1")),
  "alpha": (("0.5", "100"), ("0", "-1", "nan", "1e-9")),
  "train_share": (("0.2", "1"), SHARE[1]),
  "validation": (("0.2", "0.4"), ("0", "1", "-0.1", "0.999", "nan")),
  "max_test_rows": (("5", "None"), ("0", "-1", "x")),
  "min_test_rows": (("None",), ("1", "0", "x")),
  "models": (("mlp2", "mlp2 mlp"), ("mlp3", "", "cnn1 resnet20")),
  "input_std": (("80",), ("0", "-1", "1 2 3", "nan")),
  "dtype": (("float32", "bfloat16"), ("float16",)),
  "bits": (("1 2", "3", "8 32", "32"), ("0", "9", "16", "2 33", "")),
  "rounds": (("2", "3"), ("1", *COUNT[1][:4])),
  "finetune_rounds": (("0", "1"), ("-1", "3", "7", "1.5")),
  "local_steps": (("1", "2"), COUNT[1][:4]),
  "batch_size": (("1", "4"), ("0", "-1", "5000", "x")),
  "partial_batches": FLAG,
  "participation": SHARE,
  "augment": FLAG,
  "simultaneous": FLAG,
  "own_statistics": FLAG,
  "inner_steps": (("1", "2"), ("0", "-1")),
  "averaging_share": SHARE,
  "eval_every": (("1", "2"), ("0", "-1", "x")),
  "seed": (("0", "7"), ("-1", "4294967295", "x")),
  "seeds": (("1", "2"), ("0", "-1", "99999999999")),
  "aggregate": (("mean", "weighted_mean", "median", "trimmed_mean", "clipped_mean"), ("sum",)),
  "trim": (("0", "0.3"), ("0.5", "-0.1", "nan")),
  "clip_norm": RATE,
  "noise_multiplier": (("0",), ("1", "-1", "nan")),
  "noise_seed": (("0", "None"), ("-1", "x")),
  "delta": (("0.01", "None"), ("0", "1", "nan")),
  "dropout": (("0", "0.5"), ("1", "-0.1")),
  "stragglers": (("0", "0.5"), ("1.5", "-0.1")),
  "corrupt": (("0", "1"), ("-1", "99")),
  "corruption": (("nan", "noise", "sign"), ("lie",)),
  "lambda_p": WEIGHT,
  "global_lambda_p": WEIGHT,
  "temperature": RATE,
  "weights_rate": RATE,
  "global_rate": RATE,
  "fedavg_rate": RATE,
  "global_loss_weight": (("0", "1"), ("-1", "nan", "inf")),
  "straight_through": (("0", "0.5", "1"), ("1.5", "-1", "nan")),
  "penalty": RATE,
  "mu": (("0", "0.1"), ("-1", "nan")),
  "inner_rate": (("0", "0.1"), ("-1", "inf")),
  "centers_rate": RATE,
  "centers_clip": RATE,
  "proximity": (("0", "0.001"), ("-1", "nan")),
  "finetune_rate": RATE,
  "fedavg_finetune_rate": RATE,
  "final_rate": SHARE,
}
# What every run is given first: a few clients, little work.
BASE = "--clients 4 --models mlp2 --rounds 3 --finetune-rounds 1 --local-steps 1 --batch-size 4"
BASE += " --seeds 1 --eval-every 2 --train-share 0.2 --validation 0.2 --max-test-rows 5"
JOBS = (
  methods.local_training,
  functools.partial(methods.local_quantised, bits=(2,)),
  methods.federated_averaging,
  functools.partial(methods.averaging_then_local, bits=(1,)),
  functools.partial(methods.quped_quantised, bits=(2,), mixed=True),
  functools.partial(methods.quped_from_averaging, bits=(2,)),
  rivals.fedprox_job,
  rivals.per_fedavg_job,
  rivals.pfedme_job,
  rivals.ditto_job,
  rivals.fml_job,
  rivals.fedrep_job,
  rivals.fedbn_job,
  rivals.scaffold_job,
  rivals.apfl_job,
  functools.partial(rivals.qupel_job, bits=(2,)),
)

ALL = replaced(Options(), **flat(quickstart.DEFAULTS))


# What makes sense only beside another option.
BESIDE = {
  "alpha": "--partition dirichlet --batch-size 1",
  "clip_norm": "--aggregate clipped_mean",
  "corruption": "--corrupt 1 --aggregate median",
  "delta": "--aggregate clipped_mean --noise-multiplier 1",
  "models": "--clients 8",
  "noise_seed": "--aggregate clipped_mean --noise-multiplier 1",
  "partition": "--batch-size 1",
  "rounds": "--finetune-rounds 0",
  "store": "--participation 0.5",
  "stragglers": "--local-steps 2",
  "trim": "--aggregate trimmed_mean",
}


class Typed(NamedTuple):
  """A command line."""

  arguments: list[str]
  sensible: bool  # it must train


def typed_value(name: str, value: str) -> list[str]:
  return [command_line.flag(name), *value.split()]


def sensible_lines():
  """Returns every sensible value, typed beside what it needs."""
  return [
    Typed([*BASE.split(), *BESIDE.get(name, "").split(), *typed_value(name, value)], True)
    for name, (good, _) in VALUES.items()
    for value in good
  ]


@st.composite
def wild_lines(draw):
  """Draws a few options, each more often sensible than not: some of them go ill together."""
  names = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=4))
  arguments = BASE.split()
  for name in names:
    good, bad = VALUES[name]
    values = good if good and draw(st.integers(0, 4)) else bad
    arguments += typed_value(name, draw(st.sampled_from(values)))
  return Typed(arguments, False)


def test_every_option_is_drawn():
  assert set(flat(ALL)) - {"out"} == set(VALUES)


@settings(
  max_examples=settings.default.max_examples // 4,
  suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(typed=st.sampled_from(sensible_lines()) | wild_lines(), job=st.sampled_from(JOBS))
def test_a_drawn_command_line_trains_or_is_refused_in_one_line(typed, job, monkeypatch, capfd):
  monkeypatch.setattr(quickstart, "JOBS", (job,))
  monkeypatch.setattr(quickstart, "DEFAULTS", ALL)
  for module, name in (
    (study, "draw"),
    (plots, "clients"),
    (plots, "weights"),
    (plots, "centers"),
  ):
    monkeypatch.setattr(module, name, lambda *_, **__: None)  # costs more than the training
  with tempfile.TemporaryDirectory() as folder:
    code = cli.main(["quickstart", *typed.arguments, "--out", folder])
    _, error = capfd.readouterr()
    assert code in (TRAINED, STOPPED) or not typed.sensible, error
    if code == TRAINED:
      summary = metrics.read_summary(folder)
      assert summary
      assert all(math.isfinite(entry["accuracy"]["mean"]) for entry in summary.values())
    elif code != STOPPED:
      assert code in (FAILED, REFUSED)
      assert error.startswith("error: ")
      assert error.count("\n") == 1
      assert len(error) < LONGEST
