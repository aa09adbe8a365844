"""Tables: the same numbers on the terminal, in Markdown and in LaTeX."""

import io
import re
import shutil
import subprocess

import pytest
import rich.console

from qupeD_jax.results import metrics, tables
from qupeD_jax.results.statistics import Comparison

NAME = r"\a{b}_c^d~e#f$g%h&i<j>k|l[*"  # all that TeX would take for a command
COSTS = {"bytes_per_model": 81, "bytes_per_round": 20_000, "flops_per_example": 10, "seconds": 2.5}


def summary():
  quped = metrics.summarise([[0.871, 0.871], [0.879, 0.879]], bits=[1, 2], **COSTS)
  local = metrics.summarise([[0.5]], global_model=[[0.25]], bits=32, **COSTS)
  return {"QuPeD [a|b]": quped, "local": local}


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
  assert [cell.strip() for cell in local.split("|")][2] == "50.0"  # one seed has no spread
  assert " 25.0 " in local


def test_printed_table_says_the_same_and_reads_no_markup():
  out = io.StringIO()
  tables.print_table(summary(), rich.console.Console(file=out, width=80))
  text = out.getvalue()
  for cell in ("QuPeD [a|b]", "87.5 ± 0.6", "1, 2", "81 B", "20.0 kB", "decile"):
    assert cell in text


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_column_is_cut_however_narrow_the_terminal(width):
  methods = {"method-of-a-long-name": summary()["QuPeD [a|b]"]}
  console = rich.console.Console(file=io.StringIO(), width=width)
  tables.print_table(methods, console)
  text = console.file.getvalue()
  assert all(len(line) <= width for line in text.splitlines())
  assert len(re.findall("^Method", text, re.M)) == 1 or width < 80
  name, *cells = tables.cells(methods)[0]
  assert set(" ".join(cells).split()) <= set(text.split())
  assert name in "".join(line.split(" ")[0] for line in text.splitlines())


def test_a_terminal_without_the_sign_gets_another():
  out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  tables.print_table(summary(), rich.console.Console(file=out, width=80))
  out.seek(0)
  assert "87.5 +- 0.6" in out.read()


def test_the_best_accuracies_are_found_and_ties_share():
  methods = summary()
  assert tables.best_cells(methods) == {(0, 1), (0, 2), (1, 3)}
  methods["as good"] = methods["QuPeD [a|b]"]
  assert tables.best_cells(methods) == {(0, 1), (0, 2), (2, 1), (2, 2), (1, 3)}
  del methods["local"]
  assert tables.best_cells(methods) == {(0, 1), (0, 2), (1, 1), (1, 2)}  # none is global
  assert tables.best_cells({}) == set()


def tex_cells(line):
  """Returns the cells of a row of a LaTeX table."""
  assert line.endswith(r" \\")
  return re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))


def test_latex_tables_have_the_rules_of_booktabs_and_as_many_cells_in_each_row():
  comment, begin, top, head, unit, middle, *rows, bottom, end = tables.latex_accuracies(
    summary(), "results/a\nb/summary.json"
  ).splitlines()
  assert comment == r"% Made from results/a b/summary.json; needs \usepackage{booktabs,tabularx}"
  assert (begin, end) == (r"\begin{tabularx}{\linewidth}{@{}Xrrrr@{}}", r"\end{tabularx}")
  assert (top, middle, bottom) == (r"\toprule", r"\midrule", r"\bottomrule")
  assert [len(tex_cells(line)) for line in (head, unit, *rows)] == [5] * 4
  assert (tex_cells(head)[2], tex_cells(unit)[2]) == ("Worst", r"decile (\%)")
  quped, local = map(tex_cells, rows)
  assert quped == [
    r"QuPeD {[}a\textbar{}b]", r"\textbf{87.5 $\pm$ 0.6}", r"\textbf{87.5}", "-", "1, 2",
  ]  # fmt: skip
  assert local == ["local", "50.0", "50.0", r"\textbf{25.0}", "32"]
  costs = tables.latex_costs(summary(), "").splitlines()
  assert tex_cells(costs[6])[1:] == ["1, 2", "81 B", "20.0 kB", "2.5"]


