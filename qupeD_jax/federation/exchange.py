"""What devices that share the clients tell each other; where there is one, all is there already.

A computation is written for the clients of one device. Whether there are others is found where it
is traced, so that nobody has to say so who builds an algorithm: `parallel.over_devices` binds AXIS.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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


def size() -> int:
  """Counts the devices that share the clients."""
  return jax.lax.axis_size(AXIS) if is_shared() else 1


def rank() -> Array | int:
  """Returns the rank of this device among those that share the clients, [] int32, from 0."""
  return jax.lax.axis_index(AXIS) if is_shared() else 0


def part(leaf: Array) -> Array:
  """Returns this device's part [k / devices, ...] of what all devices have whole, [k, ...]."""
  return leaf.reshape(size(), -1, *leaf.shape[1:])[rank()]


def hand_out(pick: Callable[[Array], PyTree], slots: Array, num_clients: int) -> PyTree:
  """Gives each device an equal part of some clients, whosever they are, to the bit.

  Args:
    pick: slots [k] int32 of this device's clients -> what is handed out of them, leaves [k, ...].
    slots: [k] int32, those of the first device first, the same on every device; k a multiple of
      the number of devices.
    num_clients: of this device.

  Returns:
    Leaves [k / devices, ...].
  """
  own, is_own = _own_slots(slots, num_clients)
  if not is_shared():
    return pick(own)

  def send(leaf):
    bits = _bits(leaf)
    mine = jnp.where(is_own.reshape(-1, *[1] * (bits.ndim - 1)), bits, 0)
    return _from_bits(jax.lax.psum_scatter(mine, AXIS, tiled=True), leaf)

  return jax.tree.map(send, pick(own))


def hand_back(tree: PyTree, slots: Array, changed: PyTree) -> PyTree:
  """Writes clients that were handed out back to where they belong.

  Args:
    tree: leaves [K, ...] of this device's clients.
    slots: as of `hand_out`; what belongs to a slot beyond all clients is dropped.
    changed: leaves [k / devices, ...], this device's part.

  Returns:
    Leaves [K, ...]; all other clients are as they were.
  """

  def write(leaf, new):
    own, is_own = _own_slots(slots, len(leaf))
    return leaf.at[jnp.where(is_own, own, len(leaf))].set(gather(new), mode="drop")

  return jax.tree.map(write, tree, changed)


def _own_slots(slots: Array, num_clients: int) -> tuple[Array, Array]:
  """Counts slots among this device's clients, [k] int32; and [k] bool, which are its own."""
  own = slots - rank() * num_clients
  return jnp.clip(own, 0, num_clients - 1), (own >= 0) & (own < num_clients)


def _bits(leaf: Array) -> Array:
  """Returns numbers that a sum with zeros leaves as they are, as it does not leave -0.0."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(leaf)
  if leaf.dtype == bool:
    return leaf.astype(jnp.uint8)
  return jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")


def _from_bits(bits: Array, like: Array) -> Array:
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(like))
  if like.dtype == bool:
    return bits.astype(bool)
  return jax.lax.bitcast_convert_type(bits, like.dtype)
