"""Every algorithm against a plain numpy loop: two clients, a linear model, three rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qupeD_jax import models
from qupeD_jax.federation import losses
from qupeD_jax.quantization import ops, quantizers
from qupeD_jax.wrappers.posttraining import with_post_training_quantisation
from tests import oracle, toy
from tests.algorithms.comparing import (
  BOTH,
  MODEL,
  PERSONAL,
  STEPS,
  assert_model,
  assert_models,
  assert_personal,
  close,
)
from tests.flat import (
  apfl,
  ditto,
  fedavg,
  fedbn,
  fedprox,
  fedrep,
  finetune,
  fml,
  local,
  per_fedavg,
  pfedme,
  quped,
  qupel,
  scaffold,
)

QUANTIZER = quantizers.learned_codebook(max_bits=3)


def assert_both(algorithm, expected):
  """What an algorithm shows of its clients' models and of the server's."""
  _, shown = oracle.train(algorithm)
  personal, w = expected
  assert_models(shown["personal"][0].variables, personal)
  assert_model(shown["global"][0].variables, w)


@functools.cache
def make_quped(**options):
  """Of the same options the same, so that clients of other bits train by the same program."""
  return quped(
    MODEL,
    (MODEL,),
    QUANTIZER,
    temperature=oracle.TEMPERATURE,
    global_rate=oracle.GLOBAL_RATE,
    **PERSONAL,
    **options,
  )


def run_quped(bits, **options):
  return oracle.train(make_quped(**options), bits)[0]


def assert_quped(state, expected):
  xs, cs, w = expected
  assert_personal(state.clients[0], xs, cs)
  assert_model(state.server, w)


@pytest.mark.parametrize("bits", [(1, 2), (32, 2), (32, 32), (3, 1)])
@pytest.mark.parametrize(("p", "a"), [(0.6, 0.0), (0.3, 0.8)])
def test_quped(bits, p, a):
  state = run_quped(bits, lambda_p=p, global_loss_weight=a)
  assert_quped(state, oracle.quped(bits, p, a))


# An option of the package, and the same of the loops.
REVERSE = {"global_divergence": losses.reverse_kl}, {"reverse": True}
COOLER = {"global_temperature": 0.7}, {"global_temperature": 0.7}
OWN = {"own_classes": True}, {"own": True}
THROUGH = {"straight_through": 0.4}, {"share": 0.4}
AT_ONCE = {"simultaneous": True}, {"simultaneous": True}


@pytest.mark.parametrize(
  ("bits", "options"),
  [
    ((1, 2), [REVERSE]),
    # One bit: of more, the outer centers start on entries, and rounding decides on which side.
    ((32, 1), [AT_ONCE]),
    ((1, 1), [AT_ONCE, THROUGH]),
    ((32, 2), [REVERSE, COOLER, OWN, THROUGH]),
    ((3, 1), [REVERSE, COOLER, OWN, THROUGH]),
    ((2, 1), [COOLER, OWN]),
  ],
)
def test_quped_beyond_the_paper(bits, options):
  ours, theirs = ({k: v for one in options for k, v in one[side].items()} for side in (0, 1))
  state = run_quped(bits, lambda_p=0.6, global_loss_weight=0.3, **ours)
  assert_quped(state, oracle.quped(bits, 0.6, 0.3, **theirs))


@pytest.mark.parametrize(
  ("bits", "quantizer"),
  [
    ((1, 2), QUANTIZER),
    ((32, 2), QUANTIZER),
    ((32, 32), QUANTIZER),
    ((32, 32), quantizers.full_precision()),
  ],
)
def test_qupel(bits, quantizer):
  assert_quped(oracle.train(make_qupel(quantizer), bits)[0], oracle.qupel(bits, 0.8))


@functools.cache
def make_qupel(quantizer):
  return qupel(MODEL, quantizer, penalty=0.8, global_rate=oracle.GLOBAL_RATE, **PERSONAL)


@pytest.mark.parametrize(("bits", "own"), [((1, 2), False), ((32, 1), True)])
def test_finetune(bits, own):
  w = MODEL.init(jax.random.key(1))
  before = quped(MODEL, (MODEL,), QUANTIZER, start=(w, (oracle.START,)), **PERSONAL)
  algorithm = finetune(
    (MODEL,),
    QUANTIZER,
    before.init(jax.random.key(0), oracle.DATA, (toy.cohort(range(2), bits),)),
    server_model=MODEL,
    lambda_p=0.6,
    temperature=oracle.TEMPERATURE,
    own_classes=own,
    rate=oracle.ETA,
    centers_rate=0.01,
    **STEPS,
  )
  state, _ = oracle.train(algorithm, bits)
  teacher = [np.asarray(t, np.float64) for t in oracle.tensors(w)]
  assert_personal(state.clients[0], *oracle.finetune(bits, 0.6, teacher, 0.01, own=own))


def test_local_is_algorithm_1():
  state, _ = oracle.train(local((MODEL,), QUANTIZER, **PERSONAL), (2, 1))
  xs, cs, _ = oracle.quped((2, 1), p=0.0)
  assert_personal(state.clients[0], xs, cs)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedavg_and_fedprox(mu):
  options = {"rate": oracle.ETA, **STEPS}
  algorithm = fedprox(MODEL, mu=mu, **options) if mu else fedavg(MODEL, **options)
  assert_model(oracle.train(algorithm)[0].server, oracle.averaging(mu))


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_ditto(penalty):
  assert_both(ditto(MODEL, penalty=penalty, **BOTH), oracle.ditto(penalty))


@pytest.mark.parametrize(("inner_steps", "mixing"), [(1, 1.0), (3, 1.0), (2, 0.6)])
def test_pfedme(inner_steps, mixing):
  algorithm = pfedme(MODEL, penalty=1.7, inner_steps=inner_steps, mixing=mixing, **BOTH)
  assert_both(algorithm, oracle.pfedme(1.7, inner_steps, mixing))


@pytest.mark.parametrize("adapt_steps", [1, 3])
def test_per_fedavg(adapt_steps):
  algorithm = per_fedavg(MODEL, inner_rate=0.2, rate=oracle.ETA, adapt_steps=adapt_steps, **STEPS)
  assert_both(algorithm, oracle.per_fedavg(0.2, adapt_steps))


def test_per_fedavg_draws_both_batches_of_a_step_independently():
  """A client of two rows in batches of one: all four pairs of rows turn up, and nothing else."""
  rows, inner_rate, data = np.array([0, 1]), 0.1, jax.tree.map(jnp.asarray, oracle.DATA)
  group = toy.cohort([0], [32], 2)._replace(index=rows[None])
  options = {"inner_rate": inner_rate, "rate": oracle.ETA, "local_steps": 1, "batch_size": 1}
  algorithm = per_fedavg(MODEL, **options)
  state = algorithm.init(jax.random.key(0), data, (group,))
  one_round = lambda key: algorithm.round(key, state, data, (group,))[0].server
  keys = jax.random.split(jax.random.key(1), 24)
  kernels = np.asarray(oracle.tensors(jax.jit(jax.vmap(one_round))(keys))[0])

  one = [oracle.Batch(0, rows[i : i + 1]) for i in (0, 1)]
  pairs = [oracle.per_fedavg_step(oracle.start(), a, b, inner_rate) for a in one for b in one]
  distance = np.abs(kernels[:, None] - np.stack([kernel for kernel, _ in pairs])).max((2, 3))
  nearest, next_one, *_ = np.sort(distance, axis=1).T
  assert np.all(nearest < 1e-5)
  assert np.all(next_one > 1e-3)
  assert set(np.argmin(distance, axis=1)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("p", "q"), [(0.6, 0.3), (0.0, 0.5)])
def test_fml(p, q):
  options = {"lambda_p": p, "global_lambda_p": q, "temperature": oracle.TEMPERATURE}
  assert_both(fml(MODEL, (MODEL,), **options, **BOTH), oracle.fml(p, q))


@pytest.mark.parametrize("head_steps", [None, 2])
def test_fedrep(head_steps):
  """By default the head has one of three steps."""
  options = {"rate": oracle.ETA, "head_rate": 0.5, "head_steps": head_steps, **STEPS}
  _, shown = oracle.train(fedrep(MODEL, **options))
  assert_models(shown["personal"][0].variables, oracle.fedrep(head_steps or 1, 0.5))


def test_fedbn():
  model = models.from_linen(NormalisedPixels(), toy.IMAGE)
  start = model.init(jax.random.key(0))
  _, shown = oracle.train(fedbn(model, rate=oracle.ETA, start=start, **STEPS))
  tensors = lambda variables: [
    *(variables["params"]["head"][name] for name in ("kernel", "bias")),
    *(variables["params"]["norm"][name] for name in ("scale", "bias")),
  ]
  variables = shown["personal"][0].variables
  running = variables["stats"]["batch_stats"]["norm"]
  first = [np.asarray(t, np.float64) for t in tensors(start)]
  expected = zip(*oracle.fedbn(first, momentum=0.9), strict=True)
  for found, tensor in zip([*tensors(variables), running["mean"], running["var"]], expected,
                           strict=True):  # fmt: skip
    close(found, np.stack(tensor))


class NormalisedPixels(nn.Module):
  """What FedBN's loop trains."""

  @nn.compact
  def __call__(self, x, train):
    rows = x.reshape(len(x), -1)
    rows = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(rows)
    return nn.Dense(toy.CLASSES, name="head")(rows)


