"""The Makefile: what is typed reaches Python as words, and nothing runs it on the way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import steps

MAKEFILE = Path(__file__).parent.parent / "Makefile"
HOSTILE = "a; touch ran `touch ran` $(touch ran) $(shell touch ran) $$(touch ran) \"' & | > ran"


@pytest.fixture
def make(tmp_path):
  """Returns a function: what is typed -> the process, where Python prints its arguments."""
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
  (tmp_path / "requirements").mkdir()
  for name in ("pyproject.toml", "requirements.txt", "requirements/test.txt"):
    (tmp_path / name).touch()
  (tmp_path / ".venv" / "installed").touch()
  for room, name in (("experiments", "__main__"), ("qupeD_jax", "__main__")):
    (tmp_path / room).mkdir(parents=True)
    (tmp_path / room / f"{name}.py").write_text("import sys; print(sys.argv[1:])")

  # Beneath `make test` a make would take its parent's options and speak of folders it enters.
  of_make = {"MAKELEVEL", "MAKEFLAGS", "MFLAGS", "NAME", "ARGS"}
  env = {name: value for name, value in os.environ.items() if name not in of_make}

  def make(*typed):
    command = ["make", "-f", MAKEFILE, *typed]
    done = subprocess.run(
      command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert not (tmp_path / "ran").exists()
    return done

  return make


@pytest.mark.parametrize("target", ["experiment", "report"])
def test_a_name_is_one_word_that_nothing_runs(make, target):
  done = make(target, f"NAME={HOSTILE}")
  assert HOSTILE in done.stdout.replace("\\'", "'")


def test_arguments_are_words_as_a_shell_has_them(make):
  typed = """--only 'QuPeD 2 bit' "a b" $(touch ran) $$HOME *"""
  words = ["x", "--only", "QuPeD 2 bit", "a b", "$(touch", "ran)", "$$HOME", "*"]
  assert make("experiment", "NAME=x", f"ARGS={typed}").stdout == f"{words}\n"
  assert make("experiment", "ARGS='a").stderr.startswith("error: ARGS='a: No closing quotation\n")


def test_without_a_name_the_experiments_are_listed(make):
  assert make("experiment").stdout == make("experiments").stdout == "[]\n"


def test_a_report_of_results_that_come_with_the_repository_lies_where_git_does_not_look(
  make, tmp_path
):
  (tmp_path / "experiments" / "results" / "mnist").mkdir(parents=True)
  words = ["report", "experiments/results/mnist", "results/reports/mnist"]
  assert make("report", "NAME=mnist").stdout == f"{words}\n"
  assert "/results/" in (MAKEFILE.parent / ".gitignore").read_text().splitlines()
  assert steps.Options().out.parts[0] == "results"


def test_an_unknown_data_set_is_refused_before_anything_is_installed(make, tmp_path):
  """By a Python that has nothing but itself."""
  shutil.rmtree(tmp_path / ".venv")
  for name in ("__init__", "checks", "data/catalog"):
    file = tmp_path / "qupeD_jax" / f"{name}.py"
    file.parent.mkdir(exist_ok=True)
    shutil.copy(MAKEFILE.parent / "qupeD_jax" / f"{name}.py", file)
  done = make("data", "NAME=cifr10", f"PYTHON={sys.executable} -S")
  refused, _ = done.stderr.splitlines()  # and make's own
  assert refused.startswith("dataset cifr10: allowed is digits, ")
  assert refused.endswith("; the nearest is cifar10")
  assert done.returncode == 2
  assert not [*tmp_path.glob(".venv*")]


def test_a_known_data_set_is_prepared_in_an_environment_of_its_own(make, tmp_path):
  shutil.copytree(tmp_path / ".venv", tmp_path / ".venv-data", symlinks=True)
  (tmp_path / "qupeD_jax" / "data").mkdir()
  (tmp_path / "qupeD_jax" / "data" / "catalog.py").touch()
  done = make("data", "NAME=cifar100", "ARGS=--data-dir x")
  assert (done.stdout, done.stderr) == ("['data', 'cifar100', '--data-dir', 'x']\n", "")


def test_an_environment_whose_installation_was_cut_off_is_filled_again(make, tmp_path):
  shutil.copytree(tmp_path / ".venv", tmp_path / ".venv-data", symlinks=True)
  fills = lambda: "pip install --quiet" in make("--dry-run", "data", "NAME=cifar100").stdout
  assert not fills()
  (tmp_path / ".venv-data" / "installed").unlink()
  assert fills()


def test_help_names_every_target():
  lines = MAKEFILE.read_text().splitlines()
  (targets,) = (line.split()[1:] for line in lines if line.startswith(".PHONY:"))
  told = "\n".join(line for line in lines if line.startswith("# make "))
  assert [name for name in targets if name != "help" and f"make {name}" not in told] == []
