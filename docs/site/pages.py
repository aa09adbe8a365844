"""Makes the site's pages that are not in docs/: the README, the experiments, the docstrings' rooms.

MkDocs calls the functions whose names begin with on_; what is given to it anew lies nowhere but in
the site. In the site, files of the repository's root lie beside the pages of docs/.
"""

import ast
import json
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS, PACKAGE, RESULTS = ROOT / "docs", ROOT / "qupeD_jax", ROOT / "experiments/results"
_LINK = re.compile(r"""(?<=\]\()[^)\s]+|(?<=src=")[^"]+|(?<=href=")[^"]+""")
# What says at which scale a table was measured.
_SCALE = ("dataset", "clients", "classes_per_client", "models", "rounds", "seeds")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Orders the pages."""
  guides = sorted(path.name for path in DOCS.glob("*.md") if path.stem != "reproduction")
  notebooks = sorted(path.name for path in DOCS.glob("*.ipynb"))
  experiments = [{path.stem: f"experiments/{path.stem}.md"} for path in _experiments()]
  rooms = {
    room: [{path.stem: f"api/{_below_api(path)}"} for path in modules]
    for room, modules in _rooms().items()
  }
  config.nav = [
    {"Start": ["index.md", *notebooks, *(name for name in _front()[1:])]},
    {"Guides": guides},
    {"Experiments": ["experiments/index.md", "reproduction.md", *experiments]},
    {"API": ["api/index.md", *rooms.pop("", []), *({room: rooms[room]} for room in rooms)]},
  ]
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are made, the pictures, and the files of the repository that are linked."""
  pages = {placed(name): (ROOT / name).read_text("utf-8") for name in _front()}
  pages |= {f"experiments/{path.stem}.md": experiment(path) for path in _experiments()}
  pages |= {"experiments/index.md": all_experiments(), "api/index.md": front_door()}
  for modules in _rooms().values():
    pages |= {f"api/{_below_api(path)}": f"::: {_dotted(path)}\n" for path in modules}
  for name, content in pages.items():
    files.append(File.generated(config, name, content=content))
  shown = [*RESULTS.rglob("*.png"), *RESULTS.rglob("config.json")]
  for path in sorted(linked() | {path.relative_to(ROOT).as_posix() for path in shown}):
    if (ROOT / path).is_file() and files.get_file_from_path(placed(path)) is None:
      files.append(File.generated(config, placed(path), abs_src_path=str(ROOT / path)))
  return files


