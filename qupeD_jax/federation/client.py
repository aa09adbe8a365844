"""What one client does in a round: its batches, its proximal steps, its scan over local steps.

Everything here is written for one client; `over_clients` is the one place that vmaps it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qupeD_jax import checks, rng
from qupeD_jax.federation import losses, tree
from qupeD_jax.quantization import ops
from qupeD_jax.types import Array, Cohort, Dataset, Info, Model, PyTree, Quantizer, Scored


class Rates(NamedTuple):
  """Step sizes of the alternating proximal gradient steps: numbers, or optax schedules of steps."""

  weights: Array | float | Callable = 0.1  # eta_1, of x
  centers: Array | float | Callable = 1e-4  # eta_2, of c
  proximity: Array | float | Callable = 1e-4  # lambda, the weight of R


class Personal(NamedTuple):
  """One client's personal model while it trains."""

  variables: PyTree  # x and the running statistics of its own passes
  codebooks: dict[str, Array]  # c
  moments: PyTree  # the optimiser's state over x
  quantised_stats: PyTree = ()  # those of the passes at Q_c(x); () where x has the only ones


class Rows(NamedTuple):
  """One client's training rows in a round, and how far it gets."""

  index: Array  # [N] int32, padded
  size: Array  # [] int32, how many of them are true
  steps: Array | None = None  # [] int32, local steps that it takes; None: all


class Batch(NamedTuple):
  """One step's examples of one client."""

  x: Array  # [B, H, W, C] uint8 or float32
  y: Array  # [B] int32
  mask: Array  # [B] float32, 1 for an example that counts


class Pass(NamedTuple):
  """What one pass through a model gives, forward and backward."""

  value: Array  # [], the loss
  stats: PyTree  # running statistics after it
  grads: PyTree  # of the loss in the parameters


def value_at(rate: Array | float | Callable, step: Array) -> Array | float:
  """Reads a rate that may be an optax schedule at a step."""
  return rate(step) if callable(rate) else rate


def draw_rows(
  key: Array, index: Array, size: Array, num_steps: int, batch_size: int
) -> tuple[Array, Array]:
  """Draws the rows of a round's batches without replacement, starting over when they run out.

  A client with fewer rows than a batch has slots sees all of its rows in every batch, once.

  Args:
    key: of this client and round.
    index: [N] int32, the client's rows, padded.
    size: [] int32, how many of them are true.
    num_steps: tau.
    batch_size: B.

  Returns:
    rows [tau, min(B, N)] int32 and mask likewise float32: slots beyond N are none that any client
    could fill. They do not depend on the padding: entry i of the random order is a function of the
    key and i alone.
  """
  slots = jnp.arange(len(index))
  order = jnp.argsort(jnp.where(slots < size, jax.random.uniform(key, slots.shape), jnp.inf))
  within = slots[:batch_size] < size
  positions = batch_size * jnp.arange(num_steps)[:, None] + slots[:batch_size]
  rows = index[order[positions % jnp.maximum(size, 1)]]
  return rows, jnp.broadcast_to(within, rows.shape).astype(jnp.float32)


def local_round(
  step_fn: Callable,
  data: Dataset,
  first_step: Array,
  local_steps: int,
  batch_size: int,
  batches_per_step: int = 1,
  augment: Callable | None = None,
) -> Callable:
  """Returns a client's round: its local steps, scanned over freshly drawn batches.

  Args:
    step_fn: (carry, step [] int32, *batches) -> (carry, loss []).
    data: the training examples of all clients.
    first_step: [] int32, steps done before this round; schedules are read at the sum.
    local_steps: tau.
    batch_size: B; a batch is no wider than N, the rows of the largest client.
    batches_per_step: how many batches a step gets, drawn independently of each other; the first
      is the same however many there are.
    augment: (key, x [B, H, W, C]) -> x [B, H, W, C], such as `data.augment.flip_and_crop()`, for
      every batch anew; None for none.

  Returns:
    (key of this client and round, carry, Rows) -> (carry after the client's last step, mean loss []
    over its steps).
  """

  def batch(key, step, rows, mask):
    x = data.x[rows]
    if augment is not None:
      x = augment(rng.stream(key, "augment", step), x)
    return Batch(x, data.y[rows], mask)

  def run(key, carry, rows):
    keys = tuple(rng.stream(key, "batches", i) for i in range(batches_per_step))
    index, size, steps = Rows(*rows)
    drawn = tuple(
      draw_rows(rng.stream(k, "rows"), index, size, local_steps, batch_size) for k in keys
    )

    def body(carry, inputs):
      step, drawn = inputs
      batches = (batch(k, step, *d) for k, d in zip(keys, drawn, strict=True))
      after, loss = step_fn(carry, step, *batches)
      if steps is None:
        return after, loss
      goes_on = step - first_step < steps
      after = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), after, carry)
      return after, jnp.where(goes_on, loss, 0.0)

    carry, loss = jax.lax.scan(body, carry, (first_step + jnp.arange(local_steps), drawn))
    return carry, jnp.mean(loss) if steps is None else jnp.sum(loss) / steps

  return run


