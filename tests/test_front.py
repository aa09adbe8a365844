"""What stands in the files at the front agrees with the package."""

import re
import tomllib
from pathlib import Path

import yaml

import qupeD_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_citation_is_of_this_version_and_of_the_paper_in_the_readme():
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
  assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
  assert cited["version"] == qupeD_jax.__version__
  assert (cited["title"], cited["license"]) == (PROJECT["name"], PROJECT["license"])
  paper = cited["preferred-citation"]
  assert paper["url"] in README
  assert all(author["family-names"] in README for author in paper["authors"])
  assert paper["title"] in " ".join(README.split())


def test_badges_are_true():
  badges = dict(re.findall(r"!\[(\w+): ([^]]+)\]\(https://img\.shields\.io/badge/", README))
  of_python = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
  assert badges == {
    "python": f"{of_python[0]} to {of_python[-1]}",
    "licence": PROJECT["license"],
    "paper": "arXiv 2107.13892",
  }
  assert PROJECT["requires-python"] == f">={of_python[0]}"


def test_the_changelog_begins_with_this_version():
  changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
  assert re.search(r"^## (\S+?),? ", changes, re.M)[1] == qupeD_jax.__version__


def test_commands_and_files_of_the_guide_are_there():
  guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
  makefile = (ROOT / "Makefile").read_text("utf-8")
  assert all(f"\n{target}:" in makefile for target in re.findall(r"make (\w+)", guide))
  named = re.findall(r"`((?:qupeD_jax|tests|experiments)/[\w/.]*)`|\]\(([\w/.]+)\)", guide)
  assert named
  assert all((ROOT / (code or link)).exists() for code, link in named)
