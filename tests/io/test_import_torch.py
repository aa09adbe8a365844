"""PyTorch state dicts become variables of ours, or a line that says which tensor does not fit."""

import json
import pathlib
import re

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from qupeD_jax import models
from qupeD_jax.checks import BadInput
from qupeD_jax.io import import_torch, packing, shipped
from qupeD_jax.quantization import ops

CHECKPOINT = pathlib.Path(__file__).parents[1] / "data" / "resnet20_cifar10_fp.safetensors"


def state_dict(blocks=1, channels=3, classes=10):
  """Returns a state dict as PyTorch names and shapes it, of random values."""
  shapes = {"conv1.weight": (16, channels, 3, 3), "linear.weight": (classes, 64)}
  shapes["linear.bias"] = (classes,)
  norms = {"bn1": 16}
  width = 16
  for layer, features in ((1, 16), (2, 32), (3, 64)):
    for block in range(blocks):
      for i, inputs in ((1, width), (2, features)):
        shapes[f"layer{layer}.{block}.conv{i}.weight"] = (features, inputs, 3, 3)
        norms[f"layer{layer}.{block}.bn{i}"] = features
      width = features
  for norm, features in norms.items():
    for kind in ("weight", "bias", "running_mean", "running_var"):
      shapes[f"{norm}.{kind}"] = (features,)
  rng = np.random.default_rng(0)
  tensors = {name: rng.uniform(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
  return tensors | {f"{norm}.num_batches_tracked": np.array(7) for norm in norms}


@pytest.fixture
def saved(tmp_path):
  """Saves a state dict, with some tensors changed, or without those that are None."""

  def save(changes=(), **options):
    tensors = state_dict(**options) | dict(changes)
    path = tmp_path / "network.safetensors"
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(kept, path)
    return path

  return save


def refusal(fn, *args):
  with pytest.raises(BadInput) as raised:
    fn(*args)
  assert "\n" not in str(raised.value)
  return str(raised.value)


@pytest.mark.parametrize(
  ("name", "blocks", "channels", "classes"), [("resnet8", 1, 1, 62), ("resnet32", 5, 3, 10)]
)
def test_every_tensor_finds_its_place(saved, name, blocks, channels, classes):
  shape = (28, 28, channels)
  path = saved(blocks=blocks, channels=channels, classes=classes)
  variables = import_torch.load(path, name, classes, shape)
  wanted = jax.eval_shape(models.make(name, classes, shape).init, jax.random.key(0))
  chex.assert_trees_all_equal_shapes_and_dtypes(variables, wanted)


def test_layouts_by_hand(saved):
  theirs, ours = state_dict(), import_torch.load(saved(), "resnet8")
  params, stats = ours["params"], ours["stats"]["batch_stats"]
  kernel, block = theirs["layer2.0.conv1.weight"], params["stage_2_block_0"]
  for o, i, h, w in [(0, 0, 0, 0), (31, 3, 2, 1), (7, 15, 0, 2)]:
    assert block["conv_1"]["kernel"][h, w, i, o] == kernel[o, i, h, w]
  np.testing.assert_array_equal(params["stem"]["kernel"][1, 2], theirs["conv1.weight"][..., 1, 2].T)
  np.testing.assert_array_equal(params["head"]["kernel"], theirs["linear.weight"].T)
  np.testing.assert_array_equal(params["head"]["bias"], theirs["linear.bias"])
  np.testing.assert_array_equal(block["norm_2"]["scale"], theirs["layer2.0.bn2.weight"])
  np.testing.assert_array_equal(block["norm_2"]["bias"], theirs["layer2.0.bn2.bias"])
  norm = stats["stage_3_block_0"]["norm_1"]
  np.testing.assert_array_equal(norm["mean"], theirs["layer3.0.bn1.running_mean"])
  np.testing.assert_array_equal(norm["var"], theirs["layer3.0.bn1.running_var"])
  np.testing.assert_array_equal(stats["stem_norm"]["var"], theirs["bn1.running_var"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_names_of_wrappers_are_taken_off(saved, tmp_path, prefix):
  path = tmp_path / "wrapped.safetensors"
  named = {f"{prefix}{name.replace('linear', 'fc')}": x for name, x in state_dict().items()}
  safetensors.numpy.save_file(named, path)
  chex.assert_trees_all_equal(
    import_torch.load(path, "resnet8"), import_torch.load(saved(), "resnet8")
  )


@pytest.mark.parametrize("content", [b"PK\3\4 and more", b"\x80\2ctorch"])
def test_a_pickle_is_not_opened_and_told_from_damage(tmp_path, content):
  path = tmp_path / "network.pth"
  path.write_bytes(content)
  for read in (import_torch.load, import_torch.read_variables):
    message = refusal(read, path, "resnet8")
    assert message.startswith(f"{path}: a pickle, which may run programs")
    assert "torch.load(FILE, weights_only=True)" in message


def test_types_that_numpy_lacks_are_named(tmp_path):
  path = tmp_path / "small.safetensors"
  about = {"conv1.weight": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
  header = json.dumps(about).encode()
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x38" * 2)
  problem = "conv1.weight is of type F8_E4M3, which is not read; make it F32"
  assert refusal(import_torch.load, path, "resnet8") == f"{path}: {problem}"


def test_half_precision_is_widened(saved):
  halved = {"linear.bias": np.arange(10, dtype=np.float16)}
  bias = import_torch.load(saved(halved), "resnet8")["params"]["head"]["bias"]
  assert bias.dtype == np.float32
  np.testing.assert_array_equal(bias, np.arange(10))


VECTOR = np.ones(16, np.float32)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bn1.running_var": None}, "bn1.running_var is missing, a tensor of resnet8"),
    ({"layer1.1.conv1.weight": VECTOR}, "layer1.1.conv1.weight is no tensor of resnet8"),
    (
      {"layer3.0.conv1.weight": np.ones((64, 32, 5, 5), np.float32)},
      "shape of layer3.0.conv1.weight (64, 32, 5, 5): allowed is (64, 32, 3, 3)",
    ),
    (
      {"bn1.weight": VECTOR.astype(np.int32)},
      "type of bn1.weight int32: allowed is a floating-point type",
    ),
    ({"bn1.bias": VECTOR * np.nan}, "bn1.bias has entries that are not finite in float32"),
    (
      {"bn1.bias": VECTOR.astype(np.float64) * 1e300},
      "bn1.bias has entries that are not finite in float32",
    ),
    ({"bn1.running_var": -VECTOR}, "bn1.running_var has entries below 0, which no variance is"),
    (
      {"module.bn1.bias": VECTOR},
      "module.bn1.bias is one of several tensors that could be bn1.bias",
    ),
    ({"fc.bias": VECTOR}, "linear.bias is one of several tensors that could be linear.bias"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_does_not_fit_is_named(saved, changes, message):
  path = saved(changes)
  assert refusal(import_torch.load, path, "resnet8") == f"{path}: {message}"


def test_files_that_cannot_be_read_are_named(saved, tmp_path):
  absent = tmp_path / "absent.safetensors"
  assert refusal(import_torch.load, absent, "resnet8").startswith(f"{absent}: cannot be read (No s")
  assert refusal(import_torch.load, tmp_path, "resnet8").startswith(f"{tmp_path}: cannot be read")
  path = saved()
  path.write_bytes(path.read_bytes()[:-1])
  damaged = f"{path}: damaged, or not a safetensors file"
  assert refusal(import_torch.load, path, "resnet8") == damaged
  assert refusal(import_torch.read_variables, path, "resnet8") == damaged


@pytest.mark.parametrize("name", ["resnet56", "cnn1"])
def test_networks_that_cannot_be_imported_are_refused(name):
  message = f"model {name}: allowed is resnet8, resnet20, resnet32"
  assert refusal(import_torch.load, CHECKPOINT, name) == message


# --- the command, and what it writes


def test_the_command_writes_what_can_be_read_back(tmp_path, capsys):
  out = tmp_path / "made" / "resnet20.safetensors"
  assert import_torch.main([str(CHECKPOINT), "--model", "resnet20", "--out", str(out)]) == 0
  counts = "resnet20: 269,722 parameters in 59 tensors, 1,376 running statistics in 38"
  assert capsys.readouterr().out == f"{counts}\n{out}\n"
  variables = import_torch.load(CHECKPOINT, "resnet20")
  chex.assert_trees_all_equal(import_torch.read_variables(out, "resnet20"), variables)
  chex.assert_trees_all_equal(import_torch.read_variables(CHECKPOINT, "resnet20"), variables)
  about = shipped.read(out).about
  assert (about.model, about.bits, about.image_shape) == ("resnet20", 32, (32, 32, 3))
  assert about.mean == pytest.approx((125.307, 122.961, 113.8575))
  assert about.std == pytest.approx((51.5865, 50.847, 51.255))


def test_what_the_command_writes_knows_of_its_images_what_it_is_told(saved, tmp_path, capsys):
  path, out = saved(channels=1), tmp_path / "out.safetensors"
  typed = [str(path), "--model", "resnet8", "--image-shape", "28", "28", "1", "--out", str(out)]
  assert import_torch.main([*typed, "--mean", "33.3", "--std", "78.5"]) == 0
  assert shipped.read(out).about.mean == pytest.approx((33.3,))
  assert shipped.read(out).about.std == pytest.approx((78.5,))
  for wrong in ((), ("--mean", "nan"), ("--mean", "1", "2"), ("--mean", "1", "--std", "0")):
    assert import_torch.main([*typed, *wrong]) == 2
    option = "--std" if "--std" in wrong else "--mean"
    assert capsys.readouterr().err.startswith(f"error: {option} ")


def test_the_command_takes_other_classes_and_channels(saved, capsys):
  typed = ["--model", "resnet8", "--num-classes", "62", "--image-shape", "28", "28", "1"]
  assert import_torch.main([str(saved(channels=1, classes=62)), *typed]) == 0
  assert capsys.readouterr().out.startswith("resnet8: ")


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    ([CHECKPOINT, "--model", "resnet32"], ".*: layer1.3.conv1.weight is missing, .* resnet32"),
    ([CHECKPOINT, "--model", "resnet9"], "--model resnet9: allowed is resnet8, resnet20, resnet32"),
    ([CHECKPOINT, "--model", "resnet20", "--out", CHECKPOINT / "x"], ".*: cannot be written .*"),
    (
      [CHECKPOINT],
      ".*: not understood; quped import-torch --help lists the options",
    ),
    (
      [CHECKPOINT, "--model", "resnet8", "--num-classes", "ten"],
      "--num-classes ten: allowed is a whole number",
    ),
  ],
)
def test_what_cannot_be_done_ends_in_one_line(typed, message, capsys):
  assert import_torch.main(list(map(str, typed))) == 2
  assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_a_shipped_model_can_be_started_from(tmp_path):
  model = models.make("mlp2", 10, (8, 8, 1))
  variables = jax.jit(model.init)(jax.random.key(0))
  kernel = variables["params"]["dense_1"]["kernel"]
  codebooks = {"dense_1/kernel": ops.init_centers(kernel, 4)}
  path = tmp_path / "client.safetensors"
  packing.save(path, packing.pack(variables, codebooks), {"client": 3})
  read = import_torch.read_variables(path, "mlp2", image_shape=(8, 8, 1))
  hard = {**variables, "params": ops.harden(variables["params"], codebooks)}
  chex.assert_trees_all_equal(read, jax.device_get(hard))
  message = refusal(import_torch.read_variables, path, "mlp", 10, (8, 8, 1))
  assert message.startswith(f"{path}: shape of params/")


def test_names_of_all_networks_are_distinct():
  for name in import_torch.NAMES:
    shapes = jax.eval_shape(models.make(name, 10, (32, 32, 3)).init, jax.random.key(0))
    paths = flatten_dict(shapes, sep="/")
    assert len({import_torch.torch_name(path) for path in paths}) == len(paths)
