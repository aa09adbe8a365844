"""Times the pieces of a quantised step: nearest centers, sums per center, both proximal maps.

python -m benchmarks.quantiser [--clients 4] [--entries 100000] [--centers 2 4 16 256]
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import tyro

from benchmarks.timing import alternate
from qupeD_jax.quantization import codebook, ops, prox


@dataclasses.dataclass(frozen=True)
class Options:
  """What is timed."""

  clients: int = 4
  """Clients side by side."""
  entries: int = 100_000
  """Entries of a client's tensor."""
  centers: tuple[int, ...] = (2, 4, 16, 256)
  """Numbers of centers, 2 to 256."""
  repeats: int = 7
  """Timings, of which the median counts."""


def pieces(num_centers: int) -> dict:
  """Returns what is timed, by name: functions of a client's (x, gradient, centers)."""

  def slope(x, g, centers):
    return jax.vjp(lambda c: ops.hard_quantize(x, c), centers)[1](g)[0]

  def sums(form, x, g, centers):
    # Owners that cost next to nothing to find: any will do.
    index = jnp.clip((x * num_centers).astype(jnp.int32), 0, num_centers - 1)
    return form(g, index, num_centers=num_centers)

  return {
    "nearest": lambda x, g, centers: codebook.nearest(x, centers),
    "sums per center": functools.partial(sums, codebook.sums_per_center),
    # What sums of up to 16 centers are on an accelerator; there the two are one.
    "sums in one pass": functools.partial(sums, codebook._sums_in_one_pass),
    "gradient in c": slope,
    "prox in x": lambda x, g, centers: prox.prox_weights(x, centers, 1e-3),
    "prox in c": lambda x, g, centers: prox.prox_centers(centers, x, 1e-6),
  }


def main(options: Options) -> None:
  """Prints what each piece takes: time, and bytes read and written by XLA's cost analysis.

  The time is nanoseconds per entry, and a multiple of that of one pass, x - 0.1 g.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  shape = options.clients, options.entries
  x, g = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
  print(f"{jax.devices()[0].device_kind}, {options}")
  for num_centers in options.centers:
    centers = jnp.sort(jax.random.normal(keys[2], (options.clients, num_centers)))
    timed = {"one pass": lambda x, g, centers: x - 0.1 * g, **pieces(num_centers)}
    compiled = {
      name: jax.jit(jax.vmap(fn)).lower(x, g, centers).compile() for name, fn in timed.items()
    }
    calls = {name: functools.partial(fn, x, g, centers) for name, fn in compiled.items()}
    seconds = alternate(calls, options.repeats)
    for name, (median, ratio) in seconds.items():
      each, moved = 1e9 * median / x.size, compiled[name].cost_analysis()["bytes accessed"] / x.size
      took = f"{each:8.2f} ns, {ratio:6.1f} passes, {moved:6.1f} bytes"
      print(f"m = {num_centers:3}: {name:16} {took}", flush=True)


if __name__ == "__main__":
  main(tyro.cli(Options))
