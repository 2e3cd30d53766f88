"""Pictures show what they are given, need no display, and are saved by suffix."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import fastlr
from fastlr import plotting

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

LRS = np.geomspace(1e-5, 1.0, 120)
BOWL = 2.0 + np.log10(LRS / 0.03) ** 2 / 5
ACCURACIES = np.where(np.arange(120) % 10 == 9, np.exp(-(np.log10(LRS / 0.01) ** 2)), np.nan)

RESULTS = {
    "loss": fastlr.RangeTestResult(LRS, BOWL),
    "loss and accuracy": fastlr.RangeTestResult(LRS, BOWL, ACCURACIES),
    "other metric": fastlr.RangeTestResult(LRS, BOWL, 5 * ACCURACIES, metric_name="dice"),
    "no answer": fastlr.RangeTestResult(LRS, np.ones(120)),
    "few accuracies": fastlr.RangeTestResult(LRS[:25], BOWL[:25], ACCURACIES[:25]),
    "linear": fastlr.RangeTestResult(np.linspace(0, 1, 50), np.linspace(-1, 1, 50) ** 2, sweep="linear"),
    "stopped": fastlr.RangeTestResult(LRS, np.where(np.arange(120) < 110, BOWL, np.nan)),
    "three points": fastlr.RangeTestResult(LRS[:3], BOWL[:3]),
    "repeats": fastlr.RangeTestResult.from_repeats(
        [
            fastlr.RangeTestResult(LRS[:end], BOWL[:end] + 0.1 * end / 100, ACCURACIES[:end])
            for end in (100, 110, 120)
        ]
    ),
    "one point": fastlr.RangeTestResult(LRS[:1], BOWL[:1]),
    "empty": fastlr.RangeTestResult([], []),
}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("suffix", "mark"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")])
def test_the_suffix_decides_the_format(suffix, mark, tmp_path):
    path = tmp_path / f"range.{suffix}"
    RESULTS["loss"].plot(str(path))
    assert mark in path.read_bytes()[:500]


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
def test_every_range_test_can_be_drawn(result):
    figure = result.plot()
    figure.canvas.draw()
    losses = figure.axes[0].lines[0]
    np.testing.assert_array_equal(losses.get_xdata(), result.lrs)
    np.testing.assert_array_equal(losses.get_ydata(), result.losses)
    assert figure.axes[0].get_xscale() == ("linear" if result.sweep == "linear" else "log")
    assert len(figure.axes) == (1 if result.accuracies is None else 2)
    assert "learning rate" in figure.axes[-1].get_xlabel()


def test_repeats_are_a_band_from_the_lowest_to_the_highest():
    result = RESULTS["repeats"]
    figure = result.plot()
    for axes, name, scale in zip(
        figure.axes, ("smoothed_losses", "smoothed_accuracies"), (1, 100), strict=True
    ):
        (band,) = axes.collections
        corners = band.get_paths()[0].vertices
        rate = result.lrs[60]
        at_rate = corners[corners[:, 0] == rate][:, 1]
        values = [scale * getattr(r, name)[60] for r in result.repeats]
        np.testing.assert_allclose([at_rate.min(), at_rate.max()], [min(values), max(values)])
        assert "repeats" in [text.get_text() for text in axes.get_legend().get_texts()]
    low, high = result.intervals["max_lr"]
    assert f"max_lr: {result.max_lr:.2g} [{low:.2g}, {high:.2g}]" in texts(figure)[-1]


def test_bounds_are_shaded_and_readings_marked():
    result = RESULTS["loss and accuracy"]
    figure = result.plot()
    for axes in figure.axes:
        (span,) = axes.patches
        box = span.get_extents().transformed(axes.transData.inverted())
        np.testing.assert_allclose([box.x0, box.x1], [result.base_lr, result.max_lr], rtol=1e-6)
    for name in ("steepest", "valley", "minimum"):
        (text,) = [t for t in texts(figure) if t.startswith(name)]
        assert float(text.split(": ")[1]) == pytest.approx(getattr(result, name), rel=0.06)
    assert figure.axes[1].get_ylabel() == "validation accuracy (%)"
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 100 * ACCURACIES[9::10])


def test_without_an_answer_the_picture_says_why():
    result = RESULTS["no answer"]
    figure = result.plot()
    assert not figure.axes[0].patches
    assert result.reason in figure.texts[-1].get_text()
    assert RESULTS["stopped"].stopped in RESULTS["stopped"].plot().texts[-1].get_text()


def test_another_metric_is_named_and_not_scaled():
    figure = RESULTS["other metric"].plot()
    assert figure.axes[1].get_ylabel() == "validation dice"
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 5 * ACCURACIES[9::10])


def test_a_loss_that_explodes_does_not_hide_the_rest():
    losses = BOWL.copy()
    losses[-5:] = 1e30
    low, high = fastlr.RangeTestResult(LRS, losses).plot().axes[0].get_ylim()
    assert low < BOWL.min()
    assert BOWL[0] < high < 10 * BOWL[0]


def within(axes, line):
    """Whether no part of a line is cut off by the limits of its axes."""
    ends = zip((line.get_xdata(), line.get_ydata()), (axes.get_xlim(), axes.get_ylim()), strict=True)
    return all(np.nanmin(data) > low and np.nanmax(data) < high for data, (low, high) in ends)


@pytest.mark.parametrize("width", [4.2, 8.6])
@pytest.mark.parametrize("name", ["loss", "loss and accuracy", "linear", "stopped", "repeats"])
def test_no_line_of_a_range_test_is_cut(name, width):
    figure = plotting.plot_range_test(RESULTS[name], width=width)
    figure.canvas.draw()
    for axes in figure.axes:
        smooth = [line for line in axes.lines if line.get_label() == "smoothed"]
        assert [within(axes, line) for line in smooth] == [True]


def test_a_loss_that_rises_again_is_seen_to_its_end():
    losses = np.where(LRS > 0.1, 2.5 * BOWL[0], BOWL)
    axes = fastlr.RangeTestResult(LRS, losses).plot().axes[0]
    assert within(axes, axes.lines[1])


@pytest.mark.parametrize("width", [4.2, 8.6])
def test_legends_stand_where_there_is_room(width):
    figure = plotting.plot_range_test(RESULTS["loss and accuracy"], width=width)
    figure.canvas.draw()
    assert figure.get_figwidth() == width
    for axes in figure.axes:
        legend, panel = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert (legend.x0 > panel.x1) == (width > 6)
        assert (legend.y0 >= panel.y1) == (width < 6)
        assert panel.width > 0.55 * figure.bbox.width


SCHEDULES = {
    "ends": (fastlr.Cosine(0.1, 0.0, 100), None, 101),
    "ends, last value before its duration": (fastlr.OneCycle(0.1, 100), None, 100),
    "drawn in part": (fastlr.Cosine(0.1, 0.0, 1000), 80, 80),
    "drawn beyond its end": (fastlr.Cosine(0.1, 0.0, 100), 500, 101),
    "endless": (fastlr.Triangular2(0.001, 0.006, 20), 300, 300),
}


@pytest.mark.parametrize(("schedule", "steps", "points"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_schedule_is_drawn_value_by_value(schedule, steps, points):
    axes = schedule.plot(steps).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [schedule(t) for t in range(points)])
    assert axes.get_xlabel() == "updates"
    assert axes.get_ylabel() == "learning rate"


def test_few_updates_are_drawn_as_stairs():
    schedule = fastlr.LinearRamp(0.0, 1.0, 4)
    (stairs,) = schedule.plot().axes[0].patches
    assert stairs.get_data().values.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_schedules_share_a_picture(tmp_path):
    pair = {"cosine": fastlr.Cosine(0.1, 0.0, 100), "steps": fastlr.StepDecay(0.1, 30, 0.5)}
    figure = plotting.plot_schedules(pair, path=str(tmp_path / "pair.png"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cosine", "steps"]
    assert [len(line.get_ydata()) for line in figure.axes[0].lines] == [101, 101]
    assert (tmp_path / "pair.png").stat().st_size > 1000


def test_momentum_and_epochs_are_labelled_as_such():
    _, momentum = fastlr.one_cycle(0.1, 100)
    assert momentum.plot().axes[0].get_ylabel() == "momentum"
    assert fastlr.Cosine(1.0, 0.0, 90, unit="epoch").plot().axes[0].get_xlabel() == "epochs"


def test_a_clock_of_billions_is_drawn_in_places_that_miss_no_cycle():
    """Round numbers of cycles, which equal distances would show as a level line."""
    schedule = fastlr.Triangular(0.0, 1.0, 500_000, unit="token")
    (line,) = schedule.plot(20_000 * 1_000_000).axes[0].lines
    clocks, values = line.get_data()
    assert len(clocks) == 20_000
    assert (clocks[0], clocks[-1]) == (0, 20_000 * 1_000_000 - 1)
    assert (np.diff(clocks) > 0).all()
    assert values[:50].tolist() == [schedule(int(clock)) for clock in clocks[:50]]
    for stretch in np.split(values, 100):
        assert stretch.min() < 0.1
        assert stretch.max() > 0.9
    (line,) = fastlr.Cosine(1.0, 0.0, 3 * 10**11, unit="token").plot().axes[0].lines
    assert (line.get_ydata()[0], line.get_ydata()[-1]) == (1.0, 0.0)


@pytest.mark.parametrize("width", [7.2, 3.6])
@pytest.mark.parametrize("steps", [10, 90_000, 1_000_000, 1_000_001, 115_300_000, 300_000_000_000])
def test_clocks_do_not_run_into_each_other(steps, width):
    figure = plotting.plot_schedules({"a": fastlr.Constant(0.1)}, steps, width=width)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    labels = [
        tick.label1.get_window_extent()
        for tick in figure.axes[0].xaxis.get_major_ticks()
        if low <= tick.get_loc() <= high
    ]
    assert len(labels) >= 3
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(labels))


@pytest.mark.parametrize("name", ["", "lr/"])
def test_a_folder_is_no_file_to_save_to(tmp_path, name):
    with pytest.raises(IsADirectoryError):
        fastlr.Cosine(0.1, 0.0, 100).plot(path=f"{tmp_path}/{name}" if name else tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_drawing_a_schedule_does_not_use_up_its_warning():
    schedule = fastlr.Cosine(0.1, 0.0, 100)
    schedule.plot(200)
    with pytest.warns(UserWarning, match="ended at update 100"):
        schedule(101)


BAD_SCHEDULES = {
    "none": ({}, None, "one or more"),
    "two units": (
        {"a": fastlr.Constant(1.0), "b": fastlr.Constant(1.0, unit="epoch")},
        10,
        "of one unit",
    ),
    "no end": ({"a": fastlr.Constant(1.0)}, None, "a has no end: say how many steps"),
    "no steps": ({"a": fastlr.Constant(1.0)}, 0, "steps must be"),
}


@pytest.mark.parametrize(("schedules", "steps", "message"), BAD_SCHEDULES.values(), ids=BAD_SCHEDULES.keys())
def test_what_cannot_be_drawn_is_refused(schedules, steps, message):
    with pytest.raises(ValueError, match=message):
        plotting.plot_schedules(schedules, steps)


class Halving:
    """Not the package's, but with all that a picture shows of a schedule."""

    unit, quantity, duration, last = "update", "dropout", 3, 3

    def values(self, start, stop):
        return 0.5 ** np.arange(start, stop)


