"""A network trained in PyTorch as variables of ours.

  quped import-torch FILE.safetensors --model resnet20 [--out FILE]

FILE.safetensors holds a state dict, as `safetensors.torch.save_file(network.state_dict(), FILE)`
writes it, of a residual network in the usual CIFAR implementation: conv1, bn1, layer1 to layer3 and
linear, or fc; what wrappers put before these names is taken off. What --out writes is the file of a
shipped model (packing.py) in which nothing is quantised: it can be started from, exported and
asked for predictions. What the network was told of images, --mean and --std, no state dict says.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict

from qupeD_jax import command_line, models
from qupeD_jax.checks import BadInput, positive, require
from qupeD_jax.io import packing, tensor_file
from qupeD_jax.types import FULL_PRECISION, PyTree

# Of CIFAR-10's training images, per channel, as such networks are commonly told them.
MEAN = tuple(255 * share for share in (0.4914, 0.4822, 0.4465))
STD = tuple(255 * share for share in (0.2023, 0.1994, 0.2010))

NAMES = tuple(name for name in models.NAMES if name.startswith("resnet"))

# Our modules, and what PyTorch calls them: patterns, of which exactly one fits a whole name.
_MODULES = {
  r"stem": r"conv1",
  r"stem_norm": r"bn1",
  r"stage_(\d+)_block_(\d+)/conv_(\d+)": r"layer\1.\2.conv\3",
  r"stage_(\d+)_block_(\d+)/norm_(\d+)": r"layer\1.\2.bn\3",
  r"head": r"linear",
}
_TENSORS = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
_VARIANCES = ("running_var", "/var")
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning and others
_IGNORED = "num_batches_tracked"  # for a momentum that changes; ours does not
# By rank: kernels OIHW and HWIO, dense ones [out, in] and [in, out], vectors.
TO_OURS = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def load(
  path: str | os.PathLike,
  name: str,
  num_classes: int = 10,
  image_shape: models.ImageShape = (32, 32, 3),
) -> PyTree:
  """Reads a PyTorch state dict.

  Args:
    path: a safetensors file.
    name: of the network, one of NAMES.
    num_classes: its logits.
    image_shape: (H, W, C) of its images.

  Returns:
    The variables of `models.make(name, num_classes, image_shape)`, in float32 numpy arrays.

  Raises:
    BadInput: the network is unknown, the file cannot be read, or one of its tensors is missing,
      extra, of another shape, or not of floats that float32 can hold, variances of at least 0.
  """
  require(name in NAMES, "model", name, ", ".join(NAMES))
  shapes = _shapes(name, num_classes, image_shape)
  theirs = {torch_name(ours): ours for ours in shapes}
  tensors, _ = _read(path)
  tensors = _unwrapped(path, {k: x for k, x in tensors.items() if not k.endswith(_IGNORED)})
  _require_fit(path, tensors, name, {key: _to_torch(shapes[ours]) for key, ours in theirs.items()})
  return unflatten_dict({theirs[key]: _to_ours(x) for key, x in tensors.items()}, sep="/")


def read_variables(
  path: str | os.PathLike,
  name: str,
  num_classes: int = 10,
  image_shape: models.ImageShape = (32, 32, 3),
) -> PyTree:
  """Reads variables to start from: a file that --out or `packing.save` wrote, or a PyTorch one.

  Args:
    path: a safetensors file; of a quantised model every entry becomes its center.
    name: of the network, one of models.NAMES, or of NAMES for a PyTorch file.
    num_classes: its logits.
    image_shape: (H, W, C) of its images.

  Returns:
    As `load`.

  Raises:
    BadInput: as `load`.
  """
  _, header = _read(path)
  if header.get("format") != packing.FORMAT:
    return load(path, name, num_classes, image_shape)
  packed, _ = packing.load(path)
  variables = packing.unpack(packed)
  shapes = _shapes(name, num_classes, image_shape)
  _require_fit(path, flatten_dict(variables, sep="/"), name, shapes)
  return variables


def torch_name(path: str) -> str:
  """Says what PyTorch calls one of our tensors.

  >>> torch_name("params/stage_2_block_0/conv_1/kernel")
  'layer2.0.conv1.weight'
  >>> torch_name("stats/batch_stats/stem_norm/var")
  'bn1.running_var'
  """
  module, tensor = re.fullmatch(r"(?:params|stats/batch_stats)/(.+)/(\w+)", path).groups()
  fits = ((re.fullmatch(pattern, module), theirs) for pattern, theirs in _MODULES.items())
  theirs = next(fit.expand(theirs) for fit, theirs in fits if fit)
  return f"{theirs}.{_TENSORS[tensor]}"


def _read(path: str | os.PathLike) -> tuple[tensor_file.Tensors, tensor_file.Header]:
  """Reads a safetensors file; of a pickle says how it becomes one."""
  try:
    return tensor_file.read(path)
  except BadInput as error:
    if not _is_pickled(path):
      raise
    raise BadInput(
      f"{path}: a pickle, which may run programs and is not read; where PyTorch is, "
      "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), OTHER_FILE)` converts it"
    ) from error


def _is_pickled(path: str | os.PathLike) -> bool:
  """Tells whether a file begins as torch.save writes it, as a zip file or, once, a plain pickle."""
  with contextlib.suppress(OSError), open(path, "rb") as file:
    return file.read(4).startswith((b"PK\3\4", b"\x80\2"))
  return False


def _unwrapped(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> tensor_file.Tensors:
  """Takes off what wrappers put before a network's names, and calls its last layer linear.

  Raises:
    BadInput: two tensors would have one name.
  """
  found = {}
  for key, tensor in tensors.items():
    name = key
    while name.startswith(_WRAPPERS):
      name = name.partition(".")[2]
    name = re.sub(r"^fc\.", "linear.", name)
    if name in found:
      raise BadInput(f"{path}: {key} is one of several tensors that could be {name}")
    found[name] = tensor
  return found


def _shapes(
  name: str, num_classes: int, image_shape: models.ImageShape
) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor of a network by its path."""
  model = models.make(name, num_classes, image_shape)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  return {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}


