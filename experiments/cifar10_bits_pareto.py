"""CIFAR-10: accuracy against bits 1 to 8 and 32, with and without distillation.

make data NAME=cifar10
make experiment NAME=cifar10_bits_pareto

By default at the paper's scale, which wants an accelerator. pareto.png shows the accuracy against
the bytes of a shipped model. What came of it, at a smaller scale, is in docs/reproduction.md.
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