def over_clients(
  client_fns: tuple[Callable, ...],
  key: Array,
  cohorts: tuple[Cohort, ...],
  clients: PyTree,
  clients_per_step: int | None = None,
) -> tuple[tuple[PyTree, ...], tuple[PyTree, ...], tuple[Info, ...]]:
  """Runs a round of all clients, those of a cohort side by side: the one place that vmaps them.

  Args:
    client_fns: one per cohort, (key, client state, Rows) -> (client state, upload, loss []).
    key: of this round; each client gets its own by its id.
    cohorts: the clients.
    clients: their states, one pytree per cohort, leaves [K, ...].
    clients_per_step: how many of a cohort train side by side, and then the next so many; what a
      step needs in memory is that of so many. None is all of them.

  Returns:
    Per cohort: new states, uploads (leaves [K, ...]) and what is reported.

  Raises:
    BadInput: clients_per_step is not a whole number of at least 1.
  """
  if clients_per_step is not None:
    checks.at_least("clients_per_step", clients_per_step, 1)

  def run(client_fn, cohort, states):
    keys = rng.client_keys(key, "clients", cohort.client)
    rows = Rows(cohort.index, cohort.size, cohort.steps)
    states, uploads, loss = map_clients(client_fn, (keys, states, rows), clients_per_step)
    none_dropped = jnp.zeros(cohort.size.shape, bool)
    return states, uploads, Info(cohort.client, cohort.size, loss, none_dropped)

  return tuple(zip(*map(run, client_fns, cohorts, clients), strict=True))


def map_clients(client_fn: Callable, arguments: tuple[PyTree, ...], per_step: int | None) -> PyTree:
  """Applies a function of one client to arguments with leaves [K, ...], so many at a time."""
  count = len(jax.tree.leaves(arguments)[0])
  if per_step is None or per_step >= count:
    return jax.vmap(client_fn)(*arguments)
  # The last step is filled up with clients that were computed before: with a shorter one the
  # program would hold two.
  more = -count % per_step
  filled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:more]]), arguments)
  results = jax.lax.map(lambda one: client_fn(*one), filled, batch_size=per_step)
  return jax.tree.map(lambda leaf: leaf[:count], results)


def gradient_step(
  variables: PyTree,
  moments: PyTree,
  loss_fn: Callable,
  rate: Array | float,
  optimizer: optax.GradientTransformation,
) -> tuple[PyTree, PyTree, Array]:
  """Takes one step of an optimiser on a whole model.

  Args:
    variables: the model.
    moments: the optimiser's state.
    loss_fn: variables -> (loss [], stats).
    rate: step size.
    optimizer: turns the gradient into a direction.

  Returns:
    New variables, new moments, and the loss before the step.
  """

  def of_params(params):
    return loss_fn({**variables, "params": params})

  params = variables["params"]
  (loss, stats), grads = jax.value_and_grad(of_params, has_aux=True)(params)
  direction, moments = optimizer.update(grads, moments, params)
  return {"params": tree.descend(params, direction, rate), "stats": stats}, moments, loss


def sgd_step(variables: PyTree, loss_fn: Callable, rate: Array | float) -> tuple[PyTree, Array]:
  """Takes one step of plain gradient descent; new variables and the loss before it."""
  optimizer = optax.identity()
  variables, _, loss = gradient_step(variables, optimizer.init(()), loss_fn, rate, optimizer)
  return variables, loss


# --- the personal model


