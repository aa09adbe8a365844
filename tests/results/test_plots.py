"""Pictures: what is on them, and that they are written."""

import itertools

import matplotlib as mpl
import numpy as np
import pytest

from qupeD_jax.checks import BadInput
from qupeD_jax.results import plots

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
  left, right = plots.draw_curves(rows(METHODS[:2])).axes
  assert len(left.get_lines()) == len(right.get_lines()) == 2
  first = left.get_lines()[0]
  np.testing.assert_array_equal(first.get_xdata(), [5, 10, 15, 20])
  np.testing.assert_allclose(first.get_ydata(), 100 * (0.05 + 0.01))
  np.testing.assert_array_equal(right.get_lines()[0].get_xdata(), range(1, 21))


def test_bands_are_one_standard_deviation_to_either_side():
  left, _ = plots.draw_curves(rows(METHODS[:1])).axes
  band = left.collections[0].get_datalim(left.transData)
  np.testing.assert_allclose([band.y0, band.y1], [6 - 1, 6 + 1])


def test_one_seed_has_no_band():
  left, right = plots.draw_curves(rows(seeds=1)).axes
  assert not left.collections
  assert not right.collections


def test_legend_lists_the_best_first_and_those_never_evaluated_last():
  figure = plots.draw_curves([*rows(), {"method": "never", "seed": 0, "round": 1, "loss": 1.0}])
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == [*reversed(METHODS), "never"]


def test_twelve_methods_look_different_and_the_same_on_both_panels():
  looks = [
    [(line.get_color(), line.get_linestyle()) for line in axes.get_lines()]
    for axes in plots.draw_curves(rows()).axes
  ]
  assert len(set(looks[0])) == 12
  assert looks[0] == looks[1]


def test_a_single_evaluation_is_visible():
  left, right = plots.draw_curves(rows(every=20)).axes
  assert left.get_lines()[0].get_marker() == "o"
  assert right.get_lines()[0].get_marker() == "None"


@pytest.mark.parametrize(("least", "scale"), [(0.001, "log"), (0.5, "linear"), (0.0, "linear")])
def test_losses_over_decades_get_a_logarithmic_axis(least, scale):
  few = [dict(row, loss=max(least, 2.0 / row["round"] ** 4)) for row in rows(METHODS[:1])]
  few[-1]["loss"] = least
  few = [row for row in few if row["seed"] == 2]
  assert plots.draw_curves(few).axes[1].get_yscale() == scale


def test_curves_without_any_accuracy_are_refused():
  with pytest.raises(BadInput, match="no row has an accuracy"):
    plots.draw_curves([{"method": "a", "seed": 0, "round": 1, "loss": 1.0, "accuracy": None}])
  with pytest.raises(BadInput, match="lacks its method or its round"):
    plots.draw_curves([{"seed": 0, "round": 1, "loss": 1.0, "accuracy": 0.5}])


def holdings(num_clients, num_classes):
  rng = np.random.default_rng(0)
  counts = rng.integers(1, 600, (num_clients, num_classes))
  return counts * (rng.random(counts.shape) < 0.4)


def test_area_of_discs_is_the_amount():
  counts = np.array([[100, 0, 25], [0, 50, 0]])
  bars, discs = sorted(plots.draw_clients(counts).axes, key=lambda axes: -axes.get_position().y0)
  (scatter,) = discs.collections
  np.testing.assert_array_equal(scatter.get_offsets(), [[0, 0], [0, 2], [1, 1]])
  np.testing.assert_allclose(scatter.get_sizes() / scatter.get_sizes()[0], [1, 0.25, 0.5])
  assert [bar.get_height() for bar in bars.patches] == [125, 50]
  shown = {disc.get_label(): disc.get_markersize() ** 2 for disc in discs.get_legend().get_lines()}
  expected = {"20": 0.2, "50": 0.5, "100": 1.0}
  assert shown == pytest.approx({n: part * scatter.get_sizes()[0] for n, part in expected.items()})


@pytest.mark.parametrize(("num_clients", "num_classes"), [(5, 2), (5, 10), (50, 10), (100, 62)])
def test_discs_stay_in_square_cells(num_clients, num_classes):
  figure = plots.draw_clients(holdings(num_clients, num_classes))
  discs = min(figure.axes, key=lambda axes: axes.get_position().y0)
  figure.draw_without_rendering()
  (x0, y0), (x1, y1) = discs.transData.transform([(0, 0), (1, 1)])
  assert abs(x1 - x0) == pytest.approx(abs(y1 - y0), rel=1e-3)
  diameter = np.sqrt(discs.collections[0].get_sizes().max()) * figure.dpi / 72
  assert 0.8 * (x1 - x0) < diameter < x1 - x0


