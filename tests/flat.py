"""The builders of algorithms, taking every hyperparameter by a name of its own, for short tests."""

import functools
from collections.abc import Callable

from qupeD_jax.algorithms import apfl as _apfl
from qupeD_jax.algorithms import ditto as _ditto
from qupeD_jax.algorithms import fedavg as _fedavg
from qupeD_jax.algorithms import fedbn as _fedbn
from qupeD_jax.algorithms import fedprox as _fedprox
from qupeD_jax.algorithms import fedrep as _fedrep
from qupeD_jax.algorithms import finetune as _finetune
from qupeD_jax.algorithms import fml as _fml
from qupeD_jax.algorithms import local as _local
from qupeD_jax.algorithms import per_fedavg as _per_fedavg
from qupeD_jax.algorithms import pfedme as _pfedme
from qupeD_jax.algorithms import quped as _quped
from qupeD_jax.algorithms import qupel as _qupel
from qupeD_jax.algorithms import scaffold as _scaffold
from qupeD_jax.federation.objectives import Distillation

_PARTS = {
  "work": {"local_steps": "steps", "batch_size": "batch_size", "augment": "augment",
           "clients_per_step": "clients_per_step"},
  "distillation": {name: name for name in Distillation._fields},
  "global_step": {"global_rate": "rate", "global_loss_weight": "loss_weight",
                  "global_optimizer": "optimizer"},
}  # fmt: skip


def flat(builder: Callable) -> Callable:
  """Lets a builder take the fields of its NamedTuples as arguments."""
  defaults = builder.__kwdefaults__

  @functools.wraps(builder)
  def build(*arguments, **options):
    for part in _PARTS.keys() & defaults.keys():
      fields = {field: options.pop(name) for name, field in _PARTS[part].items() if name in options}
      options[part] = options.get(part, defaults[part])._replace(**fields)
    return builder(*arguments, **options)

  return build


ditto, fedavg, fedprox = flat(_ditto.ditto), flat(_fedavg.fedavg), flat(_fedprox.fedprox)
finetune, fml, local = flat(_finetune.finetune), flat(_fml.fml), flat(_local.local)
per_fedavg, pfedme = flat(_per_fedavg.per_fedavg), flat(_pfedme.pfedme)
quped, qupel = flat(_quped.quped), flat(_qupel.qupel)
apfl, fedbn = flat(_apfl.apfl), flat(_fedbn.fedbn)
fedrep, scaffold = flat(_fedrep.fedrep), flat(_scaffold.scaffold)
