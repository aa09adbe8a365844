"""Models as ONNX: the same logits, codes packed, and nothing that is not the network's."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="requirements/export.txt is not installed")
pytest.importorskip("onnxruntime", reason="requirements/export.txt is not installed")

from qupeD_jax import models  # noqa: E402
from qupeD_jax.checks import BadInput  # noqa: E402
from qupeD_jax.io import onnx_file, packing, sealed, weights  # noqa: E402
from tests import shipped as toys  # noqa: E402

BITS = (*range(1, 9), 32)
NETWORKS = ("mlp", "mlp2", "cnn1", "cnn2", "cnn3", "resnet8", "resnet20", "resnet32")
CASES = [(name, bits) for name in ("mlp", "cnn3", "resnet8") for bits in BITS]
CASES += [(name, bits) for name in NETWORKS for bits in (2, 5, 32)]


def written(folder, model):
  path = folder / "model.onnx"
  path.write_bytes(onnx_file.write(model))
  return path


def predicted(path, x):
  return onnx_file.predictor(onnx_file.read(path))(x)


@pytest.mark.parametrize(("name", "bits"), sorted(set(CASES)))
def test_logits_and_size(name, bits, tmp_path):
  model = toys.shipped(name, bits)
  path = written(tmp_path, model)  # checked by onnx when it was written
  expected = toys.logits(model, toys.images())
  assert expected.std() > 0.1  # signals come through
  np.testing.assert_allclose(predicted(path, toys.images()), expected, atol=1e-5, rtol=1e-5)
  source = toys.save(tmp_path, model).stat().st_size
  assert path.stat().st_size <= 1.02 * source + 4096


def test_any_number_of_images(tmp_path):
  path = written(tmp_path, toys.shipped("cnn3", 3))
  for number in (1, 4):
    assert predicted(path, toys.images(number)).shape == (number, 10)


def test_tensors_of_one_model_may_differ_in_bits(tmp_path):
  books = toys.codebooks("resnet8", 3) | {
    path: book for path, book in toys.codebooks("resnet8", 7).items() if path.startswith("stage_2")
  }
  packed = packing.pack(toys.variables("resnet8"), books)
  model = toys.shipped("resnet8", 3)._replace(packed=packed)
  expected = toys.logits(model, toys.images())
  got = predicted(written(tmp_path, model), toys.images())
  np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_kept_tensors_may_be_float16(tmp_path):
  whole = toys.shipped("resnet8", 2)
  half = whole._replace(packed=packing.halve_kept(whole.packed))
  path = written(tmp_path, half)
  expected = toys.logits(half, toys.images())
  np.testing.assert_allclose(predicted(path, toys.images()), expected, atol=1e-5, rtol=1e-5)
  source = toys.save(tmp_path, half).stat().st_size
  assert source < toys.save(tmp_path, whole).stat().st_size
  assert path.stat().st_size <= 1.02 * source + 4096


def test_codes_are_stored_packed_and_centers_once(tmp_path):
  model = toys.shipped("cnn3", 2)
  proto = onnx.load_from_string(onnx_file.write(model))
  found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
  for path, centers in model.packed.centers.items():
    np.testing.assert_array_equal(found[f"{path}.centers"], centers)
    assert found[f"{path}.codes"].nbytes == model.packed.codes[path].nbytes


def test_a_network_of_ones_own_brings_its_layers():
  model = toys.shipped("mlp", 2)
  own = model._replace(about=model.about._replace(model="mine"))
  with pytest.raises(BadInput, match=r"model mine: .*a network of one's own brings a list"):
    onnx_file.write(own)
  assert len(onnx_file.write(own, models.layers("mlp"))) > 1000


def test_every_network_has_a_list_of_layers_with_all_its_tensors():
  for name in models.NAMES:
    laid_out = weights.lay_out(toys.shipped(name, 2).packed, models.layers(name))
    leaves = {path.rsplit("/", 1)[0] for path in laid_out}
    kept = toys.shipped(name, 2).packed
    paths = [f"params/{path}" for path in kept.codes] + [*kept.kept]
    modules = {
      path.split("/", 1)[1].removeprefix("batch_stats/").rsplit("/", 1)[0] for path in paths
    }
    assert leaves == modules


def test_a_changed_byte_is_noticed(tmp_path):
  path = written(tmp_path, toys.shipped())
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(BadInput, match=r"model\.onnx: damaged"):
    onnx_file.read(path)


def lie(proto, what):
  """Makes a sound file say something else, its checksum right again."""
  constants = {tensor.name: tensor for tensor in proto.graph.initializer}
  with_values = lambda name, array: constants[name].CopyFrom(
    onnx.numpy_helper.from_array(array, name)
  )
  props = {prop.key: prop for prop in proto.metadata_props}
  match what:
    case "nan":
      with_values("head/bias", np.full(10, np.nan, np.float32))
    case "codebook":
      with_values("dense_1/kernel.centers", np.arange(3, dtype=np.float32))
    case "unsorted":
      with_values("dense_1/kernel.centers", np.float32([3, 2, 1, 0]))
    case "codes":
      with_values("dense_1/kernel.codes", np.zeros(7, np.uint8))
    case "shape":
      with_values("head/bias", np.zeros(11, np.float32))
    case "type":
      with_values("head/bias", np.zeros(10, np.int32))
    case "missing":
      proto.graph.initializer.remove(constants["head/bias"])
    case "foreign":
      proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3), "other"))
    case "operator":
      proto.graph.node[-1].op_type = "Sub"
    case "external":
      constants["head/bias"].data_location = onnx.TensorProto.EXTERNAL
    case "bytes":
      constants["head/bias"].raw_data = b"1"
    case "classes":
      props["metadata"].value = props["metadata"].value.replace(
        '"num_classes": 10', '"num_classes": 9'
      )
    case "images":
      props["metadata"].value = props["metadata"].value.replace("[8, 8, 1]", "[8, 9, 1]")
    case "version":
      props["format"].value = "qupeD_jax ONNX 2"
    case "json":
      props["metadata"].value = "{"


LIES = (
  "nan codebook unsorted codes shape type missing foreign operator external bytes classes images"
)


@pytest.mark.parametrize("what", [*LIES.split(), "version", "json"])
def test_a_file_that_lies_is_refused_though_its_checksum_is_right(what, tmp_path):
  path = tmp_path / "model.onnx"
  data = onnx_file.write(toys.shipped())
  proto = onnx.load_from_string(data)
  lie(proto, what)
  path.write_bytes(sealed.seal(proto.SerializeToString()[: -sealed.DIGITS]))
  with pytest.raises(BadInput, match=r"^[^\n]*model\.onnx: [^\n]*$"):
    onnx_file.read(path)