def test_classes_carry_their_names():
  discs = plots.draw_clients(holdings(5, 2), ["cat", "dog"]).axes[0]
  assert [text.get_text() for text in discs.get_yticklabels()] == ["cat", "dog"]


@pytest.mark.parametrize("counts", [np.ones(3), np.zeros((2, 3)), np.zeros((0, 3))])
def test_counts_that_show_nothing_are_refused(counts):
  with pytest.raises(BadInput, match="counts of shape"):
    plots.draw_clients(counts)


def test_labels_must_fit_the_classes():
  with pytest.raises(BadInput, match="3 names"):
    plots.draw_clients(np.ones((2, 3)), ["a"])


def snapshots(num_centers):
  values = np.random.default_rng(0).standard_normal((40, 25)).astype(np.float32)
  centers = np.append(np.linspace(-1, 1, num_centers), [np.inf] * 3) if num_centers else None
  return [(number, values * (5 - k) / 5, centers) for k, number in enumerate(range(0, 100, 20))]


def test_each_snapshot_has_a_panel_with_its_centers():
  panels = plots.draw_weights(snapshots(4), "a tensor").axes
  assert [panel.get_ylabel() for panel in panels] == [f"round {k}" for k in (0, 20, 40, 60, 80)]
  for panel in panels:
    (lines,) = panel.collections
    places = [segment[0, 0] for segment in lines.get_segments()]
    np.testing.assert_allclose(places, np.linspace(-1, 1, 4))
  assert panels[0].get_xlim() == panels[-1].get_xlim()
  assert panels[0].get_title(loc="left") == "a tensor"


def test_histogram_counts_the_entries_within_reach():
  panels = plots.draw_weights(snapshots(2), "").axes
  values, edges, _ = panels[-1].patches[0].get_data()
  assert values.sum() == 1000
  assert len(edges) == len(values) + 1


def test_many_centers_do_not_hide_the_histogram():
  (lines,) = plots.draw_weights(snapshots(256), "").axes[0].collections
  assert max(segment[:, 1].max() for segment in lines.get_segments()) < 0.2


def test_without_centers_there_is_no_legend():
  panel = plots.draw_weights(snapshots(0)[:1], "").axes[0]
  assert panel.get_legend() is None


def test_a_constant_tensor_and_entries_that_are_not_finite_are_drawn():
  plots.draw_weights([(0, np.float32([0, 0, np.nan, np.inf]), None)], "")


@pytest.mark.parametrize("empty", [[], [(0, np.array([]), None)]])
def test_nothing_to_draw_is_refused(empty):
  with pytest.raises(BadInput, match="snapshots"):
    plots.draw_weights(empty, "")


def centers(num_tensors, num_rounds=25, m=4):
  """Returns rounds and centers [R, m + 1] of tensors named as ResNet's, the last slot unused."""
  rounds = np.arange(10, 10 * num_rounds + 1, 10)
  moving = np.linspace(-1, 1, m) * np.exp(-rounds / 200)[:, None]
  slots = np.append(moving, np.full((num_rounds, 1), np.inf), axis=1)
  names = [f"stage_{k // 6 + 1}_block_{k // 2 % 3}/conv_{k % 2 + 1}" for k in range(num_tensors)]
  return rounds, {f"{name}/kernel": slots / (k + 1) for k, name in enumerate(names)}


@pytest.mark.parametrize("num_tensors", [1, 5, 18])
def test_each_tensor_has_a_panel_with_a_line_for_each_center(num_tensors):
  rounds, by_tensor = centers(num_tensors)
  figure = plots.draw_centers(rounds, by_tensor, "Algorithm 1 2 bit, client 0")
  assert len(figure.axes) == num_tensors
  assert figure.get_suptitle() == "Algorithm 1 2 bit, client 0"
  for axes, (name, values) in zip(figure.axes, by_tensor.items(), strict=True):
    assert f"{axes.get_title(loc='left')}/kernel" == name
    drawn = np.transpose([line.get_ydata() for line in axes.get_lines()])
    np.testing.assert_allclose(drawn, values[:, :4])
    np.testing.assert_array_equal(axes.get_lines()[0].get_xdata(), rounds)
    assert len({tuple(line.get_color()) for line in axes.get_lines()}) == 4