@pytest.mark.parametrize("global_rate", [1.0, 0.6])
def test_scaffold(global_rate):
  algorithm = scaffold(MODEL, rate=oracle.ETA, global_rate=global_rate, **STEPS)
  state, _ = oracle.train(algorithm)
  own, w, control = oracle.scaffold(global_rate, oracle.ROUNDS * [(0, 1)])
  assert_model(state.server["model"], w)
  assert_model({"params": state.server["control"]}, control)
  assert_models({"params": state.clients[0]}, own)


def test_scaffold_weighs_by_the_whole_federation_what_a_few_clients_send():
  """One of two clients takes part in each round; the mean of both stays the server's control."""
  algorithm = scaffold(MODEL, rate=oracle.ETA, num_clients=2, **STEPS)
  cohort, data = toy.cohort(range(2), (32, 32), oracle.ROWS), jax.tree.map(jnp.asarray, oracle.DATA)
  state, one_round = algorithm.init(jax.random.key(0), data, (cohort,)), jax.jit(algorithm.round)
  order = [(0,), (1,), (0,)]
  for (i,) in order:
    present = (cohort._replace(size=np.where(np.arange(2) == i, cohort.size, 0)),)
    after, _ = one_round(jax.random.key(0), state, data, present)
    own = jax.tree.map(lambda new, old, i=i: old.at[i].set(new[i]), after.clients, state.clients)
    state = after._replace(clients=own)
  own, w, control = oracle.scaffold(1.0, order)
  assert_model(state.server["model"], w)
  assert_model({"params": state.server["control"]}, control)
  assert_models({"params": state.clients[0]}, own)


@pytest.mark.parametrize("adaptive", [False, True])
def test_apfl(adaptive):
  algorithm = apfl(MODEL, alpha=0.4, adaptive=adaptive, **BOTH)
  state, shown = oracle.train(algorithm)
  personal, w, alphas = oracle.apfl(0.4, adaptive)
  assert_models(shown["personal"][0].variables, personal)
  assert_model(shown["global"][0].variables, w)
  close(state.clients[0]["alpha"], alphas)


@pytest.mark.parametrize("bits", [(1, 3), (32, 2)])
def test_post_training_quantisation(bits):
  quantizer = quantizers.learned_codebook(max_bits=3, init=ops.kmeans_centers)
  alone = local((MODEL,), quantizers.full_precision(), **PERSONAL)
  algorithm = with_post_training_quantisation(alone, quantizer)
  _, shown = oracle.train(algorithm, bits)
  trained, shipped = oracle.post_training(bits)
  assert_models(shown["unquantised"][0].variables, trained)
  assert_models(shown["personal"][0].variables, shipped)
