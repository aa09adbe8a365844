"""The page of a results folder: complete, self-contained, escaped; and what it says of damage."""

import base64
import html.parser
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import quickstart
from qupeD_jax.checks import BadInput
from qupeD_jax.results import markup, metrics, page, plots, tables
from qupeD_jax.study import report

NAMES = ("local", "local 2 bit", "QuPeD 2 bit", "QuPeD <i>x</i> & a_b$")
VOID = {"meta", "img", "br", "hr", "link", "input"}
PNG = base64.b64decode(
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Reader(html.parser.HTMLParser):
  """Collects text, attributes and cells, and holds that tags are balanced."""

  def __init__(self, text):
    super().__init__()
    self.open, self.attributes, self.rows, self.headings, self.text = [], [], [], [], ""
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]
    if tag not in VOID:
      self.open.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    if tag in ("h1", "h2", "h3"):
      self.headings.append("")

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" in self.open:
      return
    self.text += data
    if {"td", "th"} & set(self.open):
      self.rows[-1][-1] += data
    if {"h1", "h2", "h3"} & set(self.open):
      self.headings[-1] += data


def results(folder):
  """Writes a small results folder with everything in it."""
  config = {"experiment": "tiny <&> test", "seed_list": [3, 4], "bits": (1, 2), "out": None}
  folder = metrics.open_results(folder, config)
  rng = np.random.default_rng(0)
  known = {n: {"seeds": [3, 4], "accuracy": 0.5 + 0.1 * k + 0.05 * rng.random((2, 5))}
           for k, n in enumerate(NAMES)}  # fmt: skip
  costs = {"bytes_per_round": 5_000, "flops_per_example": 10, "seconds": 12.5}
  methods = {
    n: metrics.summarise(entry["accuracy"], bits=2, bytes_per_model=1000 + 100 * k, **costs)
    for k, (n, entry) in enumerate(known.items())
  }
  rows = [
    {"method": n, "seed": seed, "round": r, "loss": 1 / r, "accuracy": 0.1 * r}
    for n in NAMES for seed in (3, 4) for r in (1, 2, 3)
  ]  # fmt: skip
  metrics.append_metrics(folder, rows)
  metrics.write_summary(folder, methods)
  metrics.write_accuracies(folder, known)
  metrics.write_comparisons(folder, {"QuPeD 2 bit": ["local", NAMES[3]]})
  (folder / "clients.png").write_bytes(PNG)
  (folder / "curves.png").write_bytes(PNG)
  (folder / "extra_<b>.png").write_bytes(PNG)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = results(tmp_path_factory.mktemp("results") / "tiny")
  assert page.main([str(folder)]) == 0
  return folder


@pytest.fixture(scope="module")
def read(folder):
  return Reader((folder / "report.html").read_text("utf-8"))


def test_three_files_are_written_and_nothing_else(tmp_path, capsys):
  folder = results(tmp_path / "tiny")
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert page.main([str(folder)]) == 0
  after = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert after.keys() - before.keys() == {"report.html", "table.tex", "costs.tex"}
  assert {name: after[name] for name in before} == before
  out = [f"{folder}/{name}" for name in ("report.html", "table.tex", "costs.tex")]
  assert capsys.readouterr().out.splitlines() == out
  assert page.main([str(folder)]) == 0
  assert (folder / "report.html").read_bytes() == after["report.html"]


def test_the_page_stands_alone(folder, read):
  links = [value for _, name, value in read.attributes if name in ("src", "href", "srcset")]
  assert links
  assert all(re.match(r"data:image/(png|svg\+xml);base64,", link) for link in links)
  text = (folder / "report.html").read_text("utf-8")
  assert not re.search(r"<script|<link|@import|url\(|https?:", text)
  assert "prefers-color-scheme: dark" in text
  assert "@media print" in text


def test_the_page_has_all_parts_in_order(read):
  assert read.headings == [
    "tiny <&> test", "Results", "Comparisons", "Learning curves", "Gains over local training",
    "Accuracy and size", "Who holds what: examples of each class at every client", "Extra <b>",
    "Columns", "Options", "Versions and device",
  ]  # fmt: skip


def test_every_number_of_the_table_is_on_the_page(folder, read):
  for line in (folder / "table.md").read_text("utf-8").splitlines():
    cells = [cell.strip() for cell in line.strip("| \n").split(" | ")]
    assert cells in read.rows or set(line) <= set("|-: ")
  assert read.rows[0][:3] == ["Method", "Accuracy (%)", "Worst decile (%)"]


def test_the_comparisons_are_on_the_page(folder, read):
  (rivals,) = metrics.read_comparisons(folder)[0].values()
  local = rivals["local"]
  interval = f"[{100 * local.low:+.1f}, {100 * local.high:+.1f}]"
  assert ["local", f"{100 * local.difference:+.1f}", interval, "win"] in read.rows
  assert [row[3] for row in read.rows if row[:1] == [NAMES[3]] and len(row) == 4] == ["loss"]