def test_centers_of_one_round_are_visible():
  (axes,) = plots.draw_centers(*centers(1, num_rounds=1), "").axes
  assert {line.get_marker() for line in axes.get_lines()} == {"o"}


def test_every_column_of_panels_has_its_rounds_below():
  figure = plots.draw_centers(*centers(5), "")
  figure.draw_without_rendering()
  with_rounds = [axes.xaxis.get_major_ticks()[1].label1.get_visible() for axes in figure.axes]
  assert with_rounds == [False, False, True, True, True]


@pytest.mark.parametrize(
  ("by_tensor", "line"), [({}, "at least one"), ({"a": np.ones(3)}, "a: centers of shape")]
)
def test_centers_that_show_nothing_are_refused(by_tensor, line):
  with pytest.raises(BadInput, match=line):
    plots.draw_centers([1, 2, 3], by_tensor, "")


def measured(methods, seeds=3, every=5):
  """Returns rows whose gradient mapping falls; seeds differ by a factor of 10."""
  return [
    row | {"gradient_mapping": 10.0 ** (row["seed"] - row["round"] / 5 + k)}
    if row["round"] % every == 0
    else row | {"gradient_mapping": None}
    for k, method in enumerate(methods)
    for row in rows([method], seeds)
  ]


def test_the_gradient_mapping_is_a_geometric_mean_on_a_logarithmic_axis():
  figure = plots.draw_stationarity(measured(METHODS[:2]))
  (axes,) = figure.axes
  assert axes.get_yscale() == "log"
  first = axes.get_lines()[0]
  np.testing.assert_array_equal(first.get_xdata(), [5, 10, 15, 20])
  np.testing.assert_allclose(first.get_ydata(), [1, 0.1, 0.01, 0.001])
  low, high = np.sort(axes.collections[0].get_paths()[0].vertices[:, 1])[[0, -1]]
  np.testing.assert_allclose([low, high], [1e-4, 10])
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == [METHODS[1], METHODS[0]]


def test_what_was_not_measured_or_is_zero_is_left_out():
  assert not plots.has_stationarity(rows())
  with pytest.raises(BadInput, match="no row has a gradient mapping"):
    plots.draw_stationarity(rows())
  zero = {"method": METHODS[0], "seed": 0, "round": 25, "gradient_mapping": 0.0}
  assert not plots.has_stationarity([zero])
  (axes,) = plots.draw_stationarity([*measured(METHODS[:1]), zero]).axes
  np.testing.assert_array_equal(axes.get_lines()[0].get_xdata(), [5, 10, 15, 20])


def accuracies(methods, num_clients=20, seeds=3):
  """Returns accuracies in which later methods gain more, and clients differ."""
  rng = np.random.default_rng(0)
  return {
    method: {
      "seeds": list(range(seeds)),
      "accuracy": 0.5 + 0.01 * k + 0.05 * rng.uniform(-1, 1, (seeds, num_clients)),
    }
    for k, method in enumerate(methods)
  }


def heights(axes):
  return [bar.get_height() for bar in axes.patches]


def test_gains_are_means_over_seeds_in_points_sorted_and_coloured_by_sign():
  known = {
    "local": {"seeds": [0, 1], "accuracy": [[0.5, 0.5, 0.5, None], [0.5, 0.5, None, None]]},
    "other": {"seeds": [0, 1], "accuracy": [[0.5, 0.7, 0.4, 0.9], [0.7, 0.8, 0.9, 0.9]]},
  }
  (axes,) = plots.draw_gains(known).axes
  np.testing.assert_allclose(heights(axes), [25, 10, -10])
  blue, red = mpl.colors.to_rgba("#0072B2"), mpl.colors.to_rgba("#D55E00")
  assert [bar.get_facecolor() for bar in axes.patches] == [blue, blue, red]
  # The mean of seeds: (0 + 20 - 10) / 3 and (20 + 30) / 2.
  assert axes.get_title(loc="left") == "other\nmean +14.2"


def test_each_method_but_the_baseline_has_a_panel_on_common_axes():
  panels = plots.draw_gains(accuracies(METHODS), METHODS[3]).axes
  names = [axes.get_title(loc="left").split("\n")[0] for axes in panels]
  assert names == [method for method in METHODS if method != METHODS[3]]
  assert len({axes.get_ylim() for axes in panels}) == 1
  assert all(len(heights(axes)) == 20 for axes in panels)


