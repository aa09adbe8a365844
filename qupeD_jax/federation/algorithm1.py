"""Algorithm 1 of QuPeD: one client's weights x and centers c, moved in turn or at once.

Ozkara, Singh, Data, Diggavi, "QuPeD: Quantized Personalization via Distillation with Applications
to Federated Learning", NeurIPS 2021, section 3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from qupeD_jax import checks
from qupeD_jax.federation import tree
from qupeD_jax.federation.gradients import value_at
from qupeD_jax.quantization import ops
from qupeD_jax.types import Array, Cohort, Model, PyTree, Quantizer


class Rates(NamedTuple):
  """Step sizes of the alternating proximal gradient steps: numbers, or optax schedules of steps."""

  weights: Array | float | Callable = 0.1  # eta_1, of x
  centers: Array | float | Callable = 1e-4  # eta_2, of c
  proximity: Array | float | Callable = 1e-4  # lambda, the weight of R


class Rule(NamedTuple):
  """How a personal model moves."""

  quantizer: Quantizer  # Q, R and the rule for c
  rates: Rates = Rates()
  optimizer: optax.GradientTransformation = optax.identity()  # turns x's gradient into a direction
  # s in [0, 1]: (1 - s) grad f(x) + s (grad f)(Q_c(x)) is the data gradient in quantised tensors,
  # where f is taken at both; 0 is the paper's.
  straight_through: Array | float = 0.0


class Personal(NamedTuple):
  """One client's personal model while it trains."""

  variables: PyTree  # x and the running statistics of its own passes
  codebooks: dict[str, Array]  # c
  moments: PyTree  # the optimiser's state over x
  quantised_stats: PyTree = ()  # those of the passes at Q_c(x); () where x has the only ones


class Pass(NamedTuple):
  """What one pass through a model gives, forward and backward."""

  value: Array  # [], the loss
  stats: PyTree  # running statistics after it
  grads: PyTree  # of the loss in the parameters


def check(rule: Rule) -> None:
  """Requires sensible rates and shares; schedules and traced values pass.

  Raises:
    BadInput: a rate is not positive, or a share not in [0, 1].
  """
  checks.positive("rates.weights", rule.rates.weights)
  checks.positive("rates.centers", rule.rates.centers)
  checks.non_negative("rates.proximity", rule.rates.proximity)
  checks.share("straight_through", rule.straight_through)


# --- the beginning


def init_personal(variables: PyTree, bits: Array, rule: Rule) -> Personal:
  """Starts one client's personal model from given variables."""
  params = variables["params"]
  codebooks = rule.quantizer.init(params, bits)
  at_q = variables["stats"] if codebooks and rule.quantizer.at_q else ()
  return Personal(variables, codebooks, rule.optimizer.init(params), at_q)


def start_clients(
  models: tuple[Model, ...],
  start: tuple[PyTree, ...] | None,
  key: Array,
  cohorts: tuple[Cohort, ...],
  rule: Rule,
) -> tuple[Personal, ...]:
  """Starts the personal models of all cohorts, equal within a cohort but for their codebooks.

  Args:
    models: one per cohort.
    start: variables per cohort, one model each; None draws them from `key`, so that cohorts (and a
      server) of one architecture start from the same weights.
    key: of the initialisation.
    cohorts: the clients.
    rule: makes the codebooks.

  Raises:
    BadInput: the quantizer has no room for a client's bits, where these are not traced.
  """
  if start is None:
    start = tuple(model.init(key) for model in models)
  for variables, cohort in zip(start, cohorts, strict=True):
    if not isinstance(cohort.bits, jax.core.Tracer):  # then each precision may be refused
      for bits in np.unique(cohort.bits):
        jax.eval_shape(
          lambda params, b=int(bits): rule.quantizer.init(params, b), variables["params"]
        )
  return tuple(
    jax.vmap(lambda bits, v=variables: init_personal(v, bits, rule))(cohort.bits)
    for variables, cohort in zip(start, cohorts, strict=True)
  )


