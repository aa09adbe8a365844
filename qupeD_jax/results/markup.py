"""HTML of which a page is made: tables, pictures, lists, and the page around them.

Texts are escaped here; what is named `cell` or `body` is HTML already.
"""

import base64
import html
import importlib.resources
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from qupeD_jax.results import plots

_INCH = 96  # CSS pixels


def text(value: object) -> str:
  """Writes a value as text of a page."""
  return html.escape(str(value))


def page(title: str, body: str) -> str:
  """Makes a page that stands alone, with its style inside."""
  css = importlib.resources.files(__package__).joinpath("page.css").read_text("utf-8")
  head = (
    '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{text(title)}</title>\n<style>{css}</style>"
  )
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n'
    f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
  )


def section(title: str, body: str, level: int = 2) -> str:
  """Heads a part of the page."""
  return f"<section>\n<h{level}>{text(title)}</h{level}>\n{body}\n</section>"


def paragraph(words: str, kind: str = "note") -> str:
  """Writes a paragraph; its kind is a class of page.css."""
  return f'<p class="{kind}">{text(words)}</p>'


def anchor(name: str) -> str:
  """Makes the id of a part of the page.

  >>> anchor("3 classes & more")
  'part-3-classes-more'
  """
  return "part-" + re.sub(r"[^\w]+", "-", name).strip("-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
  """Lays cells out as a table that scrolls where it is too wide."""
  columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
  body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
  inside = f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n</tbody>"
  return _scrolling(f'<table class="{kind}">\n{inside}\n</table>', f"Table: {_words(head)}")


def listed(values: Mapping[str, Any], kind: str) -> str:
  """Lists names and what they are."""
  rows = [f"<dt>{text(name)}</dt><dd>{text(_value(value))}</dd>" for name, value in values.items()]
  if kind == "options":  # a row must not be torn apart where columns break
    rows = [f"<div>{row}</div>" for row in rows]
  body = "\n".join(rows)
  return f'<dl class="{kind}">\n{body}\n</dl>'


def figure(drawn: Figure, caption: str) -> str:
  """Shows a figure."""
  return _picture("image/svg+xml", plots.svg(drawn).encode(), caption, "", caption)


def png(content: bytes, alternative: str) -> str:
  """Shows a PNG that was written at the resolution of `plots`, at its size on paper."""
  # The width stands in the first chunk, behind eight bytes of signature and eight of its head.
  pixels = struct.unpack(">I", content[16:20])[0] if len(content) >= 20 else 0
  width = f' width="{max(1, round(pixels * _INCH / plots.DPI))}"'
  return _picture("image/png", content, alternative, width, "")


def _picture(kind: str, content: bytes, alternative: str, width: str, caption: str) -> str:
  data = base64.b64encode(content).decode("ascii")
  image = f'<img src="data:{kind};base64,{data}" alt="{text(alternative)}"{width}>'
  below = f"\n<figcaption>{text(caption)}</figcaption>" if caption else ""
  return f"<figure>\n{_scrolling(image, alternative)}{below}\n</figure>"


def _scrolling(body: str, label: str) -> str:
  """Lets what is too wide be scrolled, by keys as well."""
  return f'<div class="wide" tabindex="0" role="group" aria-label="{text(label)}">{body}</div>'


def _words(cells: Sequence[str]) -> str:
  return html.unescape(", ".join(cells))


def _value(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