@pytest.mark.parametrize(("methods", "baseline"), [(["a"], "a"), (["a", "b"], "local"), ([], "a")])
def test_gains_over_nothing_are_refused(methods, baseline):
  with pytest.raises(BadInput, match="method"):
    plots.draw_gains(accuracies(methods), baseline)


def points():
  """Returns 17 methods as a study has them: most of one size and hardly apart in accuracy."""
  rng = np.random.default_rng(3)
  sizes = {"1 bit": 10_400, "2 bit": 18_900, "4 bit": 35_800, "mixed": 84_300, "32 bit": 272_000}
  single = ["FedAvg", "FedAvg + fine-tuning", "FedProx", "SCAFFOLD", "pFedMe", "Ditto", "FedPer"]
  named = [(family, label) for family in ("local", "QuPeD") for label in sizes]
  named += [(family, family) for family in single]
  return [
    (family, label, sizes.get(label, 272_000), 0.845 + 0.012 * rng.standard_normal(), 0.004)
    for family, label in named
  ]


def labels(axes):
  return {text.get_text(): text for text in axes.texts}


def markers(axes):
  """Returns the places of all markers, in pixels."""
  lines = [line for line in axes.get_lines() if line.get_marker() not in ("None", None, "")]
  return [line.get_transform().transform(line.get_xydata()[0]) for line in lines]


def front(axes):
  lines = [line for line in axes.get_lines() if line.get_marker() in ("None", None, "")]
  return next(line for line in lines if line.get_transform() == axes.transData).get_xydata()


def test_pareto_shows_percents_over_bytes_and_the_front_no_method_beats():
  best = [("a", "1", 100, 0.5, 0), ("b", "2", 1000, 0.75, 0), ("c", "3", 1e5, 0.875, 0.01)]
  beaten = [("a", "4", 1000, 0.625, 0), ("a", "5", 2000, 0.75, 0), ("d", "6", 2e5, 0.5, 0)]
  axes = plots.draw_pareto([*beaten, *best]).axes[0]
  assert axes.get_xscale() == "log"
  np.testing.assert_allclose(front(axes), [(100, 50), (1000, 75), (1e5, 87.5)])
  assert labels(axes).keys() >= set("123456")
  (bar,) = [b for b in axes.collections if np.ptp(b.get_segments()[0][:, 1])]
  np.testing.assert_allclose(bar.get_segments()[0], [(1e5, 86.5), (1e5, 88.5)])


def test_shares_of_averaging_are_lines_in_percent_beside_a_level():
  curves = {"alone": [(0.6, 0.75, 0.0), (0.0, 0.5, 0.125)], "taught": [(0.6, 0.7, 0.0)]}
  figure = plots.draw_shares(curves, {"fine-tuned": 0.625})
  alone, taught, level = figure.axes[0].get_lines()
  np.testing.assert_allclose(alone.get_xydata(), [(0, 50), (60, 75)])
  np.testing.assert_allclose(taught.get_xydata(), [(60, 70)])
  np.testing.assert_allclose(level.get_ydata(), 62.5)
  (band,) = figure.axes[0].collections
  np.testing.assert_allclose(band.get_datalim(figure.axes[0].transData).intervaly, [37.5, 75])
  assert [text.get_text() for text in figure.legends[0].texts] == ["alone", "taught", "fine-tuned"]
  with pytest.raises(BadInput, match="curves"):
    plots.draw_shares({}, {})


def test_families_share_a_look_and_only_those_without_a_label_of_their_own_are_listed():
  figure = plots.draw_pareto(points())
  named = labels(figure.axes[0])
  assert named["Ditto"].get_color() != named["FedPer"].get_color()
  looks = {
    (line.get_color(), line.get_marker())
    for line in figure.axes[0].get_lines()
    if line.get_marker() not in ("None", None, "")
  }
  assert len(looks) == 9
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == ["local", "QuPeD", "Pareto front"]


