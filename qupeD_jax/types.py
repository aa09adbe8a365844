"""The types everything else is written in: plain NamedTuples of arrays and pure functions.

Dimensions, here and in every docstring: M examples of a data set, K clients of a cohort, N rows of
a client (padded), B examples of a batch, H W C an image, m centers of a codebook.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any

FULL_PRECISION = 32  # the `bits` of a client without codebooks


class InitModel(Protocol):
  """Draws a network's first variables."""

  def __call__(self, key: Array, /) -> PyTree: ...


class ApplyModel(Protocol):
  """Runs a network: x [B, H, W, C] to logits [B, classes] and statistics.

  `key` is for what a network draws in training; only one that says so (`Model.draws`) gets it.
  """

  def __call__(
    self,
    variables: PyTree,
    x: Array,
    train: bool,
    mask: Array | None = None,
    key: Array | None = None,
    /,
  ) -> tuple[Array, PyTree]: ...


class Model(NamedTuple):
  """A network as two pure functions.

  `variables` is {"params": ..., "stats": ...}: what is trained, and running statistics that a
  forward pass in training mode renews (empty where a network has none). `mask` [B], 0 for examples
  that only fill a batch up, is for networks that normalise a batch by its own statistics: these are
  of the examples that count. None counts all.
  """

  init: InitModel
  apply: ApplyModel
  # What a file says of a network that `models.make` can make anew; None for one of your own.
  about: Mapping[str, Any] | None = None
  draws: bool = False  # whether `apply` takes a key in training, as one with dropout does


class Dataset(NamedTuple):
  """Examples, stored once, on the device, as they came."""

  x: Array  # [M, H, W, C] uint8, or float32 where these are no pixels
  y: Array  # [M] int32
  client: Array | None = None  # [M] int32, natural client of each example, where there is one


class Cohort(NamedTuple):
  """Clients that share an architecture: the unit that is vmapped.

  A slot whose size is 0 is padding: it trains on nothing and weighs nothing.
  """

  index: Array  # [K, N] int32, rows of a Dataset; padded
  size: Array  # [K] int32, true rows of each client
  client: Array  # [K] int32, global client ids: seeds and reports follow the client, not its slot
  bits: Array  # [K] int32, precision of each client: 1..8, or 32 for full precision
  steps: Array | None = None  # [K] int32, local steps that each client takes; None: all of a round


class FedState(NamedTuple):
  """All that a federation carries from one round to the next."""

  server: PyTree  # no client axis
  clients: tuple[PyTree, ...]  # one per cohort, every leaf [K, ...]
  round: Array  # [] int32, rounds done: schedules and keys follow it


class Scored(NamedTuple):
  """Models to be scored on the clients of one cohort."""

  model: Model
  variables: PyTree  # leaves [K, ...] if stacked, else one model that all clients share
  stacked: bool
  codebooks: PyTree | None = None  # of quantised models, leaves [K, ...]: what they ship with


class Info(NamedTuple):
  """What one cohort reports of one round; only clients that took part are in it."""

  client: Array  # [k] int32
  size: Array  # [k] int32
  loss: Array  # [k] float32, mean over the local steps
  dropped: Array  # [k] bool, the server got an upload and did not take it


Cohorts = tuple[Cohort, ...]  # one per architecture


class InitFederation(Protocol):
  """Makes the state that a federation starts from."""

  def __call__(self, key: Array, data: Dataset, cohorts: Cohorts, /) -> FedState: ...


class Round(Protocol):
  """Trains all clients for a round and combines what they send."""

  def __call__(
    self, key: Array, state: FedState, data: Dataset, cohorts: Cohorts, /
  ) -> tuple[FedState, tuple[Info, ...]]: ...


class Personalize(Protocol):
  """Shows the models that are scored, by name, one Scored per cohort; "personal" is what ships."""

  def __call__(
    self, key: Array, state: FedState, data: Dataset, cohorts: Cohorts, /
  ) -> dict[str, tuple[Scored, ...]]: ...


class Algorithm(NamedTuple):
  """A federated algorithm as three pure functions."""

  init: InitFederation
  round: Round
  personalize: Personalize


class Aggregate(Protocol):
  """Combines what the clients of a round send; see `federation.aggregators`.

  uploads: one pytree per cohort, leaves [K, ...]. before: the server's variables, leaves [...].
  Returns the server's new variables, and per cohort [K] bool whose upload counted.
  """

  def __call__(
    self, key: Array, uploads: tuple[PyTree, ...], cohorts: Cohorts, before: PyTree, /
  ) -> tuple[PyTree, tuple[Array, ...]]: ...


Codebooks = dict[str, Array]  # path of a quantised tensor -> its centers, [m_max] float32


class InitCodebooks(Protocol):
  """Makes the first codebooks of a model of so many bits, [] int32."""

  def __call__(self, params: PyTree, bits: Array, /) -> Codebooks: ...


class Project(Protocol):
  """Returns Q: the parameters that the network computes with."""

  def __call__(self, params: PyTree, codebooks: Codebooks, step: Array, /) -> PyTree: ...


class Prox(Protocol):
  """Returns the parameters after the proximal map of t R, which follows the optimiser's step."""

  def __call__(self, params: PyTree, codebooks: Codebooks, t: Array | float, /) -> PyTree: ...


class UpdateCodebooks(Protocol):
  """Moves the centers by the slopes of f in them, and by the pull t of the entries they own."""

  def __call__(
    self,
    codebooks: Codebooks,
    params: PyTree,
    slopes: Codebooks | None,
    rate: Array | float,
    t: Array | float,
    /,
  ) -> Codebooks: ...


class Quantizer(NamedTuple):
  """What optax.GradientTransformation is to updates, this is to a model's precision.

  `codebooks` maps the path of every quantised tensor ("dense_1/kernel") to its centers, [m_max]
  float32, sorted; slots that a client does not use hold +inf. No finite center: full precision.

  The smooth loss f that a client minimises is taken at x, at Q (its projection) or at both; a
  client at full precision has f(x) once, whichever it is. What happens to x between Q and f is said
  by the derivative of `project`, and its derivative in the codebooks makes the slopes of f in the
  centers that `update` gets. Steps, [] int32, count a client's local steps, as schedules do.
  """

  init: InitCodebooks
  project: Project
  prox: Prox
  update: UpdateCodebooks
  at_x: bool = True  # f(x) is minimised
  at_q: bool = True  # f(Q) is minimised
  learned: bool = True  # `update` reads the slopes; without it they are None, and cost nothing