def _to_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(shape[axis] for axis in TO_TORCH[len(shape)])


def _to_ours(tensor: np.ndarray) -> np.ndarray:
  return np.array(tensor.transpose(TO_OURS[tensor.ndim]), np.float32, order="C")


def _require_fit(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  name: str,
  shapes: Mapping[str, tuple[int, ...]],
) -> None:
  """Requires a file's tensors to be those of a network, of its shapes and of finite floats."""
  for key in shapes:
    if key not in tensors:
      raise BadInput(f"{path}: {key} is missing, a tensor of {name}")
  for key, tensor in tensors.items():
    if key not in shapes:
      raise BadInput(f"{path}: {key} is no tensor of {name}")
    require(tensor.shape == shapes[key], f"{path}: shape of {key}", tensor.shape, str(shapes[key]))
    floating = jnp.issubdtype(tensor.dtype, jnp.floating)
    require(floating, f"{path}: type of {key}", tensor.dtype, "a floating-point type")
    with np.errstate(over="ignore"):
      narrowed = np.asarray(tensor, np.float32)
    if not np.isfinite(narrowed).all():
      raise BadInput(f"{path}: {key} has entries that are not finite in float32")
    if key.endswith(_VARIANCES) and not (narrowed >= 0).all():
      raise BadInput(f"{path}: {key} has entries below 0, which no variance is")


# --- the command line


@dataclasses.dataclass(frozen=True)
class Options:
  """Turns a PyTorch state dict into variables of ours."""

  file: tyro.conf.Positional[Path]
  """The state dict, a safetensors file."""
  model: Annotated[str, tyro.conf.arg(metavar="|".join(NAMES))]
  """The network."""
  out: Path | None = None
  """Where to write the variables; nothing is written without it."""
  num_classes: int = 10
  """Logits of the network."""
  image_shape: models.ImageShape = (32, 32, 3)
  """Height, width and channels of its images."""
  mean: tuple[float, ...] = ()
  """What it takes off each channel, 0 to 255; by default, of three channels, CIFAR-10's mean."""
  std: tuple[float, ...] = ()
  """What it divides each channel by then; by default, of three, CIFAR-10's standard deviation."""


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns 0, or 2 for what cannot be done."""
  try:
    options = command_line.parse(Options, arguments, prog="quped import-torch")
    network = options.model, options.num_classes, options.image_shape
    variables = load(options.file, *network)
    print(f"{options.model}: {_summary(variables)}")
    if options.out is not None:
      about = models.make(*network, mean=_mean(options), std=_std(options)).about
      packing.save(options.out, packing.pack(variables, {}), {"bits": FULL_PRECISION, **about})
      print(options.out)
  except BadInput as error:
    return command_line.fail(command_line.in_flags(error, command_line.leaves(Options)))
  return 0


def _mean(options: Options) -> tuple[float, ...]:
  return _per_channel("mean", options.mean or MEAN, options.image_shape[-1])


def _std(options: Options) -> tuple[float, ...]:
  values = _per_channel("std", options.std or STD, options.image_shape[-1])
  for value in values:
    positive("std", value)
  return values


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
  """Requires a finite number for every channel."""
  fits = len(values) == channels and bool(np.isfinite(values).all())
  shown = " ".join(f"{value:g}" for value in values)
  require(fits, name, shown, f"a finite number for each channel, of which there are {channels}")
  return values


def _summary(variables: PyTree) -> str:
  """Says how much there is of a network.

  >>> _summary({"params": {"kernel": np.zeros((3, 4))}, "stats": {"mean": np.zeros(4)}})
  '12 parameters in 1 tensors, 4 running statistics in 1'
  """
  leaves = {kind: jax.tree.leaves(variables[kind]) for kind in ("params", "stats")}
  entries = {kind: sum(leaf.size for leaf in tensors) for kind, tensors in leaves.items()}
  return (
    f"{entries['params']:,} parameters in {len(leaves['params'])} tensors, "
    f"{entries['stats']:,} running statistics in {len(leaves['stats'])}"
  )
