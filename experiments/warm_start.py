"""QuPeD at 2 bits after more and more rounds of FedAvg: what a start is worth, and what a teacher.

make data NAME=cifar10
make experiment NAME=warm_start

Personal models begin from drawn weights or from FedAvg's model after a share of the rounds; from
there on they learn alone or are taught, more or less, by a global model that learns from them, with
and without a cross-entropy of its own. FedAvg followed by fine-tuning at full precision stands
beside them. By default at the paper's scale, which wants an accelerator; shares.png shows the
accuracy against the share of FedAvg. What came of it, at a smaller scale, is in
docs/reproduction.md.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

from experiments.recipes.comparison import Tuned, with_tuned
from qupeD_jax import checks
from qupeD_jax.results import plots
from qupeD_jax.study import methods, study
from qupeD_jax.study.jobs import MakeJob, changed, with_values
from qupeD_jax.study.options import PAPER_CIFAR10, replaced, withheld

FINETUNED = "FedAvg + fine-tuning"
# Who teaches a personal model, and how strongly; "alone" is Algorithm 1 from the same start.
TEACHERS = {
  "alone": {"lambda_p": 0.0},
  "lambda_p 0.1": {"lambda_p": 0.1},
  "lambda_p 0.4": {"lambda_p": 0.4},
  "lambda_p 0.9": {"lambda_p": 0.9},
  "lambda_p 0.4, w only distilled": {"lambda_p": 0.4, "global_loss_weight": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Options(withheld(Tuned, "inner_steps", "averaging_share")):
  """QuPeD at 2 bits, begun after more and more rounds of FedAvg."""

  shares: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 0.8)
  """Shares of the rounds that are FedAvg before personal models begin; 0 is a cold start."""


DEFAULTS = replaced(Options(), **PAPER_CIFAR10)


def main(options: Options) -> study.Outcome:
  """Runs the experiment."""
  checks.require(len(options.shares) > 0, "shares", "()", "at least one number")
  for share in options.shares:
    checks.share("shares", share)
  after = [with_tuned(options, "QuPeD+ 2 bit", begun_after(share)) for share in options.shares]
  jobs = (with_tuned(options, FINETUNED, methods.averaging_then_local), *after)
  done = study.run("warm_start", options, jobs, comparisons=pairs)
  draw(done, options.shares)
  return done


def draw(done: study.Outcome, shares: Sequence[float]) -> None:
  """Draws the accuracy that each teacher leads to against the share of FedAvg before."""

  def points(teacher):
    for share in shares:
      if entry := done.summary.get(name_of(teacher, share)):
        yield share, entry["accuracy"]["mean"], entry["accuracy"]["std"] or 0.0

  curves = {teacher: [*points(teacher)] for teacher in TEACHERS}
  levels = {f"{FINETUNED}, 32 bit": done.summary[FINETUNED]["accuracy"]["mean"]}
  plots.shares(curves, levels, done.folder / "shares.png")


def begun_after(share: float) -> MakeJob:
  """Returns what makes the job of all teachers after a share of FedAvg."""
  quped = partial(methods.quped_from_averaging, bits=(2,))
  named = {name_of(teacher, share): values for teacher, values in TEACHERS.items()}
  return with_values(changed(quped, named), {"averaging_share": share})


def name_of(teacher: str, share: float) -> str:
  """Names a teacher after a share of FedAvg.

  >>> name_of("alone", 0.6)
  'alone after 60% FedAvg'
  """
  return f"{teacher} after {100 * share:.3g}% FedAvg"


def pairs(names: Iterable[str]) -> dict[str, list[str]]:
  """Compares each taught model with the one alone, and all with FedAvg + fine-tuning."""
  alone = lambda name: f"alone after {name.partition(' after ')[2]}"
  return {
    name: [other for other in (alone(name), FINETUNED) if other != name]
    for name in names
    if name != FINETUNED
  }
