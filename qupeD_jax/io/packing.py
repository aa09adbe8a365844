"""A client's model as it ships: packed codes, their codebooks and the tensors kept in float32.

An entry of a quantised tensor costs `bits` bits: the index of its center, written little-endian,
entry after entry without gaps. Eight entries fill exactly `bits` bytes.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qupeD_jax.checks import BadInput, require
from qupeD_jax.io import files, tensor_file
from qupeD_jax.quantization import codebook
from qupeD_jax.types import PyTree

FORMAT = "qupeD_jax packed model 1"
_KEPT = (np.float32, np.float16)
_SIZES = tuple(2**bits for bits in range(1, 9))


class Packed(NamedTuple):
  """One client's model, ready to be written; a path is a tensor's keys joined by "/"."""

  codes: dict[str, np.ndarray]  # "conv_2/kernel" -> [ceil(entries * bits / 8)] uint8
  centers: dict[str, np.ndarray]  # the same paths -> [2^bits] float32, sorted
  shapes: dict[str, tuple[int, ...]]  # the same paths -> the tensor's shape
  kept: dict[str, np.ndarray]  # "params/conv_1/bias", "stats/..." -> float32, or float16


def pack(variables: PyTree, codebooks: dict) -> Packed:
  """Quantises one client's variables to their nearest centers and packs the codes.

  Args:
    variables: {"params": ..., "stats": ...}, nested dicts of arrays without a client axis.
    codebooks: path in params -> centers [m_max] float32, sorted, unused slots +inf. A tensor
      that has no codebook, or one without a finite center, is kept in float32.

  Returns:
    The packed model.

  Raises:
    BadInput: a codebook fits no tensor or is not 2^bits sorted centers, or a tensor that is to be
      quantised holds entries that are not finite.

  >>> variables = {"params": {"dense": {"kernel": np.float32([[-2, -1], [1, 3]])}}, "stats": {}}
  >>> packed = pack(variables, {"dense/kernel": np.float32([-1, 2, np.inf, np.inf])})
  >>> packed.codes  # one byte, first entry in the lowest bit: 1100
  {'dense/kernel': array([12], dtype=uint8)}
  >>> unpack(packed)["params"]["dense"]["kernel"]
  array([[-1., -1.],
         [ 2.,  2.]], dtype=float32)
  """
  variables, codebooks = jax.device_get((variables, codebooks))
  params = flatten_dict(variables["params"], sep="/")
  used = {path: _used_centers(path, centers) for path, centers in codebooks.items()}
  for path in used:
    require(path in params, "codebook", path, "a tensor of the model: " + ", ".join(params))
  centers = {path: centers for path, centers in used.items() if centers.size}
  kept = {
    f"{kind}/{path}": np.array(tensor, np.float32, order="C")
    for kind in ("params", "stats")
    for path, tensor in flatten_dict(variables[kind], sep="/").items()
    if kind == "stats" or path not in centers
  }
  return Packed(
    codes={path: _encode(path, params[path], centers[path]) for path in centers},
    centers=centers,
    shapes={path: np.shape(params[path]) for path in centers},
    kept=kept,
  )


def halve_kept(packed: Packed) -> Packed:
  """Rounds what is not quantised to float16; codes and centers stay as they are.

  Args:
    packed: a packed model.

  Returns:
    The same with kept tensors in float16.

  Raises:
    BadInput: an entry is too large for float16.
  """
  with np.errstate(over="ignore"):
    kept = {path: tensor.astype(np.float16) for path, tensor in packed.kept.items()}
  for path, tensor in kept.items():
    finite = bool(np.isfinite(tensor).all())
    largest = np.abs(packed.kept[path]).max(initial=0)
    require(finite, f"largest entry of {path}", largest, "what float16 can hold, up to 65504")
  return packed._replace(kept=kept)


def unpack(packed: Packed) -> PyTree:
  """Rebuilds the hard-quantised variables, every quantised entry bit for bit its center.

  Args:
    packed: a packed model.

  Returns:
    {"params": ..., "stats": ...}, nested dicts of float32 numpy arrays.
  """
  flat = {path: np.asarray(tensor, np.float32) for path, tensor in packed.kept.items()}
  for path, centers in packed.centers.items():
    flat[f"params/{path}"] = centers[codes_of(packed, path)]
  return {"params": {}, "stats": {}} | unflatten_dict(flat, sep="/")


def bits_of(centers: np.ndarray) -> int:
  """Returns the bits of a code: the logarithm of the number of centers."""
  return centers.size.bit_length() - 1


def code_bytes(shape: tuple[int, ...], bits: int) -> int:
  """Returns how many bytes the codes of a tensor take."""
  return -(-math.prod(shape) * bits // 8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
  """Packs codes [n] uint8, each below 2^bits, into [ceil(n * bits / 8)] bytes."""
  planes = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
  return np.packbits(planes, bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, entries: int) -> np.ndarray:
  """Returns the codes [entries] uint8 that `pack_codes` packed."""
  planes = np.unpackbits(packed, count=entries * bits, bitorder="little")
  return np.packbits(planes.reshape(entries, bits), axis=1, bitorder="little").ravel()


def codes_of(packed: Packed, path: str) -> np.ndarray:
  """Returns the code of every entry of a quantised tensor, uint8, in the tensor's shape."""
  shape, bits = packed.shapes[path], bits_of(packed.centers[path])
  return unpack_codes(packed.codes[path], bits, math.prod(shape)).reshape(shape)


