"""The engine: one compilation, nothing but rounds on the device, runs side by side by vmap."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import models, rng
from qupeD_jax.checks import BadInput
from qupeD_jax.engine import evaluate, loop, programs, reports
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.quantization import quantizers
from qupeD_jax.types import Cohort, Dataset, FedState, Info, Model, Scored
from qupeD_jax.wrappers.sampling import with_sampling
from tests import toy
from tests.flat import fedavg, local, quped

SERVER, MODELS = toy.linear(), (toy.linear(),)
DATA = jax.tree.map(jnp.asarray, toy.dataset(96))
STEPS = {"work": LocalWork(steps=2, batch_size=4)}
SEEDS = 2


def cohorts():
  groups = (toy.cohort((0, 2, 1, 3), (1, 32, 2, 2)),)
  return jax.tree.map(lambda leaf: np.stack([leaf] * SEEDS), groups)


def runs(setting=None):
  keys = jax.random.wrap_key_data(
    np.stack([jax.random.key_data(jax.random.key(seed)) for seed in range(SEEDS)])
  )
  return loop.Runs(keys, cohorts(), setting)


def build(setting):
  lambda_p = 0.5 if setting is None else setting
  quantizer = quantizers.learned_codebook(max_bits=2)
  return quped(SERVER, MODELS, quantizer, lambda_p=lambda_p, **STEPS)


def counting(build):
  calls = []

  def counted(setting):
    calls.append(setting)
    return build(setting)

  return counted, calls


def test_all_chunks_run_one_program():
  """Traced once for the start, once for the rounds and once for the scores, in 4 uneven chunks."""
  counted, calls = counting(build)
  chunks = []
  loop.run(
    counted,
    runs(),
    DATA,
    rounds=7,
    every=2,
    scored=(DATA, cohorts()),
    callback=chunks.append,
  )
  assert len(calls) == 3
  assert [chunk.rounds.tolist() for chunk in chunks] == [[1, 2], [3, 4], [5, 6], [7]]
  assert [chunk.loss.shape for chunk in chunks] == [(2, 2)] * 3 + [(2, 1)]
  assert chunks[-1].scores["personal"].shape == (SEEDS, 4)


def test_pauses_call_back_and_change_nothing():
  def reports(pause):
    chunks = []
    keep = lambda chunk: chunks.append(jax.device_get(chunk))
    scored = (DATA, cohorts())
    loop.run(build, runs(), DATA, rounds=7, every=4, pause=pause, scored=scored, callback=keep)
    return chunks

  paused, plain = reports(3), reports(None)
  assert [chunk.rounds.tolist() for chunk in paused] == [[1, 2, 3], [4], [5, 6], [7]]
  assert [bool(chunk.scores) for chunk in paused] == [False, True, False, True]
  losses = (np.concatenate([c.loss for c in chunks], axis=1) for chunks in (paused, plain))
  np.testing.assert_array_equal(*losses)
  for ours, theirs in zip(paused[1::2], plain, strict=True):
    chex.assert_trees_all_equal((ours.state, ours.scores), (theirs.state, theirs.scores))


def test_measures_are_taken_of_every_run_after_each_chunk():
  def measure(setting, state, data, cohorts):
    del data
    return {"sum": tuple(setting * state.round + 10.0 * cohort.client for cohort in cohorts)}

  chunks, settings = [], jnp.array([0.0, 0.5])
  loop.run(build, runs(settings), DATA, rounds=3, every=2, measure=measure, callback=chunks.append)
  expected = 10.0 * np.arange(4)
  for chunk, rounds in zip(chunks, (2, 3), strict=True):
    np.testing.assert_allclose(chunk.measures["sum"], [expected, expected + 0.5 * rounds])


@functools.cache
def five_rounds():
  return jax.device_get(loop.run(build, runs(), DATA, rounds=5, every=5).state)


def test_chunks_do_not_change_the_result():
  pieces = loop.run(build, runs(), DATA, rounds=5, every=2)
  chex.assert_trees_all_equal(five_rounds(), jax.device_get(pieces.state))


def test_a_run_goes_on_from_a_state():
  half = loop.run(build, runs(), DATA, rounds=3, every=3)
  rest = loop.run(build, runs(), DATA, rounds=5, every=2, state=half.state)
  chex.assert_trees_all_equal(five_rounds(), jax.device_get(rest.state))


def test_runs_do_not_notice_each_other():
  """A seed alone ends where it ends beside another, up to how XLA tiles a product of more runs."""
  both = five_rounds()
  alone = jax.tree.map(lambda leaf: leaf[1:], runs())
  one = loop.run(build, alone, DATA, rounds=5, every=5)
  second = jax.tree.map(lambda leaf: leaf[1:], both)
  chex.assert_trees_all_close(one.state, second, rtol=2e-5, atol=2e-5)
  first = jax.tree.map(lambda leaf: leaf[:1], both)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(first, second, rtol=2e-5, atol=2e-5)


def test_settings_may_differ_between_runs():
  swept = loop.run(build, runs(jnp.array([0.0, 0.7])), DATA, rounds=3, every=3)
  for i, lambda_p in enumerate((0.0, 0.7)):
    single = loop.run(lambda _, p=lambda_p: build(p), runs(), DATA, rounds=3, every=3)
    chex.assert_trees_all_close(
      jax.tree.map(lambda leaf, i=i: leaf[i], swept.state),
      jax.tree.map(lambda leaf, i=i: leaf[i], single.state),
      rtol=2e-5,
      atol=2e-5,
    )


def test_simulate_is_a_function_to_vmap_over_rates():
  """A sweep as a user writes it: no loop.run, one jit around one vmap."""
  groups = jax.tree.map(lambda leaf: leaf[0], cohorts())
  key = jax.random.key(0)

  def final_loss(rate):
    algorithm = local(MODELS, quantizers.full_precision(), rates=Rates(weights=rate), **STEPS)
    state = algorithm.init(key, DATA, groups)
    _, infos = programs.simulate(algorithm, key, state, DATA, groups, 10, 10)
    return jnp.mean(infos[0].loss[-1])

  losses = jax.jit(jax.vmap(final_loss))(jnp.array([1e-4, 0.1]))
  assert losses[1] < losses[0]


def chunk_of(build_fn):
  one = jax.device_put(runs())
  state = jax.jit(jax.vmap(programs.initialise(build_fn), (0, None)))(one, DATA)
  fn = jax.vmap(programs.train_chunk(build_fn, 3), (0, 0, None, None))
  return programs.compile_ahead(fn, one, state, DATA, jnp.int32(0), donate=1), one, state


def test_a_chunk_calls_no_host_and_keeps_images_as_bytes():
  compiled, one, state = chunk_of(build)
  text = compiled.as_text()
  for word in ("infeed", "outfeed", "callback", "send(", "recv("):
    assert word not in text
  assert f"u8[{','.join(map(str, DATA.x.shape))}]" in text
  data, length = jax.device_put((DATA, np.int32(3)))
  with jax.transfer_guard("disallow"):
    compiled(one, state, data, length)


def test_the_state_is_donated():
  compiled, one, state = chunk_of(build)
  data, length = jax.device_put((DATA, np.int32(3)))
  compiled(one, state, data, length)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.server, state.clients)))


def test_a_loss_that_is_not_finite_stops_the_run():
  """Seed 1 diverges in its second round; the first chunk was reported, the second names clients."""

  def explode(_):
    algorithm = fedavg(SERVER, **STEPS)

    def one_round(key, state, data, groups):
      state, info = algorithm.round(key, state, data, groups)
      bad = (state.round == 2) & (key_word(key) == key_word(round_key))
      hit = bad & (info[0].client % 2 == 1)
      return state, (info[0]._replace(loss=jnp.where(hit, jnp.nan, info[0].loss)),)

    return algorithm._replace(round=one_round)

  key_word = lambda key: jax.random.key_data(key)[0]
  round_key = rng.stream(jax.random.key(1), "rounds", 1)
  chunks = []
  with pytest.raises(reports.NonFinite) as caught:
    loop.run(explode, runs(), DATA, rounds=4, every=1, callback=chunks.append)
  assert (caught.value.run, caught.value.round, caught.value.clients) == (1, 2, [1, 3])
  assert [chunk.rounds.tolist() for chunk in chunks] == [[1]]


def test_bad_options_are_refused():
  with pytest.raises(BadInput, match="rounds 0: allowed is a whole number of at least 1"):
    loop.run(build, runs(), DATA, rounds=0, every=1)
  with pytest.raises(BadInput, match="fraction 0: allowed is above 0 and at most 1"):
    with_sampling(build(None), 0)


def test_a_round_in_which_nobody_trained_has_no_loss():
  """One run, two rounds, two clients."""
  size, loss = np.array([[[3, 0], [0, 0]]]), np.float32([[[2.0, np.nan], [1.0, 1.0]]])
  infos = (Info(np.zeros_like(size), size, loss, size < 0),)
  np.testing.assert_array_equal(reports.mean_loss(infos), [[2.0, np.nan]])
  np.testing.assert_array_equal(reports.num_clients(infos), [[1, 0]])


# --- scores


def constant_model(stacked):
  """Answers always the class that its one parameter names."""
  apply = lambda v, x, *_: (jnp.tile(jax.nn.one_hot(v["c"], 4), (len(x), 1)), {})
  model = Model(None, apply)
  return Scored(model, {"c": jnp.array([0, 1, 2]) if stacked else jnp.int32(1)}, stacked)


@pytest.mark.parametrize("examples", [1, 8, 5_000])
@pytest.mark.parametrize("rows_per_step", [1, 4, 100])
@pytest.mark.parametrize("stacked", [True, False])
def test_accuracy_counts_a_clients_own_true_rows(stacked, rows_per_step, examples, monkeypatch):
  monkeypatch.setattr(evaluate, "_EXAMPLES", examples)
  index = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 7, 7], [8, 8, 8, 8, 8]], np.int32)
  cohort = Cohort(index, np.array([5, 3, 0], np.int32), np.array([4, 2, -1]), np.zeros(3))
  scored = constant_model(stacked)
  actual = evaluate.accuracy(scored, DATA, cohort, rows_per_step)
  answers = [0, 1, 2] if stacked else [1, 1, 1]
  expected = [np.mean(DATA.y[:5] == answers[0]), np.mean(DATA.y[5:8] == answers[1]), 0.0]
  np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_memory_of_a_score_hardly_grows_with_clients():
  def temporary(clients):
    model = models.make("cnn3", 10, (16, 16, 3))
    of_each = lambda leaf: jax.ShapeDtypeStruct((clients, *leaf.shape), leaf.dtype)
    stacked = jax.tree.map(of_each, jax.eval_shape(model.init, jax.random.key(0)))
    data = Dataset(jnp.zeros((100, 16, 16, 3), jnp.uint8), jnp.zeros(100, jnp.int32))
    of_all = lambda value: np.full(clients, value, np.int32)
    index = np.zeros((clients, 100), np.int32)
    cohort = Cohort(index, of_all(100), np.arange(clients), of_all(32))
    score = lambda variables: evaluate.accuracy(Scored(model, variables, True), data, cohort)
    return jax.jit(score).lower(stacked).compile().memory_analysis().temp_size_in_bytes

  assert temporary(300) < 2 * temporary(100)


def test_scores_come_in_the_order_of_client_ids():
  groups = jax.tree.map(lambda leaf: np.stack([leaf]), (toy.cohort((5, 0), (2, 2)),
                                                        toy.cohort((3, 1), (2, 2))))  # fmt: skip
  scores = reports.by_client({"a": (np.array([[50.0, 0.0]]), np.array([[30.0, 10.0]]))}, groups)
  np.testing.assert_array_equal(scores["a"], [[0, 10, 30, 50]])


def test_score_equals_the_last_evaluation():
  chunks = []
  result = loop.run(
    build, runs(), DATA, rounds=2, every=2, scored=(DATA, cohorts()), callback=chunks.append
  )
  scores = loop.score(build, runs(), result.state, DATA, (DATA, cohorts()))
  for name, values in chunks[-1].scores.items():
    np.testing.assert_array_equal(values, scores[name])
  assert isinstance(result.state, FedState)
