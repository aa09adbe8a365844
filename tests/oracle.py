"""Algorithms as plain numpy loops in double precision, gradients written out by hand.

Two clients, one after the other, each with its whole data as every batch, and a linear model:
softmax(x kernel + bias), the kernel quantised and the bias exempt. Written from the papers'
equations, they share nothing with the package but its data and its first weights.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.types import Dataset
from tests import toy

ROWS = 12
ETA, CENTER_RATE, PULL, GLOBAL_RATE, TEMPERATURE = 0.3, 0.05, 0.02, 0.4, 2.0
STEPS, ROUNDS = 3, 3
RATES = Rates(ETA, CENTER_RATE, PULL)
START = toy.linear().init(jax.random.key(0))
HELD = ((0, 1, 2), (1, 3))  # each client's classes


def two_clients():
  """Twelve rows of each client's own classes."""
  data = toy.dataset(96)
  rows = [np.flatnonzero(np.isin(data.y, held))[i::2][:ROWS] for i, held in enumerate(HELD)]
  rows = np.concatenate(rows)
  return Dataset(data.x[rows], data.y[rows])


DATA = two_clients()


def train(algorithm, bits=(32, 32)):
  """Runs the package's algorithm on the two clients; its last state and what it shows of it."""
  cohorts = (toy.cohort(range(2), bits, ROWS),)
  data = jax.tree.map(jnp.asarray, DATA)
  state = algorithm.init(jax.random.key(0), data, cohorts)
  one_round = jax.jit(algorithm.round)
  for r in range(ROUNDS):
    state, _ = one_round(jax.random.key(r), state, data, cohorts)
  return state, algorithm.personalize(jax.random.key(ROUNDS), state, data, cohorts)


def tensors(variables):
  """A model, or several with a client axis, as the pair that the loops work on."""
  params = variables["params"]
  return params["dense_1"]["kernel"], params["head"]["bias"]


def start():
  return [np.asarray(t, np.float64) for t in tensors(START)]


def softmax(z, classes=1.0):
  """Over the classes where `classes` is not 0."""
  e = np.exp(z - z.max(-1, keepdims=True)) * classes
  return e / e.sum(-1, keepdims=True)


class Batch:
  """A client's whole data, or the given rows, and what can be said of them."""

  def __init__(self, i, rows=None):
    rows = np.arange(i * ROWS, (i + 1) * ROWS) if rows is None else rows
    self.x = DATA.x[rows].reshape(len(rows), -1) / 64.0
    self.one_hot = np.eye(toy.CLASSES)[DATA.y[rows]]
    self.held = np.eye(toy.CLASSES)[list(HELD[i])].sum(0)

  def logits(self, model):
    kernel, bias = model
    return self.x @ kernel + bias

  def pull_back(self, g):
    """The gradient in kernel and bias of a mean over rows, g being its gradient in the logits."""
    return [self.x.T @ g / len(g), g.sum(0) / len(g)]

  def gradient(self, model):
    """Of the cross-entropy."""
    return self.pull_back(softmax(self.logits(model)) - self.one_hot)

  def student_gradient(self, model, teacher, p, temperature=TEMPERATURE, classes=1.0):
    """(1 - p) CE + p T^2 KL(teacher || student), in the student."""
    z = self.logits(model)
    gap = softmax(z / temperature, classes) - softmax(teacher / temperature, classes)
    return self.pull_back((1 - p) * (softmax(z) - self.one_hot) + p * temperature * gap)

  def imitation_gradient(self, z, target, temperature=TEMPERATURE, classes=1.0):
    """T^2 KL(imitator || target), in the imitator's logits z."""
    q, aim = softmax(z / temperature, classes), softmax(target / temperature, classes)
    ratio = np.log(np.where(q > 0, q, 1.0) / np.where(aim > 0, aim, 1.0))
    return temperature * q * (ratio - np.sum(q * ratio, -1, keepdims=True))


def descend(model, gradient, rate):
  return [t - rate * g for t, g in zip(model, gradient, strict=True)]


def gaps(a, b):
  return [s - t for s, t in zip(a, b, strict=True)]


