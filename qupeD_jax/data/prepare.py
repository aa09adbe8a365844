"""Downloads a data set and prepares it as array_record files, which are read without TensorFlow.

  make data NAME=cifar10

runs this file in an environment of its own, since preparing does need TensorFlow, which has no
place beside JAX: both would claim the accelerator, and each its own versions of shared libraries.
"""

import argparse
import importlib.util
import itertools
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from qupeD_jax.checks import BadInput
from qupeD_jax.data import catalog

PATIENCE = 10  # seconds that a host has for an answer
RETRIES = 5  # of a download, seconds apart: TFDS's own ten take minutes
NEEDS = ("tensorflow", "tensorflow_datasets", "array_record")


class DownloadFailed(RuntimeError):
  """A download or its preparation failed; the message is one line."""


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> str:
  """Prepares a data set, unless it is there already.

  Args:
    name: one of catalog.NAMES.
    data_dir: the folder that holds the data sets; None for the one that TFDS uses.

  Returns:
    One line that says where the data set is.

  Raises:
    BadInput: if the name is unknown, cannot be downloaded, or the environment lacks TensorFlow.
    DownloadFailed: if the download, or its preparation, failed.

  >>> prepare("digits")
  'digits comes with scikit-learn: nothing to prepare'
  """
  catalog.require_known(name)
  folder = catalog.folder(data_dir)
  if name == "digits":
    return "digits comes with scikit-learn: nothing to prepare"
  if name == "femnist":
    put = f"put {catalog.FEMNIST_FILES} into {folder / 'femnist'}"
    raise BadInput(f"femnist: TensorFlow Datasets cannot download it; {put}")
  for module in NEEDS:
    if importlib.util.find_spec(module) is None:
      make = catalog.make_command(name, data_dir)
      raise BadInput(f"{module} is not installed, and preparing {name} needs it; run {make}")
  _download(name, folder)
  return f"{name} is in {catalog.newest(name, data_dir)}"


def _download(name: str, folder: Path) -> None:
  """Has TFDS download and prepare a data set."""
  import tensorflow as tf
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import downloader

  downloader.MAX_RETRIES = RETRIES
  logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would tell of every one
  tf.config.set_visible_devices([], "GPU")
  try:
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    # Who put archives there needs no network.
    if catalog.newest(name, folder) is None and not any((folder / "downloads").glob("*")):
      _reach(builder.url_infos)
    builder.download_and_prepare()
  except Exception as error:  # network, disk, checksum, layout: each library has errors of its own
    reason = (str(error).splitlines() or [""])[0]
    raise DownloadFailed(
      f"{name}: not prepared in {folder}: {type(error).__name__}: {reason}"
    ) from error


def _reach(urls: Iterable[str]) -> None:
  """Asks each host of the addresses for an answer, whichever: TFDS would try for minutes.

  Raises:
    ConnectionError: one cannot be reached.
  """
  import requests

  for host, same in itertools.groupby(sorted(urls), lambda url: urlsplit(url).netloc):
    try:
      requests.head(next(same), timeout=PATIENCE)
    except requests.RequestException as error:
      raise ConnectionError(f"{host} cannot be reached") from error


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns 0, 1 after a failed download, or 2 for what cannot be done."""
  parser = argparse.ArgumentParser(prog="quped data")
  parser.add_argument("name", help=f"one of {', '.join(catalog.NAMES)}")
  parser.add_argument("--data-dir", help="where to, instead of the folder that TFDS uses")
  options = parser.parse_args(arguments)
  try:
    print(prepare(options.name, options.data_dir))
  except (BadInput, DownloadFailed) as error:
    print(error, file=sys.stderr)
    return 1 if isinstance(error, DownloadFailed) else 2
  return 0
