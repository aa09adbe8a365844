"""The command line: what it lists and documents, and bad input, which ends with one line."""

import ast
import errno
import importlib
import os
import pty
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import quickstart
from qupeD_jax import checks, command_line
from qupeD_jax.engine import loop
from qupeD_jax.io import predict
from qupeD_jax.study import cli, compiled
from qupeD_jax.study.options import flat, settled

ROOT = Path(__file__).parents[2]
FILES = sorted(p for p in (ROOT / "experiments").glob("*.py") if not p.stem.startswith("_"))
NAMES = [path.stem for path in FILES]


@pytest.fixture(autouse=True)
def _no_training(monkeypatch, tmp_path):
  """Fails what gets as far as the engine; keeps results out of the working tree."""

  def reached(*_, **__):
    raise AssertionError("bad input reached the engine")

  monkeypatch.setattr(loop, "run", reached)
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def refusal(capfd):
  """Returns a function: arguments -> the one line that refuses them."""

  def refusal(*arguments):
    assert cli.main(arguments) == 2
    printed, line = capfd.readouterr()
    assert printed == ""
    assert re.fullmatch(r"error: .+\n", line)  # a dot is any character but a newline
    return line.removeprefix("error: ").rstrip("\n")

  return refusal


# --- names


def test_the_listing_shows_every_experiment_with_its_docstrings_first_line(capsys):
  assert cli.main([]) == 0
  lines = capsys.readouterr().out.splitlines()
  for path, line in zip(FILES, lines, strict=True):
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert line.split(maxsplit=1) == [path.stem, docstring.splitlines()[0]]


@pytest.mark.parametrize("typed", ["quikstart", "Quickstart", "quick", "quickstart.py"])
def test_a_typo_in_the_name_names_the_nearest(refusal, typed):
  line = refusal(typed, "--rounds", "3")
  assert line.startswith(f"NAME={typed}: ")
  assert "nearest is quickstart" in line


@pytest.mark.parametrize("typed", ["", "common", "__main__", "../quickstart", "a\nb"])
def test_what_is_no_experiment_is_refused(refusal, typed):
  assert "no such experiment" in refusal(typed)


def test_a_typo_does_not_wait_for_jax():
  code = "import sys, qupeD_jax.study.cli as c; c.main(['x']); print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=False)
  assert done.stdout == b"False\n"


# --- options


@pytest.mark.parametrize(
  ("typed", "nearest"),
  [
    (["--rouds", "3"], "--rounds"),
    (["--rouds=3"], "--rounds"),
    (["--rou", "3"], "--rounds"),
    (["-rounds", "3"], "--rounds"),
    (["--Rounds", "3"], "--rounds"),
    (["rounds", "3"], "--rounds"),
    (["--rounds", "20", "--sead", "3"], "--seed"),
    (["--finetune_round", "3"], "--finetune-rounds"),
    (["--finetune_round=3"], "--finetune-rounds"),
    (["--bits", "1", "2", "--lambda", "0.5"], "--lambda-p"),
    (["--no-partial-batch"], "--no-partial-batches"),
    (["--seed", "-1", "--batchsize", "3"], "--batch-size"),
  ],
)
def test_a_typo_in_an_option_names_the_nearest(refusal, typed, nearest):
  line = refusal("quickstart", *typed)
  assert "belongs to no option" in line
  assert line.endswith(f"nearest is {nearest}")


@pytest.mark.parametrize(
  ("typed", "stray"),
  [
    (["leftover"], "leftover"),
    (["--seed", "1", "2"], "2"),
    (["--partial-batches", "yes"], "yes"),
    (["--out", "results", "elsewhere"], "elsewhere"),
  ],
)
def test_a_stray_value_is_named(refusal, typed, stray):
  assert refusal("quickstart", *typed) == f"{stray}: belongs to no option"


