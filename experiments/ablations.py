"""QuPeD at 2 bits on CIFAR-10, one thing changed at a time: what matters, and how much.

make data NAME=cifar10
make experiment NAME=ablations
make experiment NAME=ablations ARGS="--topics temperature centers"

By default at the paper's scale, which wants an accelerator. Every topic has a folder of its own
below results/ablations.

What came of it, at a smaller scale, is in docs/reproduction.md.
"""

import dataclasses
from functools import partial
from pathlib import Path

from experiments.recipes.comparison import Tuned, with_tuned
from qupeD_jax import checks
from qupeD_jax.study import methods, study
from qupeD_jax.study.jobs import changed, with_values
from qupeD_jax.study.options import PAPER_CIFAR10, replaced, settled, withheld

QUPED = partial(methods.quped_quantised, bits=(2,))
LOCAL = partial(methods.local_quantised, bits=(2,))
SHARES = (0.1, 0.3, 1.0)  # of a client's training rows


@dataclasses.dataclass(frozen=True)
class Options(withheld(Tuned, "inner_steps", "averaging_share")):
  """QuPeD at 2 bits, one thing changed at a time."""

  topics: tuple[str, ...] = ()
  """What to change: lambda_p, temperature, local_steps, centers, participation, data; or all."""


DEFAULTS = replaced(Options(), **PAPER_CIFAR10)


# --- topics: options -> the jobs of one study


def lambda_p(options: Options) -> list:
  """The weight of distillation; 0 is local training."""
  return _side_by_side(options, "lambda_p", (0.0, 0.1, 0.2, 0.5, 0.75))


def temperature(options: Options) -> list:
  """The temperature of distillation."""
  return _side_by_side(options, "temperature", (1.0, 2.0, 4.0))


def centers(options: Options) -> list:
  """Learned centers against those that stay where they start."""
  changes = {"learned centers": {}, "fixed centers": {"centers_rate": 0.0}}
  return [with_tuned(options, "QuPeD 2 bit", changed(QUPED, changes))]


def local_steps(options: Options) -> list:
  """Steps between two rounds, as many steps in all."""

  def values(steps):
    share = options.work.local_steps / steps
    rounds, last = options.work.rounds * share, options.work.finetune_rounds * share
    return {"local_steps": steps, "rounds": round(rounds), "finetune_rounds": round(last)}

  return [_quped_with(options, f"{n} local steps", values(n)) for n in (5, 10, 20)]


def participation(options: Options) -> list:
  """The share of the clients that train in a round."""
  return [
    _quped_with(options, f"{share:.0%} of the clients", {"participation": share})
    for share in (1.0, 0.5, 0.1)
  ]


def _side_by_side(options: Options, name: str, values: tuple[float, ...]) -> list:
  changes = {f"{name} {value:g}": {name: value} for value in values}
  return [with_tuned(options, "QuPeD 2 bit", changed(QUPED, changes))]


def _quped_with(options: Options, label: str, values: dict):
  make = changed(QUPED, {label: {}})
  return with_tuned(options, "QuPeD 2 bit", with_values(make, values))


TOPICS = {topic.__name__: topic for topic in (lambda_p, temperature, centers, local_steps)}
TOPICS["participation"] = participation


def main(options: Options) -> tuple[study.Outcome, ...]:
  """Runs the experiment."""
  for topic in options.topics:
    checks.require(topic in (*TOPICS, "data"), "topics", topic, ", ".join((*TOPICS, "data")))
  options, folder = settled(options), study.folder_of("ablations", options)
  chosen = options.topics or (*TOPICS, "data")
  studies = [
    (replaced(options, out=str(folder / topic)), TOPICS[topic](options))
    for topic in TOPICS
    if topic in chosen
  ]
  studies += data(options, folder) if "data" in chosen else []
  return study.run_all("ablations", studies, comparisons=study.with_first)


def data(options: Options, folder: Path) -> list:
  """The amount of data per client: a study for each, local training beside QuPeD."""
  jobs = [with_tuned(options, "local 2 bit", LOCAL), with_tuned(options, "QuPeD 2 bit", QUPED)]
  studies = []
  for share in SHARES:
    out = str(folder / f"data_{share:.0%}".rstrip("%"))
    kept = share * options.division.train_share
    studies.append((replaced(options, train_share=kept, out=out), jobs))
  return studies
