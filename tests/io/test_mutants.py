"""Mutants of every file that is read: each is read, and can be used, or refused in one line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings

from qupeD_jax.io import files
from qupeD_jax.results import metrics, page, plots, statistics
from qupeD_jax.results.plots import over_rounds
from qupeD_jax.study import parts
from tests import mutate

mutants = settings(
  max_examples=max(300, settings.default.max_examples // 10),
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

METHODS = ("local", "QuPeD 2 bit", "Grüße")
ROW = {"loss": 1.5, "dropped": 0, "accuracy": 0.5, "global_accuracy": None, "gradient_mapping": 0.1}
ROWS = [{"method": m, "seed": s, "round": r} | ROW for m in METHODS for s in (0, 1) for r in (1, 2)]
COSTS = {"bytes_per_model": 40, "bytes_per_round": 160, "flops_per_example": 10, "seconds": 2.0}
SUMMARY = {m: metrics.summarise([[0.5, 0.75]] * 2, bits=[1, 2], **COSTS) for m in METHODS}
ACCURACIES = {m: {"seeds": [0, 1], "accuracy": [[0.5, None], [0.25, 1.0]]} for m in METHODS}
COMPARISON = statistics.Comparison(0.1, 0.05, 0.15, 1)._asdict()
COMPARISONS = {"level": 0.95, "comparisons": {"local": {"QuPeD 2 bit": COMPARISON}}}
OPTIONS = {"experiment": "tiny", "rounds": 2, "seed_list": [0, 1], "models": ["mlp"], "out": None}
CONFIG = {"config": OPTIONS, "environment": {"device": "cpu", "devices": 2}, "date": "2026-01-01"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A results folder that is whole."""
  folder = tmp_path_factory.mktemp("results")
  files.write(folder / metrics.CONFIG, files.dump(CONFIG))
  files.write(folder / metrics.METRICS, "".join(files.dump(row) + "\n" for row in ROWS))
  files.write(folder / metrics.SUMMARY, files.dump({"methods": SUMMARY}))
  files.write(folder / metrics.ACCURACIES, files.dump({"methods": ACCURACIES}))
  files.write(folder / metrics.COMPARISON, files.dump(COMPARISONS))
  return folder


def drawn_cheaply(monkeypatch):
  """Leaves of the pictures what is computed for them."""
  monkeypatch.setattr(plots, "svg", lambda figure: str(figure))
  monkeypatch.setattr(plots, "draw_curves", _curves)
  monkeypatch.setattr(plots, "draw_pareto", lambda points: [x * y for *_, x, y, _ in points])
  monkeypatch.setattr(plots, "draw_stationarity", lambda rows: _curves(rows, "gradient_mapping"))
  monkeypatch.setattr(plots, "draw_gains", _gains)


def _curves(rows, *keys):
  return [over_rounds.series(rows, key) for key in keys or ("loss", "accuracy")]


def _gains(accuracies, baseline):
  return [statistics.differences(*statistics.paired(accuracies, m, baseline)) for m in accuracies]


MUTANTS = {
  metrics.CONFIG: mutate.of_json(CONFIG),
  metrics.SUMMARY: mutate.of_json({"methods": SUMMARY}),
  metrics.ACCURACIES: mutate.of_json({"methods": ACCURACIES}),
  metrics.COMPARISON: mutate.of_json(COMPARISONS),
  metrics.METRICS: mutate.of_bytes("".join(files.dump(row) + "\n" for row in ROWS).encode())
  | mutate.of_json(ROWS[0]).map(lambda line: line + b"\n" + json.dumps(ROWS[1]).encode() + b"\n"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_results_folder_is_shown_or_refused(folder, name, monkeypatch):
  drawn_cheaply(monkeypatch)
  path, seen = folder / name, set()
  whole = path.read_bytes()

  @mutants
  @given(MUTANTS[name])
  def check(content):
    path.write_bytes(content)
    use = lambda: (page.html_page(page.read_results(folder)), parts.differences(folder, OPTIONS))
    seen.add(mutate.reads_or_refuses(use, folder))

  try:
    check()
  finally:
    path.write_bytes(whole)
  assert seen == {True, False}
