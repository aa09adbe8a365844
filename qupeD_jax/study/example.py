"""One client's model set out to be tried, with images of its own."""

import sys
from pathlib import Path

import numpy as np

from qupeD_jax.io import export, images, shipped
from qupeD_jax.study import federation as fed
from qupeD_jax.study.options import Federated

FOLDER = "example"
_IMAGES = 5


def ship(folder: Path, options: Federated, client: int) -> str:
  """Writes a client's model and a few of the test images of its classes into a results folder.

  Args:
    folder: the results of a study; of several methods' models the smallest is taken.
    options: those of the study.
    client: its id.

  Returns:
    The command that predicts the images' classes.

  Raises:
    BadInput: there is no such model, or nothing can be written.
  """
  model = shipped.read(export.find(folder, client))
  target = folder / FOLDER
  file = target / f"client_{client:04d}.safetensors"
  export.write(model, "safetensors", file)
  federation = fed.load(options)
  own = federation.splits[0].test
  rows = own.rows[own.offsets[client] : own.offsets[client + 1]]
  for row in rows[np.unique(np.linspace(0, len(rows) - 1, _IMAGES).astype(int))]:
    name = f"test_{row}_of_class_{federation.test.y[row]}.png"
    images.write(target / name, federation.test.x[row], model.about.white)
  python = Path(sys.executable)
  if python.is_relative_to(Path.cwd()):
    python = python.relative_to(Path.cwd())
  return f"{python} -m qupeD_jax predict {file} {target}"
