"""The results folder: what is written, what survives a crash, and the numbers of the summary."""

import dataclasses
import errno
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st

from qupeD_jax import metrics
from qupeD_jax.checks import BadInput

COSTS = {"bytes_per_model": 81, "bytes_per_round": 20_000, "flops_per_example": 10, "seconds": 2.5}


def strict(text):
  """Parses JSON and refuses NaN and infinities."""

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  return json.loads(text, parse_constant=refuse)


def row(number, accuracy=None, **more):
  return {"method": "local", "seed": 0, "round": number, "accuracy": accuracy, **more}


class Options(NamedTuple):
  rate: float
  folder: Path


@dataclasses.dataclass(frozen=True)
class Config:
  options: Options
  bits: tuple[int, ...]


def test_config_holds_options_and_environment(tmp_path):
  config = Config(Options(rate=math.inf, folder=Path("data")), bits=(1, 32))
  folder = metrics.open_results(tmp_path / "a" / "b", config)
  written = strict((folder / "config.json").read_text())
  assert written["config"] == {"options": {"rate": None, "folder": "data"}, "bits": [1, 32]}
  names = "qupeD_jax jax jaxlib flax optax numpy python platform backend device devices"
  assert written["environment"].keys() == set(names.split())
  assert all(written["environment"].values())


def test_a_value_without_a_place_in_json_is_an_error(tmp_path):
  with pytest.raises(TypeError, match="no place"):
    metrics.open_results(tmp_path, {"loss": object()})


def test_rows_come_back_in_order_and_strict(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.append_metrics(folder, [row(1, loss=jnp.float32(0.5)), row(2, loss=np.float64("nan"))])
  metrics.append_metrics(folder, [row(np.int32(3), accuracy=jnp.array([0.5, jnp.inf]))])
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  assert [strict(line)["round"] for line in lines] == [1, 2, 3]
  rows = metrics.read_metrics(folder)
  assert rows == [row(1, loss=0.5), row(2, loss=None), row(3, accuracy=[0.5, None])]


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=8,
)


@settings(deadline=None, max_examples=50)  # the disk sets the pace
@given(JSON)
def test_any_row_is_one_strict_line(tmp_path_factory, value):
  folder = metrics.open_results(tmp_path_factory.mktemp("results"), {})
  metrics.append_metrics(folder, [row(1, value=value), row(2)])
  text = (folder / "metrics.jsonl").read_text()
  assert len(text.splitlines()) == 2
  first, second = metrics.read_metrics(folder)
  assert first == strict(text.splitlines()[0])
  assert second == row(2)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300))
def test_a_crash_anywhere_leaves_every_complete_line(tmp_path_factory, cut):
  folder = metrics.open_results(tmp_path_factory.mktemp("results"), {})
  rows = [row(number, accuracy=0.5, note="Grüße") for number in range(3)]
  metrics.append_metrics(folder, rows)
  file = folder / "metrics.jsonl"
  torn = file.read_bytes()[:cut]
  file.write_bytes(torn)
  complete = rows[: torn.count(b"\n")]
  assert metrics.read_metrics(folder) == complete
  metrics.open_results(folder, {}, resume=True)
  metrics.append_metrics(folder, [row(9)])
  assert metrics.read_metrics(folder) == [*complete, row(9)]


