"""Compiled programs, kept from one start to the next."""

import contextlib
import os
import sys
from pathlib import Path

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files


def keep_compiled() -> None:
  """Lets jax keep compiled programs between starts, in the user's cache folder.

  Where that folder is not the user's alone, a line says so and nothing is kept: runs are slower to
  start then, and no other. Variables of jax's own that are set already win; it reads them
  when it is first imported.
  """
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  try:
    folder = files.cache_folder()
  except BadInput as error:
    print(f"compiled programs are not kept: {error}", file=sys.stderr)
    return
  trim(folder)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def trim(folder: Path, most: int = 4 * 2**30) -> None:
  """Removes compiled programs, the oldest first, until they take at most so many bytes.

  jax does so by itself where JAX_COMPILATION_CACHE_MAX_SIZE is set, but holds a lock of a further
  package for every program, and refuses a folder whose programs it has no times of.
  """
  with contextlib.suppress(OSError):  # another run removes them at the same time
    programs = [(path.stat().st_mtime_ns, path) for path in folder.glob("*-cache")]
    for _, path in sorted(programs, reverse=True):
      most -= path.stat().st_size
      if most < 0:
        path.unlink()
