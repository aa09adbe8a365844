"""The documentation site builds without a warning and holds what it should."""

import doctest
import importlib
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers.python", "mkdocs_jupyter")


@pytest.fixture(scope="module", autouse=True)
def _installed():
  for name in NEEDED:
    pytest.importorskip(name, reason=f"{name} is not installed: make docs-tools")


@pytest.fixture(scope="module")
def site(tmp_path_factory, _installed):
  """Builds the site as `make docs` does, with warnings as errors; returns its folder."""
  from mkdocs.commands.build import build
  from mkdocs.config import load_config

  folder = tmp_path_factory.mktemp("site")
  config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
  config.plugins.on_startup(command="build", dirty=False)
  build(config)
  return folder


def test_every_experiment_and_every_module_has_a_page(site):
  experiments = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
  assert experiments == {path.stem for path in (site / "experiments").glob("*.html")} - {"index"}
  for name in ("quantization/ops", "federation/algorithm1", "data/index", "types"):
    assert (site / "api" / f"{name}.html").exists()


def test_links_of_the_readme_lead_to_pages_of_the_site(site):
  page = (site / "index.html").read_text("utf-8")
  assert 'href="extending.html"' in page
  for name in ("LICENSE.txt", "CITATION.cff.txt", "CONTRIBUTING.html"):
    assert f'href="{name}"' in page
    assert (site / name).exists()


def test_every_link_leads_to_a_file(site):
  """Those of notebooks and docstrings, too, at which MkDocs does not look."""
  broken = {
    (page.relative_to(site).as_posix(), link)
    for page in site.rglob("*.html")
    if page.name != "404.html"  # served anywhere, so that its links begin at the root
    for link in re.findall(r'(?:href|src)="([^":#?]+)["#?]', page.read_text("utf-8"))
    if not (page.parent / unquote(link)).exists()
  }
  assert broken == set()


def test_tables_of_results_are_on_the_experiments_page(site):
  page = (site / "experiments/cifar10_mixed_bits.html").read_text("utf-8")
  assert "<td>QuPeD within groups</td>" in page
  assert 'href="../reproduction.html#cifar-10-clients-of-1-2-and-32-bits"' in page


def test_equations_stand_in_their_lines_and_fields_say_what_they_are(site):
  aggregators = (site / "api/federation/aggregators.html").read_text("utf-8")
  shown = re.sub(r"<[^>]+>", "", aggregators)
  assert "\n(key, uploads, cohorts, before) -&gt; (variables, kept)\n" in f"\n{shown}"
  assert "<p>eta_1, of x</p>" in (site / "api/federation/algorithm1.html").read_text("utf-8")


def test_no_script_or_style_is_fetched_from_elsewhere(site):
  pages = {path: path.read_text("utf-8") for path in site.rglob("*.html")}
  fetched = r'<(script|link rel="stylesheet")[^>]* (src|href)="https?:'
  assert [path.name for path, page in pages.items() if re.search(fetched, page)] == []


@pytest.mark.parametrize("name", ["pages", "docstrings"])
def test_examples_of_what_makes_the_pages(name, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "docs/site"))
  monkeypatch.delitem(sys.modules, name, raising=False)
  result = doctest.testmod(importlib.import_module(name))
  assert result.attempted
  assert not result.failed