def test_the_best_stand_in_bold(folder):
  text = (folder / "report.html").read_text("utf-8")
  bold = re.findall(r"<b>(.*?)</b>", text)
  best = metrics.read_summary(folder)[NAMES[3]]["accuracy"]
  assert len(bold) == 2  # no method has a global model
  assert bold[0].startswith(f"{100 * best['mean']:.1f} ± ")
  assert bold[1] == f"{100 * best['worst_decile']:.1f}"


def test_one_line_tells_what_ran(folder, read):
  environment = metrics.read_config(folder)["environment"]
  line = next(line for line in read.text.splitlines() if "seeds 3, 4" in line)
  for fact in (environment["device"], f"jax {environment['jax']}", "UTC"):
    assert fact in line


def test_the_config_and_the_meaning_of_columns_are_listed_unfolded(folder, read):
  for line in ("bits[1, 2]", "outnull", "experimenttiny <&> test"):
    assert line in read.text.splitlines()
  assert all(f"{name}{tables.MEANINGS[name]}" in read.text for name in tables.COLUMNS[1:])
  assert tables.NEW not in read.text
  assert tables.MEANINGS.keys() == {*tables.COLUMNS[1:], tables.NEW}
  assert "<details" not in (folder / "report.html").read_text("utf-8")


def test_names_are_escaped(folder):
  text = (folder / "report.html").read_text("utf-8")
  assert "<i>" not in text
  assert "QuPeD &lt;i&gt;x&lt;/i&gt; &amp; a_b$" in text
  latex = (folder / "table.tex").read_text("utf-8")
  assert r"QuPeD \textless{}i\textgreater{}x\textless{}/i\textgreater{} \& a\_b\$ &" in latex
  assert latex.startswith(f"% Made from {folder}/summary.json")


def test_pictures_are_whole(read):
  sources = [value for tag, name, value in read.attributes if (tag, name) == ("img", "src")]
  decoded = [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]
  assert [data[:5] for data in decoded] == [b"<?xml"] * 3 + [PNG[:5]] * 2
  assert all(data.rstrip().endswith(b"</svg>") for data in decoded[:3])
  assert decoded[3:] == [PNG, PNG]
  alternatives = [value for tag, name, value in read.attributes if name == "alt"]
  assert all(alternatives)
  assert len(alternatives) == 5


@pytest.mark.parametrize(
  ("missing", "note"),
  [
    ("metrics.jsonl", "No metrics.jsonl"),
    ("accuracies.json", "No accuracies.json"),
    ("comparison.json", "No comparison.json"),
    ("clients.png", None),
  ],
)
def test_what_is_missing_is_noted(tmp_path, missing, note):
  folder = results(tmp_path)
  (folder / missing).unlink()
  (folder / "curves.png").unlink()
  page.write_page(folder)
  read = Reader((folder / "report.html").read_text("utf-8"))
  assert note is None or note in read.text
  assert any(row[:1] == ["local"] for row in read.rows)


def test_without_rows_the_folders_own_curves_are_shown(tmp_path):
  folder = results(tmp_path)
  (folder / "metrics.jsonl").write_text("")
  page.write_page(folder)
  read = Reader((folder / "report.html").read_text("utf-8"))
  assert read.headings.count("Learning curves") == 1
  assert "there are no learning curves" not in read.text
  (folder / "curves.png").unlink()
  page.write_page(folder)
  assert "No metrics.jsonl with accuracies" in (folder / "report.html").read_text("utf-8")


def test_a_summary_alone_and_no_numbers_still_make_a_page(tmp_path):
  metrics.open_results(tmp_path, {})
  costs = {"bytes_per_model": None, "bytes_per_round": np.nan, "seconds": None}
  entry = metrics.summarise([[0.5]], bits=2, flops_per_example=1, **costs)
  metrics.write_summary(tmp_path, {"only": entry})
  page.write_page(tmp_path)
  read = Reader((tmp_path / "report.html").read_text("utf-8"))
  assert ["only", "50.0", "50.0", "-", "2", "-", "-", "-"] in read.rows
  assert "nothing can be drawn" in read.text
  assert read.headings[0] == tmp_path.name


@pytest.mark.parametrize(
  ("file", "content"),
  [
    ("summary.json", "{"),
    ("summary.json", '{"methods": {"a": {}}}'),
    ("config.json", None),
    ("config.json", "[]"),
    ("config.json", '{"config": {}}'),
    ("config.json", '{"config": {}, "environment": {}, "methods": 3}'),
    ("metrics.jsonl", "{\n"),
    ("metrics.jsonl", '{"accuracy": 1}\n'),
    ("accuracies.json", "{}"),
    ("comparison.json", "{}"),
  ],
)
def test_damage_is_one_line_and_code_2_and_leaves_no_page(tmp_path, capsys, file, content):
  folder = results(tmp_path / "tiny")
  if content is None:
    (folder / file).unlink()
  else:
    (folder / file).write_text(content)
  assert page.main([str(folder)]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert file in line or "learning curves: a row lacks" in line
  assert not (folder / "report.html").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], ["--help"]])
def test_wrong_arguments_are_one_line_and_code_2(capsys, arguments):
  assert page.main(arguments) == 2
  assert capsys.readouterr().err.startswith("error: usage: quped report FOLDER")