def mean(copies):
  return [np.mean(same, axis=0) for same in zip(*copies, strict=True)]


# --- codebooks


def nearest(x, c):
  return np.argmin(np.abs(x[..., None] - c), axis=-1)


def project(model, c):
  return model if c is None else [c[nearest(model[0], c)], model[1]]


def first_centers(x, bits):
  if bits == 32:
    return None
  if bits == 1:
    return np.array([x[x < 0].mean(), x[x >= 0].mean()])
  return np.linspace(x.min(), x.max(), 2**bits)


def toward(y, c, t):
  """The proximal map in x."""
  q = c[nearest(y, c)]
  return q + np.sign(y - q) * np.maximum(np.abs(y - q) - t, 0)


def move_centers(c, x, g):
  """A gradient step of the centers, g in Q_c(x), and the proximal map."""
  owner, moved = nearest(x, c), c.copy()
  for j in range(len(c)):
    own = owner == j
    sides = np.sum(x[own] > c[j]) - np.sum(x[own] < c[j])
    moved[j] += CENTER_RATE * (PULL * sides - g[own].sum())
  return np.sort(moved)


def algorithm_1_step(model, c, gradient, gradient_at_q=None, share=0.0, simultaneous=False):
  """x, then c at the new x; both gradients map a model to its gradients in kernel and bias.

  Where simultaneous, c moves at the old x.
  """
  gradient_at_q = gradient_at_q or gradient
  if c is None:
    return descend(model, gradient(model), ETA), None
  (g_kernel, g_bias), at_q = gradient(model), gradient_at_q(project(model, c))
  g_kernel = (1 - share) * g_kernel + share * at_q[0]
  kernel, bias = descend(model, [g_kernel, g_bias + at_q[1]], ETA)
  moved = [toward(kernel, c, ETA * PULL), bias]
  here = model if simultaneous else moved
  return moved, move_centers(c, here[0], gradient_at_q(project(here, c))[0])


def proxquant_step(pull):
  """x alone, pulled toward fixed centers by pull(t)."""

  def step(model, c, gradient, t):
    kernel, bias = descend(model, gradient(model), ETA)
    return [kernel if c is None else toward(kernel, c, ETA * pull(t)), bias], c

  return step


def relax(model, c, weight):
  """Weights between y and Q_c(y)."""
  y, bias = model
  return model if c is None else [(weight * c[nearest(y, c)] + y) / (weight + 1), bias]


def binary_relax_step(relaxation):
  """The gradient at the relaxed weights is y's; then centers are means of what they own."""

  def step(model, c, gradient, t):
    y, bias = descend(model, gradient(relax(model, c, relaxation(t))), ETA)
    if c is None:
      return [y, bias], None
    owner, owned = nearest(y, c), range(len(c))
    means = [y[owner == j].mean() if np.any(owner == j) else c[j] for j in owned]
    return [y, bias], np.array(means)

  return step


def levels(bits):
  return None if bits == 32 else np.linspace(-1, 1, 2**bits)


def ste_step(bound=np.inf):
  """The gradient at Q_c(y) is y's; then the scale's own, at the new y."""

  def step(model, c, gradient, t):
    if c is None:
      return descend(model, gradient(model), ETA), None
    y, bias = descend(model, gradient(project(model, c)), ETA)
    y = np.clip(y, -bound, bound)
    in_q, owner = gradient(project([y, bias], c))[0], nearest(y, c)
    unit = c / c[-1]
    slope = sum(unit[j] * in_q[owner == j].sum() for j in range(len(c)))
    return [y, bias], max(c[-1] - CENTER_RATE * slope, c[-1] / 2) * unit

  return step


def only_x(x, c, t):
  return [x]


def only_q(x, c, t):
  return [project(x, c)]


def only_relaxed(relaxation):
  return lambda x, c, t: [relax(x, c, relaxation(t))]


def both(x, c, t):
  return [x] if c is None else [x, project(x, c)]