def test_points_of_one_size_stand_side_by_side_at_their_accuracy():
  close = [("a", f"label {k}", 1000, 0.5 - 1e-4 * (k // 2), 0.0) for k in range(9)]
  axes = plots.draw_pareto(close).axes[0]
  places = np.array(markers(axes))
  right = axes.transData.transform([(1000, 100 * mean) for *_, mean, _ in close])
  np.testing.assert_allclose(places[:, 1], right[:, 1])
  np.testing.assert_allclose(places[0], right[0])
  gaps = [np.hypot(*(one - other)) for one, other in itertools.combinations(places, 2)]
  assert min(gaps) * 72 / axes.figure.dpi > 6.5


def test_labels_hide_no_marker():
  figure = plots.draw_pareto(points())
  axes = figure.axes[0]
  boxes = [text.get_window_extent() for name, text in labels(axes).items() if name]
  assert not any(box.contains(*place) for box in boxes for place in markers(axes))


@pytest.mark.parametrize(
  "bad", [("a", "b", 0, 0.5, 0.0), ("a", "b", 10, np.nan, 0.0), ("a", "b", 10, 0.5, np.inf)]
)
def test_points_without_a_place_are_refused(bad):
  with pytest.raises(BadInput, match="point a b"):
    plots.draw_pareto([bad])
  with pytest.raises(BadInput, match="at least one"):
    plots.draw_pareto([])


def test_dollars_in_names_are_no_formulas():
  names = ["local", r"a$\nothing$", "$"]
  figures = [
    plots.draw_gains(accuracies(names)),
    plots.draw_pareto([(name, name, 10, 0.5, 0.1) for name in names]),
    plots.draw_curves(rows(names)),
    plots.draw_weights(snapshots(2), names[1]),
    plots.draw_centers([1, 2], {names[1]: np.ones((2, 2))}, names[1]),
    plots.draw_stationarity(measured(names)),
  ]
  for figure in figures:
    assert plots.svg(figure).rstrip().endswith("</svg>")


def test_svg_is_the_same_each_time():
  one, other = (plots.svg(plots.draw_gains(accuracies(METHODS[:3]), METHODS[0])) for _ in "ab")
  assert one == other
  assert "<image" not in one


FIGURES = {
  "curves of 2": lambda: plots.draw_curves(rows(METHODS[:2])),
  "curves of 12": lambda: plots.draw_curves(rows()),
  "5 clients": lambda: plots.draw_clients(holdings(5, 10)),
  "50 clients": lambda: plots.draw_clients(holdings(50, 10), ["automobile"] * 10),
  "100 clients": lambda: plots.draw_clients(holdings(100, 62)),
  "weights": lambda: plots.draw_weights(snapshots(4), "dense_1/kernel, 2 bits"),
  "centers of 1": lambda: plots.draw_centers(*centers(1), "QuPeD 2 bit, client 0"),
  "centers of 6": lambda: plots.draw_centers(*centers(6), "Algorithm 1 2 bit, client 0"),
  "centers of 18": lambda: plots.draw_centers(*centers(18), "Algorithm 1 2 bit, client 0"),
  "stationarity of 2": lambda: plots.draw_stationarity(measured(METHODS[:2])),
  "stationarity of 12": lambda: plots.draw_stationarity(measured(METHODS)),
  "gains of 1": lambda: plots.draw_gains(accuracies(["local", "a"], 5)),
  "gains of 19": lambda: plots.draw_gains(
    accuracies(["local", *(f"FedAvg + fine-tuning {k} bit" for k in range(19))], 100)
  ),
  "pareto of 17": lambda: plots.draw_pareto(points()),
  "shares": lambda: plots.draw_shares({name: [(0.3, 0.5, 0.1)] for name in METHODS}, {"a": 0.6}),
  "pareto of 2": lambda: plots.draw_pareto(points()[-2:]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps(name):
  assert not overlaps(text_boxes(FIGURES[name]()))


def test_pictures_are_written_and_settings_left_alone(tmp_path):
  before = dict(mpl.rcParams)
  plots.curves(rows(METHODS[:2]), tmp_path / "curves.png")
  plots.clients(holdings(5, 3), tmp_path / "clients.png")
  plots.weights(snapshots(2), tmp_path / "weights.png", "a tensor")
  plots.centers(*centers(18), tmp_path / "centers.png", "a model")
  plots.stationarity(measured(METHODS[:2]), tmp_path / "stationarity.png")
  plots.gains(accuracies(METHODS[:3]), METHODS[0], tmp_path / "gains.png")
  plots.pareto(points(), tmp_path / "pareto.png")
  assert all(is_png(path) for path in tmp_path.iterdir())
  assert len(list(tmp_path.iterdir())) == 7
  assert dict(mpl.rcParams) == before


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
  with pytest.raises(BadInput, match=r"none/a\.png: cannot be written"):
    plots.clients(np.ones((2, 2)), tmp_path / "none" / "a.png")
  with pytest.raises(BadInput, match=r"a\.doc: "):
    plots.clients(np.ones((2, 2)), tmp_path / "a.doc")