def test_a_missing_folder_is_one_line_and_code_2(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "qupeD_jax", "report", str(tmp_path / "none")],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: {tmp_path}/none: no such results folder\n"


def test_a_page_that_cannot_be_written_is_named(tmp_path):
  folder = results(tmp_path)
  (folder / "report.html").mkdir()
  with pytest.raises(BadInput, match=r"report\.html"):
    page.write_page(folder)


def test_families_are_what_precedes_the_precision():
  entry = {"accuracy": {"mean": 0.5, "std": 0.1}, "bytes_per_model": 10}
  names = ["QuPeD 2 bit", "QuPeD mixed", "QuPeD", "FedAvg", "Ditto 4 bit"]
  points = [page.point(name, entry, names)[:2] for name in names]
  assert points == [
    ("QuPeD", "2 bit"), ("QuPeD", "mixed"), ("QuPeD", "32 bit"), ("FedAvg", "FedAvg"),
    ("Ditto 4 bit", "Ditto 4 bit"),
  ]  # fmt: skip
  assert page.point("FedAvg", entry, names)[2:] == (10, 0.5, 0.1)


def test_the_gradient_mapping_is_drawn_where_it_was_measured(tmp_path):
  folder = results(tmp_path)
  row = {"method": NAMES[0], "seed": 3, "round": 4, "loss": 1.0, "gradient_mapping": 0.5}
  metrics.append_metrics(folder, [row])
  for name in ("stationarity.png", "centers.png"):
    (folder / name).write_bytes(PNG)
  page.write_page(folder)
  shown = Reader((folder / "report.html").read_text("utf-8"))
  assert shown.headings[4] == "Stationarity"
  assert shown.headings.count("Stationarity") == 1
  assert "Centers over the rounds, tensor by tensor" in shown.headings


def test_several_results_are_parts_of_one_page(tmp_path):
  for name in ("3_classes", "4_classes"):
    results(tmp_path / name)
  (tmp_path / "tried").mkdir()
  (tmp_path / "tried" / "tuning.md").write_text("| A | B |\n| --- | --: |\n| x\\|y | 1 |\n")
  (tmp_path / "neither").mkdir()
  written = page.write_page(tmp_path, tmp_path / "out")
  names = [
    "3_classes/table.tex",
    "3_classes/costs.tex",
    "4_classes/table.tex",
    "4_classes/costs.tex",
  ]
  assert written == [tmp_path / "out" / name for name in ["report.html", *names]]
  read = Reader(written[0].read_text("utf-8"))
  parts = ["3_classes", "4_classes", "tried"]
  assert [name for name in read.headings if name in parts] == parts
  assert ["x|y", "1"] in read.rows
  links = [value.removeprefix("#") for _, name, value in read.attributes if name == "href"]
  assert links == [value for _, name, value in read.attributes if name == "id"]
  assert len(set(links)) == 3
  assert read.headings.count("Options") == 1  # what all share is told once


def test_a_study_that_was_cut_off_is_marked_and_has_no_best(tmp_path):
  folder = results(tmp_path / "tiny")
  metrics.open_results(folder, {}, [*NAMES, "to come"], resume=True)
  (folder / metrics.UNFINISHED).mkdir()
  page.write_page(folder)
  text = (folder / "report.html").read_text("utf-8")
  assert "Unfinished: 4 of 5 methods trained" in text
  assert "<b>" not in text
  latex = (folder / "table.tex").read_text("utf-8")
  assert latex.startswith("% Unfinished. ")
  assert "textbf{" not in latex
  (folder / "summary.json").unlink()
  page.write_page(folder)
  read = Reader((folder / "report.html").read_text("utf-8"))
  assert "Unfinished: 0 of 5 methods trained" in read.text
  assert read.headings[1] == "Learning curves"


def test_folders_without_results_are_refused(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(BadInput, match=r"holds no results: no config\.json, nor a folder with one"):
    page.write_page(tmp_path)


def test_the_page_says_what_the_experiment_is(tmp_path):
  folder = results(tmp_path)
  metrics.open_results(folder, {"experiment": "quickstart", "dataset": "digits"}, resume=True)
  assert report.main([str(folder)]) == 0
  read = Reader((folder / "report.html").read_text("utf-8"))
  assert quickstart.__doc__.partition("\n")[0] in read.text
  assert "digits" in read.text.splitlines()
  assert [report.about(name) for name in ("../setup", "recipes/groups", "none")] == [""] * 3


def test_pictures_keep_their_size_where_a_narrow_screen_scrolls_them(folder, read):
  wide = io.BytesIO()
  Figure(figsize=(4, 1)).savefig(wide, format="png", dpi=plots.DPI)
  assert f'width="{4 * 96}"' in markup.png(wide.getvalue(), "")
  narrow = (folder / "report.html").read_text("utf-8").partition("@media screen and (max-width")[2]
  assert re.search(r"img {[^}]*max-width: none", narrow)
  scrolled = [value for tag, name, value in read.attributes if (name, value) == ("class", "wide")]
  assert len(scrolled) == len(
    re.findall("<table|<img", (folder / "report.html").read_text("utf-8"))
  )
