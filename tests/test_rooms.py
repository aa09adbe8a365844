"""The plan of the house: who may import whom (pyproject.toml, tool.importlinter), and style."""

import pathlib
import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

ROOT = pathlib.Path(__file__).parent.parent


def test_imports_follow_the_plan(monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.syspath_prepend(str(ROOT))
  assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "."]])
def test_ruff_is_content(command):
  done = subprocess.run(
    [sys.executable, "-m", "ruff", *command, "--no-cache"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout
