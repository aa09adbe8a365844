"""More clients than the device holds: the run where all of them are on the device is the oracle."""

import itertools

import chex
import jax
import numpy as np
import optax
import pytest

from qupeD_jax import rng
from qupeD_jax.algorithms.ditto import ditto
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.finetune import finetune
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import quped
from qupeD_jax.engine import groups, loop, parallel, reports, store, streaming
from qupeD_jax.federation import aggregators
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.quantization import quantizers
from qupeD_jax.types import Cohort, Dataset
from qupeD_jax.wrappers.sampling import with_sampling
from tests import toy

MODELS = (toy.linear(), toy.mlp(4))
QUANTIZER = quantizers.learned_codebook(max_bits=2)
STEPS = {"work": LocalWork(steps=2, batch_size=4)}
DATA = toy.dataset(12 * 12)
SEEDS, CLIENTS = 2, 12
DEVICES = 3
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # what devices add up they add in another order


def mesh():
  return parallel.make_mesh(DEVICES)


def make_quped(_):
  rates = Rates(0.1, 0.01, 0.01)
  return quped(MODELS[0], MODELS, QUANTIZER, rates=rates, **STEPS)


ALGORITHMS = {
  "quped": make_quped,
  "ditto": lambda _: ditto(MODELS[0], aggregate=aggregators.median(), **STEPS),
  "fedavg": lambda _: fedavg(MODELS[0], **STEPS),
}


def make_runs(name, setting=None, seeds=SEEDS):
  keys = jax.vmap(jax.random.key)(np.arange(seeds))
  one = toy.cohort(range(CLIENTS), [2] * CLIENTS)
  two = toy.cohort((0, 2, 1, 3, 4), (1, 2, 32, 2, 1)), toy.cohort(range(5, 12), [2] * 7, padding=3)
  cohorts = two if name == "quped" else (one,)
  return loop.Runs(keys, jax.tree.map(lambda leaf: np.stack([leaf] * seeds), cohorts), setting)


def drawn(runs, fraction, rounds):
  """Tells who takes part in the first rounds, by sorting: [R, K] bool of the first cohort."""
  client = runs.cohorts[0].client
  took_part = np.zeros(client.shape, bool)
  count = round(fraction * client.shape[1])
  for run_, round_ in itertools.product(range(len(client)), range(rounds)):
    key = rng.stream(runs.key[run_], "rounds", round_)
    numbers = rng.client_uniforms(key, "sampling", client[run_])
    took_part[run_, np.argsort(numbers)[:count]] = True
  return took_part


# A share of 0.8 leaves hardly anybody out: nearly all that train have trained in the round before.
@pytest.mark.parametrize(("name", "fraction"), [("quped", 0.3), ("ditto", 0.8), ("fedavg", 0.3)])
def test_results_are_those_of_the_resident_run_to_the_bit(name, fraction, tmp_path):
  build, runs = ALGORITHMS[name], make_runs(name)
  options = {"rounds": 5, "every": 3}
  if name == "quped":
    options["scored"] = DATA, runs.cohorts
  resident_chunks, chunks, started = [], [], []

  def keep(chunk):
    chunks.append(chunk)
    started.append(chunk.state.clients[0].started.copy())

  resident = lambda setting: with_sampling(build(setting), fraction)
  expected = loop.run(resident, runs, DATA, callback=resident_chunks.append, **options).state
  place = store.on_disk(tmp_path) if name == "ditto" else store.on_host
  options |= {"fraction": fraction, "place": place, "callback": keep}
  state = streaming.run(build, runs, DATA, **options).state
  for ours, theirs in zip(chunks, resident_chunks, strict=True):
    np.testing.assert_array_equal(ours.rounds, theirs.rounds)
    np.testing.assert_array_equal(ours.loss, theirs.loss)
    chex.assert_trees_all_equal(ours.scores, theirs.scores)  # of all, who never trained among them
  np.testing.assert_array_equal(started[0], drawn(runs, fraction, rounds=3))
  assert name != "quped" or not started[0].all()
  state = streaming.completed(build, runs, state, DATA, fraction)
  expected = jax.device_get(expected)
  chex.assert_trees_all_equal(jax.device_get(streaming.views(state)), expected)
  # Devices share the participants, whose numbers they do not divide, and then all clients.
  shared = streaming.run(build, runs, DATA, mesh=mesh(), **options).state
  shared = streaming.completed(build, runs, shared, DATA, fraction, mesh())
  chex.assert_trees_all_close(jax.device_get(streaming.views(shared)), expected, **TOLERANCE)
  for ours, theirs in zip(chunks[2:], resident_chunks, strict=True):
    np.testing.assert_allclose(ours.loss, theirs.loss, **TOLERANCE)
    np.testing.assert_array_equal(ours.clients, theirs.clients)
    chex.assert_trees_all_close(ours.scores, theirs.scores, atol=1e-6)


