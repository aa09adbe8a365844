"""The library neither imports nor installs Flower: the app is a folder of its own."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_library_does_not_know_flower():
  rooms = ("qupeD_jax", "experiments", "benchmarks")
  files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
  files += [ROOT / name for name in ("requirements.txt", "requirements/test.txt")]
  assert [path for path in files if "flwr" in path.read_text("utf-8")] == []
  assert "flwr" in (ROOT / "requirements/flower.txt").read_text("utf-8")
