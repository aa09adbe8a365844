"""CIFAR-10 with thirds of the clients at 1, 2 and 32 bits: what each third gains by federating.

make data NAME=cifar10
make experiment NAME=cifar10_mixed_bits

By default at the paper's scale, which wants an accelerator. groups.md compares, for each third,
training alone, QuPeD among the clients of the same precision, and QuPeD among all.

On two CPU cores (AMD EPYC), at a smaller scale, three seeds; more of it in docs/reproduction.md:

make experiment NAME=cifar10_mixed_bits ARGS="--downsample 2 --models cnn3 --clients 12
  --classes-per-client 3 --train-share 0.07 --validation 0.2 --rounds 100 --finetune-rounds 20
  --batch-size 5 --eval-every 100 --max-test-rows 300"

  third   method        accuracy (%)   gain over alone         gain over QuPeD within the third
  1 bit   local mixed           67.5                           +2.2 [-0.4, +4.8]
  1 bit   QuPeD within groups   65.3   -2.2 [-4.8, +0.4]
  1 bit   QuPeD mixed           67.1   -0.4 [-2.9, +2.1]       +1.8 [+0.6, +3.4]
  1 bit   QuPeD+ mixed          67.2   -0.3 [-2.2, +1.2]       +1.9 [-0.6, +4.6]
  2 bit   local mixed           64.5                           -1.6 [-3.6, +0.4]
  2 bit   QuPeD within groups   66.2   +1.6 [-0.4, +3.6]
  2 bit   QuPeD mixed           67.0   +2.4 [+0.3, +4.4]       +0.8 [-0.9, +2.4]
  2 bit   QuPeD+ mixed          68.3   +3.8 [+1.2, +6.1]       +2.2 [-1.6, +5.3]
  32 bit  local mixed           64.8                           +0.3 [-2.4, +2.6]
  32 bit  QuPeD within groups   64.6   -0.3 [-2.6, +2.4]
  32 bit  QuPeD mixed           65.9   +1.1 [-0.6, +2.7]       +1.3 [-0.3, +2.7]
  32 bit  QuPeD+ mixed          67.3   +2.5 [-1.4, +5.5]       +2.8 [+0.2, +5.2]
"""

from functools import partial

import numpy as np

from experiments.recipes import comparison, groups
from experiments.recipes.comparison import MixedBits
from qupeD_jax.data import cohort
from qupeD_jax.study import methods, study
from qupeD_jax.study.federation import by_bits
from qupeD_jax.study.options import PAPER_CIFAR10, replaced, withheld

DEFAULTS = replaced(withheld(MixedBits, "inner_steps")(), **PAPER_CIFAR10, bits=(1, 2, 32))


def within_precision(options, federation):
  """QuPeD among the clients of one precision: every third has a server of its own."""
  bits = cohort.assign_bits(options.bits, federation.num_clients)
  return methods.quped_within_groups(options, by_bits(federation, bits), bits)


def main(options: MixedBits) -> study.Outcome:
  """Runs the experiment."""
  jobs = (
    comparison.with_tuned(options, "local 2 bit", partial(methods.local_quantised, mixed=True)),
    comparison.with_tuned(options, "QuPeD 2 bit", within_precision),
    comparison.with_tuned(options, "QuPeD 2 bit", partial(methods.quped_quantised, mixed=True)),
    comparison.with_tuned(
      options, "QuPeD+ 2 bit", partial(methods.quped_from_averaging, mixed=True)
    ),
  )
  done = study.run("cifar10_mixed_bits", options, jobs)
  bits = cohort.assign_bits(options.bits, options.division.clients)
  thirds = {f"{b} bit": np.flatnonzero(bits == b) for b in options.bits}
  groups.write(done.folder, thirds, ("local mixed", "QuPeD within groups"))
  return done
