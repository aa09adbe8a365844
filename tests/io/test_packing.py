"""Packing a model and getting back exactly its hard-quantised self."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qupeD_jax.checks import BadInput
from qupeD_jax.io import packing

ENTRY = st.floats(-100, 100, width=32, allow_subnormal=False)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)


@st.composite
def tensors_with_codebooks(draw):
  """Draws a tensor, its bits, and its codebook with some slots unused."""
  bits = draw(st.integers(1, 8))
  tensor = draw(hnp.arrays(np.float32, draw(SHAPES), elements=ENTRY))
  centers = draw(hnp.arrays(np.float32, 2**bits, elements=ENTRY))
  unused = np.full(draw(st.sampled_from([0, 1, 6])), np.inf, np.float32)
  return tensor, bits, np.concatenate([np.sort(centers), unused])


def nearest_by_search(tensor, centers):
  """Finds the nearest center of every entry by trying all; the lower one of two as near."""
  distance = np.abs(tensor[..., None].astype(np.float64) - centers)
  return centers[np.argmin(distance, axis=-1)]


def model(tensor):
  """Returns variables of which only `middle/kernel` is quantised."""
  params = {"first": {"bias": np.float32(0.1)}, "middle": {"kernel": tensor}}
  return {"params": params, "stats": {"norm": {"mean": np.arange(3.0)}}}


@given(tensors_with_codebooks())
def test_unpacked_entries_are_nearest_centers(drawn):
  tensor, bits, centers = drawn
  packed = packing.pack(model(tensor), {"middle/kernel": centers})
  kernel = packing.unpack(packed)["params"]["middle"]["kernel"]
  used = centers[: 2**bits]
  assert kernel.shape == tensor.shape
  assert kernel.dtype == np.float32
  assert np.isin(kernel, used).all()
  # Rounding of a midpoint may decide between two centers that are as near within an ulp.
  best = np.abs(tensor - nearest_by_search(tensor, used))
  np.testing.assert_allclose(np.abs(tensor - kernel), best, rtol=1e-5, atol=1e-5)


@given(tensors_with_codebooks())
def test_unpacked_entries_follow_the_midpoints_bit_for_bit(drawn):
  tensor, bits, centers = drawn
  packed = packing.pack(model(tensor), {"middle/kernel": centers})
  used = centers[: 2**bits]
  code = np.sum(tensor[..., None] > (used[:-1] + used[1:]) / 2, axis=-1)
  kernel = packing.unpack(packed)["params"]["middle"]["kernel"]
  assert kernel.tobytes() == used[code].tobytes()


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_codes_lie_little_endian_without_gaps(bits, entries, seed):
  codes = np.random.default_rng(seed).integers(0, 2**bits, entries)
  centers = np.arange(2**bits, dtype=np.float32)
  packed = packing.pack(model(codes.astype(np.float32)), {"middle/kernel": centers})
  number = sum(int(code) << (bits * k) for k, code in enumerate(codes))
  expected = number.to_bytes(-(-entries * bits // 8), "little")
  assert packed.codes["middle/kernel"].tobytes() == expected


def test_a_tie_goes_to_the_lower_center():
  packed = packing.pack(model(np.float32([0.0])), {"middle/kernel": np.float32([-1, 1])})
  assert packing.unpack(packed)["params"]["middle"]["kernel"] == -1


def test_full_precision_client_keeps_every_tensor():
  tensor = np.float32([[0.3, -0.7]])
  packed = packing.pack(model(tensor), {"middle/kernel": np.full(4, np.inf)})
  assert packed.codes == packed.centers == packed.shapes == {}
  np.testing.assert_array_equal(packed.kept["params/middle/kernel"], tensor)


def test_structure_survives_and_everything_is_float32():
  variables = model(jnp.ones((2, 3), jnp.bfloat16))
  unpacked = packing.unpack(packing.pack(variables, {}))
  assert flatten_dict(unpacked).keys() == flatten_dict(variables).keys()
  for key, leaf in flatten_dict(unpacked).items():
    assert leaf.dtype == np.float32
    assert leaf.shape == np.shape(flatten_dict(variables)[key])


def test_a_network_without_stats_keeps_an_empty_place_for_them():
  variables = {"params": {"kernel": np.ones(2)}, "stats": {}}
  assert packing.unpack(packing.pack(variables, {}))["stats"] == {}


@settings(max_examples=25)
@given(drawn=tensors_with_codebooks())
def test_file_gives_back_model_and_metadata(tmp_path_factory, drawn):
  tensor, _, centers = drawn
  path = tmp_path_factory.mktemp("models") / "client.safetensors"
  packed = packing.pack(model(tensor), {"middle/kernel": centers})
  metadata = {"client": np.int32(7), "model": "cnn1", "classes": [1, 4]}
  packing.save(path, packed, metadata)
  loaded, about = packing.load(path)
  assert about == {"client": 7, "model": "cnn1", "classes": [1, 4]}
  assert loaded.shapes == packed.shapes
  for found, expected in zip(loaded, packed, strict=True):
    assert found.keys() == expected.keys()
  one, other = flatten_dict(packing.unpack(loaded)), flatten_dict(packing.unpack(packed))
  assert all(one[key].tobytes() == other[key].tobytes() for key in other)
  assert all(one[key].shape == other[key].shape for key in other)
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def saved(folder):
  path = folder / "client.safetensors"
  packed = packing.pack(model(np.float32([0.2, 3.0])), {"middle/kernel": np.float32([-1, 1])})
  packing.save(path, packed, {"client": 0})
  return path


def test_a_model_is_the_same_file_whenever_it_is_saved(tmp_path):
  written = {saved(tmp_path).read_bytes() for _ in range(8)}
  assert len(written) == 1
  assert int.from_bytes(written.pop()[:8], "little") % 8 == 0  # tensors are aligned


def test_file_holds_the_tensors_under_their_names(tmp_path):
  assert safetensors.numpy.load_file(saved(tmp_path)).keys() == {
    "middle/kernel.codes",
    "middle/kernel.centers",
    "params/first/bias",
    "stats/norm/mean",
  }


def test_every_damaged_bit_is_noticed(tmp_path):
  path = saved(tmp_path)
  whole = path.read_bytes()
  for place in range(8 * len(whole)):
    damaged = bytearray(whole)
    damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match=r"^[^\n]*client\.safetensors: (damaged|not a model)[^\n]*$"):
      packing.load(path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
  path = saved(tmp_path)
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(BadInput, match=r"client\.safetensors: damaged"):
    packing.load(path)


def test_a_foreign_file_is_refused(tmp_path):
  path = tmp_path / "other.safetensors"
  safetensors.numpy.save_file({"a": np.zeros(3)}, path)
  with pytest.raises(BadInput, match=r"other\.safetensors: not a model that qupeD_jax packed"):
    packing.load(path)


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(BadInput, match=r"none\.safetensors: cannot be read"):
    packing.load(tmp_path / "none.safetensors")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").touch()
  packed = packing.pack(model(np.zeros(2)), {})
  with pytest.raises(BadInput, match=r"client: cannot be written"):
    packing.save(tmp_path / "file" / "client", packed, {})


@pytest.mark.parametrize(
  "centers",
  [[0, 1, 2], [0], [1, 0], [np.nan, 1], [np.inf, 0, 1], [0, 1, np.nan], [-np.inf, 0], range(512)],
)
def test_a_codebook_that_is_none_is_refused(centers):
  with pytest.raises(BadInput, match="codebook of middle/kernel"):
    packing.pack(model(np.zeros(2)), {"middle/kernel": np.float32(centers)})


def test_a_codebook_without_its_tensor_is_refused():
  with pytest.raises(BadInput, match=r"codebook middle: allowed is .*middle/kernel"):
    packing.pack(model(np.zeros(2)), {"middle": np.float32([0, 1])})


@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_a_diverged_tensor_is_not_passed_off_as_a_quantised_one(entry):
  with pytest.raises(BadInput, match="middle/kernel: has entries that are not finite"):
    packing.pack(model(np.float32([1, entry])), {"middle/kernel": np.float32([0, 1])})
