"""A personal model as a web page that runs it: draw or drop an image, see what the model says.

The folder holds the page, the model as ONNX and onnxruntime-web, the runtime, from the npm
registry. It opens from any static server, and asks no other for anything. The runtime is fetched
once, by `npm pack`, into the user's cache folder, and checked against digests written here.

  quped serve FOLDER      serves it, on this machine alone
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from qupeD_jax import command_line
from qupeD_jax.checks import BadInput, refusal, require
from qupeD_jax.io import files, forms, packing, shipped

VERSION = "1.30.0"
# Of the npm package's files those that are needed, what they are called here, and their SHA-256.
RUNTIME = {
  "dist/ort.wasm.bundle.min.mjs": (
    "ort.js",
    "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
  ),
  "dist/ort-wasm-simd-threaded.wasm": (
    "ort.wasm",
    "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
  ),
}
_PAGE = Path(__file__).with_name("page")
MODEL, ABOUT = "model.onnx", "model.json"


@dataclasses.dataclass(frozen=True)
class Options:
  """Serves the page of a model on this machine alone."""

  folder: tyro.conf.Positional[Path]
  """What `quped export --to web` wrote."""
  port: int = 8000
  """Of the loopback address; 0 is any that is free."""


def save(folder: Path, model: shipped.Shipped) -> None:
  """Writes the page.

  Args:
    folder: made if need be; files of the same names are replaced.
    model: the packed model and its description.

  Raises:
    BadInput: the network is not one of the library's, a package is missing, the runtime cannot be
      fetched, or nothing can be written.
  """
  data = forms.needing("onnx_file").write(model)
  ready = runtime()
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*_PAGE.iterdir(), *ready.iterdir()):
      shutil.copyfile(file, folder / file.name)
    (folder / MODEL).write_bytes(data)
  files.write(folder / ABOUT, files.dump(_description(model, len(data), ready), indent=2))


def runtime() -> Path:
  """Returns a folder with the runtime, which is fetched the first time.

  Raises:
    BadInput: it has to be, and npm is missing or fails, or what came is not what is expected.
  """
  folder = files.cache_folder() / f"onnxruntime-web-{VERSION}"
  if not folder.is_dir():
    with files.writing(folder), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
      _fetch(Path(scratch)).rename(folder)
  for name, digest in RUNTIME.values():
    with files.on_disk(folder / name):
      found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    require(found == digest, f"{folder / name}: SHA-256", found, f"{digest}; remove the folder")
  return folder


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
  """Returns a server of a folder, on the loopback address; port 0 is any that is free.

  Raises:
    BadInput: the port is taken, or none.
  """
  require(0 <= port < 2**16, "port", port, "0 to 65535")
  handler = functools.partial(_Quiet, directory=str(folder))
  try:
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
  except OSError as error:
    raise refusal("port", port, error.strerror) from error


def main(arguments: Sequence[str]) -> int:
  """Serves a folder until it is interrupted; returns 0, or 2 for what cannot be done."""
  return command_line.run(Options, arguments, _serve, prog="quped serve")


class _Quiet(http.server.SimpleHTTPRequestHandler):
  """Serves files without a word."""

  def log_message(self, format, *args):
    del format, args


def _serve(options: Options) -> None:
  written = (options.folder / MODEL).is_file()
  require(written, "folder", options.folder, "one that `quped export --to web` wrote")
  with server(options.folder, options.port) as running:
    print(f"http://127.0.0.1:{running.server_port}/  (Ctrl+C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
      running.serve_forever()


def _description(model: shipped.Shipped, size: int, ready: Path) -> dict:
  """Returns what the page says of its model and its runtime, and how images get to it."""
  packed, about = model
  tensors = packing.unpack(packed)
  return {
    "model": about.model,
    "client": about.client,
    "bits": about.bits,
    "dataset": about.dataset,
    "shape": about.image_shape,
    "white": about.white,
    "classes": about.classes,
    "drawing": _drawing(about.dataset or ""),
    "bytes": size,
    "bytes_in_float32": sum(4 * leaf.size for leaf in jax.tree.leaves(tensors)),
    "runtime": f"onnxruntime-web {VERSION}",
    "runtime_bytes_gzipped": sum(len(gzip.compress(f.read_bytes())) for f in ready.iterdir()),
  }


def _drawing(dataset: str) -> dict | None:
  """Returns how a data set's images come of strokes; None where they do not.

  `margin` is the part of the image that stays empty on every side, `turned` that rows and columns
  are exchanged, `inverted` that ink is dark.
  """
  if dataset == "digits":
    return {"margin": 0, "turned": False, "inverted": False}
  if dataset == "mnist" or dataset.startswith("emnist/") or dataset == "femnist":
    turned, inverted = dataset.startswith("emnist/"), dataset == "femnist"
    return {"margin": 4 / 28, "turned": turned, "inverted": inverted}
  return None


def _fetch(scratch: Path) -> Path:
  """Fetches the runtime by npm into a folder in `scratch`."""
  npm = shutil.which("npm")
  if npm is None:
    raise BadInput("npm is not installed: it fetches the page's runtime, once (https://nodejs.org)")
  package = f"onnxruntime-web@{VERSION}"
  done = subprocess.run(
    [npm, "pack", package, "--silent"], cwd=scratch, capture_output=True, text=True, check=False
  )
  archives = list(scratch.glob("*.tgz"))
  if done.returncode or not archives:
    said = (done.stderr or done.stdout).strip().splitlines() or ["no archive came"]
    raise BadInput(f"npm pack {package} failed: {said[-1]}")
  ready = scratch / "ready"
  ready.mkdir()
  with tarfile.open(archives[0]) as archive:
    for inside, (name, _) in RUNTIME.items():
      with archive.extractfile(f"package/{inside}") as file:
        (ready / name).write_bytes(file.read())
  return ready


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
