"""A packed model's tensors as runtimes with images [N, C, H, W] take them.

Kernels of convolutions are turned to OIHW, their codes with them. Batch normalisation is one
multiplication and one addition per channel after the convolution: folded into the kernel it would
make of each codebook as many as there are channels.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from qupeD_jax import models
from qupeD_jax.checks import require
from qupeD_jax.io import packing
from qupeD_jax.models import architecture
from qupeD_jax.models.architecture import Layers

_OIHW = (3, 2, 0, 1)  # of HWIO


class Quantised(NamedTuple):
  """A tensor by its packed codes, in the order of `shape`."""

  codes: np.ndarray  # [bytes] uint8
  centers: np.ndarray  # [2^bits] float32
  shape: tuple[int, ...]


Weights = Mapping[str, np.ndarray | Quantised]
Shapes = Mapping[str, tuple[int, ...]]


def lay_out(packed: packing.Packed, layers: Layers) -> Weights:
  """Turns a packed model's tensors.

  Args:
    packed: the model.
    layers: what its network is made of.

  Returns:
    By name: "conv_1/kernel" OIHW, "head/kernel" [in, out], "head/bias" [out], and of batch
    normalisation "norm_1/mul" and "norm_1/add" [D, 1, 1].
  """
  found = {}
  for layer in flat(layers):
    match layer:
      case architecture.Norm(name, epsilon):
        mul, add = _affine(packed.kept, name, epsilon)
        found |= {f"{name}/mul": mul[:, None, None], f"{name}/add": add[:, None, None]}
      case architecture.Conv(name, _, has_bias):
        found[f"{name}/kernel"] = _kernel(packed, f"{name}/kernel", _OIHW)
        if has_bias:
          found[f"{name}/bias"] = packed.kept[f"params/{name}/bias"]
      case architecture.Dense(name):
        found[f"{name}/kernel"] = _kernel(packed, f"{name}/kernel", (0, 1))
        found[f"{name}/bias"] = packed.kept[f"params/{name}/bias"]
  return found


def shapes_of(shapes: Shapes, layers: Layers) -> Shapes:
  """Returns the shapes of what `lay_out` returns.

  Args:
    shapes: of the network's tensors by path, as "params/head/bias".
    layers: what it is made of.
  """
  found = {}
  for layer in flat(layers):
    match layer:
      case architecture.Norm(name):
        channels = (*shapes[f"params/{name}/scale"], 1, 1)
        found |= {f"{name}/mul": channels, f"{name}/add": channels}
      case architecture.Conv(name, _, has_bias):
        kernel = shapes[f"params/{name}/kernel"]
        found[f"{name}/kernel"] = tuple(kernel[axis] for axis in _OIHW)
        if has_bias:
          found[f"{name}/bias"] = shapes[f"params/{name}/bias"]
      case architecture.Dense(name):
        found |= {f"{name}/{of}": shapes[f"params/{name}/{of}"] for of in ("kernel", "bias")}
  return found


def known_layers(name: str) -> Layers:
  """Lists the layers of one of the library's networks.

  Raises:
    BadInput: there is none of that name, and no list of its layers.
  """
  allowed = f"{', '.join(models.NAMES)}; a network of one's own brings a list of its layers"
  require(name in models.NAMES, "model", name, allowed)
  return models.layers(name)


def flat(layers: Layers) -> Iterator[architecture.Layer]:
  """Yields all layers, those of residual bodies in their place."""
  for layer in layers:
    if isinstance(layer, architecture.Residual):
      yield from flat(layer.body)
    else:
      yield layer


def _affine(kept: Mapping[str, np.ndarray], name: str, epsilon: float) -> list[np.ndarray]:
  """Returns m and a of normalisation as m x + a, [D] float32 each, worked out in float64."""
  paths = [f"params/{name}/scale", f"params/{name}/bias"]
  paths += [f"stats/batch_stats/{name}/{of}" for of in ("mean", "var")]
  scale, bias, mean, var = (kept[path].astype(np.float64) for path in paths)
  mul = scale / np.sqrt(var + epsilon)
  return [part.astype(np.float32) for part in (mul, bias - mul * mean)]


def _kernel(packed: packing.Packed, path: str, order: tuple[int, ...]) -> np.ndarray | Quantised:
  """Turns a kernel's axes, or those of its codes."""
  if path not in packed.codes:
    return np.ascontiguousarray(packed.kept[f"params/{path}"].transpose(order))
  codes = packing.codes_of(packed, path).transpose(order)
  centers = packed.centers[path]
  return Quantised(
    packing.pack_codes(codes.ravel(), packing.bits_of(centers)), centers, codes.shape
  )
