"""The installed package: its names, what an import costs, README's program in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import qupeD_jax as qj
from tests.test_docs import EXAMPLES

ROOT = Path(__file__).parent.parent
HEAVY = ("jax", "flax", "matplotlib", "tensorflow_datasets", "orbax", "dp_accounting", "sklearn")


def test_every_name_leads_somewhere():
  for name in qj.__all__:
    assert getattr(qj, name) is not None
  assert set(qj.__all__) <= set(dir(qj))


def test_an_import_is_light():
  """Not even jax is imported before it is used; nothing for pictures or privacy by training."""
  code = (
    "import sys, qupeD_jax as qj; print([m for m in HEAVY if m in sys.modules]);"
    "qj.run, qj.quped, qj.data, qj.save_model;"
    "print([m for m in HEAVY if m in sys.modules])"
  ).replace("HEAVY", repr(HEAVY))
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ["[]", "['jax', 'flax']"]


def test_the_wheel_runs_readmes_program_without_the_repository(tmp_path):
  """For fewer rounds: how well it learns does not depend on where the package lies."""
  source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
  files = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt")
  source.mkdir()
  empty.mkdir()
  for name in files:
    shutil.copy(ROOT / name, source)
  for name in ("qupeD_jax", "requirements"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
  subprocess.run([*pip, str(source)], check=True, cwd=empty)
  # An editable installation beside it would lend what is missing.
  inside = lambda root: {path.relative_to(root) for path in root.glob("qupeD_jax/**/*.*")}
  assert inside(source) <= inside(site)
  (name,) = (name for name in EXAMPLES if name.startswith("readme"))
  rounds, code = "rounds=60", EXAMPLES[name].code
  assert rounds in code
  (empty / "program.py").write_text(code.replace(rounds, "rounds=2"), "utf-8")
  environment = os.environ | {"PYTHONPATH": str(site)}
  run = lambda *command: subprocess.run(
    [sys.executable, *command],
    cwd=empty,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  where = run("-c", "import qupeD_jax; print(qupeD_jax.__file__)").stdout.strip()
  assert Path(where).is_relative_to(site)
  assert re.fullmatch(r"\(20,\) (True|False)\n", run("program.py").stdout)
  assert "client_7.safetensors" in {path.name for path in empty.iterdir()}
  assert "client 7" in run("-m", "qupeD_jax", "inspect", "client_7.safetensors").stdout
  assert (site / "bin" / "quped").exists()
  assert (site / "qupeD_jax" / "py.typed").exists()
