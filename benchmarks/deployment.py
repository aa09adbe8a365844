"""Weighs and times shipped models: the tables of docs/deployment.md.

  python -m benchmarks.deployment sizes
  python -m benchmarks.deployment latency
  python -m benchmarks.deployment damage

Networks are drawn, not trained: neither bytes nor time depend on the values.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from qupeD_jax import models
from qupeD_jax.checks import BadInput
from qupeD_jax.io import export, forms, onnx_file, packing, predict, shipped
from qupeD_jax.quantization import ops

IMAGES = {"mlp": (8, 8, 1), "mlp2": (8, 8, 1)}  # digits; the others are for CIFAR-10
NETWORKS = ("mlp", "mlp2", "cnn1", "cnn2", "cnn3", "resnet8", "resnet20", "resnet32")
FORMS = ("safetensors", "onnx", "stablehlo", "coreml")
TIMED = ("mlp", "cnn1", "resnet20")
RUNTIMES = ("onnxruntime", "onnxruntime, kept packed", "StableHLO in jax", "safetensors in jax")
_PACKED = "optimization.constant_folding_max_output_size_in_bytes"


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured."""

  what: tyro.conf.Positional[Literal["sizes", "latency", "damage", "call"]]
  """"call" is what "latency" starts for each of its rows."""
  bits: tuple[int, ...] = (1, 2, 3, 4, 8, 32)
  """Precisions of the table of sizes."""
  calls: int = 200
  """Calls with one image, of which the median counts."""
  mutants: int = 300
  """Of "damage": files."""
  model: Path | None = None
  """Of "call": a model's file."""
  runtime: Literal[RUNTIMES] = RUNTIMES[0]
  """Of "call": what runs it."""


def make(name: str, bits: int) -> shipped.Shipped:
  """Makes a model of initial weights, quantised at their quantiles."""
  shape = IMAGES.get(name, (32, 32, 3))
  network = models.make(name, 10, shape)
  variables = jax.device_get(jax.jit(network.init)(jax.random.key(0)))
  codebooks = {
    path: np.asarray(ops.quantile_centers(tensor, 2**bits))
    for path, tensor in ops.flatten(variables["params"]).items()
    if bits < 32 and ops.is_quantised(path)
  }
  inputs = {"num_classes": 10, "image_shape": shape, "mean": 0.0, "std": 255.0}
  metadata = {"model": name, "client": 0, "bits": bits, "input": inputs}
  about = shipped.describe(metadata, name)
  return shipped.Shipped(packing.pack(variables, codebooks), about)


