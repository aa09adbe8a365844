"""QuPeD in JAX: clients learn personal quantised models together, side by side on one device.

    import qupeD_jax as qj

    train, test = qj.data.load("digits")
    federation = qj.data.federate(train, test, clients=20, classes_per_client=3)
    model = qj.models.make("mlp", **federation.inputs)
    algorithm = qj.quped(model, (model,), qj.learned_codebook(max_bits=2))
    result = qj.run(algorithm, federation, bits=2, rounds=60)
    qj.save_model("client_7.safetensors", result.personal(7))

Everything here is imported when it is first used, so that `import qupeD_jax` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from qupeD_jax import data, models
  from qupeD_jax.algorithms.apfl import apfl
  from qupeD_jax.algorithms.ditto import ditto
  from qupeD_jax.algorithms.fedavg import fedavg
  from qupeD_jax.algorithms.fedbn import fedbn
  from qupeD_jax.algorithms.fedprox import fedprox
  from qupeD_jax.algorithms.fedrep import fedrep
  from qupeD_jax.algorithms.finetune import finetune
  from qupeD_jax.algorithms.fml import fml
  from qupeD_jax.algorithms.local import local
  from qupeD_jax.algorithms.per_fedavg import per_fedavg
  from qupeD_jax.algorithms.pfedme import pfedme
  from qupeD_jax.algorithms.quped import GlobalStep, quped
  from qupeD_jax.algorithms.qupel import qupel
  from qupeD_jax.algorithms.scaffold import scaffold
  from qupeD_jax.checks import BadInput
  from qupeD_jax.engine.one_run import Progress, Result, run
  from qupeD_jax.federation.algorithm1 import Rates
  from qupeD_jax.federation.clients import LocalWork
  from qupeD_jax.federation.objectives import Distillation
  from qupeD_jax.io.personal import PersonalModel, load_model, save_model
  from qupeD_jax.quantization.quantizers import (
    binary_relax,
    full_precision,
    learned_codebook,
    proxquant,
    ste,
  )

__version__ = "0.1.0"

_MODULES = ("data", "models")
_HOMES = {
  "algorithms.apfl": ("apfl",),
  "algorithms.ditto": ("ditto",),
  "algorithms.fedavg": ("fedavg",),
  "algorithms.fedbn": ("fedbn",),
  "algorithms.fedprox": ("fedprox",),
  "algorithms.fedrep": ("fedrep",),
  "algorithms.finetune": ("finetune",),
  "algorithms.fml": ("fml",),
  "algorithms.local": ("local",),
  "algorithms.per_fedavg": ("per_fedavg",),
  "algorithms.pfedme": ("pfedme",),
  "algorithms.quped": ("GlobalStep", "quped"),
  "algorithms.qupel": ("qupel",),
  "algorithms.scaffold": ("scaffold",),
  "checks": ("BadInput",),
  "engine.one_run": ("Progress", "Result", "run"),
  "federation.algorithm1": ("Rates",),
  "federation.clients": ("LocalWork",),
  "federation.objectives": ("Distillation",),
  "io.personal": ("PersonalModel", "load_model", "save_model"),
  "quantization.quantizers": (
    "binary_relax", "full_precision", "learned_codebook", "proxquant", "ste",
  ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_MODULES, *_HOME_OF]


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return importlib.import_module(f"{__name__}.{name}")
  if name in _HOME_OF:
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
