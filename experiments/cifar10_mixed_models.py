"""CIFAR-10 with half of the clients on CNN1 and half on CNN2: what each half gains by federating.

make data NAME=cifar10
make experiment NAME=cifar10_mixed_models

By default at the paper's scale, which wants an accelerator. The server has CNN1. Models of
different shapes have no mean: FedAvg and its fine-tuning serve each half by itself, distillation
both together. groups.md compares them with training alone.

What came of it, at a smaller scale, is in docs/reproduction.md.
"""

from functools import partial

from experiments.recipes import comparison, groups
from experiments.recipes.comparison import Tuned
from qupeD_jax.data import cohort
from qupeD_jax.study import methods, rivals, study
from qupeD_jax.study.jobs import every_client
from qupeD_jax.study.options import PAPER_CIFAR10, replaced, trained_clients, withheld

DEFAULTS = replaced(
  withheld(Tuned, "inner_steps")(), **PAPER_CIFAR10 | {"models": ("cnn1", "cnn2")}
)


def within_architecture(options, federation):
  """QuPeD among the clients of one architecture."""
  return methods.quped_within_groups(options, federation, every_client(federation, 32))


def main(options: Tuned) -> study.Outcome:
  """Runs the experiment."""
  tuned = partial(comparison.with_tuned, options)
  jobs = (
    tuned("local", methods.local_training),
    tuned("FedAvg + fine-tuning", methods.averaging_then_local),
    tuned("FML", rivals.fml_job),
    tuned("QuPeD 32 bit", within_architecture),
    tuned("QuPeD 32 bit", partial(methods.quped_quantised, bits=(32,))),
    tuned("QuPeD 2 bit", partial(methods.quped_quantised, bits=(2,))),
    tuned("QuPeD+ 32 bit", partial(methods.quped_from_averaging, bits=(32,))),
    tuned("QuPeD+ 2 bit", partial(methods.quped_from_averaging, bits=(2,))),
  )
  done = study.run("cifar10_mixed_models", options, jobs)
  halves = cohort.assign_groups(
    trained_clients(options), len(options.networks.models), len(options.bits)
  )
  named = dict(zip(options.networks.models, halves, strict=True))
  baselines = ("local", "FedAvg + fine-tuning", "QuPeD within groups")
  groups.write(done.folder, named, baselines)
  return done
