"""The benchmark: contenders compute the same step, and what is written can be read. No times."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest

from benchmarks import clients, jax_forms, profile, steps, torch_forms, workload
from qupeD_jax import command_line
from qupeD_jax.io import files

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # sums in float32, in another order
MLP = workload.Case("mlp", "float32", 3, 4, 2)
CNN = workload.Case("cnn3", "float32", 2, 2, 1)


@pytest.fixture(autouse=True)
def _large_steps(monkeypatch):
  """Lets weights move by far more than rounding, the global model's of QuPeD included."""
  for module in (workload, torch_forms):
    monkeypatch.setattr(module, "RATE", 0.3)


def after_a_round(form):
  return form.weights(form.run(form.start(), 1))


def assert_close(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), ours, theirs)


@functools.cache
def ours(case, method):
  """Task, and its weights after a round of ours."""
  task = workload.make_task(case, method, *workload.federation(case))
  return task, after_a_round(jax_forms.vmapped(task))


@pytest.mark.parametrize("method", workload.METHODS)
@pytest.mark.parametrize("make", [jax_forms.mapped, jax_forms.looped])
def test_contenders_agree_on_all_weights_after_a_round(method, make):
  task, after = ours(MLP, method)
  assert_close(after, after_a_round(make(task)))


def test_clients_on_several_devices_or_in_turns_agree_too():
  task, after = ours(MLP, "quped")
  for parts in ({"spread": True}, {"clients_per_step": 2}):
    assert_close(after, after_a_round(jax_forms.vmapped(task, **parts)))


@pytest.mark.parametrize("make", [jax_forms.vmapped, jax_forms.mapped, jax_forms.looped])
def test_a_contender_starts_anew_with_a_single_client_too(make):
  task, after = ours(MLP._replace(clients=1), "quped")
  form = make(task)
  for _ in range(2):
    assert_close(after, after_a_round(form))


@pytest.mark.parametrize("make", [jax_forms.vmapped, jax_forms.mapped])
def test_forms_of_the_convolution_agree_on_all_weights_after_a_round(make):
  task, after = ours(CNN, "fedavg")
  assert_close(after, after_a_round(make(task, "lax")))


@pytest.mark.parametrize("method", workload.METHODS)
def test_a_round_moves_every_tensor_by_more_than_rounding(method):
  task, (server, _) = ours(MLP, method)
  moved = jax.tree.map(lambda a, b: abs(a - b).max(), server, task.state.server["params"])
  assert min(jax.tree.leaves(moved)) > 10 * ROUNDING["atol"]


@pytest.mark.skipif(not torch_forms.is_installed(), reason="PyTorch is not installed")
@pytest.mark.parametrize("make", [torch_forms.looped, torch_forms.vmapped])
@pytest.mark.parametrize("case", [MLP, CNN, CNN._replace(model="resnet8")], ids=lambda c: c.model)
def test_pytorch_agrees_on_the_weights_after_a_round(case, make):
  task, after = ours(case, "fedavg")
  assert_close(after, after_a_round(make(task)))


# --- measuring and reporting


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Runs the command line on a tiny case; returns what it wrote."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(steps._MATRIX, "cpu", 64)
    folder = tmp_path_factory.mktemp("results")
    typed = "--models mlp --clients 2 --batch-size 4 --local-steps 1 --repeats 3 --forms ours lax"
    assert steps.main([*typed.split(), "--out", str(folder)]) == 0
  return folder / "cpu.json"


def test_the_results_are_json_with_a_row_per_contender(written):
  result = files.read(written)
  assert set(result) == {"machine", "options", "peak", "rows", "ratios", "peak_bytes"}
  assert set(result["machine"]) >= {"backend", "device", "cores", "jax", "torch"}
  assert set(result["peak"]) == {"float32", "bfloat16"}
  assert all(set(row) == set(steps.Row._fields) for row in result["rows"])
  timed = [row for row in result["rows"] if row["skipped"] is None]
  assert [(row["method"], row["form"]) for row in timed] == [
    (method, steps.OURS) for method in workload.METHODS
  ]
  for row in timed:
    assert row["turns"] == 3
    assert row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
    assert 0.5 < row["xla_flops"] / row["flops"] < 2
    assert row["bytes_per_client"] > 0
  assert [ratio["method"] for ratio in result["ratios"]] == ["quped", "simultaneous"]


def test_the_table_has_every_timed_contender_and_says_what_is_left_out(written):
  text = written.with_suffix(".md").read_text("utf-8")
  cells = [[c.strip() for c in line.split("|")] for line in text.splitlines()]
  shown = [(c[2], c[3]) for c in cells if len(c) == len(steps._COLUMNS) + 2][2:]
  assert shown == [(method, steps.OURS) for method in steps._METHODS.values()]
  assert "- FedAvg, vmap of lax.conv, mlp: without a convolution it is ours." in text


