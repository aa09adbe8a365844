"""The command `quped`: its help, its commands, and a name that is none of them."""

import pytest

from qupeD_jax import __main__


def test_without_a_command_it_lists_them(capsys):
  assert __main__.main([]) == 0
  listed = capsys.readouterr().out
  assert all(f"\n  {name} " in listed for name in ("report", "import-torch", "data"))
  assert __main__.main(["--help"]) == 0
  assert capsys.readouterr().out == listed


def test_a_mistyped_command_is_told_the_nearest(capsys):
  assert __main__.main(["reprot"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: reprot: no such command; nearest is report; all: report, ")
  assert error.count("\n") == 1


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    (["report"], "error: usage: quped report FOLDER"),
    (["import-torch", "none.safetensors", "--model", "resnet20"], "none.safetensors"),
    (["data", "typo"], "typo"),
  ],
)
def test_arguments_reach_the_command(typed, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert __main__.main(typed) == 2
  assert message in capsys.readouterr().err
