"""QuPeD and its parts against a plain numpy loop: two clients, a linear model, three rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax import client, quantize
from qupeD_jax.algorithms.fedavg import fedavg
from qupeD_jax.algorithms.fedprox import fedprox
from qupeD_jax.algorithms.local import local
from qupeD_jax.algorithms.quped import quped
from tests import toy

ROWS = 12
DATA = toy.dataset(2 * ROWS)
ETA, CENTER_RATE, PULL, GLOBAL_RATE, TEMPERATURE, MU = 0.3, 0.05, 0.02, 0.4, 2.0, 0.7
STEPS, ROUNDS = 3, 3


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


class Batch:
  """A client's whole data; in double precision, gradients written out by hand."""

  def __init__(self, i):
    rows = slice(i * ROWS, (i + 1) * ROWS)
    self.x = DATA.x[rows].reshape(ROWS, -1) / 64.0
    self.one_hot = np.eye(toy.CLASSES)[DATA.y[rows]]

  def logits(self, kernel, bias):
    return self.x @ kernel + bias

  def pull_back(self, g):
    return self.x.T @ g / ROWS, g.sum(0) / ROWS

  def personal_gradient(self, kernel, bias, teacher, p):
    """(1 - p) CE + p T^2 KL(teacher || student), in the student's parameters."""
    z = self.logits(kernel, bias)
    g = (1 - p) * (softmax(z) - self.one_hot)
    if p:
      g = g + p * TEMPERATURE * (softmax(z / TEMPERATURE) - softmax(teacher / TEMPERATURE))
    return self.pull_back(g)

  def global_gradient(self, teacher_logits, targets, p, a):
    """p T^2 sum KL(w || target) + a CE, in w's parameters."""
    q = softmax(teacher_logits / TEMPERATURE)
    g = a * (softmax(teacher_logits) - self.one_hot)
    for target in targets:
      ratio = np.log(q / softmax(target / TEMPERATURE))
      g = g + p * TEMPERATURE * q * (ratio - np.sum(q * ratio, -1, keepdims=True))
    return self.pull_back(g)


def nearest(x, c):
  return np.argmin(np.abs(x[..., None] - c), axis=-1)


def quped_by_loops(start, bits, p, a=0.0):
  """Algorithm 2 as its equations stand, one client after the other."""
  w = [start["params"]["dense_1"]["kernel"], start["params"]["head"]["bias"]]
  w = [np.asarray(t, np.float64) for t in w]
  xs = [[t.copy() for t in w] for _ in bits]
  cs = [None if b == 32 else first_centers(w[0], 2**b) for b in bits]
  for _ in range(ROUNDS):
    copies = []
    for i in range(len(bits)):
      batch, (kernel, bias), c = Batch(i), xs[i], cs[i]
      w_i = [t.copy() for t in w]
      for _ in range(STEPS):
        teacher = batch.logits(*w_i)
        g_kernel, g_bias = batch.personal_gradient(kernel, bias, teacher, p)
        if c is not None:
          g_bias = g_bias + batch.personal_gradient(c[nearest(kernel, c)], bias, teacher, p)[1]
        kernel, bias = kernel - ETA * g_kernel, bias - ETA * g_bias
        targets = []
        if c is not None:
          q = c[nearest(kernel, c)]
          gap = kernel - q
          kernel = q + np.sign(gap) * np.maximum(np.abs(gap) - ETA * PULL, 0)
          owner = nearest(kernel, c)
          g_q = batch.personal_gradient(c[owner], bias, teacher, p)[0]
          moved = c.copy()
          for j in range(len(c)):
            own = owner == j
            sides = np.sum(kernel[own] > c[j]) - np.sum(kernel[own] < c[j])
            moved[j] += CENTER_RATE * (PULL * sides - g_q[own].sum())
          c = np.sort(moved)
          targets = [batch.logits(c[nearest(kernel, c)], bias)]
        targets.append(batch.logits(kernel, bias))
        g_w = batch.global_gradient(teacher, targets, p, a)
        w_i = [t - GLOBAL_RATE * g for t, g in zip(w_i, g_w, strict=True)]
      xs[i], cs[i] = (kernel, bias), c
      copies.append(w_i)
    w = [np.mean(tensors, axis=0) for tensors in zip(*copies, strict=True)]
  return xs, cs, w