def linked() -> set[str]:
  """Returns the paths, in the repository, that pages in its root and in docs/ link to."""
  pages = [(ROOT / name, "") for name in _front()]
  pages += [(path, "docs") for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")]
  return {
    _target(link, folder)
    for path, folder in pages
    for link in _LINK.findall(path.read_text("utf-8"))
  }


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
  """Leads the links of the README and of docs/ to where their targets lie in the site."""
  name = page.file.src_uri
  if "/" in name or name.endswith(".ipynb"):
    return markdown
  folder = "docs" if (DOCS / name).exists() else ""
  return _LINK.sub(lambda link: moved(link.group(), folder), markdown)


def on_page_content(html: str, page: Page, files: Files, **kwargs: Any) -> str:
  """Leads the links of a notebook, which MkDocs leaves as they are, likewise."""

  def led(link: re.Match) -> str:
    file = files.get_file_from_path(moved(link.group(), "docs"))
    return file.url_relative_to(page.file) if file else link.group()

  is_notebook = page.file.src_uri.endswith(".ipynb")
  return re.sub(r'(?<=href=")[^"#:]+', led, html) if is_notebook else html


def moved(link: str, folder: str) -> str:
  """Returns where a link of a page in a folder of the repository leads in the site."""
  path, mark, anchor = link.partition("#")
  if not path or re.match(r"[a-z]+:", path):
    return link
  return placed(_target(path, folder)) + mark + anchor


def placed(path: str) -> str:
  """Returns where a file or folder of the repository lies in the site.

  >>> placed("README.md"), placed("docs/speed.md"), placed("LICENSE")
  ('index.md', 'speed.md', 'LICENSE.txt')
  >>> placed("experiments/faults.py"), placed("qupeD_jax/engine/loop.py")
  ('experiments/faults.md', 'api/engine/loop.md')
  """
  for pattern, place in (
    (r"README\.md", "index.md"),
    (r"docs/(.+)", r"\1"),
    ("experiments", "experiments/index.md"),
    (r"experiments/(\w+)\.py", r"experiments/\1.md"),
    ("qupeD_jax", "api/index.md"),
    (r"qupeD_jax/(.*)/__init__\.py", r"api/\1/index.md"),
    (r"qupeD_jax/(.+)\.py", r"api/\1.md"),
    (r"(?!.*\.(?:json|md|png)$).+", r"\g<0>.txt"),  # what a browser would not show
  ):
    if found := re.fullmatch(pattern, path):
      return found.expand(place)
  return path


def experiment(path: Path) -> str:
  """Writes an experiment's page: its docstring, and the tables that come with the repository."""
  about = _docstring(path).split("\n\n")
  links = [f"- [{title}](../reproduction.md#{mark})" for title, mark in _sections_about(path.stem)]
  came = ["## What came of it", "\n".join(links)] if links else []
  tables = (part for folder in _results(path.stem) for part in table(folder))
  return "\n\n".join([f"# {path.stem}", *map(_commands, about), *came, *tables])


def table(folder: Path) -> Iterator[str]:
  """Writes what a results folder holds: the scale, tables and pictures."""
  config = _config(folder)
  yield f"## {folder.relative_to(RESULTS).as_posix()}"
  scale = (f"{key} {_plain(config[key])}" for key in _SCALE if config.get(key))
  yield f"{', '.join(scale)}; [all options]({_above(folder / 'config.json')})."
  for name in ("table.md", "groups.md", "comparison.md"):
    if (folder / name).exists():
      yield (folder / name).read_text("utf-8").strip()
  for picture in sorted(folder.glob("*.png")):
    yield f"[![{picture.stem}]({_above(picture)})]({_above(picture)})"


def all_experiments() -> str:
  """Writes the list of experiments, by the first lines of their docstrings."""
  rows = [f"- [{path.stem}]({path.stem}.md): {_first_line(path)}" for path in _experiments()]
  return "\n".join(["# Experiments", "", "    make experiment NAME=quickstart", "", *rows, ""])


def front_door() -> str:
  """Writes what `import qupeD_jax` offers, and lists all modules by room."""
  tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
  imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
  homes = {a.name: f"{node.module}.{a.name}" for node in imports for a in node.names}
  names = [f"[`{name}`][{home}]" for name, home in homes.items() if home.startswith(PACKAGE.name)]
  text = [f"::: {PACKAGE.name}\n    options:\n      members: false", f"Names: {', '.join(names)}."]
  for room, modules in _rooms().items():
    rows = (f"- [`{_dotted(path)}`]({_below_api(path)}): {_first_line(path)}" for path in modules)
    text += [f"## {room or PACKAGE.name}", "\n".join(rows)]
  return "\n\n".join(text)


def _front() -> list[str]:
  """The pages in the repository's root."""
  return sorted((path.name for path in ROOT.glob("*.md")), key=lambda name: name != "README.md")


def _experiments() -> list[Path]:
  return sorted((ROOT / "experiments").glob("[!_]*.py"))


def _rooms() -> dict[str, list[Path]]:
  """Modules that say what they are, by the room that they are in."""
  rooms: dict[str, list[Path]] = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    room = path.parent.relative_to(PACKAGE).as_posix().replace(".", "")
    if _docstring(path) and path.parent / path.stem != PACKAGE / "__init__":
      rooms.setdefault(room, []).append(path)
  return rooms


def _results(name: str) -> list[Path]:
  """The folders of an experiment's results that come with the repository and hold a table."""
  folders = sorted(path.parent for path in RESULTS.rglob("table.md"))
  return [folder for folder in folders if _config(folder)["experiment"] == name]


def _sections_about(name: str) -> Iterator[tuple[str, str]]:
  """Title and anchor of each section of reproduction.md that runs an experiment."""
  text = (ROOT / "docs/reproduction.md").read_text("utf-8")
  for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
    title, _, body = section.partition("\n")
    if re.search(rf"NAME={name}\b", body):
      yield title, slugify(title, "-")


def _config(folder: Path) -> dict[str, Any]:
  return json.loads((folder / "config.json").read_text("utf-8"))["config"]


def _docstring(path: Path) -> str:
  return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def _first_line(path: Path) -> str:
  return _docstring(path).partition("\n")[0]


def _commands(paragraph: str) -> str:
  """Sets a paragraph of commands as they are typed."""
  return textwrap.indent(paragraph, "    ") if paragraph.startswith("make ") else paragraph


def _plain(value: Any) -> str:
  return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _dotted(path: Path) -> str:
  return (
    path.relative_to(ROOT)
    .as_posix()
    .removesuffix(".py")
    .replace("/", ".")
    .removesuffix(".__init__")
  )


def _below_api(path: Path) -> str:
  return placed(path.relative_to(ROOT).as_posix()).removeprefix("api/")


def _above(path: Path) -> str:
  """Where a file lies, as a page of experiments/ has it."""
  return posixpath.relpath(path, ROOT / "experiments")


def _target(link: str, folder: str) -> str:
  return posixpath.normpath(posixpath.join(folder, link.partition("#")[0]))
