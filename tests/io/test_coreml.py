"""Models as Core ML packages: what lies in them. They predict on a Mac alone."""

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="requirements/export.txt is not installed")

from qupeD_jax.io import coreml, packing
from qupeD_jax.io.export import size
from tests import shipped as toys


@pytest.mark.parametrize(
  ("name", "bits"), [*(("mlp", bits) for bits in range(1, 9)), ("cnn3", 2), ("resnet8", 3)]
)
def test_look_up_gives_the_quantised_weights_bit_for_bit(name, bits, tmp_path):
  model = toys.shipped(name, bits)
  package = tmp_path / "model.mlpackage"
  coreml.save(package, model)
  found = coreml.look_up(package)
  params = toys.ops.flatten(packing.unpack(model.packed)["params"])
  assert found.keys() == {coreml.name_of(path) for path in model.packed.codes}
  for path in model.packed.codes:
    expected = params[path].transpose(3, 2, 0, 1) if params[path].ndim == 4 else params[path]
    assert found[coreml.name_of(path)].shape == expected.shape
    assert found[coreml.name_of(path)].tobytes() == np.ascontiguousarray(expected).tobytes()
  assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]
  if bits not in (5, 7):  # which are widened
    assert size(package) <= toys.save(tmp_path, model).stat().st_size + 16_384
