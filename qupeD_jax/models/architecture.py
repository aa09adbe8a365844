"""What a network is made of, in order: what writes it for another runtime reads this list.

Images are [B, H, W, C] here, kernels of convolutions [k, k, C, D] and of dense layers [in, out]; a
layer's name is that of its tensors, as "conv_1" of "conv_1/kernel". A network of one's own needs
such a list where it is to be written as ONNX or Core ML, and for nothing else.
"""

from typing import NamedTuple

from flax import linen as nn

from qupeD_jax.models.cnn import CNN
from qupeD_jax.models.mlp import MLP
from qupeD_jax.models.resnet import EPSILON, ResNet


class Conv(NamedTuple):
  """A convolution with k // 2 zeros on every side of the image."""

  name: str
  stride: int = 1
  has_bias: bool = False


class Norm(NamedTuple):
  """Batch normalisation by running statistics."""

  name: str
  epsilon: float = EPSILON


class Relu(NamedTuple):
  """max(x, 0)."""


class MaxPool(NamedTuple):
  """The maximum of 2x2 pixels; an odd last row or column is dropped."""


class MeanPool(NamedTuple):
  """The mean over all pixels: [B, H, W, C] to [B, C]."""


class Flatten(NamedTuple):
  """[B, H, W, C] to [B, H W C], channels last."""


class Dense(NamedTuple):
  """x @ kernel + bias."""

  name: str


class Residual(NamedTuple):
  """body(x), plus every stride-th pixel of x with zeros as the channels that x lacks."""

  body: tuple
  stride: int = 1
  below: int = 0  # zero channels before those of x
  above: int = 0  # and after


Layer = Conv | Norm | Relu | MaxPool | MeanPool | Flatten | Dense | Residual
Layers = tuple[Layer, ...]


def layers(module: nn.Module) -> Layers:
  """Lists the layers of one of the library's networks.

  Args:
    module: an MLP, a CNN or a ResNet.

  >>> layers(MLP(num_classes=10, widths=(64,)))
  (Flatten(), Dense(name='stem'), Relu(), Dense(name='head'))
  """
  match module:
    case MLP():
      return _mlp(module)
    case CNN():
      return _cnn(module)
    case ResNet():
      return _resnet(module)
  raise TypeError(f"{type(module).__name__}: its list of layers is not known")


def _mlp(module: MLP) -> Layers:
  names = [f"dense_{i}" if i else "stem" for i in range(len(module.widths))]
  return (Flatten(), *_hidden(names), Dense("head"))


def _cnn(module: CNN) -> Layers:
  names = [f"conv_{i}" if i else "stem" for i in range(len(module.channels))]
  convolutions = [
    layer for name in names for layer in (Conv(name, has_bias=True), Relu(), MaxPool())
  ]
  dense = _hidden([f"dense_{i}" for i in range(1, len(module.widths) + 1)])
  return (*convolutions, Flatten(), *dense, Dense("head"))


def _resnet(module: ResNet) -> Layers:
  found = [Conv("stem"), Norm("stem_norm"), Relu()]
  present = module.channels[0]
  for stage, features in enumerate(module.channels, start=1):
    for block in range(module.blocks):
      stride = 2 if stage > 1 and block == 0 else 1
      found += [_block(f"stage_{stage}_block_{block}", stride, features - present), Relu()]
      present = features
  return (*found, MeanPool(), Dense("head"))


def _block(name: str, stride: int, lacking: int) -> Residual:
  body = (
    Conv(f"{name}/conv_1", stride),
    Norm(f"{name}/norm_1"),
    Relu(),
    Conv(f"{name}/conv_2"),
    Norm(f"{name}/norm_2"),
  )
  return Residual(body, stride, lacking // 2, lacking - lacking // 2)


def _hidden(names: list[str]) -> list[Layer]:
  return [layer for name in names for layer in (Dense(name), Relu())]
