"""The data sets by name, and the folder each is looked for in.

Nothing here imports more than Python has, so that a name is refused before anything is installed:

  python qupeD_jax/data/catalog.py NAME
"""

import difflib
import os
import re
import sys
from pathlib import Path

from qupeD_jax.checks import BadInput, place, refusal

EMNIST = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
TFDS = ("mnist", "fashion_mnist", "cifar10", "cifar100", *(f"emnist/{config}" for config in EMNIST))
NAMES = ("digits", *TFDS, "femnist")
FEMNIST_FILES = (
  "LEAF's folders train/ and test/ with all_data_*.json (or its femnist/data), "
  "or fed_emnist_train.h5 and fed_emnist_test.h5"
)
_CLASSES = {
  "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
  "fashion_mnist": "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot",
}
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def require_known(name: str) -> None:
  """Requires `name` to be one of NAMES.

  Raises:
    BadInput: naming all of them, and the nearest if one is near.

  >>> require_known("cifar-10")  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ...
  qupeD_jax.checks.BadInput: dataset cifar-10: allowed is digits, ...; the nearest is cifar10
  """
  if name in NAMES:
    return
  near = difflib.get_close_matches(str(name).lower(), NAMES, n=1)
  hint = f"; the nearest is {near[0]}" if near else ""
  raise refusal("dataset", name, f"allowed is {', '.join(NAMES)}, or a file *.npz{hint}")


def class_names(name: str | None, num_classes: int) -> tuple[str, ...]:
  """Returns what the classes of a data set are called; their numbers where nothing is known.

  >>> class_names("cifar10", 10)[:2], class_names("digits", 3)
  (('airplane', 'automobile'), ('0', '1', '2'))
  """
  names = tuple(_CLASSES.get(name, "").split())
  return names if len(names) == num_classes else tuple(map(str, range(num_classes)))


def white(name: str) -> int:
  """Returns the largest value of a data set's pixels: 16 for scikit-learn's digits, else 255."""
  return 16 if name == "digits" else 255


def folder(data_dir: str | os.PathLike | None = None) -> Path:
  """Returns the folder that holds the data sets: `data_dir`, or where TFDS keeps its own."""
  own = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return place("data_dir", data_dir or own)


def newest(name: str, data_dir: str | os.PathLike | None = None) -> Path | None:
  """Returns the folder of the newest version of a data set that TFDS prepared, or None."""
  versions = [
    path
    for path in (folder(data_dir) / name).glob("*")
    if _VERSION.fullmatch(path.name) and path.is_dir()
  ]
  return max(versions, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def make_command(name: str, data_dir: str | os.PathLike | None = None) -> str:
  """Returns the command that puts a data set into `data_dir`.

  >>> make_command("cifar10", "/data")
  '`make data NAME=cifar10 ARGS="--data-dir /data"`'
  """
  where = f' ARGS="--data-dir {data_dir}"' if data_dir else ""
  return f"`make data NAME={name}{where}`"


def main(name: str) -> int:
  """Checks a name; returns 0, or 2 after a line that refuses it."""
  try:
    require_known(name)
  except BadInput as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1]))
