"""Clients spread over devices and processes: the mesh, what lies where, what is read back.

The client axis of a cohort is cut into as many equal pieces as there are devices, and every device
holds the training rows of its own clients and no others. What a round computes is written for the
clients of one device (`over_devices`); what devices tell each other goes through `exchange`: the
sums of an aggregate, the few numbers that a sample is drawn by, and what a round reports.

Everything here has a leading axis of R runs, as the engine has it.
"""

import contextlib
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qupeD_jax import checks
from qupeD_jax.federation import exchange
from qupeD_jax.federation.exchange import AXIS
from qupeD_jax.types import Array, Cohort, Dataset, FedState, PyTree

# How things are cut: their PartitionSpecs.
_WHOLE = PartitionSpec()  # everything on every device
CLIENTS = PartitionSpec(None, AXIS)  # leaves [R, K, ...]
_ROWS = PartitionSpec(AXIS)
CUT = {
  FedState: FedState(_WHOLE, CLIENTS, _WHOLE),
  Cohort: CLIENTS,
  Dataset: _ROWS,
}
STATE, REPORT = CUT[FedState], _WHOLE  # what `over_devices` hands out

# The CPU's devices wait for each other in every sum over clients. XLA ends a process in which one
# waits for more than 40 seconds, which a round of large networks, or a laptop's sleep, may take.
_PATIENCE = {
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 3_600,
  "--xla_cpu_collective_call_terminate_timeout_seconds": 86_400,
}


def cores() -> int:
  """Counts the processor's cores that this process may use."""
  counted = hasattr(os, "sched_getaffinity")
  return len(os.sched_getaffinity(0)) if counted else os.cpu_count() or 1


def split_processor(count: int) -> None:
  """Splits the CPU into a number of jax devices; call it before jax is asked for its devices.

  XLA runs one device's program on several cores only within large operations; clients spread over
  one device per core keep all cores at work. If XLA_FLAGS sets a number of devices, that one stays.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" not in flags:
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", count)
  missing = [f"{name}={seconds}" for name, seconds in _PATIENCE.items() if name not in flags]
  os.environ["XLA_FLAGS"] = " ".join([*missing, flags]).strip()


def fewest(num_clients: int, most: int) -> int:
  """Returns the fewest devices on which no device has more clients than it would have on `most`.

  >>> fewest(20, most=16), fewest(1, most=16)
  (10, 1)
  """
  return min(range(1, most + 1), key=lambda count: -(-num_clients // count))


def make_mesh(devices_per_process: int | None) -> Mesh | None:
  """Makes a mesh of a number of devices of each process; None if that is one device in all.

  Args:
    devices_per_process: None for one.

  Raises:
    BadInput: a process has fewer.
  """
  devices_per_process = 1 if devices_per_process is None else devices_per_process
  here = jax.local_device_count()
  allowed = f"1 to {here}, the devices of a process"
  checks.require(
    1 <= devices_per_process <= here, "devices_per_process", devices_per_process, allowed
  )
  if devices_per_process * jax.process_count() == 1:
    return None
  by_process = (
    sorted((d for d in jax.devices() if d.process_index == i), key=lambda d: d.id)
    for i in range(jax.process_count())
  )
  devices = [device for own in by_process for device in own[:devices_per_process]]
  return Mesh(np.array(devices), (AXIS,))


def slots(num_clients: int, mesh: Mesh | None) -> int:
  """Rounds a number of clients up to a multiple of the devices: each gets as many slots.

  >>> slots(10, None)
  10
  """
  return -(-num_clients // size(mesh)) * size(mesh)


def size(mesh: Mesh | None) -> int:
  """Counts the devices of a mesh."""
  return 1 if mesh is None else mesh.size


def place(tree: PyTree, mesh: Mesh | None, cut: dict = CUT) -> PyTree:
  """Puts a pytree on the devices: clients to their own, everything else to all of them.

  Clients are what FedState.clients and Cohorts hold, leaves [R, K, ...]; a Dataset is cut along its
  rows, as `spread` has laid it out. In a run of several processes each puts its own part there.

  Args:
    tree: of arrays on the host or the devices.
    mesh: None for the one device.
    cut: type -> how what is of this type is cut, PartitionSpecs.
  """
  if mesh is None:
    return jax.device_put(tree)
  of_part = lambda spec, part: jax.tree.map(
    lambda leaf: _put(leaf, NamedSharding(mesh, spec)), part
  )
  return jax.tree.map(of_part, _specs(tree, cut), tree)


def spread(
  data: Dataset, cohorts: tuple[Cohort, ...], mesh: Mesh | None
) -> tuple[Dataset, tuple[Cohort, ...]]:
  """Gives each device the rows of its own clients; `index` then counts the device's own rows.

  Args:
    data: of all clients, on the host.
    cohorts: leaves [R, K, ...], K a multiple of the mesh's size.
    mesh: None leaves both as they are.

  Returns:
    The data of all devices one after the other, the same number of rows for each, on the devices;
    and the cohorts, there too.
  """
  if mesh is None:
    return place((data, cohorts), None)
  pieces = [np.split(np.asarray(cohort.index), mesh.size, axis=1) for cohort in cohorts]
  own = [np.unique(np.concatenate([p.ravel() for p in of])) for of in zip(*pieces, strict=True)]
  most = max(map(len, own))
  local = [
    np.concatenate([np.searchsorted(rows, p) for rows, p in zip(own, of, strict=True)], axis=1)
    for of in pieces
  ]
  cohorts = tuple(
    cohort._replace(index=index.astype(np.int32))
    for cohort, index in zip(cohorts, local, strict=True)
  )
  filled = [np.pad(rows, (0, most - len(rows)), mode="edge") for rows in own]
  sharding = NamedSharding(mesh, _ROWS)

  def cut(leaf):
    leaf = np.asarray(leaf)
    of_device = lambda where: leaf[filled[(where[0].start or 0) // most]]
    shape = (most * mesh.size, *leaf.shape[1:])
    return jax.make_array_from_callback(shape, sharding, of_device)

  return jax.tree.map(cut, data), place(cohorts, mesh)


def over_devices(fn: Callable, mesh: Mesh | None, out: PyTree, cut: dict = CUT) -> Callable:
  """Lets every device run a function on its own clients; `exchange` is among all of them.

  Args:
    fn: of pytrees as `place` cuts them.
    mesh: None runs it on the one device.
    out: what it returns: STATE for a FedState, and REPORT for what has the client axis last, as
      [R, K]; or a tuple of these.
    cut: as of `place`.

  Returns:
    The same function of whole arrays. A report is whole on every device, so that every process can
    read it.
  """
  if mesh is None:
    return fn

  def own(*arguments):
    is_state = lambda node: isinstance(node, FedState)
    whole = lambda node: node if is_state(node) else exchange.gather(node, axis=node.ndim - 1)
    return jax.tree.map(whole, fn(*arguments), is_leaf=is_state)

  def run(*arguments):
    # That a report is the same everywhere cannot be seen by jax's own check.
    spread_out = {"mesh": mesh, "in_specs": _specs(arguments, cut), "out_specs": out}
    return jax.shard_map(own, check_vma=False, **spread_out)(*arguments)

  return run


def fetch(tree: PyTree) -> PyTree:
  """Reads arrays back, whole, into every process: a pytree of numpy arrays."""

  def read(leaf):
    here = leaf.is_fully_addressable or leaf.is_fully_replicated
    return np.asarray(leaf) if here else multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(lambda leaf: read(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def from_first_process(array: np.ndarray) -> np.ndarray:
  """Returns the first process' array in all of them."""
  return np.asarray(multihost_utils.broadcast_one_to_all(array))