@pytest.mark.parametrize(
  ("typed", "line"),
  [
    (["--rounds", "x"], "--rounds x: allowed is a whole number"),
    (["--rounds=1.5"], "--rounds 1.5: allowed is a whole number"),
    (["--rounds"], "--rounds without a value: allowed is a whole number"),
    (["--rounds="], "--rounds without a value: allowed is a whole number"),
    (["--rounds", "--seed", "3"], "--rounds without a value: allowed is a whole number"),
    (["--rounds", "3", "--seed"], "--seed without a value: allowed is a whole number"),
    (["--rounds", "--help"], "--rounds without a value: allowed is a whole number"),
    (["--lambda_p", "half"], "--lambda-p half: allowed is a number"),
    (["--alpha", "1\n2"], "--alpha 1 2: allowed is a number"),
    (["--max-test-rows", "all"], "--max-test-rows all: allowed is a whole number or None"),
    (["--dtype", "float16"], "--dtype float16: allowed is float32 or bfloat16"),
    (["--dtype=--rounds"], "--dtype --rounds: allowed is float32 or bfloat16"),
    (
      ["--partition", "by-class"],
      "--partition by-class: allowed is by_class or dirichlet or iid or natural",
    ),
    (
      ["--bits", "1", "two"],
      "--bits 1 two: allowed is a whole number, or several with spaces between",
    ),
    (["--data-dir"], "--data-dir without a value: allowed is any text or None"),
  ],
)
def test_a_value_that_cannot_be_read_is_named_with_what_is_allowed(refusal, typed, line):
  assert refusal("quickstart", *typed) == line


@pytest.mark.parametrize("columns", ["20", "40", "400"])
def test_a_complaint_is_one_line_however_wide_the_terminal(refusal, monkeypatch, columns):
  monkeypatch.setenv("COLUMNS", columns)
  value = "word " * 40
  assert refusal("quickstart", "--rounds", value) == f"--rounds {value}: allowed is a whole number"
  assert refusal("quickstart", *["--rouds"] * 50).endswith("nearest is --rounds")


