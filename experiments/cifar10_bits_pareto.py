"""CIFAR-10: accuracy against bits 1 to 8 and 32, with and without distillation.

make data NAME=cifar10
make experiment NAME=cifar10_bits_pareto

By default at the paper's scale, which wants an accelerator. pareto.png shows the accuracy against
the bytes of a shipped model. On two CPU cores (AMD EPYC), at a smaller scale, three seeds:

make experiment NAME=cifar10_bits_pareto ARGS="--downsample 2 --models cnn3 --clients 10
  --classes-per-client 3 --train-share 0.06 --validation 0.2 --rounds 100 --finetune-rounds 20
  --batch-size 5 --eval-every 100 --max-test-rows 300"

  bits     model  local (%)   QuPeD (%)
     1   11.9 kB  67.4 ± 3.0  65.9 ± 3.8
     2   16.4 kB  66.2 ± 2.0  68.1 ± 2.9
     3   20.9 kB  66.4 ± 2.3  68.3 ± 2.9
     4   25.4 kB  66.3 ± 2.4  67.9 ± 2.7
     5   30.1 kB  66.5 ± 2.5  68.0 ± 2.7
     6   34.9 kB  66.1 ± 2.7  68.0 ± 2.6
     7   40.1 kB  66.2 ± 2.5  68.0 ± 2.9
     8   46.1 kB  66.3 ± 3.3  68.2 ± 3.1
    32  149.8 kB  67.9 ± 2.6  68.7 ± 3.8
"""

from functools import partial

from experiments.recipes import comparison
from experiments.recipes.comparison import MixedBits
from qupeD_jax.results import page, plots
from qupeD_jax.study import methods, study
from qupeD_jax.study.options import PAPER_CIFAR10, replaced, withheld

DEFAULTS = replaced(
  withheld(MixedBits, "inner_steps", "averaging_share")(), **PAPER_CIFAR10, bits=tuple(range(1, 9))
)


def main(options: MixedBits) -> study.Outcome:
  """Runs the experiment."""
  tuned = partial(comparison.with_tuned, options)
  # All codebooks of a job are as wide as its widest, and narrow ones are cheaper.
  narrow = tuple(bits for bits in options.bits if bits <= 4)
  wide = tuple(bits for bits in options.bits if bits > 4)
  widths = [bits for bits in (narrow, wide) if bits]
  jobs = (
    tuned("local", methods.local_training),
    *(tuned("local 2 bit", partial(methods.local_quantised, bits=bits)) for bits in widths),
    tuned("QuPeD 32 bit", partial(methods.quped_quantised, bits=(32,))),
    *(tuned("QuPeD 2 bit", partial(methods.quped_quantised, bits=bits)) for bits in widths),
  )
  alone = {32: "local"} | {bits: f"local {bits} bit" for bits in options.bits}
  pairs = {f"QuPeD {bits} bit": (local,) for bits, local in alone.items()}
  comparisons = partial(study.among, pairs)
  done = study.run("cifar10_bits_pareto", options, jobs, comparisons=comparisons)
  points = [page.point(method, entry, done.summary) for method, entry in done.summary.items()]
  plots.pareto(points, done.folder / "pareto.png")
  return done