def anywhere(holds: tuple[bool, ...]) -> tuple[bool, ...]:
  """Tells for each of several flags whether it is set in any process: all get the same answer."""
  if jax.process_count() == 1:
    return holds
  return tuple(multihost_utils.process_allgather(np.array(holds)).any(axis=0).tolist())


def sum_of(server: PyTree) -> Array:
  """Sums the server's numbers up, [1]: devices that hold the same server find the same sum."""
  return jnp.float32(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(server))).reshape(1)


def require_one_server(sums: np.ndarray) -> None:
  """Raises ValueError if the devices' servers, whose sums are [R, devices], are not the same."""
  if not np.array_equal(sums, np.broadcast_to(sums[:, :1], sums.shape), equal_nan=True):
    raise ValueError(
      "the devices' servers differ: what crosses clients must go through federation.exchange"
    )


def _specs(tree: PyTree, cut: dict) -> PyTree:
  """Returns PartitionSpecs: one for every leaf, or for a part that is cut in one way."""
  return jax.tree.map(
    lambda node: cut.get(type(node), _WHOLE), tree, is_leaf=lambda node: type(node) in cut
  )


def _put(leaf, sharding: NamedSharding):
  """Puts one array on the devices in the given sharding.

  An array that is spread over several processes already is only resharded: no process could read it
  whole. One that is on this process' devices alone is read, and each process sends its own part.
  """
  if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
    return leaf
  if isinstance(leaf, jax.Array) and (
    sharding.is_fully_addressable or not leaf.is_fully_addressable
  ):
    return jax.device_put(leaf, sharding)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding))
  host = np.asarray(leaf)
  return jax.make_array_from_callback(host.shape, sharding, lambda where: host[where])