def test_a_complaint_on_a_colour_terminal_is_plain():
  # tyro frames and colours what it prints if standard output is a terminal.
  master, slave = pty.openpty()
  done = subprocess.run(
    [sys.executable, "-m", "experiments", "quickstart", "--rounds", "x"],
    cwd=ROOT,
    env={**os.environ, "TERM": "xterm-256color"},
    stdout=slave,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  os.close(master), os.close(slave)
  assert done.returncode == 2
  assert done.stderr == "error: --rounds x: allowed is a whole number\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_documents_every_option(capsys, monkeypatch, name):
  monkeypatch.setenv("COLUMNS", "80")
  with pytest.raises(SystemExit) as exited:
    cli.main([name, "--help"])
  assert exited.value.code == 0
  block = re.compile(r"^\W+(--[a-z-]+)(.*?)(?=^\W+--|\Z)", re.MULTILINE | re.DOTALL)
  texts = dict(block.findall(capsys.readouterr().out))
  for option in flat(importlib.import_module(f"experiments.{name}").DEFAULTS):
    text = texts["--" + option.replace("_", "-")]
    words = re.findall("[a-z]{2,}", text.partition("(default:")[0])
    assert "(default:" in text, option
    assert len(words) >= 3, option


# --- values out of range, and values that do not fit the data

RATES = [
  "--weights-rate", "--global-rate", "--fedavg-rate", "--centers-rate", "--finetune-rate",
  "--fedavg-finetune-rate", "--temperature",
]  # fmt: skip
COUNTS = [
  "--clients", "--classes-per-client", "--rounds", "--local-steps", "--batch-size",
  "--eval-every", "--seeds", "--max-test-rows",
]  # fmt: skip
OUT_OF_RANGE = [
  *((flag, value, "a finite number above 0") for flag in RATES for value in ("0", "-1")),
  *((flag, value, "a finite number above 0") for flag in RATES for value in ("nan", "inf")),
  *((flag, value, "at least 1") for flag in COUNTS for value in ("0", "-3")),
  *(("--bits", bits, "1 to 8, or 32") for bits in ("0", "9", "16", "31", "33", "-1")),
  *(("--lambda-p", value, "[0, 1)") for value in ("1", "-0.1", "2", "nan")),
  *(("--participation", value, "above 0 and at most 1") for value in ("0", "1.1", "-1", "nan")),
  *(("--final-rate", value, "above 0 and at most 1") for value in ("0", "2", "nan")),
  *(("--validation", value, "above 0 and below 1") for value in ("0", "1", "nan")),
  *(("--proximity", value, "at least 0") for value in ("-1", "nan", "inf")),
  *(("--global-loss-weight", value, "at least 0") for value in ("-1", "nan", "inf")),
  ("--checkpoint-every", "-1", "at least 0"),
  ("--minutes", "0", "a finite number above 0"),
  ("--store", "cloud", "device or host or disk"),
  ("--seed", "-1", "at least 0"),
  ("--seed", str(2**32), "below 2^32"),  # jax would take it for seed 0
  ("--seed", str(10**30), "below 2^32"),
  ("--finetune-rounds", "-1", "at least 0"),
  ("--models", "", "mlp"),
  ("--models", "mpl", "nearest: mlp"),
  ("--dataset", "cifar", "nearest is cifar10"),
  ("--dataset", "../digits", "fashion_mnist"),
  ("--partition", "natural", "does not say whose"),
  ("--classes-per-client", "11", "at most 10, the number of classes"),
  ("--clients", "3", "at least 8"),  # two architectures, four precisions
  ("--clients", "5000", "at most 718"),
]


@pytest.mark.parametrize(("flag", "value", "allowed"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_before_anything_compiles(refusal, flag, value, allowed):
  line = refusal("quickstart", flag, *([value] if value else []))
  number = rf"{re.escape(value)}(\.0)?" if value else r"\(\)"
  assert re.match(rf"{flag} {number}: ", line)
  assert allowed in line


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_concentration_out_of_range_is_refused(refusal, value):
  line = refusal("quickstart", "--partition", "dirichlet", "--alpha", value)
  assert re.match(rf"--alpha {value}(\.0)?: allowed is a finite number above 0", line)


def test_every_value_of_several_is_checked(refusal):
  assert refusal("quickstart", "--bits", "1", "2", "9").startswith("--bits 9: ")
  assert refusal("quickstart", "--models", "mlp", "cnn").startswith("--models cnn: ")


def test_a_store_is_for_clients_that_do_not_train(refusal):
  line = refusal("quickstart", "--store", "host")
  assert line.startswith("--participation 1.0: allowed is below 1 with --store host: only those")
  line = refusal("quickstart", "--store", "disk", "--participation", "0.5", "--minutes", "5")
  assert line.startswith("--minutes 5.0: allowed is None with --store disk: ")


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_a_client_left_without_data_is_refused(refusal, partition):
  line = refusal("quickstart", "--clients", "1000", "--partition", partition)
  assert line == "--clients 1000: allowed is at most 718, so that each has 2 of 1437 training rows"


def test_finetuning_must_leave_rounds_to_train(refusal):
  line = refusal("quickstart", "--rounds", "5", "--finetune-rounds", "5")
  assert line == "--finetune-rounds 5: allowed is below --rounds 5"


def test_a_batch_larger_than_the_smallest_client_is_told_what_happens_instead(refusal):
  line = refusal("quickstart", "--batch-size", "500")
  most = r"--batch-size 500: allowed is at most \d+, the training rows of client \d+; "
  instead = "with --partial-batches such a client trains on all of its rows in each step instead"
  assert re.fullmatch(most + instead, line)


# --- folders


@pytest.fixture
def obstacle(tmp_path):
  """Returns a file where a folder is wanted."""
  (tmp_path / "file").write_text("not a folder")
  return tmp_path / "file"


@pytest.mark.parametrize("dataset", ["mnist", "femnist"])
def test_a_data_dir_that_is_no_folder_is_refused(refusal, obstacle, dataset):
  line = refusal("quickstart", "--dataset", dataset, "--data-dir", str(obstacle))
  assert line.startswith(f"--data-dir {obstacle}: allowed is a folder")


def test_an_empty_data_dir_is_told_what_to_run(refusal, tmp_path):
  line = refusal("quickstart", "--dataset", "mnist", "--data-dir", str(tmp_path))
  assert line.startswith(f"--dataset mnist: not prepared in {tmp_path}; run `make data NAME=mnist")


def test_a_data_dir_without_femnist_is_told_what_belongs_there(refusal, tmp_path):
  line = refusal("quickstart", "--dataset", "femnist", "--data-dir", str(tmp_path))
  assert line.startswith(f"--dataset femnist: nothing in {tmp_path}")
  assert "all_data_*.json" in line


def test_a_foreign_data_dir_is_told_what_to_run(refusal, tmp_path):
  foreign = tmp_path / "mnist" / "3.0.1"
  foreign.mkdir(parents=True)
  (foreign / "dataset_info.json").write_text("{}")
  line = refusal("quickstart", "--dataset", "mnist", "--data-dir", str(tmp_path))
  assert str(foreign) in line
  assert f'`make data NAME=mnist ARGS="--data-dir {tmp_path}"`' in line


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_an_out_with_a_file_in_the_way_is_refused(refusal, obstacle, inside):
  line = refusal("quickstart", "--out", str(obstacle / inside))
  assert line.startswith(f"--out {obstacle / inside}: allowed is a folder")


@pytest.fixture
def closed(tmp_path, monkeypatch):
  """A folder that may not be entered."""
  folder, stat = tmp_path / "closed", Path.stat
  folder.mkdir()

  def refusing(path, **how):
    if folder in path.parents:
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return stat(path, **how)

  monkeypatch.setattr(Path, "stat", refusing)
  return folder


SMALL = ["--dataset", "digits", "--clients", "4", "--batch-size", "5", "--classes-per-client", "4"]
TYPED = [
  (["quickstart"], "--out"),
  (["mnist_table"], "--data-dir"),
  (["quickstart"], "--config"),
  (["mnist_table", *SMALL, "--only", "local"], "--parts"),
  (["mnist_table", *SMALL, "--only", "local"], "--tuned"),
  (["cifar10_resnet20_table", *SMALL[:2], "--models", "resnet8"], "--start"),
]


@pytest.mark.parametrize(("typed", "option"), TYPED)
def test_a_home_that_nobody_has_is_refused(refusal, typed, option):
  line = refusal(*typed, option, "~nosuchuser/x")
  assert line == f"{option} ~nosuchuser/x: there is no such home folder"


@pytest.mark.parametrize("option", ["--out", "--config"])
def test_a_path_that_cannot_be_is_refused(refusal, closed, option):
  line = lambda path: refusal("quickstart", option, path)
  assert line("x" * 300) == f"{option} {'x' * 300}: File name too long"
  assert line(f"{closed}/x.toml") == f"{option} {closed}/x.toml: Permission denied"


def test_a_results_folder_that_is_closed_is_refused(refusal, closed):
  assert refusal("quickstart", "--out", str(closed)) == f"{closed}/.lock: Permission denied"


def test_a_home_is_found_in_every_path(refusal, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert checks.place("out", "~/x") == tmp_path / "x"
  options = command_line.parse(predict.Options, ["~/model.onnx", "~/a.png", "b.png"], prog="")
  assert options.model == tmp_path / "model.onnx"
  assert options.images == (tmp_path / "a.png", Path("b.png"))
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  assert refusal("quickstart", "--out", "~/x") == "--out ~/x: there is no such home folder"


@pytest.mark.parametrize(
  ("mode", "owner", "reason"),
  [
    (0o770, None, "others may write in it"),
    (0o707, None, "others may write in it"),
    (0o755, 12345, "belongs to another user"),
  ],
)
def test_programs_that_others_may_have_compiled_are_not_run(
  tmp_path, monkeypatch, capsys, mode, owner, reason
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  (tmp_path / "qupeD_jax").mkdir()
  (tmp_path / "qupeD_jax").chmod(mode)
  if owner:
    monkeypatch.setattr(os, "geteuid", lambda: owner)
  compiled.keep_compiled()
  assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
  line = f"compiled programs are not kept: {tmp_path / 'qupeD_jax'}: {reason}"
  assert capsys.readouterr().err.startswith(line)


def test_compiled_programs_are_the_users_own_and_do_not_pile_up(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  compiled.keep_compiled()
  folder = tmp_path / "caches" / "qupeD_jax"
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
  assert folder.stat().st_mode & 0o777 == 0o700
  for age, name in enumerate(["a-cache", "b-cache", "c-cache", "other"]):
    (folder / name).write_bytes(b"1234")
    os.utime(folder / name, (100 - age, 100 - age))
  compiled.trim(folder, most=9)
  assert sorted(path.name for path in folder.iterdir()) == ["a-cache", "b-cache", "other"]


def test_a_second_start_compiles_nothing(tmp_path):
  code = "from qupeD_jax.study import compiled; compiled.keep_compiled(); import jax; "
  code += "print(jax.jit(lambda x: 2 * x)(21))"
  environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
  folder, kept = tmp_path / "qupeD_jax", []
  for _ in range(2):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.split() == [b"42"]
    kept.append(sorted((p.name, p.stat().st_ctime_ns) for p in folder.glob("*-cache")))
  assert kept[0]
  assert kept[0] == kept[1]


# --- files of options


def parsed(*arguments):
  return cli.parse(quickstart.DEFAULTS, arguments, "quickstart")


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("own.toml", "rounds = 7\nbits = [1, 2]\nfresh = true\nlambda_p = 0.25"),
    ("own.yaml", "rounds: 7\nbits: [1, 2]\nfresh: true\nlambda_p: 0.25"),
    ("config.json", '{"config": {"rounds": 7, "bits": [1, 2], "lambda_p": 0.25, "out": "x"}}'),
  ],
)
def test_options_come_from_a_file_and_typed_ones_win(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  options = parsed("--lambda-p", "0.75", "--config", str(tmp_path / name))
  assert (options.work.rounds, options.bits, options.run.out) == (7, (1, 2), None)
  assert options.hyper.lambda_p == 0.75
  assert options.run.fresh == (name != "config.json")


def test_a_file_with_an_unknown_key_names_the_nearest(refusal, tmp_path):
  (tmp_path / "own.toml").write_text("rouds = 7")
  line = refusal("quickstart", "--config", str(tmp_path / "own.toml"))
  assert line == f"{tmp_path / 'own.toml'}: rouds: belongs to no option; nearest is rounds"
  assert refusal("quickstart", "--config=nowhere.toml").startswith("nowhere.toml: No such file")


@pytest.mark.parametrize(
  ("name", "text", "reason"),
  [
    ("own.json", "[" * 100_000, "damaged (nested too deeply)"),
    ("own.json", '{"rounds": ' + "9" * 5000 + "}", "damaged (Exceeds the limit (4300 digits)"),
    ("own.toml", f"rounds = {2**64}", "damaged (a whole number of more than 64 bits)"),
    ("own.yaml", "rounds: " + "[" * 99 + "]" * 99, "damaged (nested too deeply)"),
    ("own.yaml", "rounds: .inf", "damaged (a number that is not finite)"),
    ("own.yaml", "rounds: 2026-01-01", "damaged (a date)"),
    ("own.yaml", "a: &a [1, 2]\nb: [*a, *a]", "damaged (a reference)"),
    ("own.yaml", "rounds: [", "damaged (while parsing"),
    ("own.yaml", "7: rounds", "7: belongs to no option"),
  ],
)
def test_a_file_of_options_that_cannot_be_used_is_refused(refusal, tmp_path, name, text, reason):
  (tmp_path / name).write_text(text)
  line = refusal("quickstart", "--config", str(tmp_path / name))
  assert line.startswith(f"{tmp_path / name}: {reason}")


# --- defaults that follow, options without effect, experiments of one's own


def test_what_follows_the_rounds_follows_them():
  options = settled(parsed("--rounds", "10"))
  assert (options.work.finetune_rounds, options.run.eval_every) == (2, 1)


@pytest.mark.parametrize(
  ("typed", "line"),
  [
    (("--alpha", "0.3"), "--alpha 0.3: has no effect with --partition by_class"),
    (("--trim", "0.3"), "--trim 0.3: has no effect with --aggregate None"),
    (("--corruption", "nan"), "--corruption nan: has no effect with --corrupt 0"),
    (("--join-timeout", "9"), "--join-timeout 9: has no effect with --coordinator None"),
    (
      ("--dataset", "own.npz", "--data-dir", "."),
      "--data-dir .: has no effect with --dataset own.npz",
    ),
  ],
)
def test_an_option_that_plays_no_part_is_refused(refusal, typed, line):
  assert refusal("quickstart", *typed) == line


@pytest.mark.parametrize("name", ["--clients", "--rounds", "--local-steps", "--batch-size"])
def test_a_number_beyond_all_counting_is_refused(refusal, name):
  line = refusal("quickstart", name, str(10**10))
  assert line == f"{name} {10**10}: allowed is a whole number of at most {2**31 - 1}"


def test_more_clients_than_rows_are_refused_before_they_are_dealt_any(refusal):
  line = refusal("quickstart", "--clients", str(10**8))
  assert re.match(rf"--clients {10**8}: allowed is at most \d+, so that each has 2 of", line)


def test_a_file_that_is_no_experiment_is_named_and_the_others_listed(tmp_path, monkeypatch, capsys):
  (tmp_path / "right.py").write_text('"""Right."""\nDEFAULTS = 1\n\n\ndef main(options): ...\n')
  (tmp_path / "wrong.py").write_text("def\n")
  (tmp_path / "bare.py").write_text('"""No options."""\n')
  monkeypatch.setattr(cli, "FOLDER", tmp_path)
  assert cli.main(["--help"]) == 0
  bare, right, wrong = capsys.readouterr().out.splitlines()[-3:]
  assert right.split(maxsplit=1) == ["right", "Right."]
  assert "bare.py: has no DEFAULTS and no main" in bare
  assert "wrong.py, line 1: " in wrong
  assert cli.main(["wrong"]) == 2


def test_what_is_far_from_every_experiment_is_offered_none(refusal):
  assert "nearest" not in refusal("../x")
