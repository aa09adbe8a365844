"""Bytes with their SHA-256 at the end: a file that was changed, or cut short, is noticed.

The digest, 64 hexadecimal digits, is of all bytes before it. It finds damage; it is no signature.
"""

import hashlib
from pathlib import Path

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files

DIGITS = 64


def seal(content: bytes) -> bytes:
  """Appends the digest.

  >>> opened(seal(b"weights"), "model.onnx")
  b'weights'
  """
  return content + hashlib.sha256(content).hexdigest().encode()


def opened(data: bytes, where: object) -> bytes:
  """Returns the content without its digest, which has to match.

  Raises:
    BadInput: it does not; `where` names the file.
  """
  content, digest = data[:-DIGITS], data[-DIGITS:]
  if digest != hashlib.sha256(content).hexdigest().encode():
    raise BadInput(f"{where}: damaged, or not written here (its checksum does not match)")
  return content


def read(path: Path) -> bytes:
  """Reads a sealed file: all of it, the digest included, after it was checked.

  Raises:
    BadInput: the file cannot be read, or is damaged.
  """
  with files.on_disk(path):
    data = path.read_bytes()
  opened(data, path)
  return data
