"""From files to classes: quped export, predict and inspect."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from qupeD_jax.io import export, inspect, packing, predict
from tests import shipped as toys


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """A results folder with models of one client by two methods."""
  folder = tmp_path_factory.mktemp("results")
  for method, bits in (("QuPeD_2_bit", 2), ("QuPeD_1_bit", 1)):
    model = toys.shipped("mlp", bits)
    path = folder / "models" / method / "client_0007.safetensors"
    packing.save(path, model.packed, model.about.metadata)
  return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A folder with three images, as PNG, as an array and as two in an array."""
  folder = tmp_path_factory.mktemp("images")
  x = toys.images(4)
  shown = np.rint(x[0, ..., 0] * (255 / 16)).astype(np.uint8)
  Image.fromarray(shown).save(folder / "a.png")
  np.save(folder / "b.npy", x[1])
  np.save(folder / "c.npy", x[2:, ..., 0])
  (folder / "notes.txt").write_text("no image")
  return folder


def converted(results, to, *options):
  source = results / "models" / "QuPeD_2_bit" / "client_0007.safetensors"
  assert export.main([str(source), "--to", to, *options]) == 0
  return source.with_suffix({"onnx": ".onnx", "stablehlo": ".stablehlo"}[to])


def needs(form):
  for package in {"onnx": ("onnx", "onnxruntime"), "stablehlo": ("flatbuffers",)}.get(form, ()):
    pytest.importorskip(package, reason="requirements/export.txt is not installed")


FORMS = ("safetensors", "onnx", "stablehlo")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_predicts_the_same(form, results, pictures, capsys):
  needs(form)
  source = results / "models" / "QuPeD_2_bit" / "client_0007.safetensors"
  path = source if form == "safetensors" else converted(results, form)
  capsys.readouterr()
  assert predict.main([str(path), str(pictures), "--json"]) == 0
  said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  names = [str(pictures / name) for name in ("a.png", "b.npy", "c.npy[0]", "c.npy[1]")]
  assert [one["image"] for one in said] == names
  logits = toys.logits(toys.shipped("mlp", 2), toys.images(4)).astype(np.float64)
  odds = np.exp(logits)
  expected = odds / odds.sum(-1, keepdims=True)
  found = np.array([one["probabilities"] for one in said])
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert [one["class"] for one in said] == expected.argmax(-1).tolist()


def test_the_text_names_the_likeliest_classes(results, pictures, capsys):
  source = results / "models" / "QuPeD_2_bit" / "client_0007.safetensors"
  assert predict.main([str(source), str(pictures / "a.png"), "--top", "2"]) == 0
  line = capsys.readouterr().out.strip()
  best = toys.logits(toys.shipped("mlp", 2), toys.images(4))[0].argmax()
  assert line.startswith(f"{pictures / 'a.png'}: {best} ")
  assert line.count("%") == 2


@pytest.mark.parametrize("form", FORMS)
def test_inspect_shows_layers_bits_and_checksum(form, results, capsys):
  needs(form)
  source = results / "models" / "QuPeD_2_bit" / "client_0007.safetensors"
  path = source if form == "safetensors" else converted(results, form)
  capsys.readouterr()
  assert inspect.main([str(path)]) == 0
  text = capsys.readouterr().out
  assert "mlp, client 7" in text
  assert f"{path.stat().st_size:,} bytes" in text
  assert inspect.main([str(path), "--json"]) == 0
  said = json.loads(capsys.readouterr().out)
  assert said["checksum"].split()[1] in text
  if form != "stablehlo":
    assert "dense_1/kernel" in text
    tensors = {tensor["name"]: tensor for tensor in said["tensors"]}
    kernel = tensors["dense_1/kernel"]
    assert (kernel["bits"], kernel["shape"], kernel["bytes"]) == (2, [64, 64], 1024 + 16)
    assert len(kernel["centers"]) == 4


def test_export_finds_the_clients_smallest_model_or_the_methods(results, tmp_path, capsys):
  for method, bits in (((), 1), (("--method", "QuPeD 2 bit"), 2)):
    out = tmp_path / f"{bits}.safetensors"
    to = ["--client", "7", "--to", "safetensors", "--kept", "float16", "--out", str(out)]
    assert export.main([str(results), *to, *method]) == 0
    packed, about = packing.load(out)
    assert about["bits"] == bits
    assert {tensor.dtype for tensor in packed.kept.values()} == {np.dtype("float16")}
    assert f"{out} ({out.stat().st_size:,} bytes)" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "complaint"),
  [
    (["--client", "8", "--to", "onnx"], r"no method has a model of client 8"),
    (["--to", "onnx"], r"--client N says whose model"),
    (
      ["--client", "7", "--to", "onnx", "--method", "FedAvg"],
      r"--method FedAvg: allowed is QuPeD_1",
    ),
    (["--client", "7", "--to", "tflite"], r"--to tflite: allowed is safetensors or onnx"),
  ],
)
def test_export_says_what_is_missing(arguments, complaint, results, capsys):
  assert export.main([str(results), *arguments]) == 2
  printed = capsys.readouterr().err
  assert printed.count("\n") == 1
  assert re.search(complaint, printed)


def test_export_does_not_write_over_what_it_reads(results, capsys):
  assert export.main([str(results), "--client", "7", "--to", "safetensors"]) == 2
  assert "--out" in capsys.readouterr().err


def image(folder, kind):
  path = folder / "bad.png"
  grey = np.zeros((8, 8), np.uint8)
  match kind:
    case "size":
      Image.fromarray(np.zeros((9, 8), np.uint8)).save(path)
    case "colour":
      Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    case "alpha":
      Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(path)
    case "deep":
      Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    case "cut":
      Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
      path.write_bytes(path.read_bytes()[:-40])
    case "text":
      path.write_text("hello")
    case "huge":
      Image.fromarray(np.zeros((1, 1), np.uint8)).save(path)
      data = bytearray(path.read_bytes())
      data[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
      path.write_bytes(data)
    case "missing":
      pass
    case "suffix":
      path = folder / "bad.gif"
      path.touch()
    case "empty":
      path = folder / "none"
      path.mkdir()
    case "float" | "shape" | "pickle" | "archive" | "garbage":
      path = folder / "bad.npy"
      arrays = {
        "float": np.zeros((8, 8), np.float32),
        "shape": np.zeros((8, 7), np.uint8),
        "pickle": np.array([{}]),
      }
      if kind in arrays:
        np.save(path, arrays[kind], allow_pickle=True)
      elif kind == "archive":
        with path.open("wb") as file:
          np.savez(file, a=grey)
      else:
        path.write_bytes(b"\x93NUMPY")
  return path


KINDS = (
  "size colour alpha deep cut text huge missing suffix empty float shape pickle archive garbage"
)


@pytest.mark.parametrize("kind", KINDS.split())
def test_an_image_that_does_not_fit_is_refused_in_one_line(kind, results, tmp_path, capsys):
  source = results / "models" / "QuPeD_2_bit" / "client_0007.safetensors"
  path = image(tmp_path, kind)
  assert predict.main([str(source), str(path)]) == 2
  printed = capsys.readouterr()
  assert printed.out == ""
  assert printed.err.startswith("error: ")
  assert printed.err.count("\n") == 1
  assert str(path) in printed.err


def test_a_missing_package_is_named(results, monkeypatch, capsys):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  assert export.main([str(results), "--client", "7", "--to", "onnx"]) == 2
  assert capsys.readouterr().err == (
    "error: onnx is not installed: pip install '.[export]', or make export-tools\n"
  )
