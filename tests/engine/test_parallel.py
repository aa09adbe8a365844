"""Clients spread over devices: the same results, and nothing sent but what is named."""

import math
import os
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from qupeD_jax.algorithms.ditto import ditto
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.quped import quped
from qupeD_jax.checks import BadInput
from qupeD_jax.data.cohort import pad_clients
from qupeD_jax.engine import loop, parallel
from qupeD_jax.federation import aggregators
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.quantization import quantizers
from qupeD_jax.wrappers.sampling import with_sampling
from tests import toy

DEVICES = 8
DATA = toy.dataset(144)
STEPS = {"work": LocalWork(steps=3, batch_size=4)}
MODELS = (toy.linear(), toy.mlp(8))
# Partial sums of the devices are added in another order: float32, sums of size 1, a few rounds.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
SEEDS = 2


def mesh():
  return parallel.make_mesh(DEVICES)


def cohorts(slots=0):
  """Seven clients of one architecture and five of another, the same for every seed."""
  groups = (
    toy.cohort(range(7), (1, 2, 32, 2, 1, 2, 32)),
    toy.cohort(range(7, 12), (2, 1, 32, 2, 2)),
  )
  padded = (pad_clients(cohort, max(slots, len(cohort.size))) for cohort in groups)
  return jax.tree.map(lambda leaf: np.stack([leaf] * SEEDS), tuple(padded))


def runs(slots=0):
  keys = jax.vmap(jax.random.key)(np.arange(SEEDS, dtype=np.uint32))
  return loop.Runs(keys, cohorts(slots))


def make_quped():
  quantizer = quantizers.learned_codebook(max_bits=2)
  rates = Rates(0.1, 0.01, 0.01)
  return quped(MODELS[1], MODELS, quantizer, rates=rates, **STEPS)


ALGORITHMS = {
  "quped": make_quped,
  "fedavg": lambda: fedavg(MODELS[0], **STEPS),
  "ditto": lambda: ditto(MODELS[0], aggregate=aggregators.median(), **STEPS),
  "sampling": lambda: with_sampling(ditto(MODELS[1], **STEPS), 0.4),
}


def train(name, on, slots=0):
  chunks = []
  result = loop.run(
    lambda _: ALGORITHMS[name](),
    runs(slots),
    DATA,
    rounds=3,
    every=2,
    scored=(DATA, cohorts(slots)),
    callback=chunks.append,
    mesh=on,
  )
  return parallel.fetch(result.state), chunks


@pytest.mark.parametrize("name", ALGORITHMS)
def test_eight_devices_give_what_one_gives(name):
  alone, one = train(name, None)
  state, eight = train(name, mesh(), slots=DEVICES)
  without_padding = tuple(
    jax.tree.map(lambda leaf, cohort=cohort: leaf[:, : len(cohort.size[0])], clients)
    for cohort, clients in zip(cohorts(), state.clients, strict=True)
  )
  chex.assert_trees_all_close(state.server, alone.server, **TOLERANCE)
  chex.assert_trees_all_close(without_padding, alone.clients, **TOLERANCE)
  for ours, theirs in zip(eight, one, strict=True):
    np.testing.assert_allclose(ours.loss, theirs.loss, **TOLERANCE)
    chex.assert_trees_all_close(ours.scores, theirs.scores, atol=1e-6)


def test_a_device_holds_its_own_clients_and_their_rows():
  data, placed = parallel.spread(DATA, cohorts(DEVICES), mesh())
  most = len(data.y) // DEVICES
  assert most < len(DATA.y) / 2
  for cohort, given in zip(placed, cohorts(DEVICES), strict=True):
    for d in range(DEVICES):
      own = slice(d * most, (d + 1) * most)
      index = np.asarray(cohort.index)[:, d]
      np.testing.assert_array_equal(np.asarray(data.x)[own][index], DATA.x[given.index[:, d]])
      np.testing.assert_array_equal(np.asarray(data.y)[own][index], DATA.y[given.index[:, d]])
    assert {s.data.shape[1] for s in cohort.index.addressable_shards} == {1}


def collectives(text):
  """Reads the collectives of a compiled program: (name, bytes that it hands out)."""
  found = []
  pattern = r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
  for shapes, name in re.findall(pattern, text):
    sizes = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", shapes)
    count = lambda dims: math.prod(int(d) for d in dims.split(",") if d)
    found.append((name, sum(int(bits) // 8 * count(dims) for bits, dims in sizes)))
  return found


def compiled_round(name):
  on = mesh()
  data, placed = parallel.spread(DATA, cohorts(DEVICES), on)
  placed = parallel.place(runs()._replace(cohorts=()), on)._replace(cohorts=placed)
  build = lambda _: ALGORITHMS[name]()
  shapes = loop.initial_shapes(build, runs(DEVICES), DATA)
  state = parallel.place(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), on)
  return loop.compile_chunk(build, 2, placed, state, data, on), state


def total_bytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_all_that_devices_send_of_the_size_of_a_model_is_the_mean_of_w():
  program, state = compiled_round("quped")
  found = collectives(program.as_text())
  sums = [size for name, size in found if name == "all-reduce" and size > 64 * SEEDS]
  others = [size for name, size in found if name != "all-reduce"]
  # The sums of all tensors together, once a round.
  assert sum(sums) == pytest.approx(total_bytes(state.server), abs=64 * SEEDS)
  # What is reported: one number a client and round.
  assert max(others) <= 4 * SEEDS * DEVICES * 2


def test_of_a_sample_devices_send_the_states_and_examples_of_who_takes_part():
  """Of 12 clients 3 and 2 take part: a slot of each cohort on every device."""
  program, state = compiled_round("sampling")
  found = collectives(program.as_text())
  of_client = total_bytes(state.clients) / DEVICES  # one of each cohort, of every seed
  rows = cohorts(DEVICES)[0].index.shape[-1] + cohorts(DEVICES)[1].index.shape[-1]
  examples = SEEDS * rows * total_bytes(DATA) / len(DATA.y)
  handed_out = sum(size for name, size in found if name == "reduce-scatter")
  assert handed_out == pytest.approx(of_client + examples, abs=64 * SEEDS)
  gathered = sum(size for name, size in found if name == "all-gather")
  assert gathered == pytest.approx(DEVICES * of_client, abs=4 * SEEDS * DEVICES * 16)


def test_more_devices_than_there_are_are_refused():
  with pytest.raises(BadInput, match=r"devices_per_process 99: allowed is 1 to 8, the devices"):
    parallel.make_mesh(99)


def test_one_device_needs_no_mesh():
  assert parallel.make_mesh(1) is None
  assert parallel.slots(5, None) == 5
  assert parallel.slots(5, mesh()) == 8


@pytest.mark.parametrize(
  ("flags", "found"), [("", 3), ("--xla_force_host_platform_device_count=2", 2)]
)
def test_a_processor_passes_for_several_devices_that_are_patient(flags, found):
  """As many as asked for, unless XLA_FLAGS say otherwise; those flags are kept."""
  code = """
import os, jax
from qupeD_jax.engine import parallel
for _ in range(2):
  parallel.split_processor(3)
print(jax.device_count(), os.environ["XLA_FLAGS"])
"""
  environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", code]
  printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
  count, *left = printed.stdout.split()
  patience = [f"{name}={seconds}" for name, seconds in parallel._PATIENCE.items()]
  assert (int(count), left) == (found, [*patience, *flags.split()])
