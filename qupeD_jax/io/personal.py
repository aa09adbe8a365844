"""One client's model, to a file and back."""

import os
from typing import NamedTuple

from qupeD_jax.checks import require
from qupeD_jax.io import packing, shipped
from qupeD_jax.types import Model, PyTree


class PersonalModel(NamedTuple):
  """One client's model as it ships."""

  model: Model
  variables: PyTree  # quantised, where the client has codebooks
  codebooks: dict  # path of a quantised tensor -> its centers
  client: int
  bits: int  # 1 to 8, or 32 for full precision


def save_model(path: str | os.PathLike, personal: PersonalModel) -> None:
  """Writes a client's model: packed codes, codebooks, and what rebuilds its network.

  Args:
    path: a safetensors file; its folder is made, an older file of that name is replaced.
    personal: as of `Result.personal`, with a network of `models.make`.

  Raises:
    BadInput: the file cannot be written, or the network is one of your own: write its variables
      with `io.packing.save` and rebuild it yourself.
  """
  about = personal.model.about
  require(about is not None, "personal.model", "a network of one's own", "one of `models.make`")
  metadata = {"client": personal.client, "bits": personal.bits, **about}
  packing.save(path, packing.pack(personal.variables, personal.codebooks), metadata)


def load_model(path: str | os.PathLike) -> PersonalModel:
  """Reads a client's model; `model.apply(variables, images, False)` predicts with it.

  Raises:
    BadInput: the file is missing, damaged or not a packed model.
  """
  packed, about = shipped.read(path)
  codebooks = dict(packed.centers)
  model = shipped.network(about, path)
  return PersonalModel(model, packing.unpack(packed), codebooks, about.client, about.bits)
