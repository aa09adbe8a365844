"""What devices hand each other arrives to the bit, whatever its type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qupeD_jax.engine import parallel
from qupeD_jax.federation import exchange

CLIENTS = 16  # two on each of eight devices
SLOTS = np.array([3, 15, 0, 8, 9, 2, 4, 14])
LEAVES = {
  "float32": np.where(np.arange(CLIENTS) % 2, -0.0, np.nan).astype(np.float32),
  "bfloat16": jnp.linspace(-1, 1, 3 * CLIENTS, dtype=jnp.bfloat16).reshape(CLIENTS, 3),
  "int32": -np.arange(CLIENTS, dtype=np.int32),
  "uint8": np.arange(2 * CLIENTS, dtype=np.uint8).reshape(CLIENTS, 2),
  "bool": np.arange(CLIENTS) % 3 == 0,
  "key": jax.random.split(jax.random.key(0), CLIENTS),
}


def over_devices(fn, *leaves):
  """Applies fn to each device's own clients."""
  mesh, own = parallel.make_mesh(8), PartitionSpec(exchange.AXIS)
  return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=own, out_specs=own))(*leaves)


def bits(leaf):
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf).tobytes()


@pytest.mark.parametrize("name", LEAVES)
def test_clients_go_where_they_are_trained_and_back(name):
  leaf = jnp.asarray(LEAVES[name])

  def there(own):
    return exchange.hand_out(lambda slots: own[slots], SLOTS, len(own))

  def there_and_back(own, other):
    return exchange.hand_back(other, np.where(SLOTS == 9, CLIENTS, SLOTS), there(own))

  assert bits(over_devices(there, leaf)) == bits(leaf[SLOTS])
  other = leaf[::-1]
  expected = other.at[np.delete(SLOTS, 4)].set(leaf[np.delete(SLOTS, 4)])
  assert bits(over_devices(there_and_back, leaf, other)) == bits(expected)


def test_on_one_device_all_are_there_already():
  leaf = jnp.asarray(LEAVES["uint8"])
  handed_out = exchange.hand_out(lambda slots: leaf[slots], SLOTS, CLIENTS)
  np.testing.assert_array_equal(handed_out, leaf[SLOTS])
  back = exchange.hand_back(leaf, jnp.array([1, CLIENTS]), leaf[:2] + 7)
  np.testing.assert_array_equal(back, leaf.at[1].set(leaf[0] + 7))
