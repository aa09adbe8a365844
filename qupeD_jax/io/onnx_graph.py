"""A packed model as an ONNX graph: codes stay packed, and are unpacked in the graph.

Images come in as uint8 [N, H, W, C] and are normalised within; logits go out.
"""

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import packing
from qupeD_jax.io.shipped import About
from qupeD_jax.io.weights import Quantised, Shapes, Weights
from qupeD_jax.models import architecture
from qupeD_jax.models.architecture import Layers

OPSET = 18
IR_VERSION = 8  # the one of opset 18: what reads the one reads the other
_CODES, _CENTERS = ".codes", ".centers"


class _Graph(NamedTuple):
  """What has been written so far."""

  nodes: list[onnx.NodeProto]
  constants: dict[str, np.ndarray]


class _Value(NamedTuple):
  """A value in the graph and the order of its axes: NHWC, NCHW or NC."""

  name: str
  axes: str


def model_of(weights: Weights, about: About, layers: Layers) -> onnx.ModelProto:
  """Writes the graph.

  Args:
    weights: as `weights.lay_out` returns them.
    about: for the images' shape, their normalisation and the number of classes.
    layers: what the network is made of.

  Returns:
    The model, without metadata.
  """
  graph = _Graph([], {})
  x = _Value(_normalised(graph, about), "NHWC")
  for layer in layers:
    x = _write(graph, x, layer, weights)
  graph.nodes[-1].output[0] = "logits"
  images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *about.image_shape])
  logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", about.num_classes])
  constants = [numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
  return helper.make_model(
    helper.make_graph(graph.nodes, about.model, [images], [logits], constants),
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=IR_VERSION,
    producer_name="qupeD_jax",
  )


def weights_in(model: onnx.ModelProto, shapes: Shapes, where: object) -> Weights:
  """Finds the weights in a model that `model_of` wrote.

  Args:
    model: the model.
    shapes: of every tensor of the network by name, as in `weights.shapes_of`.
    where: the file, for the error.

  Raises:
    BadInput: a tensor is missing.
  """
  constants = {tensor.name: tensor for tensor in model.graph.initializer}
  found = {}
  for name, shape in shapes.items():
    names = [name] if name in constants else [name + _CODES, name + _CENTERS]
    for part in names:
      require(part in constants, f"{where}: tensor {part}", "missing", "what the network has")
    arrays = [_array(constants[part], f"{where}: tensor {part}") for part in names]
    found[name] = arrays[0] if len(arrays) == 1 else Quantised(*arrays, shape)
  return found


def _array(tensor: onnx.TensorProto, where: str) -> np.ndarray:
  within = tensor.data_location != TensorProto.EXTERNAL
  require(within, where, "outside of the file", "a tensor within")
  try:
    return numpy_helper.to_array(tensor)
  except (KeyError, TypeError, ValueError) as error:
    raise BadInput(f"{where}: its bytes are not what its type and shape say") from error


# --- layers


def _write(graph: _Graph, x: _Value, layer: architecture.Layer, weights: Weights) -> _Value:
  match layer:
    case architecture.Conv(name, stride, has_bias):
      kernel = weights[f"{name}/kernel"]
      size = kernel.shape[-1]
      inputs = [_weight(graph, f"{name}/kernel", weights)]
      inputs += [_weight(graph, f"{name}/bias", weights)] if has_bias else []
      attributes = {"pads": [size // 2] * 4, "strides": [stride] * 2}
      image = _with_axes(graph, x, "NCHW").name
      return _Value(_op(graph, "Conv", image, *inputs, **attributes), "NCHW")
    case architecture.Norm(name):
      scaled = _op(graph, "Mul", x.name, _weight(graph, f"{name}/mul", weights))
      return x._replace(name=_op(graph, "Add", scaled, _weight(graph, f"{name}/add", weights)))
    case architecture.Relu():
      return x._replace(name=_op(graph, "Relu", x.name))
    case architecture.MaxPool():
      pooled = _op(graph, "MaxPool", x.name, kernel_shape=[2, 2], strides=[2, 2])
      return x._replace(name=pooled)
    case architecture.MeanPool():
      axes = _constant(graph, "pixel_axes", [2, 3])
      return _Value(_op(graph, "ReduceMean", x.name, axes, keepdims=0), "NC")
    case architecture.Flatten():
      return _Value(_op(graph, "Flatten", _with_axes(graph, x, "NHWC").name), "NC")
    case architecture.Dense(name):
      product = _op(graph, "MatMul", x.name, _weight(graph, f"{name}/kernel", weights))
      return x._replace(name=_op(graph, "Add", product, _weight(graph, f"{name}/bias", weights)))
    case architecture.Residual(body, stride, below, above):
      y = x
      for inner in body:
        y = _write(graph, y, inner, weights)
      return y._replace(name=_op(graph, "Add", y.name, _shortcut(graph, x, stride, below, above)))


def _shortcut(graph: _Graph, x: _Value, stride: int, below: int, above: int) -> str:
  name = x.name
  if stride > 1:
    ends = _constant(graph, "to_the_end", [2**31 - 1] * 2)
    starts, axes = (
      _constant(graph, "from_the_start", [0, 0]),
      _constant(graph, "pixel_axes", [2, 3]),
    )
    name = _op(
      graph, "Slice", name, starts, ends, axes, _constant(graph, f"every_{stride}", [stride] * 2)
    )
  if below or above:
    pads = _constant(graph, f"pad_{below}_{above}", [0, below, 0, 0, 0, above, 0, 0])
    name = _op(graph, "Pad", name, pads)
  return name


def _normalised(graph: _Graph, about: About) -> str:
  graph.constants["mean"] = np.asarray(about.mean, np.float32)
  graph.constants["std"] = np.asarray(about.std, np.float32)
  raw = _op(graph, "Cast", "images", to=TensorProto.FLOAT)
  return _op(graph, "Div", _op(graph, "Sub", raw, "mean"), "std")


def _with_axes(graph: _Graph, x: _Value, axes: str) -> _Value:
  """Turns an image to the other order of its axes where it has not got it."""
  if x.axes == axes or x.axes == "NC":
    return x
  order = [x.axes.index(axis) for axis in axes]
  return _Value(_op(graph, "Transpose", x.name, perm=order), axes)


# --- weights


def _weight(graph: _Graph, name: str, weights: Weights) -> str:
  """Writes a tensor, and the unpacking of one that is quantised; returns its name."""
  tensor = weights[name]
  if isinstance(tensor, Quantised):
    return _unpacked(graph, name, tensor)
  graph.constants[name] = tensor
  return name if tensor.dtype == np.float32 else _op(graph, "Cast", name, to=TensorProto.FLOAT)


def _unpacked(graph: _Graph, name: str, tensor: Quantised) -> str:
  bits = packing.bits_of(tensor.centers)
  packed, centers = name + _CODES, name + _CENTERS
  graph.constants[centers] = tensor.centers
  if 8 % bits:  # eight codes in `bits` bytes; there may have to be zeros to fill the last eight
    length = -(-len(tensor.codes) // bits) * bits
    graph.constants[packed] = np.pad(tensor.codes, (0, length - len(tensor.codes)))
    codes = _codes_across_bytes(graph, packed, bits)
  else:
    graph.constants[packed] = tensor.codes
    codes = _codes_within_bytes(graph, packed, bits)
  codes = _op(graph, "Cast", codes, to=TensorProto.INT32)
  entries = int(np.prod(tensor.shape))
  if len(graph.constants[packed]) * 8 // bits > entries:
    codes = _op(graph, "Reshape", codes, _constant(graph, "flat", [-1]))
    start, axis = _constant(graph, "start", [0]), _constant(graph, "first", [0])
    codes = _op(graph, "Slice", codes, start, _constant(graph, f"end_{entries}", [entries]), axis)
  shape = _constant(graph, "shape_" + "_".join(map(str, tensor.shape)), tensor.shape)
  return _op(graph, "Gather", centers, _op(graph, "Reshape", codes, shape))


def _codes_within_bytes(graph: _Graph, packed: str, bits: int) -> str:
  """Unpacks 1, 2, 4 or 8 bits: [bytes] to [bytes, 8 / bits]."""
  if bits == 8:
    return packed
  column = _op(graph, "Unsqueeze", packed, _constant(graph, "last", [-1]))
  shifts = _constant(graph, f"shifts_{bits}", range(0, 8, bits), np.uint8)
  shifted = _op(graph, "BitShift", column, shifts, direction="RIGHT")
  return _op(graph, "BitwiseAnd", shifted, _constant(graph, f"mask_{bits}", 2**bits - 1, np.uint8))


def _codes_across_bytes(graph: _Graph, packed: str, bits: int) -> str:
  """Unpacks 3, 5, 6 or 7 bits: [groups * bits] bytes to [groups, 8].

  A code starts in one byte, at a shift, and may end in the next. One that does not is left of the
  mask there: what the next byte (or, after the last, the same) adds lies above it.
  """
  offsets = bits * np.arange(8)
  low, shift = offsets // 8, offsets % 8
  rows = _op(graph, "Reshape", packed, _constant(graph, f"rows_{bits}", [-1, bits]))
  parts = [
    _op(
      graph,
      "BitShift",
      _op(graph, "Gather", rows, _constant(graph, f"{side}_{bits}", index), axis=1),
      _constant(graph, f"{side}_shift_{bits}", by, np.uint8),
      direction=direction,
    )
    for side, index, by, direction in (
      ("low", low, shift, "RIGHT"),
      ("high", np.minimum(low + 1, bits - 1), np.minimum(8 - shift, 7), "LEFT"),
    )
  ]
  both = _op(graph, "BitwiseOr", *parts)
  return _op(graph, "BitwiseAnd", both, _constant(graph, f"mask_{bits}", 2**bits - 1, np.uint8))


# --- the graph


def _op(graph: _Graph, kind: str, *inputs: str, **attributes) -> str:
  """Appends a node; returns the name of its output, short, since names are part of the file."""
  output = f"v{len(graph.nodes)}"
  graph.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
  return output


def _constant(graph: _Graph, name: str, value, dtype=np.int64) -> str:
  """Writes a constant that tensors share; returns its name."""
  graph.constants[name] = np.asarray(value, dtype)
  return name
