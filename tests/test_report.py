"""Pictures: what is on them, and that they are written."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest

from qupeD_jax import report
from qupeD_jax.checks import BadInput

METHODS = [f"method {k}" for k in range(12)]


def rows(methods=METHODS, seeds=3, rounds=20, every=5):
  """Returns rows as in metrics.jsonl; later methods end higher, seeds differ by a hundredth."""
  return [
    {
      "method": method,
      "seed": seed,
      "round": number,
      "loss": 2.0 - 0.05 * number + 0.01 * seed,
      "accuracy": (k + 1) / 20 + 0.01 * seed if number % every == 0 else None,
      "global_accuracy": None,
    }
    for k, method in enumerate(methods)
    for seed in range(seeds)
    for number in range(1, rounds + 1)
  ]


def is_png(path):
  return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def overlaps(boxes):
  """Tells whether any two boxes touch."""
  pairs = itertools.combinations(boxes, 2)
  return any(mpl.transforms.Bbox.intersection(*pair) is not None for pair in pairs)


def text_boxes(figure):
  """Returns the extents of all text that is drawn."""
  figure.draw_without_rendering()
  axis = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
  unseen = {label for one in axis for label in labels_off_scale(one)}
  texts = figure.findobj(mpl.text.Text)
  shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
  return [text.get_window_extent() for text in shown if text not in unseen]


def labels_off_scale(axis):
  """Returns the tick labels beyond an axis's limits, which exist but are not drawn."""
  low, high = sorted(axis.get_view_interval())
  ticks = axis.get_major_ticks() + axis.get_minor_ticks()
  return [tick.label1 for tick in ticks if not low <= tick.get_loc() <= high]


def test_curves_show_the_mean_over_seeds_at_evaluated_rounds():
  left, right = report.draw_curves(rows(METHODS[:2])).axes
  assert len(left.get_lines()) == len(right.get_lines()) == 2
  first = left.get_lines()[0]
  np.testing.assert_array_equal(first.get_xdata(), [5, 10, 15, 20])
  np.testing.assert_allclose(first.get_ydata(), 100 * (0.05 + 0.01))
  np.testing.assert_array_equal(right.get_lines()[0].get_xdata(), range(1, 21))


def test_bands_are_one_standard_deviation_to_either_side():
  left, _ = report.draw_curves(rows(METHODS[:1])).axes
  band = left.collections[0].get_datalim(left.transData)
  np.testing.assert_allclose([band.y0, band.y1], [6 - 1, 6 + 1])


def test_one_seed_has_no_band():
  left, right = report.draw_curves(rows(seeds=1)).axes
  assert not left.collections
  assert not right.collections


def test_legend_lists_the_best_first_and_those_never_evaluated_last():
  figure = report.draw_curves([*rows(), {"method": "never", "seed": 0, "round": 1, "loss": 1.0}])
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == [*reversed(METHODS), "never"]


def test_twelve_methods_look_different_and_the_same_on_both_panels():
  looks = [
    [(line.get_color(), line.get_linestyle()) for line in axes.get_lines()]
    for axes in report.draw_curves(rows()).axes
  ]
  assert len(set(looks[0])) == 12
  assert looks[0] == looks[1]


def test_a_single_evaluation_is_visible():
  left, right = report.draw_curves(rows(every=20)).axes
  assert left.get_lines()[0].get_marker() == "o"
  assert right.get_lines()[0].get_marker() == "None"


@pytest.mark.parametrize(("least", "scale"), [(0.001, "log"), (0.5, "linear"), (0.0, "linear")])
def test_losses_over_decades_get_a_logarithmic_axis(least, scale):
  few = [dict(row, loss=max(least, 2.0 / row["round"] ** 4)) for row in rows(METHODS[:1])]
  few[-1]["loss"] = least
  few = [row for row in few if row["seed"] == 2]
  assert report.draw_curves(few).axes[1].get_yscale() == scale


def test_curves_without_any_accuracy_are_refused():
  with pytest.raises(BadInput, match="no row has an accuracy"):
    report.draw_curves([{"method": "a", "seed": 0, "round": 1, "loss": 1.0, "accuracy": None}])


def holdings(num_clients, num_classes):
  rng = np.random.default_rng(0)
  counts = rng.integers(1, 600, (num_clients, num_classes))
  return counts * (rng.random(counts.shape) < 0.4)


def test_area_of_discs_is_the_amount():
  counts = np.array([[100, 0, 25], [0, 50, 0]])
  bars, discs = sorted(report.draw_clients(counts).axes, key=lambda axes: -axes.get_position().y0)
  (scatter,) = discs.collections
  np.testing.assert_array_equal(scatter.get_offsets(), [[0, 0], [0, 2], [1, 1]])
  np.testing.assert_allclose(scatter.get_sizes() / scatter.get_sizes()[0], [1, 0.25, 0.5])
  assert [bar.get_height() for bar in bars.patches] == [125, 50]
  shown = {disc.get_label(): disc.get_markersize() ** 2 for disc in discs.get_legend().get_lines()}
  expected = {"20": 0.2, "50": 0.5, "100": 1.0}
  assert shown == pytest.approx({n: part * scatter.get_sizes()[0] for n, part in expected.items()})


