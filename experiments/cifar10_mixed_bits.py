"""CIFAR-10 with thirds of the clients at 1, 2 and 32 bits: what each third gains by federating.

make data NAME=cifar10
make experiment NAME=cifar10_mixed_bits

By default at the paper's scale, which wants an accelerator. groups.md compares, for each third,
training alone, QuPeD among the clients of the same precision, and QuPeD among all.

What came of it, at a smaller scale, is in docs/reproduction.md.
"""

from functools import partial

import numpy as np

from experiments.recipes import comparison, groups
from experiments.recipes.comparison import MixedBits
from qupeD_jax.data import cohort
from qupeD_jax.study import methods, study
from qupeD_jax.study.federation import by_bits
from qupeD_jax.study.options import PAPER_CIFAR10, replaced, trained_clients, withheld

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
  bits = cohort.assign_bits(options.bits, trained_clients(options))
  thirds = {f"{b} bit": np.flatnonzero(bits == b) for b in options.bits}
  groups.write(done.folder, thirds, ("local mixed", "QuPeD within groups"))
  return done
