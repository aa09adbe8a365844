"""Personal models as Core ML packages: codes and codebooks as Apple's own look-up tables.

Each quantised tensor is a `constexpr_lut_to_dense`, for which iOS 18 and macOS 15 have codes of 1,
2, 3, 4, 6 and 8 bits; 5 and 7 are widened to 6 and 8, the table filled up with its last center. A
package takes one image, float32 [1, H, W, C] of pixels as they came, and returns logits. It is
written without a Mac, and predicts only on one.
"""

import contextlib
import io
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qupeD_jax.io import files, packing, shipped, weights
from qupeD_jax.io.shipped import About
from qupeD_jax.io.weights import Quantised, Weights
from qupeD_jax.models import architecture
from qupeD_jax.models.architecture import Layers

with contextlib.redirect_stderr(io.StringIO()):  # it tells at length what else is not installed
  import coremltools as ct
  from coremltools.converters.mil import Builder as mb  # noqa: N813 (its documents say so)
  from coremltools.converters.mil.frontend.milproto.load import load as load_program
  from coremltools.converters.mil.mil import types

_WIDER = {5: 6, 7: 8}  # bits of a code that there are none of
_CODES = {
  1: types.np_uint1_dtype,
  2: types.np_uint2_dtype,
  3: types.np_uint3_dtype,
  4: types.np_uint4_dtype,
  6: types.np_uint6_dtype,
  8: np.uint8,
}
_TARGET = ct.target.iOS18


def save(path: Path, model: shipped.Shipped, layers: Layers | None = None) -> None:
  """Writes a packed model as an .mlpackage, all of it or nothing.

  Args:
    path: the package, a folder; an older one of that name is replaced.
    model: the packed model and its description.
    layers: what its network is made of; None for one of the library's.

  Raises:
    BadInput: the package cannot be written, or `layers` is None and the network is not one of the
      library's.
  """
  layers = layers or weights.known_layers(model.about.model)
  program = _program(weights.lay_out(model.packed, layers), model.about, layers)
  with contextlib.redirect_stderr(io.StringIO()):
    # Nothing may be folded: a look-up table times a number per channel is a table no longer.
    converted = ct.convert(
      program,
      convert_to="mlprogram",
      minimum_deployment_target=_TARGET,
      compute_precision=ct.precision.FLOAT32,
      pass_pipeline=ct.PassPipeline.EMPTY,
      skip_model_load=True,
    )
  converted.user_defined_metadata["metadata"] = files.dump(model.about.metadata)
  partial = path.with_name("partial." + path.name)
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    converted.save(str(partial))
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


def look_up(path: Path) -> Mapping[str, np.ndarray]:
  """Reads the tensors of a package and looks every code up in its table.

  Args:
    path: an .mlpackage.

  Returns:
    "conv_1_kernel" -> float32, of every tensor that is quantised.
  """
  with contextlib.redirect_stderr(io.StringIO()):
    spec = ct.models.utils.load_spec(str(path))
    folder = path / "Data" / "com.apple.CoreML" / "weights"
    program = load_program(spec, spec.specificationVersion, file_weights_dir=str(folder))
  return {
    op.outputs[0].name: op.lut.val.ravel()[op.indices.val.astype(int)]
    for op in program.functions["main"].operations
    if op.op_type == "constexpr_lut_to_dense"
  }


def name_of(tensor: str) -> str:
  """Returns what a tensor is called in a package, where names hold no slashes.

  >>> name_of("conv_1/kernel")
  'conv_1_kernel'
  """
  return tensor.replace("/", "_")


def _program(tensors: Weights, about: About, layers: Layers):
  def network(images):
    mean, std = np.float32(about.mean), np.float32(about.std)
    x = mb.real_div(x=mb.sub(x=images, y=mean), y=std)
    x = mb.transpose(x=x, perm=[0, 3, 1, 2])
    for layer in layers:
      x = _write(x, layer, tensors)
    return mb.identity(x=x, name="logits")

  specs = [mb.TensorSpec(shape=(1, *about.image_shape))]
  return mb.program(input_specs=specs, opset_version=_TARGET)(network)


def _write(x, layer: architecture.Layer, tensors: Weights):
  """Adds a layer to the program; images are [1, C, H, W]."""
  match layer:
    case architecture.Conv(name, stride, has_bias):
      kernel = tensors[f"{name}/kernel"]
      pad = [kernel.shape[-1] // 2] * 4
      bias = {"bias": _weight(f"{name}/bias", tensors)} if has_bias else {}
      weight = _weight(f"{name}/kernel", tensors)
      return mb.conv(x=x, weight=weight, strides=[stride] * 2, pad_type="custom", pad=pad, **bias)
    case architecture.Norm(name):
      scaled = mb.mul(x=x, y=_weight(f"{name}/mul", tensors))
      return mb.add(x=scaled, y=_weight(f"{name}/add", tensors))
    case architecture.Relu():
      return mb.relu(x=x)
    case architecture.MaxPool():
      return mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
    case architecture.MeanPool():
      return mb.reduce_mean(x=x, axes=[2, 3], keep_dims=False)
    case architecture.Flatten():
      return mb.reshape(x=mb.transpose(x=x, perm=[0, 2, 3, 1]), shape=[1, math.prod(x.shape[1:])])
    case architecture.Dense(name):
      product = mb.matmul(x=x, y=_weight(f"{name}/kernel", tensors))
      return mb.add(x=product, y=_weight(f"{name}/bias", tensors))
    case architecture.Residual(body, stride, below, above):
      y = x
      for inner in body:
        y = _write(y, inner, tensors)
      return mb.add(x=y, y=_shortcut(x, stride, below, above))


def _shortcut(x, stride: int, below: int, above: int):
  if stride > 1:
    x = mb.slice_by_index(
      x=x, begin=[0] * 4, end=[0] * 4, stride=[1, 1, stride, stride], end_mask=[True] * 4
    )
  if below or above:
    x = mb.pad(x=x, pad=[0, 0, below, above, 0, 0, 0, 0], mode="constant", constant_val=0.0)
  return x


def _weight(name: str, tensors: Weights):
  """Returns a tensor as a constant, or as a look-up table and its codes."""
  tensor = tensors[name]
  if not isinstance(tensor, Quantised):
    return mb.const(val=np.asarray(tensor, np.float32), name=name_of(name))
  bits = packing.bits_of(tensor.centers)
  codes = packing.unpack_codes(tensor.codes, bits, math.prod(tensor.shape)).reshape(tensor.shape)
  wide = _WIDER.get(bits, bits)
  table = np.pad(tensor.centers, (0, 2**wide - 2**bits), mode="edge")
  table = table.reshape(*[1] * codes.ndim, -1, 1)
  return mb.constexpr_lut_to_dense(
    indices=codes.astype(_CODES[wide]), lut=table, name=name_of(name)
  )