@pytest.mark.parametrize(("num_clients", "num_classes"), [(5, 2), (5, 10), (50, 10), (100, 62)])
def test_discs_stay_in_square_cells(num_clients, num_classes):
  figure = report.draw_clients(holdings(num_clients, num_classes))
  discs = min(figure.axes, key=lambda axes: axes.get_position().y0)
  figure.draw_without_rendering()
  (x0, y0), (x1, y1) = discs.transData.transform([(0, 0), (1, 1)])
  assert abs(x1 - x0) == pytest.approx(abs(y1 - y0), rel=1e-3)
  diameter = np.sqrt(discs.collections[0].get_sizes().max()) * figure.dpi / 72
  assert 0.8 * (x1 - x0) < diameter < x1 - x0


def test_classes_carry_their_names():
  discs = report.draw_clients(holdings(5, 2), ["cat", "dog"]).axes[0]
  assert [text.get_text() for text in discs.get_yticklabels()] == ["cat", "dog"]


@pytest.mark.parametrize("counts", [np.ones(3), np.zeros((2, 3)), np.zeros((0, 3))])
def test_counts_that_show_nothing_are_refused(counts):
  with pytest.raises(BadInput, match="counts of shape"):
    report.draw_clients(counts)


def test_labels_must_fit_the_classes():
  with pytest.raises(BadInput, match="3 names"):
    report.draw_clients(np.ones((2, 3)), ["a"])


def snapshots(num_centers):
  values = np.random.default_rng(0).standard_normal((40, 25)).astype(np.float32)
  centers = np.append(np.linspace(-1, 1, num_centers), [np.inf] * 3) if num_centers else None
  return [(number, values * (5 - k) / 5, centers) for k, number in enumerate(range(0, 100, 20))]


def test_each_snapshot_has_a_panel_with_its_centers():
  panels = report.draw_weights(snapshots(4), "a tensor").axes
  assert [panel.get_ylabel() for panel in panels] == [f"round {k}" for k in (0, 20, 40, 60, 80)]
  for panel in panels:
    (lines,) = panel.collections
    places = [segment[0, 0] for segment in lines.get_segments()]
    np.testing.assert_allclose(places, np.linspace(-1, 1, 4))
  assert panels[0].get_xlim() == panels[-1].get_xlim()
  assert panels[0].get_title(loc="left") == "a tensor"


def test_histogram_counts_the_entries_within_reach():
  panels = report.draw_weights(snapshots(2), "").axes
  values, edges, _ = panels[-1].patches[0].get_data()
  assert values.sum() == 1000
  assert len(edges) == len(values) + 1


def test_many_centers_do_not_hide_the_histogram():
  (lines,) = report.draw_weights(snapshots(256), "").axes[0].collections
  assert max(segment[:, 1].max() for segment in lines.get_segments()) < 0.2


def test_without_centers_there_is_no_legend():
  panel = report.draw_weights(snapshots(0)[:1], "").axes[0]
  assert panel.get_legend() is None


def test_a_constant_tensor_and_entries_that_are_not_finite_are_drawn():
  report.draw_weights([(0, np.float32([0, 0, np.nan, np.inf]), None)], "")


@pytest.mark.parametrize("empty", [[], [(0, np.array([]), None)]])
def test_nothing_to_draw_is_refused(empty):
  with pytest.raises(BadInput, match="snapshots"):
    report.draw_weights(empty, "")


FIGURES = {
  "curves of 2": lambda: report.draw_curves(rows(METHODS[:2])),
  "curves of 12": lambda: report.draw_curves(rows()),
  "5 clients": lambda: report.draw_clients(holdings(5, 10)),
  "50 clients": lambda: report.draw_clients(holdings(50, 10), ["automobile"] * 10),
  "100 clients": lambda: report.draw_clients(holdings(100, 62)),
  "weights": lambda: report.draw_weights(snapshots(4), "dense_1/kernel, 2 bits"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps(name):
  assert not overlaps(text_boxes(FIGURES[name]()))


def test_pictures_are_written_and_settings_left_alone(tmp_path):
  before = dict(mpl.rcParams)
  report.curves(rows(METHODS[:2]), tmp_path / "curves.png")
  report.clients(holdings(5, 3), tmp_path / "clients.png")
  report.weights(snapshots(2), tmp_path / "weights.png", "a tensor")
  assert all(is_png(path) for path in tmp_path.iterdir())
  assert len(list(tmp_path.iterdir())) == 3
  assert dict(mpl.rcParams) == before


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
  with pytest.raises(BadInput, match=r"none/a\.png: cannot be written"):
    report.clients(np.ones((2, 2)), tmp_path / "none" / "a.png")
  with pytest.raises(BadInput, match=r"a\.doc: "):
    report.clients(np.ones((2, 2)), tmp_path / "a.doc")