def test_who_trains_twice_in_a_row_is_found_on_the_same_device():
  """Five of eight clients have a slot; all of them take part in one run, four in the other."""
  chance, takes_part = np.random.default_rng(0), np.arange(5) < np.array([[5], [4]])
  drawn = [np.stack([chance.permutation(8)[:5] for _ in range(2)]) for _ in range(20)]
  before = [groups.Group((slots,), (takes_part,)) for slots in drawn]
  device, last, found = np.repeat(np.arange(DEVICES), 2), None, 0
  for group, slots in zip(groups.arranged(before, mesh()), drawn, strict=True):
    now = [*map(np.squeeze, (group.slots, group.takes_part))]
    ours = [s[t].tolist() for s, t in zip(*now, strict=True)]
    assert list(map(sorted, ours)) == [sorted(slots[0]), sorted(slots[1, :4])]
    if last is not None:
      places = groups._places_in(*now, *last)
      for (r, k), client in np.ndenumerate(now[0]):
        there = np.flatnonzero((last[0][r] == client) & last[1][r])
        both = now[1][r, k] and len(there) > 0
        assert places[r, k] == (there[0] if both else -1)
        assert not both or device[there[0]] == device[k]
        found += both
    last = now
  assert found > 50


def test_each_group_alone_goes_through_all_rounds():
  """Fine-tuning of states in a store of one run, that both of two start from."""

  def build(trained):
    moments = {"optimizer": optax.scale_by_adam()}  # a count beside the weights: int32 and float32
    return finetune(MODELS[:1], QUANTIZER, trained, rate=0.1, **moments, **STEPS)

  cohorts = jax.tree.map(lambda leaf: leaf[0], make_runs("fedavg").cohorts)
  trained = jax.device_get(local(MODELS[:1], QUANTIZER).init(jax.random.key(0), DATA, cohorts))
  noise = lambda leaf: leaf + np.linspace(0, 1, leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
  trained = trained._replace(clients=jax.tree.map(noise, trained.clients))
  kept = store.create(trained.clients[0], (1, CLIENTS))
  packed = jax.tree.map(lambda leaf: leaf[None], store.pack(trained.clients[0]))
  store.put(kept, np.arange(CLIENTS)[None], np.ones((1, CLIENTS), bool), packed)

  twice = lambda tree: jax.tree.map(lambda leaf: np.stack([leaf] * SEEDS), tree)
  options = {"rounds": 3, "every": 2}
  runs = make_runs("fedavg", twice(trained))
  expected = loop.run(build, runs, DATA, **options)
  runs = runs._replace(setting=twice(trained._replace(clients=()))._replace(clients=(kept,)))
  losses = []
  options["callback"] = lambda chunk: losses.append(chunk.loss)
  options |= {"fraction": 0.4, "alone": True}
  state = streaming.run(build, runs, DATA, **options).state
  chex.assert_trees_all_equal(*jax.device_get((streaming.views(state), expected.state)))
  assert [loss.shape for loss in losses] == [(SEEDS, 2), (SEEDS, 1)]
  state = streaming.run(build, runs, DATA, mesh=mesh(), **options).state
  ours, theirs = jax.device_get((streaming.views(state), expected.state))
  chex.assert_trees_all_close(ours, theirs, **TOLERANCE)
  np.testing.assert_allclose(np.hstack(losses[2:]), np.hstack(losses[:2]), **TOLERANCE)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_group_has_its_own_rows_and_no_others(devices):
  data = Dataset(np.arange(100, dtype=np.uint8), np.arange(100) % 7)
  index = np.array([[[5, 5, 5], [90, 91, 92], [40, 41, 40]]])
  cohort = Cohort(index, np.array([[1, 3, 2]]), np.array([[7, 8, 9]]), np.array([[2, 1, 32]]))
  other = cohort._replace(index=index + 3)
  slots, takes_part = np.array([[2, 0]]), np.array([[True, False]])
  group = groups.Group((slots, slots), (takes_part, takes_part))
  part, chosen = groups.examples(data, (cohort, other), group, parallel.make_mesh(devices))
  assert part.x.shape == (1, 2 * 2 * 3)
  pieces = np.split(part.x[0], devices), np.split(part.y[0], devices)
  for mine, whole in zip(chosen, (cohort, other), strict=True):
    of_device = np.split(mine.index[0], devices)
    x, y = (np.concatenate(list(map(np.take, own, of_device))) for own in pieces)
    np.testing.assert_array_equal(x, whole.index[0, [2, 0]])
    np.testing.assert_array_equal(y, whole.index[0, [2, 0]] % 7)
    assert mine.size.tolist() == [[2, 0]]
    assert (mine.client.tolist(), mine.bits.tolist()) == ([[9, 7]], [[32, 2]])


def test_a_loss_that_is_not_finite_is_reported_as_by_the_resident_run():
  def diverge(_):
    return fedavg(MODELS[0], rate=3e38, **STEPS)

  errors, runs = [], make_runs("fedavg")
  options = {"rounds": 6, "every": 3}
  with pytest.raises(reports.NonFinite) as caught:
    loop.run(lambda s: with_sampling(diverge(s), 0.3), runs, DATA, **options)
  errors.append(str(caught.value))
  with pytest.raises(reports.NonFinite) as caught:
    streaming.run(diverge, runs, DATA, fraction=0.3, **options)
  assert str(caught.value) == errors[0]


def test_a_server_that_devices_do_not_make_together_is_an_error():
  def of_own_clients(key, uploads, cohorts, before):
    (upload,), (cohort,) = uploads, cohorts
    return jax.tree.map(lambda leaf: leaf[0], upload), (cohort.size > 0,)

  build, runs = lambda _: fedavg(MODELS[0], aggregate=of_own_clients, **STEPS), make_runs("fedavg")
  with pytest.raises(ValueError, match="the devices' servers differ"):
    streaming.run(build, runs, DATA, fraction=0.3, rounds=1, every=1, mesh=mesh())
