"""Times the forms of a convolution: a training step of CNN1's two blocks, with kernels per client.

python -m benchmarks.conv [--clients 4] [--batch-size 50] [--dtype float32]
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from benchmarks.timing import alternate
from qupeD_jax.models.conv import forms


@dataclasses.dataclass(frozen=True)
class Options:
  """What is timed."""

  clients: int = 4
  """Clients side by side."""
  batch_size: int = 50
  """Images of 32x32x3 per client."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """Of the computation."""
  forms: tuple[Literal["serial", "tiles", "im2col", "lax"], ...] = forms.FORMS[::-1]
  """What is compared with the first of them; on a CPU lax takes minutes in the scan."""
  steps: int = 2
  """Steps of the scan."""
  repeats: int = 5
  """Timings, of which the median counts."""


def blocks(kernels, x, form: str):
  """Runs two blocks of convolution, ReLU and pooling."""
  for kernel in kernels:
    x = forms.conv_relu_pool(x, kernel, jnp.zeros(kernel.shape[-1:], kernel.dtype), form)
  return x


def train_step(kernels, x, form: str):
  """Takes one gradient step on the kernels of one client."""
  loss = lambda kernels: jnp.sum(blocks(kernels, x, form).astype(jnp.float32) ** 2)
  return jax.tree.map(lambda k, g: k - 1e-6 * g, kernels, jax.grad(loss)(kernels))


def scanned(kernels, x, form: str, steps: int):
  """Takes several steps of all clients in a scan."""
  step = jax.vmap(functools.partial(train_step, form=form))
  return jax.lax.scan(lambda k, _: (step(k, x), None), kernels, None, length=steps)[0]


def main(options: Options) -> None:
  """Prints the time of a step in each form, in a scan and plain, and its ratio to the first."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (options.clients, 5, 5, 3, 64), (options.clients, 5, 5, 64, 64)
  kernels = tuple(
    (0.05 * jax.random.normal(k, s)).astype(options.dtype)
    for k, s in zip(keys, shapes, strict=False)
  )
  images = (options.clients, options.batch_size, 32, 32, 3)
  x = jax.random.normal(keys[2], images).astype(options.dtype)
  print(f"{jax.devices()[0].device_kind}, {options}")
  for place, steps in (("in a scan", options.steps), ("plain", 1)):
    calls = {}
    for form in options.forms:
      run = functools.partial(scanned, form=form, steps=steps)
      if steps == 1:
        run = jax.vmap(functools.partial(train_step, form=form))
      calls[form] = functools.partial(jax.jit(run), kernels, x)
    times = alternate(calls, options.repeats)
    each = (f"{form} {1e3 * t / steps:.1f} ms ({ratio:.2f})" for form, (t, ratio) in times.items())
    print(f"{place}: {', '.join(each)}", flush=True)


if __name__ == "__main__":
  main(tyro.cli(Options))