def save(path: str | os.PathLike, packed: Packed, metadata: dict) -> None:
  """Writes a packed model as one safetensors file, all of it or nothing.

  The file holds "PATH.codes" and "PATH.centers" of every quantised tensor and the others under
  their own names; its metadata hold the shapes, the bits, a checksum and what the caller adds.

  Args:
    path: the file; its folder is made, an older file of that name is replaced.
    packed: the model.
    metadata: what to remember of it (client id, model name, ...); see `files.plain`.

  Raises:
    BadInput: the file cannot be written.
  """
  layout = {
    name: {"shape": shape, "bits": bits_of(packed.centers[name])}
    for name, shape in packed.shapes.items()
  }
  header = {
    "format": FORMAT,
    "quantised": json.dumps(layout),
    "metadata": files.dump(metadata),
  }
  tensor_file.save(Path(path), _named_tensors(packed), header)


def load(path: str | os.PathLike) -> tuple[Packed, dict]:
  """Reads a packed model that `save` wrote.

  Args:
    path: the file.

  Returns:
    The packed model and the caller's metadata.

  Raises:
    BadInput: the file is missing, damaged, or not a packed model.
  """
  tensors, header = tensor_file.read(path)
  if header.get("format") != FORMAT:
    raise BadInput(f"{path}: not a model that qupeD_jax packed")
  tensor_file.verify(path, tensors, header)
  layout = files.parse(header.get("quantised", "").encode(), f"{path}: its layout")
  metadata = files.parse(header.get("metadata", "").encode(), f"{path}: its metadata")
  for name, entry in layout.items():
    fits = _fits(entry, tensors.get(f"{name}.codes"), tensors.get(f"{name}.centers"))
    _require_sound(fits, path, name)
  packed = Packed(
    codes={name: tensors.pop(f"{name}.codes") for name in layout},
    centers={name: tensors.pop(f"{name}.centers") for name in layout},
    shapes={name: tuple(entry["shape"]) for name, entry in layout.items()},
    kept=tensors,
  )
  _require_tree(path, packed)
  return packed, metadata


def _fits(entry: Any, codes: np.ndarray | None, centers: np.ndarray | None) -> bool:
  """Tells whether a quantised tensor's layout, codes and centers go together."""
  shape, bits = (entry.get("shape"), entry.get("bits")) if isinstance(entry, dict) else (None, None)
  sized = isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
  if not sized or bits not in range(1, 9) or codes is None or centers is None:
    return False
  size = -(-math.prod(shape) * bits // 8)
  good_codes = codes.dtype == np.uint8 and codes.shape == (size,)
  good_centers = centers.dtype == np.float32 and centers.shape == (2**bits,)
  return good_codes and good_centers and bool(np.isfinite(centers).all())


def _require_tree(path: str | os.PathLike, packed: Packed) -> None:
  """Requires the paths of a file's tensors to make a tree, and those kept to be floats."""
  for name, tensor in packed.kept.items():
    under = name.startswith(("params/", "stats/"))
    _require_sound(under and tensor.dtype in _KEPT, path, name)
  paths = {*packed.kept, *(f"params/{name}" for name in packed.shapes)}
  for name in paths:
    keys = name.split("/")
    above = {"/".join(keys[:i]) for i in range(1, len(keys))}
    _require_sound(all(keys) and not above & paths, path, name)


def _require_sound(holds: bool, path: str | os.PathLike, name: str) -> None:
  if not holds:
    raise BadInput(f"{path}: damaged ({' '.join(name.split())[:60]} is not as it is packed)")


def _used_centers(path: str, centers: np.ndarray) -> np.ndarray:
  """Returns the centers in use, [2^bits] float32, or none for full precision."""
  centers = np.asarray(centers, np.float32)
  used = centers[: np.isfinite(centers).sum()]
  rest = centers[used.size :]
  allowed = "2, 4, ... or 256 sorted finite centers, then +inf (or +inf alone: full precision)"
  tidy = np.all(np.isfinite(used)) and np.all(np.diff(used) >= 0) and np.all(rest == np.inf)
  require(bool(tidy) and used.size in (0, *_SIZES), f"codebook of {path}", centers, allowed)
  return used


def _encode(path: str, tensor: np.ndarray, centers: np.ndarray) -> np.ndarray:
  """Returns the packed code of every entry's nearest center, a tie going to the lower one."""
  entries = np.asarray(tensor, np.float32).ravel()
  if not np.all(np.isfinite(entries)):
    raise BadInput(f"{path}: has entries that are not finite and cannot be quantised")
  codes = np.searchsorted(codebook.midpoints(centers), entries, side="left").astype(np.uint8)
  return pack_codes(codes, bits_of(centers))


def _named_tensors(packed: Packed) -> dict[str, np.ndarray]:
  codes = {f"{path}.codes": codes for path, codes in packed.codes.items()}
  centers = {f"{path}.centers": centers for path, centers in packed.centers.items()}
  return codes | centers | packed.kept
