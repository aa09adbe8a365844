"""Algorithm 1 on one machine: one client that holds all rows, every quantiser, precisions and seeds
side by side.

A round is an epoch: `local_steps` is what an epoch takes. The schedules are those of the authors'
recipe for 250 epochs, stretched to the rounds there are; but the pull toward the centers is a tenth
of theirs, which held the weights fast before they had learned (docs/reproduction.md).
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import optax

from qupeD_jax import checks
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.algorithms.local import local
from qupeD_jax.federation import stationarity
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.io import import_torch
from qupeD_jax.quantization import quantizers
from qupeD_jax.study import study
from qupeD_jax.study.federation import Federation
from qupeD_jax.study.jobs import (
  Job,
  Phase,
  frozen_last,
  full_precision,
  local_phase,
  local_work,
  one_phase,
  precisions,
)
from qupeD_jax.study.options import MOST, Bits, Federated, withheld
from qupeD_jax.types import PyTree, Quantizer

EPOCHS = 250  # of the recipe; its schedules below are in these


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How all quantisers train."""

  start: str | None = None
  """Safetensors file of a network to start from, PyTorch's or ours; by default none."""
  weights_rate: float = 0.1
  """Step size of the weights; a tenth of it from 100 epochs of 250, a hundredth from 150."""
  momentum: float = 0.9
  """Of the weights' gradient descent."""
  weight_decay: float = 1e-4
  """Decay of all parameters in a step, before the rate."""
  proximity: float = 1e-5
  """Weight of the pull toward the centers at first; it grows by as much every epoch of 250."""
  centers_rate: float = 1e-4
  """Step size of the centers; a tenth of it from 80 epochs of 250, a hundredth from 140."""
  centers_clip: float = 10.0
  """Bound of every center's gradient."""
  weights_clip: float = 1.0
  """Bound of the quantised weights."""
  straight_through: float = 0.0
  """Share of the weights' gradient that Algorithm 1 takes at Q; 0 is the paper's."""
  sharpness: float = 200.0
  """P of the soft quantisation, where it is one."""
  relaxation: float = 1.0
  """BinaryRelax's relaxation at first; it grows by 2 % every epoch of 250."""
  measured_rows: int = 1000
  """Training rows on which the squared gradient mapping is measured; 0 for no measurement."""


# One client that holds all rows has no server, and nobody beside it.
ALONE = ("clients", "new_clients", "partition", "classes_per_client", "alpha", "min_test_rows")
ALONE += ("clients_per_step", "store", "server", "faults", "variants")


@dataclasses.dataclass(frozen=True)
class Central(withheld(Federated, *ALONE)):
  """Options of an experiment on one machine."""

  hyper: Recipe = Recipe()
  bits: Bits = (1, 2, 4)
  """Precisions, 1 to 8 bits; full precision is a method of its own."""
  only: tuple[str, ...] = ()
  """Quantisers to train with, by their names in the table; by default all."""
  parts: tuple[str, ...] = ()
  """Folders of finished runs with the same options; their methods are taken over, not trained."""


# What the table experiments have in common: the authors' scale.
RECIPE = {
  "clients": 1, "partition": "iid", "batch_size": 128, "validation": 0.02, "rounds": 250,
  "augment": True,
}  # fmt: skip
CIFAR10 = RECIPE | {"dataset": "cifar10", "local_steps": 382, "dtype": "bfloat16"}


# --- schedules of the local step


