"""Bytes predicted from shapes against bytes that exist."""

import jax
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.io import packing
from qupeD_jax.results import account

BITS = [*range(1, 9), 32]
QUANTISED = ["conv_2/kernel", "dense_1/kernel"]


def variables():
  """Returns a small network with odd sizes: no tensor of it fills its last byte at every width."""
  rng = np.random.default_rng(0)
  shapes = {
    "conv_1": {"kernel": (3, 3, 1, 5), "bias": (5,)},
    "conv_2": {"kernel": (3, 3, 5, 7), "bias": (7,)},
    "dense_1": {"kernel": (7, 11), "scale": ()},
  }
  draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
  params = jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))
  return {"params": params, "stats": {"norm": {"mean": np.zeros(7, np.float32)}}}


def packed_bytes(model, bits):
  used = 2**bits if bits < 32 else 0
  book = np.full(256, np.inf, np.float32)
  book[:used] = np.linspace(-2, 2, used)
  packed = packing.pack(model, dict.fromkeys(QUANTISED, book))
  return account.tree_bytes((packed.codes, packed.centers, packed.kept))


@pytest.mark.parametrize("bits", BITS)
def test_model_bytes_are_those_of_the_packed_model(bits):
  model = variables()
  expected = packed_bytes(model, bits)
  assert account.model_bytes(model["params"], QUANTISED, bits, model["stats"]) == expected


@pytest.mark.parametrize("bits", BITS)
def test_shapes_alone_suffice(bits):
  model, shapes = variables(), jax.eval_shape(variables_as_jax)
  expected = account.model_bytes(model["params"], QUANTISED, bits)
  assert account.model_bytes(shapes["params"], QUANTISED, bits) == expected


def variables_as_jax():
  return jax.tree.map(jax.numpy.asarray, variables())


def test_tensors_outside_the_codebooks_ship_in_float32_whatever_they_are():
  params = {"bias": jax.ShapeDtypeStruct((6,), "bfloat16")}
  assert account.model_bytes(params, [], 2) == 24


def test_a_round_sends_the_model_both_ways_for_every_participant():
  server = variables()["params"]
  entries = 45 + 5 + 315 + 7 + 77 + 1
  assert account.round_bytes(server) == account.Traffic(up=4 * entries, down=4 * entries)
  up, down = account.round_bytes(server, participants=50)
  assert up == down == 50 * 4 * entries


@pytest.mark.parametrize("server", [(), {}, None])
def test_nothing_to_send_costs_nothing(server):
  assert account.round_bytes(server, participants=50) == account.Traffic(0, 0)


def test_a_path_that_names_no_tensor_is_refused():
  with pytest.raises(BadInput, match="quantised path conv_9/kernel"):
    account.model_bytes(variables()["params"], ["conv_9/kernel"], 2)


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_bits_out_of_range_are_refused(bits):
  with pytest.raises(BadInput, match=f"bits {bits}"):
    account.model_bytes(variables()["params"], QUANTISED, bits)


def test_a_negative_number_of_participants_is_refused():
  with pytest.raises(BadInput, match="participants -1"):
    account.round_bytes({}, participants=-1)
