"""Data sets, their division among clients, and the arrays that clients train from."""

from qupeD_jax.data.arrays import dataset
from qupeD_jax.data.cohort import assign_groups
from qupeD_jax.data.federation import Federation, federate
from qupeD_jax.data.sources import load

__all__ = ["Federation", "assign_groups", "dataset", "federate", "load"]