def test_quick_is_read_and_has_few_cases():
  options = command_line.parse(steps.Options, ["--quick"], prog="")
  assert options.quick
  quick, full = (list(steps.cases(o)) for o in (options, steps.Options()))
  assert 0 < len(quick) < len(full)


@pytest.mark.parametrize(
  "typed", ["--clients 0", "--batch-size -1", "--models cnn9", "--no-such 1", "--seconds nan"]
)
def test_bad_input_is_refused_in_one_line(typed, capfd):
  assert steps.main(typed.split()) == 2
  printed, line = capfd.readouterr()
  assert printed == ""
  assert re.fullmatch(r"error: .+\n", line)


def test_without_pytorch_its_rows_are_left_out(monkeypatch):
  monkeypatch.setattr(torch_forms, "torch", None)
  for form in (steps.TORCH_LOOP, steps.TORCH_VMAP):
    assert steps.unavailable(MLP, "fedavg", form, slow=False) == "PyTorch is not installed"


def test_flops_are_counted_by_formula():
  one = 2 * (64 * 64 + 64 * 64 + 64 * 10)  # multiply-adds of the MLP's forward pass
  assert workload.step_flops(MLP, "fedavg") == 3 * 3 * 4 * one
  assert workload.step_flops(MLP, "quped") == 14 * 3 * 4 * one
  assert workload.step_flops(MLP, "simultaneous") == 9 * 3 * 4 * one


def test_many_clients_are_timed_wherever_they_lie(tmp_path, capsys):
  given = ["--clients", "6", "--participation", "0.5", "--method", "fedavg", "--local-steps", "1"]
  given += ["--every", "2", "--repeats", "1", "--grown", "6", "12", "--out", str(tmp_path)]
  assert clients.main(given) == 0
  result = files.read(next(tmp_path.glob("*-clients.json")))
  assert [row["form"] for row in result["rows"]] == [clients.RESIDENT, clients.HOST, clients.DISK]
  few, more = result["memory"]
  assert few["streamed"] == more["streamed"]
  assert few["resident"] < more["resident"]
  assert "on the disk" in capsys.readouterr().out
  assert clients.main(["--clints", "6"]) == 2
  line = "error: --clints: belongs to no option; nearest is --clients"
  assert capsys.readouterr().err == f"{line}\n"
  assert clients.main(["--participation", "0"]) == 2
  assert "--participation 0.0: allowed is above 0" in capsys.readouterr().err


# --- the profile


def test_a_profile_tells_the_kernels_of_a_step_and_what_they_are_of():
  found = profile.profile(MLP, "fedavg", rounds=3)
  assert all(row.ms > 0 and row.calls > 0 for row in found.rows)
  assert found.rows == sorted(found.rows, key=lambda row: -row.ms)
  products = [row for row in found.rows if re.search(r"\bdot(_general)?$", row.operation)]
  assert any(row.calls == 1 and re.fullmatch(r"f32\[[\d,]+\]", row.shape) for row in products)


def test_kernels_are_added_up_per_step_and_loops_left_out():
  text = """
%inside (a: f32[2]) -> f32[2] {
  ROOT %dot.3 = f32[2]{0} dot(%a, %a), metadata={op_name="jit(f)/y"}
}

ENTRY %main (t: s32[]) -> f32[2] {
  %named.4 = f32[2]{0} fusion(%a), kind=kLoop, calls=%inside
  ROOT %while.1 = (s32[], f32[2]{0}) while(%t), condition=%c, body=%b
  %fused.2 = (f32[2]{0}, /*index=1*/pred[2]{0}) fusion(%a), metadata={op_name="jit(f)/while/body/x"}
"""
  ran = [("while.1", "while.1", 9.0), ("fused_2", "fused.2", 1.0), ("fused_2", "fused.2", 2.0)]
  ran += [("Memset", "", 0.5), ("named_4", "named.4", 0.25)]
  rows = profile.by_kernel(itertools.starmap(profile.Event, ran), profile.instructions(text), 2)
  assert rows == [
    profile.Row("fused_2", 1500.0, 1.0, "(f32[2], pred[2])", "x"),
    profile.Row("Memset", 250.0, 0.5, "", ""),
    profile.Row("named_4", 125.0, 0.5, "f32[2]", "y"),
  ]
  table = profile.report(profile.Profile(2000.0, 1875.0, rows), top=1)
  assert "375.00 ms in those that are not listed" in table
  assert "Memset" not in table


def test_what_cannot_be_traced_is_refused(capsys):
  assert profile.main(["--rounds", "0"]) == 2
  assert "--rounds 0: allowed is" in capsys.readouterr().err