def _dropping(options: Central, value: float, *epochs: int) -> Callable:
  """A value that falls to a tenth at each of these epochs of 250."""
  at = {_steps(options) * epoch // EPOCHS: 0.1 for epoch in epochs}
  return optax.piecewise_constant_schedule(value, at)


def _steps(options: Central) -> int:
  return options.work.rounds * options.work.local_steps


def rates(options: Central) -> Rates:
  """Returns the step sizes; what the pull is times the weights' rate grows without a jump."""
  weights = _dropping(options, options.hyper.weights_rate, 100, 150)
  last = options.hyper.proximity * EPOCHS
  growing = optax.linear_schedule(options.hyper.proximity, last, _steps(options))
  proximity = lambda step: growing(step) * options.hyper.weights_rate / weights(step)
  return Rates(weights, _dropping(options, options.hyper.centers_rate, 80, 140), proximity)


def _relaxation(options: Central) -> Callable:
  return optax.exponential_decay(options.hyper.relaxation, _steps(options) / EPOCHS, 1.02)


# --- quantisers: options, max_bits -> Quantizer


def _algorithm_1(options: Central, max_bits: int, **changes) -> Quantizer:
  clips = {"clip": options.hyper.centers_clip, "clip_weights": options.hyper.weights_clip}
  return quantizers.learned_codebook(max_bits=max_bits, **clips, **changes)


def _soft(options: Central, max_bits: int) -> Quantizer:
  return _algorithm_1(options, max_bits, sharpness=options.hyper.sharpness)


def _proxquant(options: Central, max_bits: int) -> Quantizer:
  return quantizers.proxquant(max_bits=max_bits, clip_weights=options.hyper.weights_clip)


def _binary_relax(options: Central, max_bits: int) -> Quantizer:
  return quantizers.binary_relax(max_bits=max_bits, relaxation=_relaxation(options))


def _ste(options: Central, max_bits: int) -> Quantizer:
  return quantizers.ste(max_bits=max_bits, clip_weights=options.hyper.weights_clip)


QUANTIZERS = {
  "Algorithm 1": _algorithm_1,
  "Algorithm 1 l2": partial(_algorithm_1, norm="l2"),
  "Algorithm 1 soft": _soft,
  "ProxQuant": _proxquant,
  "BinaryRelax": _binary_relax,
  "STE": _ste,
}
NAMES = ("full precision", *QUANTIZERS)


# --- jobs


def run(name: str, options: Central) -> study.Outcome:
  """Trains by all quantisers."""
  for method in options.only:
    checks.require(method in NAMES, "only", repr(method), ", ".join(map(repr, NAMES)))
  _check(options)
  chosen = [method for method in NAMES if method in (options.only or NAMES)]
  jobs = [partial(_job, method) for method in chosen]
  pictured = _pictured(chosen, options.bits)
  return study.run(name, options, jobs, taken=options.parts, pictured=pictured)


def _pictured(chosen: list[str], bits: tuple[int, ...]) -> str | None:
  """Names the method whose weights and centers are drawn: of 2 bits, if there are any."""
  quantised = [method for method in chosen if method in QUANTIZERS]
  return f"{quantised[0]} {2 if 2 in bits else bits[0]} bit" if quantised else None


def _check(options: Central) -> None:
  recipe = options.hyper
  for name in ("weights_rate", "proximity", "centers_rate", "centers_clip", "weights_clip",
               "sharpness"):  # fmt: skip
    checks.positive(name, getattr(recipe, name))
  checks.share("straight_through", recipe.straight_through)
  checks.non_negative("weight_decay", recipe.weight_decay)
  checks.non_negative("relaxation", recipe.relaxation)
  checks.fraction("momentum", recipe.momentum, closed=False)
  checks.whole("measured_rows", recipe.measured_rows, 0, MOST)
  for bits in options.bits:
    checks.whole("bits", bits, 1, 8)


def _job(method: str, options: Central, federation: Federation) -> Job:
  if method == "full precision":
    variants, quantizer = full_precision(method, federation), quantizers.full_precision()
    phases = one_phase(options, _training(options, federation, quantizer), local_phase)
    return Job(options, federation, variants, _measured(phases, options, federation, quantizer))
  variants = precisions(method, options, federation, options.bits, mixed=False)
  quantizer = QUANTIZERS[method](options, max(options.bits))
  builds = _training(options, federation, quantizer), _finetuning(federation, quantizer)
  phases = frozen_last(options, variants, *builds, phase=local_phase)
  return Job(options, federation, variants, _measured(phases, options, federation, quantizer))


def _measured(
  phases: tuple[Phase, ...], options: Central, federation: Federation, quantizer: Quantizer
) -> tuple[Phase, ...]:
  """Has the squared gradient mapping measured along training.

  Not along fine-tuning: frozen weights minimise nothing, and what is left is another objective.
  """
  if not options.hyper.measured_rows:
    return phases

  def mapping(options, state, data, cohorts):
    measure = stationarity.of_clients(
      federation.models,
      quantizer,
      rates=rates(options),
      local_steps=options.work.local_steps,
      num_rows=options.hyper.measured_rows,
      optimizer=_decay(options),
    )
    return measure(state, data, cohorts)

  first, *rest = phases
  return first._replace(measures={"gradient_mapping": mapping}), *rest


def _training(options: Central, federation: Federation, quantizer: Quantizer) -> Callable:
  start = _start(options, federation)  # before a run replaces the results of another

  def build(options, _):
    return local(
      federation.models,
      quantizer,
      rates=rates(options),
      straight_through=options.hyper.straight_through,
      start=start,
      optimizer=_optimizer(options),
      work=local_work(options, federation),
    )

  return build


def _finetuning(federation: Federation, quantizer: Quantizer) -> Callable:
  """The last epochs: weights on their centers, all rates at their lowest."""

  def build(options, trained):
    return finetune(
      federation.models,
      quantizer,
      trained,
      rate=options.hyper.weights_rate / 100,
      centers_rate=options.hyper.centers_rate / 100,
      optimizer=_optimizer(options),
      work=local_work(options, federation),
    )

  return build


def _optimizer(options: Central) -> optax.GradientTransformation:
  return optax.chain(_decay(options), optax.trace(options.hyper.momentum))


def _decay(options: Central) -> optax.GradientTransformation:
  return optax.add_decayed_weights(options.hyper.weight_decay)


def _start(options: Central, federation: Federation) -> tuple[PyTree, ...] | None:
  if options.hyper.start is None:
    return None
  shapes = federation.num_classes, federation.train.x.shape[1:]
  path = checks.place("start", options.hyper.start)
  return tuple(import_torch.read_variables(path, n, *shapes) for n in federation.names)
