"""What every algorithm has to hold to: one suite runs them all."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.engine import parallel
from qupeD_jax.federation import losses
from qupeD_jax.federation.aggregators import weighted_mean
from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.quantization import quantizers
from qupeD_jax.types import Cohort
from qupeD_jax.wrappers.posttraining import with_post_training_quantisation
from qupeD_jax.wrappers.sampling import with_sampling
from qupeD_jax.wrappers.separate import separate
from tests import toy
from tests.algorithms.federations import (
  DATA,
  KEY,
  KMEANS,
  LOCAL,
  MODELS,
  QUANTIZER,
  QUPED,
  RATES,
  SERVER,
  STEPS,
  TOLERANCE,
  cohorts,
  make_local,
  make_quped,
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


def make_finetune():
  """Fine-tuning starts from a trained state, whose clients are those of the cohorts it is given."""
  algorithm = make_quped()

  def init(key, data, cohorts):
    return phase(algorithm.init(key, data, cohorts)).init(key, data, cohorts)

  def phase(trained):
    return finetune(MODELS, QUANTIZER, trained, server_model=SERVER, lambda_p=0.5, **STEPS)

  def personalize(key, state, data, cohorts):
    return phase(state).personalize(key, state, data, cohorts)

  return phase(None)._replace(init=init, personalize=personalize)


BEYOND_THE_PAPER = {
  "global_loss_weight": 0.5,
  "global_divergence": losses.reverse_kl,
  "global_temperature": 2.0,
  "own_classes": True,
  "straight_through": 0.5,
}
PROXQUANT = quantizers.proxquant(max_bits=2)
BINARY_RELAX = quantizers.binary_relax(max_bits=2, relaxation=lambda step: 1.0 + step)
STE = quantizers.ste(max_bits=2, clip_weights=1.0)


def make_rival_quantizers():
  """Two at once: the cohorts know nothing of each other."""
  pairs = zip(MODELS, (PROXQUANT, STE), strict=True)
  return separate(tuple(local((model,), q, rates=RATES, **STEPS) for model, q in pairs))


ALGORITHMS = {
  "local": lambda: LOCAL,
  "local_full_precision": lambda: make_local(quantizers.full_precision()),
  "local_rival_quantizers": make_rival_quantizers,
  "posttraining": lambda: with_post_training_quantisation(
    make_local(quantizers.full_precision()), KMEANS
  ),
  "fedavg": lambda: fedavg(SERVER, **STEPS),
  "fedprox": lambda: fedprox(SERVER, mu=0.1, **STEPS),
  "ditto": lambda: ditto(SERVER, penalty=0.5, **STEPS),
  "pfedme": lambda: pfedme(SERVER, penalty=5.0, inner_steps=2, mixing=0.9, **STEPS),
  "per_fedavg": lambda: per_fedavg(SERVER, adapt_steps=2, **STEPS),
  "fml": lambda: fml(SERVER, MODELS, **STEPS),
  "fedrep": lambda: fedrep(SERVER, **STEPS),
  "fedbn": lambda: fedbn(toy.normalised(), **STEPS),
  "scaffold": lambda: scaffold(SERVER, num_clients=8, **STEPS),
  "apfl": lambda: apfl(SERVER, adaptive=True, **STEPS),
  "qupel": lambda: qupel(SERVER, QUANTIZER, rates=RATES, **STEPS),
  "quped": lambda: QUPED,
  "quped_beyond_the_paper": lambda: make_quped(**BEYOND_THE_PAPER),
  "quped_binary_relax": lambda: quped(SERVER, MODELS, BINARY_RELAX, rates=RATES, **STEPS),
  "quped_full_precision": lambda: quped(
    SERVER, MODELS, quantizers.full_precision(), rates=RATES, **STEPS
  ),
  "finetune": make_finetune,
  "separate": lambda: separate(tuple(fedavg(model, **STEPS) for model in MODELS)),
}
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
# Those whose clients hold no more than another's do, and send the same.
ALIKE = {"local", "local_rival_quantizers", "posttraining", "fedavg", "fedprox"}
ALIKE |= {"quped", "quped_binary_relax", "quped_full_precision"}
every_kind = pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ALIKE])


@functools.cache
def made(name):
  """Returns an algorithm of which half the clients take part in a round, or all of those ALIKE.

  Whoever is drawn goes through the algorithm's own round: one program is asked about both.
  """
  algorithm = ALGORITHMS[name]()
  return algorithm if name in ALIKE else with_sampling(algorithm, 0.5)


@functools.cache
def rounds_of(name, fraction=None):
  algorithm = made(name)
  if fraction is not None:
    return algorithm, rounds_of(name)[1], jax.jit(with_sampling(algorithm, fraction).round)
  return algorithm, jax.jit(algorithm.init), jax.jit(algorithm.round)


def train(name, groups, rounds=3, fraction=None):
  _, init, one_round = rounds_of(name, fraction)
  state = init(KEY, DATA, groups)
  for r in range(rounds):
    state, info = one_round(jax.random.fold_in(KEY, r), state, DATA, groups)
  return state, info


def by_id(groups, clients):
  """Client states by id, whatever slot they are in."""
  return {
    int(i): jax.tree.map(lambda leaf, k=k: leaf[k], states)
    for cohort, states in zip(groups, clients, strict=True)
    for k, i in enumerate(cohort.client)
    if i >= 0
  }


def assert_same_clients(groups, clients, other_groups, other_clients, **tolerance):
  ours, theirs = by_id(groups, clients), by_id(other_groups, other_clients)
  for i in ours.keys() & theirs.keys():
    chex.assert_trees_all_close(ours[i], theirs[i], **tolerance)


@every_algorithm
def test_a_round_keeps_structure_shapes_and_dtypes(name):
  _, init, one_round = rounds_of(name)
  state = init(KEY, DATA, cohorts())
  after, info = jax.eval_shape(one_round, KEY, state, DATA, cohorts())
  chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda s: s, state))
  assert [i.loss.shape for i in info] == [(4,) if name in ALIKE else (2,)] * 2


@every_algorithm
def test_a_round_counts_and_reports_finite_losses(name):
  state, info = train(name, cohorts())
  assert state.round == 3
  assert all(np.all(np.isfinite(i.loss)) for i in info)


@every_algorithm
def test_training_lowers_the_loss(name):
  _, first = train(name, cohorts(), rounds=1)
  _, last = train(name, cohorts(), rounds=20)
  assert np.mean([i.loss for i in last]) < np.mean([i.loss for i in first])


@every_algorithm
def test_the_same_key_gives_the_same_bits(name):
  chex.assert_trees_all_equal(train(name, cohorts())[0], train(name, cohorts())[0])


@every_algorithm
def test_what_stands_in_padding_rows_changes_nothing(name):
  ours = cohorts()
  theirs = tuple(jax.tree.map(np.copy, cohort) for cohort in ours)
  for cohort in theirs:
    cohort.index[:, 12:] = np.random.default_rng(0).integers(0, 96, (4, 2))
  chex.assert_trees_all_equal(train(name, ours)[0], train(name, theirs)[0])


def test_row_padding_changes_nothing():
  chex.assert_trees_all_equal(train("fedavg", cohorts())[0], train("fedavg", cohorts(padding=9))[0])


@every_algorithm
def test_client_order_changes_nothing(name):
  ours, theirs = cohorts(), cohorts((2, 0, 3, 1), (7, 6, 5, 4))
  a, b = train(name, ours)[0], train(name, theirs)[0]
  chex.assert_trees_all_close(a.server, b.server, **TOLERANCE)
  assert_same_clients(ours, a.clients, theirs, b.clients, **TOLERANCE)


def pad_clients(cohort, count):
  """Adds slots without rows."""
  pad = lambda leaf, value: np.pad(
    leaf, [(0, count)] + [(0, 0)] * (leaf.ndim - 1), constant_values=value
  )
  return jax.tree.map(pad, cohort, Cohort(index=0, size=0, client=-1, bits=32))


@every_kind
def test_devices_padding_clients_and_row_padding_change_nothing(name):
  """All at once, to compile one program and not three."""
  algorithm, mesh, ours = made(name), parallel.make_mesh(2), cohorts()
  padded = tuple(pad_clients(cohort, 2) for cohort in cohorts(padding=9))

  def three_rounds(key, data, cohorts):
    def one_round(r, state):
      return algorithm.round(jax.random.fold_in(key, r), state, data, cohorts)[0]

    return jax.lax.fori_loop(0, 3, one_round, algorithm.init(key, data, cohorts))

  runs = jax.vmap(three_rounds, (0, None, 0))
  data, spread = parallel.spread(DATA, jax.tree.map(lambda leaf: leaf[None], padded), mesh)
  key = parallel.place(KEY[None], mesh)
  state = jax.jit(parallel.over_devices(runs, mesh, parallel.STATE))(key, data, spread)
  for leaf in jax.tree.leaves(state.clients):
    assert {shard.data.shape[1] for shard in leaf.addressable_shards} == {3}
  state = jax.tree.map(lambda leaf: leaf[0], parallel.fetch(state))
  expected = jax.device_get(train(name, ours)[0])
  chex.assert_trees_all_close(state.server, expected.server, **TOLERANCE)
  assert_same_clients(ours, expected.clients, padded, state.clients, **TOLERANCE)


@every_kind
def test_clients_that_sit_out_keep_their_state_to_the_bit(name):
  groups = cohorts()
  _, init, one_round = rounds_of(name)
  state = init(KEY, DATA, groups)
  after, info = one_round(KEY, state, DATA, groups)
  took_part = {int(c) for i in info for c, size in zip(i.client, i.size, strict=True) if size}
  assert [len(i.client) for i in info] == [2, 2]
  assert len(took_part) == 4
  before, now = by_id(groups, state.clients), by_id(groups, after.clients)
  for i in before:
    if i not in took_part:
      chex.assert_trees_all_equal(before[i], now[i])
    elif jax.tree.leaves(before[i]):
      with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(before[i], now[i])


@pytest.mark.parametrize("name", ["fedavg", "local"])
def test_full_participation_changes_nothing(name):
  groups = cohorts()
  a, b = train(name, groups)[0], train(name, groups, fraction=1.0)[0]
  chex.assert_trees_all_close(a, b, **TOLERANCE)


def test_local_clients_do_not_notice_each_other():
  all_of_them, few = cohorts(), cohorts((1, 3), (6,))
  a, b = train("local", all_of_them)[0], train("local", few)[0]
  assert_same_clients(all_of_them, a.clients, few, b.clients, **TOLERANCE)


@every_algorithm
def test_what_is_scored(name):
  algorithm, _, _ = rounds_of(name)
  state, _ = train(name, cohorts())
  shown = algorithm.personalize(KEY, state, DATA, cohorts())
  assert "personal" in shown
  for models in shown.values():
    assert len(models) == 2
    for scored in models:
      x = DATA.x[:4]
      if scored.stacked:
        logits, _ = jax.vmap(scored.model.apply, (0, None, None))(scored.variables, x, False)
        assert logits.shape == (4, 4, toy.CLASSES)
      else:
        assert scored.model.apply(scored.variables, x, False)[0].shape == (4, toy.CLASSES)


@pytest.mark.parametrize("name", ["per_fedavg", "posttraining"])
def test_models_made_to_be_scored_ignore_order_and_padding(name):
  """These two do not merely show what their state holds."""
  algorithm, _, _ = rounds_of(name)
  state, _ = train(name, cohorts())
  order = np.array([2, 0, 3, 1])
  personal = []
  for slots, groups in ((np.arange(4), cohorts()), (order, cohorts(padding=9))):
    groups = tuple(jax.tree.map(lambda leaf, s=slots: leaf[s], group) for group in groups)
    moved = state._replace(clients=jax.tree.map(lambda leaf, s=slots: leaf[s], state.clients))
    shown = algorithm.personalize(KEY, moved, DATA, groups)["personal"]
    personal.append((groups, [scored.variables for scored in shown]))
  assert_same_clients(*personal[0], *personal[1], **TOLERANCE)


def test_post_training_quantisation_ships_what_the_bits_allow():
  algorithm, _, _ = rounds_of("posttraining")
  state, _ = train("posttraining", cohorts())
  shown = algorithm.personalize(KEY, state, DATA, cohorts())
  trained = (models.variables for models in shown["unquantised"])
  for group, before, after in zip(cohorts(), trained, shown["personal"], strict=True):
    after = after.variables["params"]
    exempt = before["params"].keys() - {"dense_1"}
    chex.assert_trees_all_equal(
      *({name: of[name] for name in exempt} for of in (after, before["params"]))
    )
    for k, bits in enumerate(group.bits):
      kernel = after["dense_1"]["kernel"][k]
      if bits == 32:
        np.testing.assert_array_equal(kernel, before["params"]["dense_1"]["kernel"][k])
      else:
        assert len(np.unique(kernel)) == 2**bits


LINEAR = toy.linear()


def proximal(rate):
  return {"rates": Rates(rate, rate), "global_rate": rate}


def both(rate):
  return {"rate": rate, "global_rate": rate}


# By rate, a number or a schedule, and further options.
BY_RATE = {
  fedavg: lambda rate, **options: fedavg(LINEAR, rate=rate, **STEPS, **options),
  fedprox: lambda rate, **options: fedprox(LINEAR, rate=rate, **STEPS, **options),
  ditto: lambda rate, **options: ditto(LINEAR, **both(rate), **STEPS, **options),
  pfedme: lambda rate, **options: pfedme(LINEAR, **both(rate), **STEPS, **options),
  per_fedavg: lambda rate, **options: per_fedavg(LINEAR, rate=rate, **STEPS, **options),
  fml: lambda rate, **options: fml(LINEAR, (LINEAR,), **both(rate), **STEPS, **options),
  fedrep: lambda rate, **options: fedrep(LINEAR, rate=rate, head_rate=rate, **STEPS, **options),
  fedbn: lambda rate, **options: fedbn(LINEAR, rate=rate, **STEPS, **options),
  scaffold: lambda rate, **options: scaffold(LINEAR, rate=rate, **STEPS, **options),
  apfl: lambda rate, **options: apfl(LINEAR, adaptive=True, **both(rate), **STEPS, **options),
  qupel: lambda rate, **options: qupel(LINEAR, QUANTIZER, **proximal(rate), **STEPS, **options),
  quped: lambda rate, **options: quped(
    LINEAR, (LINEAR,), QUANTIZER, **proximal(rate), **STEPS, **options
  ),
}
SCHEDULED = BY_RATE | {
  local: lambda rate, **options: local(
    (LINEAR,), QUANTIZER, rates=Rates(rate, rate), **STEPS, **options
  )
}
PAIR_OF_CLIENTS = (toy.cohort(range(2), (1, 32)),)


def finetune_by_rate(rate, trained=None, **options):
  trained = trained or SCHEDULED[local](rate).init(KEY, DATA, PAIR_OF_CLIENTS)
  return finetune((LINEAR,), QUANTIZER, trained, rate=rate, **STEPS, **options)


AUGMENTED = SCHEDULED | {finetune: finetune_by_rate}
FIVE = (toy.cohort(range(5), (1, 32, 2, 2, 1)),)


def fall(step):
  """A rate that is 0 from the second round on."""
  return jnp.where(step < STEPS["work"].steps, 0.1, 0.0)


@functools.cache
def trained(make, **options):
  """Returns five clients' states before and after their rounds, and what runs one round.

  They learn by a rate that falls, and where there is a server, the first of them weighs nothing.
  """
  weights = weighted_mean(lambda cohort: cohort.client * 1.0)
  options |= {"aggregate": weights} if make in BY_RATE else {}
  options |= {"trained": trained(local)[0][0]} if make is finetune else {}
  algorithm = AUGMENTED[make](fall, **options)
  states, one_round = [algorithm.init(KEY, DATA, FIVE)], jax.jit(algorithm.round)
  for _ in range(1 if "clients_per_step" in options else 2):
    states.append(one_round(KEY, states[-1], DATA, FIVE)[0])
  return states, algorithm.init, one_round


@pytest.mark.parametrize("make", SCHEDULED, ids=lambda make: make.__name__)
def test_schedules_count_the_steps_of_all_rounds(make):
  """Rates that fall to 0 with the first step of the second round leave that round nothing."""
  states, _, _ = trained(make)
  # pFedMe's clients start every round at the server's model.
  before, after, last = (s.server if make is pfedme else s[:2] for s in states)
  chex.assert_trees_all_close(last, after, rtol=1e-6, atol=1e-6)
  assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))


@pytest.mark.parametrize("make", AUGMENTED, ids=lambda make: make.__name__)
def test_clients_that_train_a_few_at_a_time_end_where_they_end_side_by_side(make):
  """Five in steps of two: the last step is filled up."""
  side_by_side, in_turns = trained(make)[0][1], trained(make, clients_per_step=2)[0][1]
  chex.assert_trees_all_close(side_by_side, in_turns, **TOLERANCE)
  with pytest.raises(BadInput, match="clients_per_step 0: allowed is a whole number of at least"):
    trained(make, clients_per_step=0)


@pytest.mark.parametrize("make", AUGMENTED, ids=lambda make: make.__name__)
def test_every_batch_is_augmented(make):
  """Traced, not run: a round augments at least one batch, as it is drawn."""
  shapes = []
  algorithm = AUGMENTED[make](0.1, augment=lambda key, x: shapes.append(x.shape) or x)
  state = algorithm.init(KEY, DATA, PAIR_OF_CLIENTS)
  jax.eval_shape(algorithm.round, KEY, state, DATA, PAIR_OF_CLIENTS)
  assert set(shapes) == {(STEPS["work"].batch_size, *toy.IMAGE)}


@pytest.mark.parametrize("make", BY_RATE, ids=lambda make: make.__name__)
def test_the_server_weighs_its_clients_as_told(make):
  """A client that weighs nothing might as well not be there."""
  states, init, one_round = trained(make)
  without = (pad_clients(toy.cohort(range(1, 5), (32, 2, 2, 1)), 1),)
  state, _ = one_round(KEY, init(KEY, DATA, without), DATA, without)
  chex.assert_trees_all_close(state.server, states[1].server, **TOLERANCE)


def test_clients_weigh_by_default_as_in_the_papers():
  """Two clients, at 0 and at 1, the first with three times as many rows."""
  (pair,) = PAIR_OF_CLIENTS
  sent = ({"w": jnp.float32([0, 1])},), (pair._replace(size=np.int32([9, 3])),)
  found = {}
  for make in BY_RATE:
    default = inspect.signature(make).parameters["aggregate"].default
    found[make] = float(default(KEY, *sent, {"w": jnp.float32(7)})[0]["w"])
  alike = {pfedme, fedrep, fedbn, scaffold, apfl, qupel, quped}
  assert {make for make in BY_RATE if found[make] == 0.5} == alike
  assert all(found[make] == 0.25 for make in BY_RATE.keys() - alike)


def only(name, value, allowed):
  return {name: value}, f"{name} {value}: allowed is {allowed}"


PAIR = (SERVER, MODELS)
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
  ("make", "bad"),
  [
    (ditto, only("penalty", -1.0, "a finite number of at least 0")),
    (ditto, only("penalty", INF, "a finite number of at least 0")),
    (ditto, only("rate", 0.0, "a finite number above 0")),
    (ditto, only("global_rate", NAN, "a finite number above 0")),
    (pfedme, only("penalty", 0.0, "a finite number above 0")),
    (pfedme, only("mixing", -0.5, "a finite number above 0")),
    (pfedme, only("inner_steps", 0, "a whole number of at least 1")),
    (pfedme, only("rate", -1.0, "a finite number above 0")),
    (pfedme, only("global_rate", 0.0, "a finite number above 0")),
    (per_fedavg, only("inner_rate", -0.1, "a finite number of at least 0")),
    (per_fedavg, only("adapt_steps", 0, "a whole number of at least 1")),
    (per_fedavg, only("rate", 0.0, "a finite number above 0")),
    (fml, only("lambda_p", 1.0, "in [0, 1)")),
    (fml, only("global_lambda_p", -0.1, "in [0, 1)")),
    (fml, only("temperature", 0.0, "a finite number above 0")),
    (fml, only("global_rate", 0.0, "a finite number above 0")),
    (fml, only("rate", INF, "a finite number above 0")),
    (fedrep, only("head_steps", 11, "a whole number of at most 10")),
    (fedrep, only("head_rate", 0.0, "a finite number above 0")),
    (fedrep, only("rate", INF, "a finite number above 0")),
    (fedbn, only("rate", 0.0, "a finite number above 0")),
    (scaffold, only("rate", NAN, "a finite number above 0")),
    (scaffold, only("global_rate", 0.0, "a finite number above 0")),
    (scaffold, only("num_clients", 0, "a whole number of at least 1")),
    (apfl, only("alpha", 1.5, "in [0, 1]")),
    (apfl, only("rate", -1.0, "a finite number above 0")),
    (apfl, only("global_rate", 0.0, "a finite number above 0")),
    (qupel, only("penalty", -1.0, "a finite number of at least 0")),
    (qupel, only("global_rate", 0.0, "a finite number above 0")),
    (quped, only("straight_through", 1.5, "in [0, 1]")),
    (quped, only("global_temperature", -1.0, "a finite number above 0")),
    *((make, only("local_steps", 0, "a whole number of at least 1"))
      for make in (ditto, pfedme, per_fedavg, fml, fedrep, fedbn, scaffold, apfl, qupel)),
    *((make, only("batch_size", 2.5, "a whole number of at least 1"))
      for make in (ditto, pfedme, per_fedavg, fml, fedrep, fedbn, scaffold, apfl, qupel)),
  ],
)  # fmt: skip
def test_bad_hyperparameters_are_refused_in_one_line(make, bad):
  options, message = bad
  models = {fml: PAIR, quped: (*PAIR, QUANTIZER), qupel: (SERVER, QUANTIZER)}.get(make, (SERVER,))
  with pytest.raises(BadInput) as raised:
    make(*models, **options)
  assert str(raised.value) == message