def test_latex_escapes_all_that_tex_would_take_for_a_command():
  methods = {NAME: summary()["local"]}
  row = tables.latex_accuracies(methods, "").splitlines()[6]
  cell = tex_cells(row)[0]
  assert cell == (
    r"\textbackslash{}a\{b\}\_c\textasciicircum{}d\textasciitilde{}e\#f\$g\%h\&i"
    r"\textless{}j\textgreater{}k\textbar{}l{[}{*}"
  )


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs a TeX")
def test_latex_tables_fit_an_article(tmp_path):
  methods = {name: summary()["local"] for name in (NAME, "QuPeD 2 bit weighted_mean, 10 noise")}
  made = (tables.latex_accuracies(methods, "a"), tables.latex_costs(methods, "a"))
  body = "".join(f"\\noindent\n{table}\n" for table in made)
  packages = r"\documentclass{article}\usepackage{booktabs,tabularx}"
  source = f"{packages}\\begin{{document}}\n{body}\\end{{document}}"
  (tmp_path / "article.tex").write_text(source)
  command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "article.tex"]
  log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
  if "booktabs.sty' not found" in log:
    pytest.skip("needs booktabs")
  assert "Output written" in log
  assert "Overfull" not in log


def test_comparison_table_has_a_part_for_each_method_and_its_verdicts():
  better, worse = Comparison(0.0112, 0.003, 0.019, 1, None), Comparison(-0.2, -0.25, -0.1, -1, None)
  equal, barely = Comparison(-0.0001, -0.01, 0.01, 0, None), Comparison(0.02, 0.0002, 0.04, 1, None)
  lone = Comparison(0.02, None, None, 0, 0.0312)
  text = tables.comparison_table(
    {"A": {"B|": better, "C": equal, "D": barely, "E": lone}, "B|": {"A": worse}}, 0.9
  )
  first, second = text.split("\n\n")
  rows = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in first.split("\n")
  ]
  assert rows[0] == ["A against", "Points more", "90% interval", "Verdict"]
  assert rows[2:] == [
    [r"B\|", "+1.1", "[+0.3, +1.9]", "win"],
    ["C", "0.0", "[-1.0, +1.0]", "-"],
    ["D", "+2.0", "[+0.02, +4.0]", "win"],  # the digit that decides
    ["E", "+2.0", "one seed; clients ± 3.1", "-"],
  ]
  assert "[-25.0, -10.0] |    loss |" in second


def test_new_clients_have_a_column_where_there_are_any():
  entry = metrics.summarise([[0.5], [0.7]], bits=2, **COSTS)
  methods = {
    "FedAvg": entry | {"new_clients": metrics.new_clients([[0.5, 0.75], [0.5, 0.5]])},
    "local": entry | {"new_clients": metrics.new_clients(None)},
  }
  assert tables.columns(methods) == (*tables.COLUMNS, "New clients (%)")
  assert tables.columns({"local": entry}) == tables.COLUMNS
  assert [row[-1] for row in tables.cells(methods)] == ["56.2 ± 8.8", "-"]
  table = tables.latex_accuracies(methods, "summary.json").splitlines()
  head, unit, *_ = (line for line in table if "&" in line)
  assert (tex_cells(head)[4], tex_cells(unit)[4]) == ("New", r"clients (\%)")


@pytest.mark.parametrize("bits", [2, [1, 2, 4, 32]])
def test_cells_fit_their_columns(bits):
  entry = metrics.summarise([[0.5]], bits=bits, **COSTS)
  assert [len(row) for row in tables.cells({"a": entry})] == [len(tables.COLUMNS)]
