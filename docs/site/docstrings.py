"""Reads docstrings and comments as this code writes them, for mkdocstrings."""

import ast
import re
import textwrap
from typing import Any

import griffe

_SECTIONS = re.compile(r"^(?=(?:Args|Attributes|Raises|Returns|Yields):$)", re.MULTILINE)
_SET_IN = re.compile(r"(?<=\n\n)  .+(?:\n+  .+)*")
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_TOGETHER = re.compile(r"^  (\w+(?:, \w+)+):(.*(?:\n {3}.*)*)", re.MULTILINE)
_COMMENT = re.compile(r"""^(?:[^#"']|"[^"]*"|'[^']*')*#\s?(.*)$""")


class AsWritten(griffe.Extension):
  """Keeps equations in their lines, and takes the comment beside a field as what it says."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Sets the equations and examples of a docstring, and its arguments one by one."""
    if obj.docstring:
      obj.docstring.value = one_by_one(preformatted(obj.docstring.value))

  def on_attribute_instance(
    self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
  ) -> None:
    """Gives a field the comment at the end of its line."""
    found = _COMMENT.match(attr.lines[-1]) if attr.lines else None
    if found and not attr.docstring:
      attr.docstring = griffe.Docstring(found.group(1), lineno=attr.lineno, parent=attr)


def preformatted(text: str) -> str:
  """Fences what is set in above a docstring's first section, and its examples everywhere.

  >>> print(preformatted("Moves x.\\n\\n  x <- x - eta g\\n\\nArgs:\\n  x: a number."))
  Moves x.
  <BLANKLINE>
  ```text
  x <- x - eta g
  ```
  <BLANKLINE>
  Args:
    x: a number.
  """
  above, *sections = _SECTIONS.split(text, maxsplit=1)
  above = _SET_IN.sub(lambda found: _fenced("text", textwrap.dedent(found.group())), above)
  return _EXAMPLE.sub(lambda found: _fenced("pycon", found.group()), above + "".join(sections))


def one_by_one(text: str) -> str:
  """Gives arguments that are described together a line each.

  >>> print(one_by_one("Args:\\n  one, other: numbers."))
  Args:
    one: numbers.
    other: numbers.
  """

  def apart(found: re.Match) -> str:
    names, said = found.groups()
    return "\n".join(f"  {name}:{said}" for name in names.split(", "))

  return _TOGETHER.sub(apart, text)


def _fenced(language: str, text: str) -> str:
  return f"```{language}\n{text}\n```"