def kmeans(x, m, iterations=30):
  """Lloyd's iterations from the quantiles on."""
  x = x.ravel()
  c = np.quantile(x, (np.arange(m) + 0.5) / m)
  for _ in range(iterations):
    owner = nearest(x, c)
    c = np.array([x[owner == j].mean() if np.any(owner == j) else c[j] for j in range(m)])
  return c


# --- algorithms: each returns what its clients and its server have after the last round


def quped(
  bits,
  p,
  a=0.0,
  *,
  reverse=False,
  global_temperature=TEMPERATURE,
  own=False,
  share=0.0,
  simultaneous=False,
  take_step=None,
  trained=both,
  first=None,
):
  """Algorithm 2 as its equations stand, with the options that go beyond them.

  Another quantizer is another step (model, centers, gradient, t), other models that it trains and
  w learns from (x, centers, t), and other first centers by bits.
  """
  options = {"share": share, "simultaneous": simultaneous}
  take_step = take_step or (lambda x, c, gradient, t: algorithm_1_step(x, c, gradient, **options))
  w = start()
  first = first or (lambda b: first_centers(w[0], b))
  xs, cs = [start() for _ in bits], list(map(first, bits))
  for r in range(ROUNDS):
    copies = []
    for i in range(len(bits)):
      batch, w_i = Batch(i), w
      classes = batch.held if own else 1.0
      for t in range(r * STEPS, (r + 1) * STEPS):
        z = batch.logits(w_i)
        gradient = lambda x, b=batch, z=z, k=classes: b.student_gradient(x, z, p, classes=k)
        before = xs[i], cs[i]
        xs[i], cs[i] = take_step(*before, gradient, t)
        targets = trained(*(before if simultaneous else (xs[i], cs[i])), t)
        g = a * (softmax(z) - batch.one_hot)
        for target in map(batch.logits, targets):
          if reverse:
            gap = softmax(z / global_temperature, classes)
            gap = gap - softmax(target / global_temperature, classes)
            g = g + p * global_temperature * gap
          else:
            g = g + p * batch.imitation_gradient(z, target, global_temperature, classes)
        w_i = descend(w_i, batch.pull_back(g), GLOBAL_RATE)
      copies.append(w_i)
    w = mean(copies)
  return xs, cs, w


def finetune(bits, p, w, centers_rate, *, own=False):
  """Entries stay with their centers, which must not cross; w is a fixed teacher."""
  xs, cs = [start() for _ in bits], [first_centers(start()[0], b) for b in bits]
  for i in range(len(bits)):
    batch, xs[i] = Batch(i), project(xs[i], cs[i])
    options = {"classes": batch.held if own else 1.0}
    for _ in range(ROUNDS * STEPS):
      g_kernel, g_bias = batch.student_gradient(xs[i], batch.logits(w), p, **options)
      kernel, bias = descend(xs[i], [g_kernel, g_bias], ETA)
      if cs[i] is not None:
        owner = nearest(xs[i][0], cs[i])
        sums = [g_kernel[owner == j].sum() for j in range(len(cs[i]))]
        cs[i] = cs[i] - centers_rate * np.array(sums)
        kernel = cs[i][owner]
      xs[i] = [kernel, bias]
  return xs, cs


def qupel(bits, penalty, take_step=None, first=None):
  """F(x, c, w) = f(x) + f(Q) + penalty/2 ||Q - w||^2; at 32 bits f(x) + penalty/2 ||x - w||^2.

  Another step (model, centers, gradient, t) trains at Q alone.
  """
  w = start()
  first = first or (lambda b: first_centers(w[0], b))
  xs, cs = [start() for _ in bits], list(map(first, bits))
  for _ in range(ROUNDS):
    copies = []
    for i in range(len(bits)):
      batch, w_i = Batch(i), w
      for _ in range(STEPS):

        def tied(x, batch=batch, w_i=w_i):
          return descend(batch.gradient(x), gaps(x, w_i), -penalty)

        if take_step is not None:
          xs[i], cs[i] = take_step(xs[i], cs[i], tied, None)
        else:
          at_x = tied if cs[i] is None else batch.gradient
          xs[i], cs[i] = algorithm_1_step(xs[i], cs[i], at_x, tied)
        w_i = descend(w_i, gaps(w_i, project(xs[i], cs[i])), GLOBAL_RATE * penalty)
      copies.append(w_i)
    w = mean(copies)
  return xs, cs, w