def init_personal(
  variables: PyTree,
  bits: Array,
  quantizer: Quantizer,
  optimizer: optax.GradientTransformation,
) -> Personal:
  """Starts one client's personal model from given variables."""
  params = variables["params"]
  codebooks = quantizer.init(params, bits)
  at_q = variables["stats"] if codebooks and quantizer.at_q else ()
  return Personal(variables, codebooks, optimizer.init(params), at_q)


def running_stats(personal: Personal) -> dict[str, PyTree]:
  """Returns the running statistics by where they were taken, "x" or "q"."""
  at_x = personal.variables["stats"]
  return {"x": at_x, "q": personal.quantised_stats or at_x}


def start_clients(
  models: tuple[Model, ...],
  start: tuple[PyTree, ...] | None,
  key: Array,
  cohorts: tuple[Cohort, ...],
  quantizer: Quantizer,
  optimizer: optax.GradientTransformation,
) -> tuple[Personal, ...]:
  """Starts the personal models of all cohorts, equal within a cohort but for their codebooks.

  Args:
    models: one per cohort.
    start: variables per cohort, one model each; None draws them from `key`, so that cohorts (and a
      server) of one architecture start from the same weights.
    key: of the initialisation.
    cohorts: the clients.
    quantizer: makes the codebooks.
    optimizer: over the parameters.

  Raises:
    BadInput: the quantizer has no room for a client's bits, where these are not traced.
  """
  if start is None:
    start = tuple(model.init(key) for model in models)
  for variables, cohort in zip(start, cohorts, strict=True):
    if not isinstance(cohort.bits, jax.core.Tracer):  # then each precision may be refused
      for bits in np.unique(cohort.bits):
        jax.eval_shape(lambda params, b=int(bits): quantizer.init(params, b), variables["params"])
  return tuple(
    jax.vmap(lambda bits, v=variables: init_personal(v, bits, quantizer, optimizer))(cohort.bits)
    for variables, cohort in zip(start, cohorts, strict=True)
  )


def trained_points(
  params: PyTree, codebooks: dict[str, Array], quantizer: Quantizer, step: Array
) -> dict[str, tuple[Array | float, PyTree]]:
  """Returns where a client's smooth loss is taken, and how much it counts there.

  Args:
    params: x.
    codebooks: c.
    quantizer: says whether the loss is taken at x, at Q_c(x) or at both.
    step: [] int32, at which the quantizer's schedules are read.

  Returns:
    Weight and parameters of "x", "q" or both. Beside "x", "q" weighs 0 for a client at full
    precision; alone it weighs 1, and is x itself for such a client.
  """
  if not quantizer.at_q or (quantizer.at_x and not codebooks):
    return {"x": (1.0, params)}
  quantised = quantizer.project(params, codebooks, step)
  if not quantizer.at_x:
    return {"q": (1.0, quantised)}
  return {"x": (1.0, params), "q": (ops.is_active(codebooks), quantised)}