# --- a step


def alternating_step(
  personal: Personal,
  loss_fn: Callable,
  step: Array,
  rule: Rule,
  quantised_loss_fn: Callable | None = None,
) -> tuple[Personal, Array]:
  """Takes the paper's step: first x, then c at the new x.

    x <- prox_{eta1 lambda R(., c)}(x - eta1 grad_x [f(x) + f(Q_c(x))])
    c <- prox_{eta2 lambda R(x, .)}(c - eta2 grad_c f(Q_c(x)))

  A quantizer that trains at x alone, or at Q_c(x) alone, leaves the other term out, one without
  learned centers the gradient in c; both maps are the quantizer's. A client at full precision has
  no codebook: f(x) remains, once.

  Args:
    personal: the client's x, c and optimiser state.
    loss_fn: variables -> (f [], stats), the smooth loss of this batch.
    step: [] int32, for the schedules.
    rule: how the model moves.
    quantised_loss_fn: the smooth loss at Q_c(x), if it is another one than at x.

  Returns:
    The personal model after the step, and the smooth objective before it.
  """
  at_q = quantised_loss_fn or loss_fn
  passes = passes_of(personal, {"x": loss_fn, "q": at_q}, step, rule.quantizer)
  moved, value = _weights_step(personal, passes, step, rule)
  if not personal.codebooks:
    return moved, value
  params, gradient = moved.variables["params"], None
  if rule.quantizer.learned:
    projected = rule.quantizer.project(params, personal.codebooks, step)
    again = _pass(at_q, projected, running_stats(personal)["q"])
    moved = _with_stats(moved, {"q": again.stats}, rule.quantizer)
    gradient = again.grads
  return _centers_step(moved, params, gradient, step, rule), value


def simultaneous_step(
  personal: Personal, passes: dict[str, Pass], step: Array, rule: Rule
) -> tuple[Personal, Array]:
  """Takes both gradients at the old x and c: cheaper by a pass through Q, and not the paper's step.

  Args:
    personal: the client's x, c and optimiser state.
    passes: through the models before the step, as of `passes_of`.
    step: [] int32, for the schedules.
    rule: how the model moves.

  Returns:
    The personal model after the step, and the smooth objective before it.
  """
  moved, value = _weights_step(personal, passes, step, rule)
  if not personal.codebooks:
    return moved, value
  gradient = passes["q"].grads if rule.quantizer.learned else None
  return _centers_step(moved, personal.variables["params"], gradient, step, rule), value


def trained_points(
  personal: Personal, step: Array, quantizer: Quantizer
) -> dict[str, tuple[Array | float, PyTree]]:
  """Returns where a client's smooth loss is taken, and how much it counts there.

  Args:
    personal: x and c.
    step: [] int32, at which the quantizer's schedules are read.
    quantizer: says whether the loss is taken at x, at Q_c(x) or at both.

  Returns:
    Weight and parameters of "x", "q" or both. Beside "x", "q" weighs 0 for a client at full
    precision; alone it weighs 1, and is x itself for such a client.
  """
  params, codebooks = personal.variables["params"], personal.codebooks
  if not quantizer.at_q or (quantizer.at_x and not codebooks):
    return {"x": (1.0, params)}
  quantised = quantizer.project(params, codebooks, step)
  if not quantizer.at_x:
    return {"q": (1.0, quantised)}
  return {"x": (1.0, params), "q": (ops.is_active(codebooks), quantised)}


def passes_of(
  personal: Personal, loss_fns: dict[str, Callable], step: Array, quantizer: Quantizer
) -> dict[str, Pass]:
  """Passes through the models that are trained, by the names of `trained_points`."""
  stats = running_stats(personal)
  points = trained_points(personal, step, quantizer)
  return {name: _pass(loss_fns[name], params, stats[name]) for name, (_, params) in points.items()}


