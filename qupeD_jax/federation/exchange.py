"""What devices that share the clients tell each other; where there is one, all is there already.

A computation is written for the clients of one device. Whether there are others is found where it
is traced, so that nobody has to say so who builds an algorithm: `parallel.over_devices` binds AXIS.
"""

import jax

from qupeD_jax.types import Array, PyTree

AXIS = "clients"  # of the mesh


def is_shared() -> bool:
  """Tells whether several devices share the clients of what is being traced."""
  try:
    jax.lax.axis_size(AXIS)
  except NameError:  # jax's word for an axis that is not bound
    return False
  return True


def add(sums: PyTree) -> PyTree:
  """Adds up the sums of all devices, in one message: the same on every device."""
  return jax.lax.psum(sums, AXIS) if is_shared() else sums


def gather(leaf: Array, axis: int = 0) -> Array:
  """Joins the devices' clients along an axis, those of the first device first."""
  return jax.lax.all_gather(leaf, AXIS, axis=axis, tiled=True) if is_shared() else leaf


def rank() -> Array | int:
  """Returns the rank of this device among those that share the clients, [] int32, from 0."""
  return jax.lax.axis_index(AXIS) if is_shared() else 0