def test_whatever_is_like_a_schedule_can_be_drawn():
    axes = plotting.plot_schedules({"halving": Halving()}).axes[0]
    assert axes.patches[0].get_data().values.tolist() == [1.0, 0.5, 0.25, 0.125]
    assert axes.get_ylabel() == "dropout"
    both = plotting.plot_schedules({"halving": Halving(), "rate": fastlr.Constant(1.0)}, 3)
    assert both.axes[0].get_ylabel() == "learning rate"


def test_accuracy_bands_are_one_standard_deviation():
    runs = np.array([[0.5, 0.80, 0.90], [0.5, 0.84, 0.94], [0.5, 0.88, 0.92]])
    figure = plotting.plot_accuracy([10, 20, 30], {"a": runs, "b": runs[:1]}, target=0.9)
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [50, 84, 92])
    (band,) = axes.collections  # a single run has no spread
    heights = band.get_paths()[0].vertices
    at_20 = heights[heights[:, 0] == 20][:, 1]
    np.testing.assert_allclose([at_20.min(), at_20.max()], [80, 88])
    assert texts(figure) == ["a", "b", "target 90.0 %"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("updates", "test accuracy (%)")


@pytest.mark.parametrize("width", [4.2, 7.2])
def test_no_accuracy_is_cut(width):
    """From the climb at the start to the very best."""
    runs = np.array([[0.0, 0.08, 0.80, 0.97, 1.0], [0.0, 0.12, 0.84, 0.99, 1.0]])
    axes = plotting.plot_accuracy([1, 2, 3, 4, 5], {"a": runs}, target=0.95, width=width).axes[0]
    assert all(within(axes, line) for line in axes.lines[:1])
    low, high = axes.get_ylim()
    assert -25 < low < 0
    assert 100 < high < 100.2
    ticks = axes.get_yticks()
    assert ticks.min() >= low
    assert ticks.max() <= high
    # Half of the errors take as much of the axis, wherever they are.
    places = axes.transData.transform([[1, y] for y in (60, 80, 90, 95)])[:, 1]
    np.testing.assert_allclose(np.diff(places), np.diff(places)[0], rtol=0.05)


def test_accuracies_that_are_all_the_same_are_drawn():
    for accuracy in (0.0, 0.9, 1.0):
        axes = plotting.plot_accuracy([1, 2], {"a": [[accuracy, accuracy]]}).axes[0]
        axes.figure.canvas.draw()
        low, high = axes.get_ylim()
        assert low < 100 * accuracy < high


@pytest.mark.parametrize("width", [0.0, -1.0, np.nan])
def test_a_picture_has_a_width(width):
    plots = [
        partial(plotting.plot_range_test, RESULTS["loss"]),
        partial(plotting.plot_schedules, {"a": fastlr.Constant(1.0)}, 10),
        partial(plotting.plot_accuracy, [1, 2], {"a": [[0.1, 0.2]]}),
    ]
    for plot in plots:
        with pytest.raises(ValueError, match="width must be"):
            plot(width=width)


def test_a_schedule_that_is_zero_is_seen():
    axes = fastlr.Cosine(0.1, 0.0, 100).plot().axes[0]
    assert within(axes, axes.lines[0])


def test_pyplot_and_the_display_stay_out_of_it(tmp_path):
    code = (
        "import sys, fastlr\n"
        "assert 'matplotlib' not in sys.modules\n"
        "fastlr.Cosine(0.1, 0.0, 100).plot()\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
