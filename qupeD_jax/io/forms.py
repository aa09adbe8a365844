"""The forms a model comes in, told by the ending of its file, and the packages they need."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from qupeD_jax.checks import BadInput, require

SUFFIXES = {
  "safetensors": ".safetensors",
  "onnx": ".onnx",
  "stablehlo": ".stablehlo",
  "coreml": ".mlpackage",
}
_PACKAGES = {
  "onnx_file": ("onnx", "onnxruntime"),
  "stablehlo": ("flatbuffers",),
  "coreml": ("coremltools",),
}


def of(path: Path) -> str:
  """Tells the form of a model that can be opened here.

  Raises:
    BadInput: the file's name ends otherwise.

  >>> of(Path("client_0007.onnx"))
  'onnx'
  """
  known = {SUFFIXES[form]: form for form in ("safetensors", "onnx", "stablehlo")}
  require(path.suffix in known, "MODEL", path, f"a file that ends in {', '.join(known)}")
  return known[path.suffix]


def needing(module: str) -> ModuleType:
  """Imports the part of this library that writes and reads a form.

  Args:
    module: "onnx_file", "stablehlo" or "coreml".

  Raises:
    BadInput: one of the packages that it needs is not installed.
  """
  for package in _PACKAGES[module]:
    if importlib.util.find_spec(package) is None:
      raise BadInput(f"{package} is not installed: pip install '.[export]', or make export-tools")
  return importlib.import_module(f"qupeD_jax.io.{module}")
