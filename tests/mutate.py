"""Mutants of files that are read: bytes lost, changed and slipped in, values of other types."""

import copy
import json
from collections.abc import Callable

from hypothesis import strategies as st

from qupeD_jax.checks import BadInput

DEEP, LONG = "[" * 100_000 + "]" * 100_000, "9" * 5000
INSETS = [b"\xff", b"\xed\xa0\x80", b"\0", b"null", b"NaN", b"-", b"1e999", b"{", b"]", b'"']
INSETS += [
  DEEP.encode(),
  LONG.encode(),
  b'{"a":' * 2000,
  b"\n",
  b",",
  b"\xef\xbb\xbf",
  b"\xe2\x80\xa8",
]
VALUES = [
  None,
  True,
  0,
  -1,
  2**31,
  2**63,
  10**400,
  0.5,
  1e308,
  float("nan"),
  float("-inf"),
  "",
  "x",
]
VALUES += ["\ud800", "\0", "../..", [], {}, [[]], [1, "x"], [[1, 2], [3]], {"x": None}]
for _ in range(60):
  VALUES[-1] = [VALUES[-1]]  # deep, yet not too deep for the grammar


@st.composite
def of_bytes(draw, content: bytes):
  """Draws a text in which a few spans are replaced."""
  for _ in range(draw(st.integers(1, 3))):
    begin, length = draw(st.integers(0, len(content))), draw(st.integers(0, 12))
    inset = draw(st.sampled_from(INSETS) | st.binary(max_size=4))
    content = content[:begin] + inset + content[begin + length :]
  return content


@st.composite
def of_values(draw, value):
  """Draws a JSON value in which something, wherever it is, is gone, renamed or of another kind."""
  value = copy.deepcopy(value)
  places = list(_places(value))
  holder, key = draw(st.sampled_from(places))
  match draw(st.sampled_from(("replace", "replace", "delete", "repeat"))):
    case "replace":
      holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    case "delete":
      del holder[key]
    case "repeat":
      holder[f"{key} again" if isinstance(holder, dict) else slice(0, 0)] = [holder[key]]
  return value


def of_json(value) -> st.SearchStrategy[bytes]:
  """Draws mutants of a JSON file."""
  by_value = st.sampled_from(VALUES) | of_values(value)
  return of_bytes(json.dumps(value).encode()) | by_value.map(lambda v: json.dumps(v).encode())


def reads_or_refuses(read: Callable, where) -> bool:
  """Tells whether a file is read; if it is not, one short line names the file."""
  try:
    read()
  except BadInput as error:
    line = str(error)
    assert line.startswith(str(where))
    assert len(line.encode().splitlines()) == 1
    assert len(line) < 600
    return False
  return True


def _places(value):
  entries = value.items() if isinstance(value, dict) else enumerate(value)
  for key, entry in list(entries):
    yield value, key
    if isinstance(entry, dict | list):
      yield from _places(entry)