def test_a_run_that_is_not_resumed_starts_anew(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.append_metrics(folder, [row(1)])
  assert metrics.read_metrics(metrics.open_results(tmp_path, {}, resume=True)) == [row(1)]
  assert metrics.read_metrics(metrics.open_results(tmp_path, {})) == []


def test_a_row_measured_again_replaces_the_first(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.append_metrics(folder, [row(1, 0.1), row(2, 0.2), row(2, 0.3), row(3, 0.4)])
  assert metrics.read_metrics(folder) == [row(1, 0.1), row(2, 0.3), row(3, 0.4)]


@pytest.mark.parametrize("line", ["{", "3", ""])
def test_a_damaged_line_before_the_last_is_refused(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n{json.dumps(row(2))}\n")
  with pytest.raises(BadInput, match=r"metrics\.jsonl, line 2: damaged"):
    metrics.read_metrics(tmp_path)


def test_summary_against_numbers_by_hand():
  personal = np.full((2, 20), 0.5)
  personal[0, 3:5] = 0.1, 0.3  # seed means .47 and .5, worst two clients .2 and .5
  entry = metrics.summarise(personal, unquantised=personal + 0.1, bits=2, **COSTS)
  accuracy = entry.pop("accuracy")
  assert accuracy["per_seed"] == pytest.approx([0.47, 0.5])
  assert accuracy["mean"] == pytest.approx(0.485)
  assert accuracy["std"] == pytest.approx(0.03 / math.sqrt(2))
  assert accuracy["worst_decile"] == pytest.approx(0.35)
  assert entry.pop("unquantised_accuracy") == pytest.approx(0.585)
  assert entry == {"global_accuracy": None, "bits": 2, **COSTS}


def test_summary_of_one_seed_and_few_clients():
  entry = metrics.summarise([[0.9, 0.4, 0.5]], global_model=[[0.1, 0.2, 0.3]], bits=32, **COSTS)
  assert entry["accuracy"]["std"] == 0.0
  assert entry["accuracy"]["worst_decile"] == pytest.approx(0.4)
  assert entry["global_accuracy"] == pytest.approx(0.2)


def test_clients_without_test_examples_are_left_out():
  with_gaps = [[0.2, np.nan, 0.4], [np.nan, np.nan, 0.9]]
  entry = metrics.summarise(with_gaps, bits=2, **COSTS)
  assert entry["accuracy"]["per_seed"] == pytest.approx([0.3, 0.9])
  assert entry["accuracy"]["worst_decile"] == pytest.approx((0.2 + 0.9) / 2)


@pytest.mark.parametrize("bad", [[0.5], np.zeros((0, 3)), np.zeros((2, 0)), [[np.nan], [0.1]]])
def test_accuracies_that_cannot_be_summed_up_are_refused(bad):
  with pytest.raises(BadInput, match="per-client accuracies"):
    metrics.summarise(bad, bits=2, **COSTS)


def summary():
  quped = metrics.summarise([[0.871, 0.871], [0.879, 0.879]], bits=[1, 2], **COSTS)
  local = metrics.summarise([[0.5]], global_model=[[0.25]], bits=32, **COSTS)
  return {"QuPeD [a|b]": quped, "local": local}


def test_summary_is_read_as_it_was_written(tmp_path):
  folder = metrics.open_results(tmp_path, {})
  metrics.write_summary(folder, summary())
  assert strict((folder / "summary.json").read_text()) == {"methods": summary()}
  assert metrics.read_summary(folder) == summary()
  assert not list(tmp_path.glob("*.partial"))


def test_markdown_table(tmp_path):
  metrics.write_summary(tmp_path, summary())
  head, rule, quped, local = (tmp_path / "table.md").read_text().splitlines()
  assert [cell.strip() for cell in head.strip("|").split("|")][:3] == [
    "Method",
    "Accuracy (%)",
    "Worst decile (%)",
  ]
  assert len({len(line) for line in (head, rule, quped, local)}) == 1
  assert quped.split(" | ")[0].strip("| ") == r"QuPeD [a\|b]"
  cells = [cell.strip("| ") for cell in quped.split(" | ")[1:]]
  assert cells == ["87.5 ± 0.6", "87.5", "-", "1, 2", "81 B", "20.0 kB", "2.5"]
  assert "50.0 ± 0.0" in local
  assert " 25.0 " in local


def test_printed_table_says_the_same_and_reads_no_markup():
  out = io.StringIO()
  metrics.print_table(summary(), rich.console.Console(file=out, width=80))
  text = out.getvalue()
  for cell in ("QuPeD [a|b]", "87.5 ± 0.6", "1, 2", "81 B", "20.0 kB", "decile"):
    assert cell in text


@pytest.mark.parametrize("text", ["", "[]", '{"methods"', "{}"])
def test_a_file_that_is_no_summary_is_refused(tmp_path, text):
  (tmp_path / "summary.json").write_text(text)
  with pytest.raises(BadInput, match=r"summary\.json"):
    metrics.read_summary(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(BadInput, match=r"metrics\.jsonl: No such file"):
    metrics.read_metrics(tmp_path)
  with pytest.raises(BadInput, match=r"summary\.json: No such file"):
    metrics.read_summary(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(BadInput, match=r"file/results: Not a directory"):
    metrics.open_results(tmp_path / "file" / "results", {})


def test_a_full_disk_keeps_the_old_summary_and_leaves_no_debris(tmp_path, monkeypatch):
  folder = metrics.open_results(tmp_path, {})
  metrics.write_summary(folder, summary())
  before = (folder / "summary.json").read_text()

  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(metrics.os, "fsync", full)
  with pytest.raises(BadInput, match=r"^[^\n]*: No space left on device$"):
    metrics.write_summary(folder, {})
  with pytest.raises(BadInput, match=r"metrics\.jsonl: No space left on device$"):
    metrics.append_metrics(folder, [row(1)])
  assert (folder / "summary.json").read_text() == before
  assert not list(tmp_path.glob("*.partial"))
