"""Mutants of shipped models: each is refused in one line, or is still the same model."""

import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qupeD_jax.io import forms, packing, shipped, tensor_file
from tests import mutate
from tests import shipped as toys

mutants = settings(
  max_examples=max(100, settings.default.max_examples // 2),
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

READS = {
  "safetensors": shipped.read,
  "onnx": lambda path: forms.needing("onnx_file").read(path),
  "stablehlo": lambda path: forms.needing("stablehlo").read(path),
}


@pytest.fixture(params=READS)
def path(request, tmp_path):
  """A sound file of a model."""
  for package in {"onnx": ("onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}.get(
    request.param, ()
  ):
    pytest.importorskip(package, reason="requirements/export.txt is not installed")
  model = toys.shipped("mlp", 3)
  if request.param == "safetensors":
    return toys.save(tmp_path, model)
  module = forms.needing({"onnx": "onnx_file"}.get(request.param, request.param))
  path = tmp_path / f"model.{request.param}"
  path.write_bytes(module.write(model))
  return path


def test_no_changed_byte_goes_unnoticed(path):
  whole = path.read_bytes()
  read = READS[path.suffix[1:]]
  sound = jax.device_get(read(path)) if path.suffix == ".safetensors" else None

  @mutants
  @given(mutate.of_bytes(whole))
  def check(content):
    path.write_bytes(content)
    if content == whole:
      read(path)
    elif mutate.reads_or_refuses(lambda: read(path), path):
      # In JSON some bytes say nothing, as spaces do: all that they leave has to be the same.
      assert sound is not None
      jax.tree.map(np.testing.assert_array_equal, read(path), sound)

  check()


@pytest.mark.parametrize("length", [0, 1, 7, 63, 64, 100, -64, -1])
def test_a_file_that_was_cut_is_refused(path, length):
  path.write_bytes(path.read_bytes()[:length])
  assert not mutate.reads_or_refuses(lambda: READS[path.suffix[1:]](path), path)


ARRAYS = [
  np.zeros(3, np.uint8),
  np.zeros((2, 2), np.float32),
  np.full(10, np.nan, np.float32),
  np.full(10, np.inf, np.float16),
  np.zeros(10, np.int64),
  np.zeros((), np.float32),
  np.zeros(0, np.float32),
  np.float32([3, 2, 1, 0, 0, 0, 0, 0]),
]


@st.composite
def lying(draw, tensors, header):
  """Draws the parts of a file that says something else than it holds, or holds what is foreign."""
  header = header | {
    key: json.dumps(draw(mutate.of_values(json.loads(header[key]))))
    for key in draw(st.sampled_from([(), ("quantised",), ("metadata",), ("quantised", "metadata")]))
  }
  tensors, name = dict(tensors), draw(st.sampled_from(sorted(tensors)))
  match draw(st.sampled_from(("keep", "delete", "add", "replace", "swap", "version"))):
    case "delete":
      del tensors[name]
    case "add":
      tensors["other" + draw(st.sampled_from(("", ".codes", ".centers")))] = tensors[name]
    case "replace":
      tensors[name] = draw(st.sampled_from(ARRAYS))
    case "swap":
      tensors[name] = tensors[draw(st.sampled_from(sorted(tensors)))]
    case "version":
      header["format"] = "qupeD_jax packed model 2"
  return tensors, header


def test_a_file_that_lies_with_a_right_checksum_is_refused_or_can_be_used(tmp_path):
  path = toys.save(tmp_path, toys.shipped("mlp", 3))
  tensors, header = tensor_file.read(path)
  header = {key: text for key, text in header.items() if key != "crc32"}
  shapes = jax.tree.map(np.shape, toys.variables("mlp"))
  seen = set()

  @mutants
  @given(lying(tensors, header))
  def check(parts):
    tensor_file.save(path, *parts)
    read = mutate.reads_or_refuses(lambda: shipped.read(path), path)
    seen.add(read)
    if read:
      model = shipped.read(path)
      unpacked = packing.unpack(model.packed)
      assert jax.tree.map(np.shape, unpacked) == shapes
      assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(unpacked))
      assert shipped.network(model.about, path)

  check()
  assert seen == {True, False}