def averaging(mu):
  """FedProx; FedAvg with mu = 0."""
  w = start()
  for _ in range(ROUNDS):
    copies = []
    for i in range(2):
      w_i = w
      for _ in range(STEPS):
        gradient = descend(Batch(i).gradient(w_i), gaps(w_i, w), -mu)
        w_i = descend(w_i, gradient, ETA)
      copies.append(w_i)
    w = mean(copies)
  return w


def ditto(penalty):
  """v minimises f(v) + penalty/2 ||v - w||^2, the second term by its proximal map."""
  w, vs = start(), [start(), start()]
  for _ in range(ROUNDS):
    copies = []
    for i in range(2):
      batch, w_i = Batch(i), w
      for _ in range(STEPS):
        y = descend(vs[i], batch.gradient(vs[i]), ETA)
        t = ETA * penalty
        vs[i] = [(a + t * b) / (1 + t) for a, b in zip(y, w, strict=True)]
        w_i = descend(w_i, batch.gradient(w_i), GLOBAL_RATE)
      copies.append(w_i)
    w = mean(copies)
  return vs, w


def pfedme(penalty, inner_steps, mixing):
  """theta minimises f(theta) + penalty/2 ||theta - w_i||^2 by K steps, w_i follows theta."""
  w = start()
  for _ in range(ROUNDS):
    thetas, copies = [], []
    for i in range(2):
      batch, theta, w_i = Batch(i), w, w
      for _ in range(STEPS):
        for _ in range(inner_steps):
          y, t = descend(theta, batch.gradient(theta), ETA), ETA * penalty
          theta = [(a + t * b) / (1 + t) for a, b in zip(y, w_i, strict=True)]
        w_i = descend(w_i, gaps(w_i, theta), GLOBAL_RATE * penalty)
      thetas.append(theta)
      copies.append(w_i)
    w = [(1 - mixing) * old + mixing * new for old, new in zip(w, mean(copies), strict=True)]
  return thetas, w


def per_fedavg_step(w, batch, inner_batch, inner_rate):
  ahead = descend(w, inner_batch.gradient(w), inner_rate)
  return descend(w, batch.gradient(ahead), ETA)


def per_fedavg(inner_rate, adapt_steps):
  """Both batches of a step are all of a client's data here."""
  w = start()
  for _ in range(ROUNDS):
    copies = []
    for i in range(2):
      batch, w_i = Batch(i), w
      for _ in range(STEPS):
        w_i = per_fedavg_step(w_i, batch, batch, inner_rate)
      copies.append(w_i)
    w = mean(copies)
  adapted = []
  for i in range(2):
    v = w
    for _ in range(adapt_steps):
      v = descend(v, Batch(i).gradient(v), inner_rate)
    adapted.append(v)
  return adapted, w


def fml(p, q):
  """Both learn from labels and from each other as the other was before the step."""
  w, xs = start(), [start(), start()]
  for _ in range(ROUNDS):
    copies = []
    for i in range(2):
      batch, w_i = Batch(i), w
      for _ in range(STEPS):
        of_x, of_w = batch.logits(xs[i]), batch.logits(w_i)
        xs[i] = descend(xs[i], batch.student_gradient(xs[i], of_w, p), ETA)
        w_i = descend(w_i, batch.student_gradient(w_i, of_x, q), GLOBAL_RATE)
      copies.append(w_i)
    w = mean(copies)
  return xs, w


def fedrep(head_steps, head_rate):
  """The head is the bias: it moves in a round's first steps, and the kernel in the others."""
  body, heads = start()[0], [start()[1], start()[1]]
  for _ in range(ROUNDS):
    bodies = []
    for i in range(2):
      batch, phi = Batch(i), body
      for t in range(STEPS):
        g_kernel, g_bias = batch.gradient([phi, heads[i]])
        if t < head_steps:
          heads[i] = heads[i] - head_rate * g_bias
        else:
          phi = phi - ETA * g_kernel
      bodies.append(phi)
    body = np.mean(bodies, axis=0)
  return [[body, head] for head in heads]