def first_centers(x, m):
  if m == 2:
    return np.array([x[x < 0].mean(), x[x >= 0].mean()])
  return np.linspace(x.min(), x.max(), m)


def train(algorithm, bits):
  cohorts = (toy.cohort(range(2), bits, ROWS),)
  state = algorithm.init(jax.random.key(0), DATA, cohorts)
  data = jax.tree.map(jnp.asarray, DATA)
  for r in range(ROUNDS):
    state, _ = jax.jit(algorithm.round)(jax.random.key(r), state, data, cohorts)
  return state


START = toy.linear().init(jax.random.key(0))
RATES = client.Rates(ETA, CENTER_RATE, PULL)


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [(1, 2), (32, 2), (32, 32), (3, 1)])
@pytest.mark.parametrize(("p", "a"), [(0.6, 0.0), (0.3, 0.8)])
def test_quped(bits, p, a):
  model = toy.linear()
  algorithm = quped(
    model,
    (model,),
    quantize.learned_codebook(max_bits=3),
    lambda_p=p,
    temperature=TEMPERATURE,
    rates=RATES,
    global_rate=GLOBAL_RATE,
    global_loss_weight=a,
    local_steps=STEPS,
    batch_size=ROWS,
  )
  state = train(algorithm, bits)
  xs, cs, w = quped_by_loops(START, bits, p, a)
  (personal,) = state.clients
  for i in range(2):
    params = personal.variables["params"]
    close(params["dense_1"]["kernel"][i], xs[i][0])
    close(params["head"]["bias"][i], xs[i][1])
    if cs[i] is not None:
      close(personal.codebooks["dense_1/kernel"][i][: len(cs[i])], cs[i])
  close(state.server["params"]["dense_1"]["kernel"], w[0])
  close(state.server["params"]["head"]["bias"], w[1])


def test_local_is_algorithm_1():
  model = toy.linear()
  algorithm = local(
    (model,),
    quantize.learned_codebook(max_bits=2),
    rates=RATES,
    local_steps=STEPS,
    batch_size=ROWS,
  )
  (personal,) = train(algorithm, (2, 1)).clients
  xs, cs, _ = quped_by_loops(START, (2, 1), p=0.0)
  for i in range(2):
    close(personal.variables["params"]["dense_1"]["kernel"][i], xs[i][0])
    close(personal.codebooks["dense_1/kernel"][i][: len(cs[i])], cs[i])


def averaging_by_loops(mu):
  w = [np.asarray(START["params"][m][k], np.float64) for m, k in MEMBERS]
  for _ in range(ROUNDS):
    copies = []
    for i in range(2):
      w_i = [t.copy() for t in w]
      for _ in range(STEPS):
        grads = Batch(i).personal_gradient(*w_i, None, 0)
        w_i = [t - ETA * (g + mu * (t - s)) for t, g, s in zip(w_i, grads, w, strict=True)]
      copies.append(w_i)
    w = [np.mean(tensors, axis=0) for tensors in zip(*copies, strict=True)]
  return w


MEMBERS = (("dense_1", "kernel"), ("head", "bias"))


@pytest.mark.parametrize("mu", [0.0, MU])
def test_fedavg_and_fedprox(mu):
  options = {"rate": ETA, "local_steps": STEPS, "batch_size": ROWS}
  model = toy.linear()
  algorithm = fedprox(model, mu=mu, **options) if mu else fedavg(model, **options)
  state = train(algorithm, (32, 32))
  for (module, name), expected in zip(MEMBERS, averaging_by_loops(mu), strict=True):
    close(state.server["params"][module][name], expected)