def running_stats(personal: Personal) -> dict[str, PyTree]:
  """Returns the running statistics by where they were taken, "x" or "q"."""
  at_x = personal.variables["stats"]
  return {"x": at_x, "q": personal.quantised_stats or at_x}


def _weights_step(
  personal: Personal, passes: dict[str, Pass], step: Array, rule: Rule
) -> tuple[Personal, Array]:
  """Moves x alone: its optimiser's step, then the proximal map."""
  params, codebooks = personal.variables["params"], personal.codebooks
  value, grads = _smooth_gradient(personal, passes, step, rule)
  direction, moments = rule.optimizer.update(grads, personal.moments, params)
  eta, pull = value_at(rule.rates.weights, step), value_at(rule.rates.proximity, step)
  moved = rule.quantizer.prox(tree.descend(params, direction, eta), codebooks, eta * pull)
  after = personal._replace(variables={**personal.variables, "params": moved}, moments=moments)
  renewed = {name: one.stats for name, one in passes.items()}
  return _with_stats(after, renewed, rule.quantizer), value


def _centers_step(
  personal: Personal, here: PyTree, gradient: PyTree | None, step: Array, rule: Rule
) -> Personal:
  """Moves c alone, by the gradient of f in Q_c at x = `here`; None for centers that learn none."""
  codebooks, slopes = personal.codebooks, None
  if gradient is not None:
    project = lambda centers: rule.quantizer.project(here, centers, step)
    (slopes,) = jax.vjp(project, codebooks)[1](gradient)
  eta, pull = value_at(rule.rates.centers, step), value_at(rule.rates.proximity, step)
  moved = rule.quantizer.update(codebooks, here, slopes, eta, eta * pull)
  return personal._replace(codebooks=moved)


def _smooth_gradient(
  personal: Personal, passes: dict[str, Pass], step: Array, rule: Rule
) -> tuple[Array, PyTree]:
  """Returns the smooth objective and its gradient in x."""
  if "q" not in passes:
    return passes["x"].value, passes["x"].grads
  params, codebooks = personal.variables["params"], personal.codebooks
  project = lambda params: rule.quantizer.project(params, codebooks, step)
  at_q = passes["q"]
  (pulled_back,) = jax.vjp(project, params)[1](at_q.grads)
  if "x" not in passes:
    return at_q.value, pulled_back
  weight, share = ops.is_active(codebooks), rule.straight_through
  value, _, grads = passes["x"]
  if not (checks.concrete(share) and share == 0):
    # Without it, the quantised tensors' gradients at Q are not needed, and never computed.
    grads = _mix(grads, at_q.grads, weight * share, codebooks)
  grads = jax.tree.map(lambda g, q: g + weight * q, grads, pulled_back)
  return value + weight * at_q.value, grads


def _with_stats(personal: Personal, renewed: dict[str, PyTree], quantizer: Quantizer) -> Personal:
  """Puts renewed statistics, by where they were taken, where a personal model keeps them."""
  if personal.codebooks and quantizer.at_q:
    of_x = renewed.get("x", personal.variables["stats"])
    of_q = renewed.get("q", personal.quantised_stats)
  else:
    of_x, of_q = renewed.get("x", renewed.get("q")), ()
  return personal._replace(variables={**personal.variables, "stats": of_x}, quantised_stats=of_q)


def _pass(loss_fn: Callable, params: PyTree, stats: PyTree) -> Pass:
  at = lambda p: loss_fn({"params": p, "stats": stats})
  (value, new_stats), grads = jax.value_and_grad(at, has_aux=True)(params)
  return Pass(value, new_stats, grads)


def _mix(at_x: PyTree, at_q: PyTree, share: Array, codebooks: dict[str, Array]) -> PyTree:
  """Takes a share of the quantised tensors' gradients at Q_c(x), the rest of them at x."""
  here, there = ops.flatten(at_x), ops.flatten(at_q)
  mixed = {path: (1 - share) * here[path] + share * there[path] for path in codebooks}
  return ops.replace(at_x, mixed)
