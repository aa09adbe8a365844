"""The packed file, from which all other forms come: its size, its reader, its description."""

import copy
import json

import numpy as np
import pytest
import safetensors

from qupeD_jax.checks import BadInput
from qupeD_jax.io import packing, shipped
from tests import shipped as toys


@pytest.mark.parametrize(("name", "bits"), [("mlp", 1), ("cnn3", 5), ("resnet20", 2), ("mlp", 32)])
def test_a_file_is_little_more_than_what_it_holds(name, bits, tmp_path):
  model = toys.shipped(name, bits)
  codes, centers, _, kept = model.packed
  arrays = [*codes.values(), *centers.values(), *kept.values()]
  held = sum(array.nbytes for array in arrays)
  assert toys.save(tmp_path, model).stat().st_size <= 1.02 * held + 4096 + 170 * len(arrays)


def test_numpy_and_safetensors_read_a_file(tmp_path):
  """As the documents say."""
  model = toys.shipped("cnn3", 3)
  expected = toys.ops.flatten(packing.unpack(model.packed)["params"])
  with safetensors.safe_open(toys.save(tmp_path, model), "numpy") as file:
    quantised = json.loads(file.metadata()["quantised"])
    for name, entry in quantised.items():
      bits, n = entry["bits"], np.prod(entry["shape"])
      planes = np.unpackbits(file.get_tensor(f"{name}.codes"), count=n * bits, bitorder="little")
      codes = np.packbits(planes.reshape(n, bits), axis=1, bitorder="little").ravel()
      tensor = file.get_tensor(f"{name}.centers")[codes].reshape(entry["shape"])
      np.testing.assert_array_equal(tensor, expected[name])
  assert quantised.keys() == model.packed.codes.keys()


def test_a_float16_that_overflows_is_refused():
  packed = toys.shipped("mlp", 2).packed
  large = packed._replace(kept=packed.kept | {"params/head/bias": np.float32([1e5] * 10)})
  with pytest.raises(BadInput, match=r"largest entry of params/head/bias 100000\.0: allowed"):
    packing.halve_kept(large)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("num_classes", 0),
    ("num_classes", True),
    ("image_shape", [8, 8]),
    ("image_shape", [8, 8, 2**40]),
    ("mean", [1.0, 2.0]),
    ("mean", 1e300),
    pytest.param("mean", 10**400, id="mean-10**400"),
    ("std", 0),
    ("std", 1e-60),
    ("white", 0),
    ("classes", ["one"]),
    ("dataset", 3),
  ],
)
def test_a_description_that_cannot_be_is_refused(field, value):
  metadata = copy.deepcopy(toys.shipped("mlp", 2).about.metadata)
  metadata["input"][field] = value
  with pytest.raises(BadInput, match=rf"^model\.onnx: {field}"):
    shipped.describe(metadata, "model.onnx")


@pytest.mark.parametrize(
  ("old", "new"), [("head/bias", "head/other"), ("head/bias", None), ("dense_1/bias", "head/bias")]
)
def test_tensors_other_than_the_networks_are_refused(old, new):
  packed, about = toys.shipped("mlp", 2)
  kept = dict(packed.kept)
  tensor = kept.pop(f"params/{old}")
  kept |= {f"params/{new}": tensor} if new else {}
  with pytest.raises(BadInput, match=r"^file: "):
    shipped.check(packed._replace(kept=kept), about, "file")
