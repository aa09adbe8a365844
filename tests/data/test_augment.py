"""Random flips and crops, alone and in a client's round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.data import augment
from qupeD_jax.federation.clients import LocalWork, local_round, over_clients
from qupeD_jax.types import Dataset
from tests import toy
from tests.flat import fedavg

KEY = jax.random.key(5)
IMAGES = np.random.default_rng(0).integers(1, 256, (300, 6, 7, 3)).astype(np.uint8)
PADDING = 2


def versions(image, padding, fill=0):
  """Every flip and crop of one image, by slices of a padded array."""
  height, width, channels = image.shape
  canvas = np.empty((height + 2 * padding, width + 2 * padding, channels), np.uint8)
  found = {}
  for flip in (False, True):
    canvas[:] = fill
    canvas[padding:-padding, padding:-padding] = image[:, ::-1] if flip else image
    for i in range(2 * padding + 1):
      for j in range(2 * padding + 1):
        found[canvas[i : i + height, j : j + width].tobytes()] = (flip, i, j)
  return found


@pytest.mark.parametrize("fill", [0, (125, 123, 114)])
def test_every_image_becomes_a_flipped_crop_of_itself_and_all_of_them_turn_up(fill):
  out = augment.flip_and_crop(PADDING, fill)(KEY, IMAGES)
  assert out.shape == IMAGES.shape
  assert out.dtype == jnp.uint8
  drawn = [
    versions(image, PADDING, fill)[np.asarray(new).tobytes()]
    for image, new in zip(IMAGES, out, strict=True)
  ]
  assert len(set(drawn)) == 50
  flips, rows, columns = np.array(drawn).T
  # Independent of each other, and each uniform: within four standard deviations.
  for draws, mean, deviation in ((flips, 0.5, 0.5), (rows, 2, 2**0.5), (columns, 2, 2**0.5)):
    assert abs(draws.mean() - mean) < 4 * deviation / len(IMAGES) ** 0.5
  correlation = np.corrcoef([flips, rows, columns])
  assert np.abs(correlation - np.eye(3)).max() < 4 / len(IMAGES) ** 0.5


def test_floats_are_padded_with_what_is_not_whole():
  new = augment.flip_and_crop(PADDING, fill=-0.25)(KEY, IMAGES.astype(np.float32) / 255)
  assert new.dtype == np.float32
  assert set(np.unique(new)) - set(np.unique(IMAGES.astype(np.float32) / 255)) == {-0.25}


def test_without_padding_only_flips_remain():
  out = np.asarray(augment.flip_and_crop(0)(KEY, IMAGES))
  flipped = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(out, IMAGES, strict=True)])
  np.testing.assert_array_equal(out[~flipped], IMAGES[~flipped])
  assert 0 < flipped.sum() < len(IMAGES)


def test_the_same_key_gives_the_same_bits_however_it_is_run():
  fn = augment.flip_and_crop(PADDING)
  plain = fn(KEY, IMAGES)
  np.testing.assert_array_equal(plain, jax.jit(fn)(KEY, IMAGES))
  keys = jnp.stack([KEY, jax.random.key(6)])
  side_by_side = jax.vmap(fn, (0, None))(keys, IMAGES)
  np.testing.assert_array_equal(plain, side_by_side[0])
  assert np.any(plain != side_by_side[1])


def test_bad_options_are_refused():
  with pytest.raises(BadInput, match="padding -1: allowed is a whole number of at least 0"):
    augment.flip_and_crop(-1)
  with pytest.raises(BadInput, match="fill 256: allowed is from 0 to 255"):
    augment.flip_and_crop(fill=256)(KEY, IMAGES)
  with pytest.raises(BadInput, match="padding 6: allowed is below 6, the size of images"):
    augment.flip_and_crop(6)(KEY, IMAGES)


# --- in a round

TAU, SIZE = 4, 3  # of three images: every batch holds all of them


def seen(groups, fn, batches_per_step=1):
  """The batches of every client in a round, by id: [tau, batches, B, H, W, C]."""
  data = Dataset(jnp.asarray(IMAGES), jnp.zeros(len(IMAGES), jnp.int32))
  shape = (TAU, batches_per_step, SIZE, *IMAGES.shape[1:])

  def step_fn(carry, step, *batches):
    return carry.at[step - 7 * TAU].set(jnp.stack([b.x for b in batches])), jnp.float32(0)

  run = local_round(step_fn, data, jnp.int32(7), LocalWork(TAU, SIZE, fn), batches_per_step)
  client_fn = lambda key, carry, rows: (run(key, carry, rows)[0], (), jnp.float32(0))
  start = jnp.zeros((len(groups.size), *shape), jnp.uint8)
  (states,), _, _ = over_clients((client_fn,), KEY, (groups,), (start,))
  return {int(i): np.asarray(state) for i, state in zip(groups.client, states, strict=True)}


def test_clients_steps_and_batches_are_augmented_differently():
  group = toy.cohort((0, 1), (32, 32), SIZE)
  same_rows = group._replace(index=np.stack([group.index[0]] * 2))
  batches = seen(same_rows, augment.flip_and_crop(PADDING), batches_per_step=2)
  flat = [
    x.tobytes() for client_batches in batches.values() for step in client_batches for x in step
  ]
  assert len(set(flat)) == 2 * TAU * 2
  known = set().union(*(versions(IMAGES[i], PADDING) for i in same_rows.index[0]))
  for client_batches in batches.values():
    for image in client_batches.reshape(-1, *IMAGES.shape[1:]):
      assert image.tobytes() in known


def test_the_rows_that_are_drawn_stay_the_same():
  group = toy.cohort((0, 1), (32, 32), SIZE)
  plain, same = seen(group, None), seen(group, lambda key, x: x)
  for i in (0, 1):
    np.testing.assert_array_equal(plain[i], same[i])


def test_row_padding_and_client_order_change_nothing():
  fn = augment.flip_and_crop(PADDING)
  ours = seen(toy.cohort((0, 1, 2), (32,) * 3, SIZE), fn)
  theirs = seen(toy.cohort((2, 0, 1), (32,) * 3, SIZE, padding=5), fn)
  for i in ours:
    np.testing.assert_array_equal(ours[i], theirs[i])


def test_an_algorithm_trains_on_what_augmentation_returns():
  """Black images alone: only the biases learn."""
  groups, data = (toy.cohort((0, 1), (32, 32)),), jax.tree.map(jnp.asarray, toy.dataset())
  options = {"local_steps": 2, "batch_size": 4}
  algorithm = fedavg(toy.linear(), augment=lambda key, x: jnp.zeros_like(x), **options)
  state = algorithm.init(KEY, data, groups)
  after, _ = algorithm.round(KEY, state, data, groups)
  before, after = state.server["params"], after.server["params"]
  kernels = (params["dense_1"]["kernel"] for params in (before, after))
  np.testing.assert_allclose(*kernels, rtol=1e-6)  # a mean of equals rounds
  assert np.any(before["head"]["bias"] != after["head"]["bias"])
