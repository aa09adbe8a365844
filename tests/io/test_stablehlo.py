"""Models as StableHLO: the same logits from a program that needs nothing of this library."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("flatbuffers", reason="requirements/export.txt is not installed")

from qupeD_jax.checks import BadInput
from qupeD_jax.io import sealed, stablehlo
from tests import shipped as toys


def written(folder, model):
  path = folder / "model.stablehlo"
  path.write_bytes(stablehlo.write(model))
  return path


@pytest.mark.parametrize(("name", "bits"), [("mlp", 1), ("cnn3", 5), ("resnet8", 2), ("mlp", 32)])
def test_logits_and_size(name, bits, tmp_path):
  model = toys.shipped(name, bits)
  path = written(tmp_path, model)
  predict = stablehlo.predictor(stablehlo.read(path))
  for number in (2, 5):
    x = toys.images(number)
    np.testing.assert_allclose(predict(x), toys.logits(model, x), atol=1e-5, rtol=1e-5)
  source = toys.save(tmp_path, model).stat().st_size
  assert path.stat().st_size <= 1.25 * source + 8192


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_precision_come_out_right(bits):
  packed = toys.shipped("mlp", bits).packed
  found = jax.jit(lambda: stablehlo.unpacked(packed))()
  expected = toys.packing.unpack(packed)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


def test_jax_alone_runs_the_program(tmp_path):
  """As the documents say."""
  model = toys.shipped("mlp", 2)
  data = written(tmp_path, model).read_bytes()
  _, about, rest = data.split(b"\n", 2)
  program = jax.export.deserialize(bytearray(rest[:-64]))
  assert json.loads(about)["client"] == 7
  logits = program.call(toys.images())
  np.testing.assert_allclose(logits, toys.logits(model, toys.images()), atol=1e-5)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    (b"StableHLO 1", b"StableHLO 2"),
    (b'"num_classes": 10', b'"num_classes": 9'),
    (b"[8, 8, 1]", b"[8, 9, 1]"),
    (b'{"model"', b'"model"'),
    (b'"std": 6.0', b'"std": 0.0'),
  ],
)
def test_a_file_that_lies_is_refused_though_its_checksum_is_right(old, new, tmp_path):
  path = tmp_path / "model.stablehlo"
  content = stablehlo.write(toys.shipped("mlp", 32))[: -sealed.DIGITS]
  assert content.count(old) == 1
  path.write_bytes(sealed.seal(content.replace(old, new)))
  with pytest.raises(BadInput, match=r"^[^\n]*model\.stablehlo: [^\n]*$"):
    stablehlo.read(path)


def test_a_program_that_cannot_be_read_is_refused(tmp_path):
  path = tmp_path / "model.stablehlo"
  head = stablehlo.write(toys.shipped("mlp", 32)).split(b"\n")[:2]
  path.write_bytes(sealed.seal(b"\n".join([*head, b""])))
  with pytest.raises(BadInput, match="holds no program"):
    stablehlo.read(path)
