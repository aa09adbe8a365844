"""Personal models as StableHLO: a program that jax and flatbuffers run without this library.

A file is a line that names the format, a line of JSON that describes the model, the bytes of
`jax.export`, and a checksum of all these. The program takes images [N, H, W, C] uint8, any N, and
returns logits; its codes are constants, packed, and it unpacks them when it is called.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import lax

from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import files, packing, sealed, shipped
from qupeD_jax.types import Array, Model

FORMAT = "qupeD_jax StableHLO 1"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Opened(NamedTuple):
  """A file that was found sound."""

  program: jax.export.Exported
  about: shipped.About
  digest: str


def write(model: shipped.Shipped, network: Model | None = None) -> bytes:
  """Writes a packed model as a program.

  Args:
    model: the packed model and its description.
    network: what runs it; None for one of the library's, by its name.

  Returns:
    The file's bytes.

  Raises:
    BadInput: `network` is None and the name is not one of the library's.
  """
  packed, about = model
  network = network or shipped.network(about, "model")

  def logits(images):
    return network.apply(unpacked(packed), images, False)[0]

  (batch,) = jax.export.symbolic_shape("N")
  images = jax.ShapeDtypeStruct((batch, *about.image_shape), jnp.uint8)
  program = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(images)
  lines = [FORMAT, files.dump(about.metadata)]
  head = "".join(line + "\n" for line in lines).encode()
  return sealed.seal(head + bytes(program.serialize()))


def read(path: Path) -> Opened:
  """Reads a file that `write` wrote.

  Raises:
    BadInput: the file is missing, damaged or foreign, or its program does not take such images or
      return such logits as its description says.
  """
  data = sealed.read(path)
  head, _, rest = data.partition(b"\n")
  require(head == FORMAT.encode(), f"{path}: format", head[:40], FORMAT)
  description, _, program = rest[: -sealed.DIGITS].partition(b"\n")
  about = shipped.describe(files.parse(description, path), path)
  try:
    program = jax.export.deserialize(bytearray(program))
  except Exception as error:  # flatbuffers raises what its bytes lead it to
    raise BadInput(f"{path}: holds no program that this jax can read") from error
  _check(program, about, path)
  return Opened(program, about, data[-sealed.DIGITS :].decode())


def predictor(opened: Opened) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the model as a function from images [N, H, W, C] uint8 to logits, compiled by XLA."""
  call = jax.jit(opened.program.call)
  return lambda images: np.asarray(call(images))


def _check(program: jax.export.Exported, about: shipped.About, where: object) -> None:
  for kind, avals, shape, dtype in (
    ("images", program.in_avals, about.image_shape, jnp.uint8),
    ("logits", program.out_avals, (about.num_classes,), jnp.float32),
  ):
    fits = len(avals) == 1 and avals[0].shape[1:] == shape and avals[0].dtype == dtype
    found = ", ".join(map(str, avals))
    require(fits, f"{where}: {kind} of the program", found, f"{np.dtype(dtype)} [N, {shape}]")


def unpacked(packed: packing.Packed) -> dict:
  """Returns the variables of a model, unpacked by the program that this is traced into."""
  # Behind the barrier, lest the compiler should unpack them once for all, slowly and at full size.
  flat = {path: jnp.asarray(x, jnp.float32) for path, x in packed.kept.items()}
  for path, centers in packed.centers.items():
    shape, bits = packed.shapes[path], packing.bits_of(centers)
    groups = -(-len(packed.codes[path]) // bits)
    padded = np.pad(packed.codes[path], (0, groups * bits - len(packed.codes[path])))
    codes = _codes(lax.optimization_barrier(jnp.asarray(padded)), bits)
    flat[f"params/{path}"] = jnp.asarray(centers)[codes[: int(np.prod(shape))]].reshape(shape)
  return {"params": {}, "stats": {}} | unflatten_dict(flat, sep="/")


def _codes(packed: Array, bits: int) -> Array:
  """Unpacks codes, eight in `bits` bytes: [groups * bits] uint8 to [groups * 8] int32."""
  rows = packed.reshape(-1, bits).astype(jnp.int32)
  rows = jnp.pad(rows, ((0, 0), (0, 1)))  # no code reaches beyond its eight's bytes
  low, shift = bits * np.arange(8) // 8, bits * np.arange(8) % 8
  both = rows[:, low] | rows[:, low + 1] << 8
  return ((both >> shift) & (2**bits - 1)).ravel()