def proximal_step(
  personal: Personal,
  loss_fn: Callable,
  step: Array,
  *,
  quantizer: Quantizer,
  optimizer: optax.GradientTransformation,
  rates: Rates,
  quantised_loss_fn: Callable | None = None,
  straight_through: Array | float = 0.0,
  simultaneous: bool = False,
  passes: dict[str, Pass] | None = None,
) -> tuple[Personal, Array]:
  """Takes one step of Algorithm 1 (QuPeD, section 3): first x, then c at the new x.

  x <- prox_{eta1 lambda R(., c)}(x - eta1 grad_x [f(x) + f(Q_c(x))])
  c <- prox_{eta2 lambda R(x, .)}(c - eta2 grad_c f(Q_c(x)))

  A quantizer that trains at x alone, or at Q_c(x) alone, leaves the other term out, one without
  learned centers the gradient in c; both maps are the quantizer's. A client at full precision has
  no codebook: f(x) remains, once. A share s of x's data gradient can be taken straight through at
  Q_c(x), where f is taken at both: (1 - s) grad f(x) + s (grad f)(Q_c(x)) is then the gradient in
  the quantised tensors.

  Args:
    personal: the client's x, c and optimiser state.
    loss_fn: variables -> (f [], stats), the smooth loss of this batch.
    step: [] int32, for the schedules.
    quantizer: Q, R and the rule for c.
    optimizer: turns the gradient in x into a direction; the identity is plain gradient descent.
    rates: eta1, eta2 and lambda.
    quantised_loss_fn: the smooth loss at Q_c(x), if it is another one than at x.
    straight_through: s in [0, 1]; 0 is the paper's step.
    simultaneous: move c at the old x too, where x's gradient has passed through Q_c(x) already.
    passes: through the models before the step, by the names of `trained_points`, where the caller
      has made them already; None makes them here.

  Returns:
    The personal model after the step, and the smooth objective before it.
  """
  eta, pull = value_at(rates.weights, step), value_at(rates.proximity, step)
  variables, codebooks, moments, _ = personal
  params, stats = variables["params"], running_stats(personal)
  loss_fns = {"x": loss_fn, "q": quantised_loss_fn or loss_fn}

  points = trained_points(params, codebooks, quantizer, step)
  if passes is None:
    passes = {n: _pass(loss_fns[n], point, stats[n]) for n, (_, point) in points.items()}
  renewed = {name: one.stats for name, one in passes.items()}
  project = lambda p: quantizer.project(p, codebooks, step)
  value, grads, at_q = _smooth_gradient(
    params, codebooks, project, points, passes, straight_through
  )
  direction, moments = optimizer.update(grads, moments, params)
  moved = quantizer.prox(tree.descend(params, direction, eta), codebooks, eta * pull)
  if codebooks:
    eta, here = value_at(rates.centers, step), params if simultaneous else moved
    if quantizer.learned and not simultaneous:
      _, renewed["q"], at_q = _pass(loss_fns["q"], project(here), stats["q"])
    slopes = None
    if quantizer.learned:
      (slopes,) = jax.vjp(lambda c: quantizer.project(here, c, step), codebooks)[1](at_q)
    codebooks = quantizer.update(codebooks, here, slopes, eta, eta * pull)
  if codebooks and quantizer.at_q:
    own, of_quantised = renewed.get("x", stats["x"]), renewed["q"]
  else:
    own, of_quantised = renewed.get("x", renewed.get("q")), ()
  return Personal({"params": moved, "stats": own}, codebooks, moments, of_quantised), value


def _smooth_gradient(
  params: PyTree,
  codebooks: dict[str, Array],
  project: Callable,
  points: dict[str, tuple[Array | float, PyTree]],
  passes: dict[str, Pass],
  straight_through: Array | float,
) -> tuple[Array, PyTree, PyTree | None]:
  """Returns the smooth objective, its gradient in x, and that in Q_c(x), if f is taken there."""
  if "q" not in points:
    return passes["x"].value, passes["x"].grads, None
  weight, _ = points["q"]
  value_at_q, _, at_q = passes["q"]
  (pulled_back,) = jax.vjp(project, params)[1](at_q)
  if "x" not in points:
    return value_at_q, pulled_back, at_q
  value, _, grads = passes["x"]
  if not (checks.concrete(straight_through) and straight_through == 0):
    # Without it, the quantised tensors' gradients at Q are not needed, and never computed.
    grads = _mix(grads, at_q, weight * straight_through, codebooks)
  grads = jax.tree.map(lambda g, q: g + weight * q, grads, pulled_back)
  return value + weight * value_at_q, grads, at_q


def _pass(loss_fn: Callable, params: PyTree, stats: PyTree) -> Pass:
  at = lambda p: loss_fn({"params": p, "stats": stats})
  (value, new_stats), grads = jax.value_and_grad(at, has_aux=True)(params)
  return Pass(value, new_stats, grads)


def _mix(at_x: PyTree, at_q: PyTree, share: Array, codebooks: dict[str, Array]) -> PyTree:
  """Takes a share of the quantised tensors' gradients at Q_c(x), the rest of them at x."""
  here, there = ops.flatten(at_x), ops.flatten(at_q)
  mixed = {path: (1 - share) * here[path] + share * there[path] for path in codebooks}
  return ops.replace(at_x, mixed)


def personal_loss(model: Model, batch: Batch, *distilled) -> Callable:
  """Returns variables -> (`batch_loss` [], stats) of a model on a batch, in training mode.

  Args:
    model: the client's architecture.
    batch: B examples.
    distilled: what `batch_loss` takes beside the logits and the batch.
  """

  def loss_fn(variables):
    logits, stats = model.apply(variables, batch.x, True, batch.mask)
    return batch_loss(logits, batch, *distilled), stats

  return loss_fn