def sizes(options: Options) -> None:
  """Prints the bytes of every network in every form."""
  print("| network | bits | float32 tensors | safetensors | smaller | ONNX | StableHLO | Core ML |")
  print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
  with tempfile.TemporaryDirectory() as folder:
    for name in NETWORKS:
      for bits in options.bits:
        model = make(name, bits)
        full = 4 * sum(leaf.size for leaf in jax.tree.leaves(packing.unpack(model.packed)))
        found = {form: _weigh(model, form, Path(folder)) for form in FORMS}
        times = full / found["safetensors"]
        cells = [name, bits, f"{full:,}", f"{found['safetensors']:,}", f"{times:.1f} x"]
        cells += [f"{found[form]:,}" for form in FORMS[1:]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _weigh(model: shipped.Shipped, form: export.Form, folder: Path) -> int:
  path = folder / f"model{forms.SUFFIXES[form]}"
  export.write(model, form, path)
  return export.size(path)


def latency(options: Options) -> None:
  """Prints what a call with one image takes in each runtime, each in a process of its own."""
  print("| network at 2 bits | file | runtime | start (ms) | call (ms) | memory (MB) |")
  print("| --- | ---: | --- | ---: | ---: | ---: |")
  with tempfile.TemporaryDirectory() as folder:
    for name in TIMED:
      model = make(name, 2)
      for runtime in RUNTIMES:
        form = {"onnxruntime": "onnx", "StableHLO": "stablehlo"}.get(
          runtime.split(",")[0].split()[0], "safetensors"
        )
        path = Path(folder) / f"{name}.{form}"
        export.write(model, form, path)
        found = _in_process(path, runtime, options.calls)
        cells = [name, f"{path.stat().st_size:,}", runtime]
        cells += [
          f"{found[key]:.{digits}f}" for key, digits in (("start", 0), ("call", 2), ("memory", 1))
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def _in_process(path: Path, runtime: str, calls: int) -> dict[str, float]:
  command = [sys.executable, "-m", "benchmarks.deployment", "call"]
  command += ["--model", str(path), "--runtime", runtime, "--calls", str(calls)]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def call(options: Options) -> None:
  """Prints how long a start and a call take, and what memory they add, as JSON."""
  rng = np.random.default_rng(0)
  for module in ("onnx_file", "stablehlo"):  # what is imported is not what is measured
    forms.needing(module)
  import onnxruntime  # noqa: F401

  jax.numpy.zeros(1).block_until_ready()
  before, began = _resident(), time.perf_counter()
  if options.runtime == "onnxruntime, kept packed":
    opened = onnx_file.read(options.model)
    logits, shape = kept_packed(opened), opened.about.image_shape
  else:
    model = predict.open_model(options.model)
    logits, shape = model.logits, model.about.image_shape
  images = rng.integers(0, 256, (1, *shape), dtype=np.uint8)
  logits(images)
  start, seconds = time.perf_counter() - began, []
  for _ in range(options.calls):
    began = time.perf_counter()
    logits(images)
    seconds.append(time.perf_counter() - began)
  found = {"start": start, "call": statistics.median(seconds)}
  milliseconds = {key: 1e3 * value for key, value in found.items()}
  print(json.dumps(milliseconds | {"memory": (_resident() - before) / 1e6}))


def kept_packed(opened: onnx_file.Opened):
  """Returns a model as `onnx_file.predictor`, with codes that onnxruntime may not unpack ahead."""
  import onnx
  import onnxruntime

  proto = onnx.load_from_string(opened.data)
  for tensor in proto.graph.initializer:
    if tensor.name.endswith(".codes"):  # what is an input as well may change from call to call
      made = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
      proto.graph.input.append(made)
  options = onnxruntime.SessionOptions()
  options.add_session_config_entry(_PACKED, "1")
  session = onnxruntime.InferenceSession(
    proto.SerializeToString(),
    options,
    providers=["CPUExecutionProvider"],
    disabled_optimizers=["ConstantFolding"],
  )
  return lambda images: session.run(["logits"], {"images": images})[0]


def damage(options: Options) -> None:
  """Prints what becomes of ONNX files with one changed bit, in onnxruntime and here."""
  import onnxruntime

  rng, model = np.random.default_rng(0), make("cnn3", 2)
  whole = onnx_file.write(model)
  images = rng.integers(0, 256, (8, *model.about.image_shape), dtype=np.uint8)
  run = lambda data: onnxruntime.InferenceSession(data).run(["logits"], {"images": images})[0]
  onnxruntime.set_default_logger_severity(4)
  sound, found = (
    run(whole),
    {"refused": 0, "the same logits": 0, "other logits": 0, "found here": 0},
  )
  with tempfile.TemporaryDirectory() as folder:
    for _ in range(options.mutants):
      data = bytearray(whole)
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
      try:
        same = np.array_equal(run(bytes(data)), sound, equal_nan=False)
        found["the same logits" if same else "other logits"] += 1
      except Exception:  # onnxruntime has many, none of them with a common base
        found["refused"] += 1
      path = Path(folder) / "model.onnx"
      path.write_bytes(data)
      try:
        onnx_file.read(path)
      except BadInput:
        found["found here"] += 1
  print(f"{options.mutants} files with one changed bit:", found)


def _resident() -> int:
  """Returns the bytes of memory that this process holds; on Linux."""
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return 4096 * pages


if __name__ == "__main__":
  chosen = tyro.cli(Options)
  {"sizes": sizes, "latency": latency, "damage": damage, "call": call}[chosen.what](chosen)
