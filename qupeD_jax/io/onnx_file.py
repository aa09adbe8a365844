"""ONNX files of personal models: written whole, sealed with a checksum, and read with suspicion.

The description and the checksum are in the file's metadata. Other runtimes read the file as any
other, but do not look at the checksum: they cannot tell a damaged weight from a sound one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import files, onnx_graph, packing, sealed, shipped, weights
from qupeD_jax.models.architecture import Layers

FORMAT = "qupeD_jax ONNX 1"
_DIGEST = "sha256"


class Opened(NamedTuple):
  """A file that was found sound."""

  data: bytes  # of the whole file, what a runtime takes
  about: shipped.About
  weights: weights.Weights
  digest: str


def write(model: shipped.Shipped, layers: Layers | None = None) -> bytes:
  """Writes a packed model as an ONNX file.

  Args:
    model: the packed model and its description.
    layers: what its network is made of; None for one of the library's.

  Returns:
    The file's bytes.

  Raises:
    BadInput: `layers` is None and the network is not one of the library's.
  """
  packed, about = model
  layers = layers or weights.known_layers(about.model)
  proto = onnx_graph.model_of(weights.lay_out(packed, layers), about, layers)
  texts = {"format": FORMAT, "metadata": files.dump(about.metadata)}
  helper.set_model_props(proto, texts)
  onnx.checker.check_model(proto, full_check=True)
  # Messages one after the other are merged, so that the digest can stand at the very end.
  last = onnx.ModelProto()
  helper.set_model_props(last, {_DIGEST: "0" * sealed.DIGITS})
  return sealed.seal(proto.SerializeToString() + last.SerializeToString()[: -sealed.DIGITS])


def read(path: Path) -> Opened:
  """Reads a file that `write` wrote, of one of the library's networks.

  What is read is written anew and has to be the same: a file that was made up, or has shapes,
  operators or tensors other than its network's, is refused even if its checksum is right.

  Raises:
    BadInput: the file is missing, damaged or foreign, or not what its description says.
  """
  data = sealed.read(path)
  proto = onnx.ModelProto()
  try:
    proto.ParseFromString(data)
  except DecodeError as error:
    raise BadInput(f"{path}: damaged (no ONNX model)") from error
  props = {prop.key: prop.value for prop in proto.metadata_props}
  require(props.get("format") == FORMAT, f"{path}: format", props.get("format"), FORMAT)
  about = shipped.describe(files.parse(props.get("metadata", "").encode(), path), path)
  shapes = shipped.shapes_of(about, path)
  layers = weights.known_layers(about.model)
  shapes = weights.shapes_of(shapes, layers)
  found = _checked(onnx_graph.weights_in(proto, shapes, path), shapes, path)
  expected = onnx_graph.model_of(found, about, layers)
  del proto.metadata_props[:]
  if proto != expected:
    raise BadInput(f"{path}: is not the graph of {about.model} with these weights")
  return Opened(data, about, found, props[_DIGEST])


def predictor(opened: Opened) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the model as a function from images [N, H, W, C] uint8 to logits, by onnxruntime."""
  import onnxruntime

  session = onnxruntime.InferenceSession(opened.data, providers=["CPUExecutionProvider"])
  return lambda images: session.run(["logits"], {"images": images})[0]


def _checked(tensors: weights.Weights, shapes: weights.Shapes, where: object) -> weights.Weights:
  """Returns weights without the zeros that fill codes up; all have to be sound."""
  found = {}
  for name, tensor in tensors.items():
    if isinstance(tensor, weights.Quantised):
      bits = packing.bits_of(tensor.centers)
      tensor = tensor._replace(codes=tensor.codes[: packing.code_bytes(tensor.shape, bits)])
      shipped.check_quantised(f"{where}: {name}", *tensor)
    else:
      shipped.check_kept(f"{where}: {name}", tensor)
      shape = shapes[name]
      require(tensor.shape == shape, f"{where}: shape of {name}", tensor.shape, str(shape))
    found[name] = tensor
  return found