def fedbn(first, momentum):
  """Pixels normalised over the batch, with a scale and a shift of each, and a linear layer.

  Args:
    first: kernel, bias, scale and shift, of all clients.
    momentum: of the running mean and variance.

  Returns:
    Per client kernel, bias, scale, shift, running mean and running variance.
  """
  (kernel, bias), norms = first[:2], [list(first[2:]) for _ in range(2)]
  stats = [[np.zeros_like(first[2]), np.ones_like(first[2])] for _ in range(2)]
  for _ in range(ROUNDS):
    copies = []
    for i in range(2):
      batch, k, b = Batch(i), kernel, bias
      x, (scale, shift) = batch.x * 64 / 255, norms[i]
      x_hat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
      for _ in range(STEPS):
        h = x_hat * scale + shift
        g = (softmax(h @ k + b) - batch.one_hot) / len(x)
        back = g @ k.T
        k, b = k - ETA * h.T @ g, b - ETA * g.sum(0)
        scale, shift = scale - ETA * (back * x_hat).sum(0), shift - ETA * back.sum(0)
        seen = x.mean(0), x.var(0)
        stats[i] = [momentum * s + (1 - momentum) * n for s, n in zip(stats[i], seen, strict=True)]
      norms[i] = [scale, shift]
      copies.append([k, b])
    kernel, bias = mean(copies)
  return [[kernel, bias, *norm, *own] for norm, own in zip(norms, stats, strict=True)]


def scaffold(global_rate, shares):
  """Option II; clients take part round by round: `shares` lists who does in each."""
  w, c = start(), [np.zeros_like(t) for t in start()]
  cs = [c, c]
  for taking_part in shares:
    copies, changes = [], []
    for i in taking_part:
      y = w
      for _ in range(STEPS):
        y = descend(descend(y, Batch(i).gradient(y), ETA), gaps(c, cs[i]), ETA)
      new = [own - all_ + (a - b) / (STEPS * ETA)
             for own, all_, a, b in zip(cs[i], c, w, y, strict=True)]  # fmt: skip
      copies.append(gaps(y, w))
      changes.append(gaps(new, cs[i]))
      cs[i] = new
    w = descend(w, mean(copies), -global_rate)
    c = descend(c, mean(changes), -len(taking_part) / 2)
  return cs, w, c


def apfl(alpha, adaptive):
  """v moves by its share of the gradient at the mixture, and the share by how they differ."""
  w, vs, alphas = start(), [start(), start()], [alpha, alpha]
  mix = lambda a, v, w: [a * s + (1 - a) * t for s, t in zip(v, w, strict=True)]
  for _ in range(ROUNDS):
    copies = []
    for i in range(2):
      batch, w_i = Batch(i), w
      for _ in range(STEPS):
        a, v = alphas[i], vs[i]
        g = batch.gradient(mix(a, v, w_i))
        if adaptive:
          slope = sum(np.sum(d * s) for d, s in zip(gaps(v, w_i), g, strict=True))
          alphas[i] = min(1.0, max(0.0, a - ETA * slope))
        vs[i] = descend(v, g, ETA * a)
        w_i = descend(w_i, batch.gradient(w_i), GLOBAL_RATE)
      copies.append(w_i)
    w = mean(copies)
  return [mix(a, v, w) for a, v in zip(alphas, vs, strict=True)], w, alphas


def post_training(bits):
  """Full precision, then k-means on the kernel."""
  xs = [start() for _ in bits]
  for i in range(len(bits)):
    for _ in range(ROUNDS * STEPS):
      xs[i] = descend(xs[i], Batch(i).gradient(xs[i]), ETA)
  books = [None if b == 32 else kmeans(x[0], 2**b) for x, b in zip(xs, bits, strict=True)]
  return xs, [project(x, c) for x, c in zip(xs, books, strict=True)]