def batch_loss(
  logits: Array,
  batch: Batch,
  teacher_logits: Array | None = None,
  lambda_p: Array | float = 0.0,
  temperature: Array | float = 1.0,
  classes: Array | None = None,
) -> Array:
  """Returns (1 - p) f + p KD of a model's logits, [] float32.

  Args:
    logits: [B, classes] float32.
    batch: B examples.
    teacher_logits: [B, classes] float32 of the global model; None for f alone.
    lambda_p: p in [0, 1).
    temperature: T > 0.
    classes: [classes] bool, those that are distilled; None for all.
  """
  loss = losses.cross_entropy(logits, batch.y, batch.mask)
  if teacher_logits is None:
    return loss
  pair = losses.restrict(logits, classes), losses.restrict(teacher_logits, classes)
  teaching = losses.distillation(*pair, temperature, batch.mask)
  return (1 - lambda_p) * loss + lambda_p * teaching


def forward(model: Model, variables: PyTree, batch: Batch) -> tuple[Array, Callable, PyTree]:
  """Runs a model on a batch in training mode, once for all losses that its logits enter.

  Returns:
    Logits [B, classes] float32; what turns a gradient in them into one in the parameters; stats.
  """

  def of_params(params):
    return model.apply({**variables, "params": params}, batch.x, True, batch.mask)

  logits, backward, stats = jax.vjp(of_params, variables["params"], has_aux=True)
  return logits, lambda gradient: backward(gradient)[0], stats


def renewed_stats(model: Model, variables: PyTree, batch: Batch) -> PyTree:
  """Returns the running statistics after a pass of a model that no loss is taken of.

  A network without statistics computes nothing for it.
  """
  return model.apply(variables, batch.x, True, batch.mask)[1]


def held_classes(
  model: Model, variables: PyTree, data: Dataset, rows: tuple[Array, Array]
) -> Array:
  """Tells which classes a client has training rows of.

  Args:
    model, variables: any network over the classes; only the number of its outputs matters.
    data: the training examples of all clients.
    rows: the client's Rows.

  Returns:
    [classes] bool.
  """
  logits, _ = jax.eval_shape(lambda v: model.apply(v, data.x[:1], True), variables)
  index, size, *_ = rows
  counts = jnp.arange(len(index)) < size
  return jnp.zeros(logits.shape[-1], bool).at[data.y[index]].max(counts)


def shipped(models: tuple[Model, ...], clients: tuple[Personal, ...]) -> tuple[Scored, ...]:
  """Returns personal models as they are shipped: entries on their centers, with Q's statistics."""

  def harden(personal):
    params = ops.harden(personal.variables["params"], personal.codebooks)
    return {"params": params, "stats": running_stats(personal)["q"]}

  pairs = zip(models, clients, strict=True)
  return tuple(
    Scored(m, jax.vmap(harden)(c), stacked=True, codebooks=c.codebooks or None) for m, c in pairs
  )


def scored(
  models: tuple[Model, ...], clients: tuple[Personal, ...], quantizer: Quantizer
) -> dict[str, tuple[Scored, ...]]:
  """Returns what is scored of personal models: "personal", as shipped, and "unquantised".

  The latter is x with statistics of its own passes; it is left out where nothing is quantised, and
  where x makes no passes because its quantizer trains at Q alone.
  """
  models_shown = {"personal": shipped(models, clients)}
  if quantizer.at_x and any(personal.codebooks for personal in clients):
    pairs = zip(models, clients, strict=True)
    models_shown["unquantised"] = tuple(Scored(m, c.variables, stacked=True) for m, c in pairs)
  return models_shown


def check(local_steps: int, batch_size: int, rates: Rates = Rates()) -> None:
  """Requires sensible local training; rates that are schedules or traced pass."""
  checks.at_least("local_steps", local_steps, 1)
  checks.at_least("batch_size", batch_size, 1)
  checks.positive("rates.weights", rates.weights)
  checks.positive("rates.centers", rates.centers)
  checks.non_negative("rates.proximity", rates.proximity)
