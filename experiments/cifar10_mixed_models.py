"""CIFAR-10 with half of the clients on CNN1 and half on CNN2: what each half gains by federating.

make data NAME=cifar10
make experiment NAME=cifar10_mixed_models

By default at the paper's scale, which wants an accelerator. The server has CNN1. Models of
different shapes have no mean: FedAvg and its fine-tuning serve each half by itself, distillation
both together. groups.md compares them with training alone.

On two CPU cores (AMD EPYC), at a smaller scale, three seeds; more of it in docs/reproduction.md:

make experiment NAME=cifar10_mixed_models ARGS="--downsample 2 --models cnn3 mlp --clients 12
  --classes-per-client 3 --train-share 0.07 --validation 0.2 --rounds 100 --finetune-rounds 20
  --batch-size 5 --eval-every 100 --max-test-rows 300"

  half   method          accuracy (%)   gain over alone   over QuPeD within the half
  cnn3   local                  68.2                       +0.2 [-1.6, +1.6]
  cnn3   FedAvg + fine-tuning   69.7   +1.4 [-0.6, +3.3]   +1.6 [-0.3, +3.6]
  cnn3   FML                    69.3   +1.1 [-0.5, +2.4]   +1.3 [-0.6, +3.1]
  cnn3   QuPeD within groups    68.1   -0.2 [-1.6, +1.6]
  cnn3   QuPeD 32 bit           68.0   -0.2 [-1.6, +0.9]   -0.1 [-1.5, +1.1]
  cnn3   QuPeD 2 bit            68.5   +0.3 [-1.9, +2.0]   +0.5 [-1.2, +2.6]
  cnn3   QuPeD+ 32 bit          69.7   +1.4 [-0.8, +3.2]   +1.6 [-0.6, +3.8]
  cnn3   QuPeD+ 2 bit           69.7   +1.5 [-1.4, +3.8]   +1.7 [-0.7, +4.0]
  mlp    local                  62.6                       -0.3 [-1.5, +1.0]
  mlp    FedAvg + fine-tuning   64.5   +2.0 [+0.5, +3.5]   +1.7 [+0.0, +3.3]
  mlp    FML                    63.7   +1.2 [+0.2, +2.1]   +0.9 [-0.3, +1.9]
  mlp    QuPeD within groups    62.9   +0.3 [-1.0, +1.5]
  mlp    QuPeD 32 bit           62.1   -0.4 [-1.6, +0.8]   -0.7 [-2.1, +0.5]
  mlp    QuPeD 2 bit            62.9   +0.4 [-0.9, +1.5]   +0.1 [-1.4, +1.5]
  mlp    QuPeD+ 32 bit          64.7   +2.2 [+0.6, +3.7]   +1.9 [+0.4, +3.5]
  mlp    QuPeD+ 2 bit           65.0   +2.4 [+1.1, +3.6]   +2.1 [+0.9, +3.5]
"""

from functools import partial

from experiments.recipes import comparison, groups
from experiments.recipes.comparison import Tuned
from qupeD_jax.data import cohort
from qupeD_jax.study import methods, rivals, study
from qupeD_jax.study.jobs import every_client
from qupeD_jax.study.options import PAPER_CIFAR10, replaced, withheld

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
    tuned("FML", rivals.mutual_learning),
    tuned("QuPeD 32 bit", within_architecture),
    tuned("QuPeD 32 bit", partial(methods.quped_quantised, bits=(32,))),
    tuned("QuPeD 2 bit", partial(methods.quped_quantised, bits=(2,))),
    tuned("QuPeD+ 32 bit", partial(methods.quped_from_averaging, bits=(32,))),
    tuned("QuPeD+ 2 bit", partial(methods.quped_from_averaging, bits=(2,))),
  )
  done = study.run("cifar10_mixed_models", options, jobs)
  halves = cohort.assign_groups(
    options.division.clients, len(options.networks.models), len(options.bits)
  )
  named = dict(zip(options.networks.models, halves, strict=True))
  baselines = ("local", "FedAvg + fine-tuning", "QuPeD within groups")
  groups.write(done.folder, named, baselines)
  return done
