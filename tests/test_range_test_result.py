"""RangeTestResult reads curves with known answers, says when there is none, and is kept in files."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlr

LRS = np.geomspace(1e-5, 1.0, 200)
U = np.log10(LRS)


def falling(center=-2.6, steepness=4.0, start=2.3, fall=1.6):
    """A smooth fall; its steepest point is at ``center``, in decades."""
    return start - fall / (1 + np.exp(-(U - center) * steepness))


def corners(*points):
    """Straight from point to point, in decades."""
    return np.interp(U, *zip(*points, strict=True))


# Curves without noise. The truth is where each is lowest; on a plateau, which is as good to within 2 % of the
# fall over more than a decade, where that begins.
PEAKS = {
    "bowl": falling() + 0.02 * np.exp((U + 1.0) * 6),
    "blow-up": falling() + np.exp((U + 0.7) * 12),
    "negative": falling(start=-5.0, fall=8.0) + 0.02 * np.exp((U + 0.8) * 8),
    "small fall": falling(fall=0.4) + 0.02 * np.exp((U + 1.0) * 6),
    "vee": corners((-5, 2.3), (-4, 2.3), (-1.5, 0.7), (-1.2, 2.5), (0, 9.7)),
    "cliff": falling(steepness=3.0) + np.where(U > -0.8, (U + 0.8) * 40, 0),
    "cliff at once": falling(center=-1.5, steepness=3.0) + np.where(U > -1.0, 1e3, 0),
    "plateau before": falling(center=-1.3, steepness=6.0) + 0.02 * np.exp((U + 0.5) * 9),
}
PLATEAUS = {
    "plateau": falling(center=-3.2, steepness=6.0) + 0.02 * np.exp((U + 0.8) * 6),
    "plateau from a corner": corners((-5, 2.3), (-3.5, 2.3), (-2, 0.7), (-0.6, 0.7), (0, 5.5)),
    "negative plateau": corners((-5, -2), (-4, -2), (-2.5, -5), (-1, -5), (0, 40)),
}


def start_of_plateau(curve):
    return LRS[np.flatnonzero(curve <= curve.min() + 0.02 * (curve[0] - curve.min()))[0]]


KNOWN = {name: (curve, LRS[curve.argmin()]) for name, curve in PEAKS.items()}
KNOWN |= {name: (curve, start_of_plateau(curve)) for name, curve in PLATEAUS.items()}
SEEDS = range(200)


def noisy(curve, noise, seed, spikes=2):
    rng = np.random.default_rng(seed)
    sound = np.minimum(np.abs(curve), np.abs(curve[0]) + 2)
    losses = curve + noise * sound * rng.standard_normal(len(curve))
    losses[rng.integers(0, 20, spikes)] += 3 * abs(curve[0])
    return losses


@pytest.mark.parametrize(("curve", "truth"), KNOWN.values(), ids=KNOWN.keys())
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_the_upper_bound_is_found_on_curves_with_a_known_answer(curve, truth, noise):
    results = [fastlr.RangeTestResult(LRS, noisy(curve, noise, seed)) for seed in SEEDS]
    assert all(results)
    assert truth / 1.5 <= np.median([r.max_lr for r in results]) <= truth * 1.5
    for r in results:
        assert r.base_lr == pytest.approx(r.max_lr / 10)
        assert r.max_lr <= r.minimum


@pytest.mark.parametrize("name", ["bowl", "vee", "plateau before"])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_the_onset_is_where_a_tenth_of_the_fall_is_done(name, noise):
    curve = PEAKS[name]
    truth = LRS[np.flatnonzero(curve > curve[0] - 0.1 * (curve[0] - curve.min()))]
    truth = truth[truth < LRS[curve.argmin()]].max()
    onsets = [fastlr.RangeTestResult(LRS, noisy(curve, noise, seed)).onset for seed in SEEDS]
    assert truth / 1.5 <= np.median(onsets) <= truth * 1.5


@pytest.mark.parametrize("center", [-3.5, -2.6, -2.0])
def test_steepest_is_where_the_fall_is_steepest_on_the_log_axis(center):
    curve = falling(center) + 0.02 * np.exp((U + 1.0) * 6)
    rates = [fastlr.RangeTestResult(LRS, noisy(curve, 0.02, seed)).steepest for seed in range(15)]
    assert 10**center / 1.3 <= np.median(rates) <= 10**center * 1.3


def test_valley_lies_two_thirds_down_the_way():
    curve = falling() + 0.02 * np.exp((U + 1.0) * 6)
    found = fastlr.RangeTestResult(LRS, curve)
    gain = curve[0] - curve.min()
    onset = U[np.flatnonzero(curve[: curve.argmin()] > curve[0] - 0.1 * gain)[-1]]
    expected = onset + 2 / 3 * (U[curve.argmin()] - onset)
    assert np.log10(found.valley) == pytest.approx(expected, abs=0.1)
    assert found.steepest < found.valley < found.minimum


FLAT = {
    "flat": np.full(200, 2.3),
    "flat, negative": np.full(200, -2.3),
    "flat, then up": 2.3 + np.exp((U + 0.5) * 8),
    "rising": 2.3 + 0.3 * (U + 5),
    "zero": np.zeros(200),
}


@pytest.mark.parametrize("curve", FLAT.values(), ids=FLAT.keys())
@pytest.mark.parametrize(
    ("noise", "spikes"), [(0.0, 2), (0.05, 2), (0.05, 5), (0.2, 2)], ids=lambda value: str(value)
)
def test_a_curve_that_never_falls_gives_no_answer(curve, noise, spikes):
    for seed in SEEDS:
        found = fastlr.RangeTestResult(LRS, noisy(curve, noise, seed, spikes))
        assert not found
        assert (found.base_lr, found.max_lr, found.steepest, found.valley, found.minimum) == (None,) * 5
        assert "improves nowhere" in found.reason or "lower start_lr" in found.reason


def test_a_flat_accuracy_gives_no_answer_even_where_the_loss_falls():
    for seed in SEEDS:
        accuracies = np.full(200, np.nan)
        accuracies[9::10] = np.random.default_rng(seed).binomial(256, 0.1, 20) / 256
        found = fastlr.RangeTestResult(LRS, PEAKS["bowl"], accuracies)
        assert not found
        assert "the accuracy improves nowhere" in found.reason
        assert found.minimum is not None


def test_the_bounds_come_from_the_accuracy_where_there_is_one():
    truth = -1.7
    accuracies = np.full(200, np.nan)
    accuracies[9::10] = (0.1 + 0.8 * np.exp(-((U - truth) ** 2)))[9::10]
    best = []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        found = fastlr.RangeTestResult(
            LRS, noisy(PLATEAUS["plateau"], 0.05, seed), accuracies + 0.02 * rng.standard_normal(200)
        )
        best.append(found.max_lr)
    assert 10**truth / 1.5 <= np.median(best) <= 10**truth * 1.5


def test_an_accuracy_that_still_rises_at_the_end_is_no_upper_bound():
    found = fastlr.RangeTestResult(LRS, falling(), 0.1 + 0.15 * (U + 5))
    assert not found
    assert "raise end_lr" in found.reason
    # A sweep that ended because training broke down has found its upper bound there.
    assert fastlr.RangeTestResult(LRS, falling(), 0.1 + 0.15 * (U + 5), stopped="the loss diverged")


def test_smoothing_does_not_shift_a_symmetric_dip():
    dip = 2.0 - np.exp(-(((U + 2.5) / 0.8) ** 2))
    found = fastlr.RangeTestResult(LRS, dip)
    assert found.minimum == pytest.approx(10**-2.5, rel=0.06)  # neighbouring rates are that far apart
    sound = np.isfinite(found.smoothed_losses)
    assert sound[: dip.argmin() + 15].all()
    np.testing.assert_allclose(found.smoothed_losses[sound], dip[sound], atol=0.07)


def test_outlying_batches_do_not_move_the_minimum():
    losses = PEAKS["bowl"].copy()
    lowest = int(losses.argmin())
    clean = fastlr.RangeTestResult(LRS, losses).minimum
    losses[[lowest - 30, lowest, lowest + 1, lowest + 6]] += 50.0
    losses[60] = -20.0
    assert fastlr.RangeTestResult(LRS, losses).minimum == pytest.approx(clean, rel=0.06)


def test_a_line_is_smoothed_to_itself_up_to_its_ends():
    line = 0.1 + 0.15 * (U + 5)
    found = fastlr.RangeTestResult(LRS, falling(), line)
    np.testing.assert_allclose(found.smoothed_accuracies, line, rtol=1e-9)
    # Losses are freed of spikes first, which bends the first and last two points.
    found = fastlr.RangeTestResult(LRS, 3 - line)
    np.testing.assert_allclose(found.smoothed_losses[30:-30], 3 - line[30:-30], rtol=1e-9)


def test_a_linear_sweep_is_read_on_a_linear_axis():
    lrs = np.linspace(0.0, 0.1, 150)
    curve = 2.0 - 1.0 * np.exp(-(((lrs - 0.06) / 0.015) ** 2))
    found = fastlr.RangeTestResult(lrs, curve, sweep="linear")
    assert found.minimum == pytest.approx(0.06, rel=0.03)
    # d/dlr of a Gaussian is steepest one standard deviation off: 0.015 / sqrt(2).
    assert found.steepest == pytest.approx(0.06 - 0.015 / np.sqrt(2), rel=0.05)


def test_values_after_the_first_that_is_not_finite_are_cut():
    losses = PEAKS["bowl"].copy()
    losses[180:] = np.nan
    losses[185] = 0.0
    found = fastlr.RangeTestResult(LRS, losses)
    assert len(found.lrs) == len(found.losses) == 180
    assert "nan" in found.stopped
    assert found


@pytest.mark.parametrize("points", [0, 1, 2, 3, 9])
def test_too_short_a_curve_gives_no_answer(points):
    found = fastlr.RangeTestResult(LRS[:points], falling()[:points])
    assert not found
    assert f"{points} points, of 10" in found.reason
    assert len(found.smoothed_losses) == points


def test_no_result_says_why_in_place_of_a_schedule():
    empty = fastlr.RangeTestResult(LRS, np.ones(200))
    with pytest.raises(ValueError, match="no bounds: the loss improves nowhere"):
        empty.triangular2(step_size_up=100)
    assert "reason=" in repr(empty)


def test_a_result_becomes_a_schedule_and_drives_the_optimizer():
    found = fastlr.RangeTestResult(LRS, PEAKS["bowl"])
    schedule = found.triangular2(step_size_up=10)
    assert schedule == fastlr.Triangular2(found.base_lr, found.max_lr, 10)
    opt = fastlr.FusedSGD(torch.nn.Linear(1, 1).parameters())
    opt.set_schedule(lr=schedule)
    assert opt.param_groups[0]["lr"] == found.base_lr
    assert "base_lr=" in repr(found)


def test_a_result_is_immutable_and_survives_pickling():
    found = fastlr.RangeTestResult(LRS, PEAKS["bowl"], stopped="early")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.lrs = LRS
    with pytest.raises(ValueError, match="read-only"):
        found.losses[0] = 0.0
    loaded = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(loaded.losses, found.losses)
    assert (loaded.max_lr, loaded.stopped) == (found.max_lr, "early")


def test_the_csv_file_holds_every_number_exactly(tmp_path):
    accuracies = np.where(np.arange(200) % 10 == 9, 0.5, np.nan)
    found = fastlr.RangeTestResult(LRS, PEAKS["bowl"], accuracies, metric_name="f1")
    found.to_csv(tmp_path / "range.csv")
    with open(tmp_path / "range.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["lr", "loss", "f1"]
    assert [float(row["lr"]) for row in rows] == LRS.tolist()
    assert [float(row["loss"]) for row in rows] == PEAKS["bowl"].tolist()
    assert [row["f1"] for row in rows[8:11]] == ["", "0.5", ""]


FULL = {
    "plain": lambda: fastlr.RangeTestResult(LRS, PEAKS["bowl"]),
    "linear, with everything": lambda: fastlr.RangeTestResult(
        np.linspace(0, 1, 60),
        (np.linspace(0, 1, 60) - 0.5) ** 2,
        np.where(np.arange(60) % 4 == 3, 0.1 + np.linspace(0, 0.5, 60), np.nan),
        sweep="linear",
        stopped="the loss diverged at lr 1",
        metric_name="f1",
        notes=["the loader ran out"],
        group_bounds=[(0, 1), (0, 10)],
    ),
    "repeats": lambda: repeated([noisy(PEAKS["bowl"], 0.05, seed) for seed in range(3)]),
    "no answer": lambda: fastlr.RangeTestResult(LRS, np.ones(200)),
    "empty": lambda: fastlr.RangeTestResult([], []),
}
READINGS = ("base_lr", "max_lr", "onset", "steepest", "steepest_region", "valley", "minimum", "reason")


def repeated(curves, accuracies=None):
    return fastlr.RangeTestResult.from_repeats([fastlr.RangeTestResult(LRS, c, accuracies) for c in curves])


@pytest.mark.parametrize("make", FULL.values(), ids=FULL.keys())
def test_a_json_file_brings_everything_back(make, tmp_path):
    found, path = make(), tmp_path / "range.json"
    found.to_json(path)
    loaded = fastlr.RangeTestResult.from_json(path)
    for name in ("lrs", "losses", "accuracies"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(found, name))
    for name in (*READINGS, "sweep", "stopped", "metric_name", "notes", "group_bounds", "intervals"):
        assert getattr(loaded, name) == getattr(found, name), name
    assert loaded.summary() == found.summary()
    assert [r.max_lr for r in loaded.repeats] == [r.max_lr for r in found.repeats]
    answers = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))["answers"]
    assert answers["max_lr"] == found.max_lr


@pytest.mark.parametrize("make", FULL.values(), ids=FULL.keys())
def test_a_dict_brings_everything_back_from_a_checkpoint(make, tmp_path):
    found = make()
    torch.save({"found": found.to_dict()}, tmp_path / "model.ckpt")
    data = torch.load(tmp_path / "model.ckpt", weights_only=True)["found"]
    loaded = fastlr.RangeTestResult.from_dict(data)
    assert loaded.to_dict() == found.to_dict()
    assert loaded.summary() == found.summary()
    found.to_json(tmp_path / "range.json")
    assert json.loads((tmp_path / "range.json").read_text()) == found.to_dict()
    for wrong, message in ((data["losses"], "data holds no"), ({**data, "lrs": None}, "data is incomplete")):
        with pytest.raises(ValueError, match=message):
            fastlr.RangeTestResult.from_dict(wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr,loss", "no JSON file"),
        ("[1]", "holds no"),
        ('{"format": "something else"}', "holds no"),
        ('{"format": "fastlr range test, version 1", "lrs": [1]}', "incomplete"),
    ],
)
def test_a_file_that_is_none_is_refused(text, message, tmp_path):
    path = tmp_path / "range.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        fastlr.RangeTestResult.from_json(path)


def test_the_summary_says_everything():
    text = FULL["repeats"]().summary()
    found = FULL["repeats"]()
    assert "3 repeats" in text
    low, high = found.intervals["max_lr"]
    assert f"max_lr    {found.max_lr:.2g} [{low:.2g}, {high:.2g}]" in text
    assert "region {:.2g} to {:.2g}".format(*found.steepest_region) in text
    text = FULL["no answer"]().summary()
    assert "no bounds: the loss improves nowhere" in text
    text = FULL["linear, with everything"]().summary()
    for part in ("linear", "stopped early: the loss diverged", "note: the loader", "bounds of each group"):
        assert part in text


def test_repeats_give_medians_and_intervals():
    found = repeated([noisy(PEAKS["bowl"], 0.05, seed) for seed in range(5)])
    singles = [r.max_lr for r in found.repeats]
    assert found.max_lr == pytest.approx(np.median(singles))
    assert found.intervals["max_lr"] == (min(singles), max(singles))
    assert min(singles) < found.max_lr < max(singles)
    assert found.base_lr == pytest.approx(found.max_lr / 10)
    assert found.lrs.tolist() == LRS.tolist()
    np.testing.assert_array_equal(found.losses, np.median([r.losses for r in found.repeats], 0))


def test_the_interval_holds_the_median_as_often_as_it_says():
    truth = np.median([fastlr.RangeTestResult(LRS, noisy(PEAKS["bowl"], 0.05, s)).minimum for s in SEEDS])
    inside = []
    for seed in range(60):
        found = repeated([noisy(PEAKS["bowl"], 0.05, 1000 + 5 * seed + i) for i in range(5)])
        low, high = found.intervals["minimum"]
        inside.append(low <= truth <= high)
    assert np.mean(inside) > 0.85  # 94 % expected


def test_repeats_of_different_length_share_what_half_of_them_reached():
    curves = [PEAKS["bowl"].copy() for _ in range(4)]
    for curve, end in zip(curves, (150, 180, 190, 200), strict=True):
        curve[end:] = np.nan
    found = repeated(curves)
    assert len(found.lrs) == 190
    assert "(repeat 1)" in found.stopped
    assert found


def test_repeats_that_disagree_give_no_answer():
    low, high = PEAKS["bowl"], np.roll(PEAKS["bowl"], -90)
    low, high = low[:200], np.concatenate([high[:110], np.full(90, 9.0)])
    found = repeated([low, high, low])
    assert not found
    assert "the repeats disagree: max_lr between" in found.reason
    assert found.max_lr is None
    found = repeated([low, np.ones(200), np.ones(200)])
    assert "1 of 3 repeats give bounds: the loss improves nowhere" in found.reason


def test_results_of_different_kinds_are_no_repeats():
    one = FULL["plain"]()
    with pytest.raises(ValueError, match="of one sweep and metric"):
        fastlr.RangeTestResult.from_repeats([one, FULL["linear, with everything"]()])
    with pytest.raises(ValueError, match="one or more"):
        fastlr.RangeTestResult.from_repeats([])
    assert fastlr.RangeTestResult.from_repeats([one]) is one


def test_repeats_are_told_apart_in_the_csv_file(tmp_path):
    found = FULL["repeats"]()
    found.to_csv(tmp_path / "range.csv")
    with open(tmp_path / "range.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["repeat", "lr", "loss"]
    assert [float(r["loss"]) for r in rows if r["repeat"] == "2"] == found.repeats[1].losses.tolist()


def test_the_steepest_region_surrounds_the_steepest_rate():
    found = fastlr.RangeTestResult(LRS, falling(center=-2.6, steepness=4.0) + np.exp((U + 0.7) * 12))
    low, high = found.steepest_region
    # The slope of a logistic is half its largest where 4 * |u - center| = 2 * acosh(sqrt(2)).
    half = 2 * np.arccosh(np.sqrt(2)) / 4
    assert np.log10(low) == pytest.approx(-2.6 - half, abs=0.12)
    assert np.log10(high) == pytest.approx(-2.6 + half, abs=0.12)
    assert low < found.steepest < high
    rising = 0.1 + 0.8 / (1 + np.exp(-8 * (U + 3.0))) - 0.5 / (1 + np.exp(-12 * (U + 0.8)))
    by_accuracy = fastlr.RangeTestResult(LRS, PEAKS["bowl"], rising)
    assert np.log10(by_accuracy.steepest) == pytest.approx(-3.0, abs=0.1)


def test_a_metric_that_is_infinite_was_not_measured():
    metric = np.where(U < -0.5, -((U + 2) ** 2), -np.inf)
    found = fastlr.RangeTestResult(LRS, PEAKS["bowl"], metric)
    assert found.measured.sum() == (U < -0.5).sum()
    assert found.max_lr == pytest.approx(1e-2, rel=0.1)


# -- from test to training -----------------------------------------------------------------------------


def test_a_schedule_may_be_passed_by_position():
    found = FULL["plain"]()
    opt = fastlr.FusedSGD(torch.nn.Linear(1, 1).parameters())
    opt.set_schedule(found.triangular2(step_size_up=10))
    assert opt.param_groups[0]["lr"] == found.base_lr


def test_the_optimizer_says_why_it_takes_no_empty_answer():
    opt = fastlr.FusedSGD(torch.nn.Linear(1, 1).parameters())
    with pytest.raises(TypeError, match="gives no bounds: the loss improves nowhere"):
        opt.set_schedule(FULL["no answer"]())
    with pytest.raises(TypeError, match=r"pass its triangular2"):
        opt.set_schedule(FULL["plain"]())
    with pytest.raises(ValueError, match="gives no bounds: the loss improves nowhere"):
        fastlr.FusedCyclicSGD.from_range_test(torch.nn.Linear(1, 1).parameters(), FULL["no answer"]())


def test_a_cyclic_optimizer_is_made_from_a_result():
    found, model = FULL["plain"](), torch.nn.Linear(1, 1)
    opt = fastlr.FusedCyclicSGD.from_range_test(model.parameters(), found, 10, momentum=0.9)
    assert opt.param_groups[0]["lr_schedule"] == found.triangular2(10)
    opt = fastlr.FusedCyclicSGD.from_range_test(model.parameters(), found, 10, mode="exp_range", gamma=0.99)
    assert opt.param_groups[0]["lr_schedule"] == fastlr.ExpRange(found.base_lr, found.max_lr, 10, gamma=0.99)


def test_groups_get_bounds_of_their_own():
    model = torch.nn.Linear(2, 1)
    found = fastlr.RangeTestResult(LRS, PEAKS["bowl"], group_bounds=[(1e-5, 1.0), (1e-3, 0.1)])
    tops = [top for _, top in found.bounds()]
    part = np.log(tops[0] / 1e-5) / np.log(1e5)
    assert tops == pytest.approx([found.max_lr, 1e-3 * 100**part])
    assert found.group(1).max_lr == pytest.approx(tops[1])
    assert found.group(0).max_lr == pytest.approx(tops[0])
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    opt = fastlr.FusedCyclicSGD.from_range_test(groups, found, 10)
    assert [g["lr_schedule"].max for g in opt.param_groups] == tops
    with pytest.raises(ValueError, match="each of 2 groups has bounds of its own"):
        found.triangular2(10)
    with pytest.raises(ValueError, match=r"are 0 .. 1; got 2"):
        found.group(2)
    with pytest.raises(ValueError, match="all share their rates"):
        FULL["plain"]().group(0)


BAD_CURVES = {
    "lengths": (([1.0, 2.0], [1.0]), {}, "one length"),
    "two dimensions": (([[1.0]], [1.0]), {}, "one dimension"),
    "descending": (([2.0, 1.0], [1.0, 1.0]), {}, "ascending"),
    "repeated": (([1.0, 1.0], [1.0, 1.0]), {}, "ascending"),
    "zero on a log axis": (([0.0, 1.0], [1.0, 1.0]), {}, "> 0"),
    "negative": (([-1.0, 1.0], [1.0, 1.0]), {"sweep": "linear"}, ">= 0"),
    "infinite": (([1.0, np.inf], [1.0, 1.0]), {}, "finite"),
    "unknown sweep": (([1.0], [1.0]), {"sweep": "log"}, "sweep must be one of"),
}


@pytest.mark.parametrize(("curve", "options", "message"), BAD_CURVES.values(), ids=BAD_CURVES.keys())
def test_a_curve_that_is_none_is_refused(curve, options, message):
    with pytest.raises(ValueError, match=message):
        fastlr.RangeTestResult(*curve, **options)


def test_on_a_plateau_the_upper_bound_is_where_the_accuracy_stops_improving():
    x = np.linspace(-5, 0, 40)
    rises, falls = 1 / (1 + np.exp(-8 * (x + 2.5))), 1 / (1 + np.exp(-30 * (x + 0.3)))
    bounds, ends = [], []
    for seed in range(20):
        accuracies = 0.8 * (rises - falls) + np.random.default_rng(seed).normal(0, 0.01, 40)
        found = fastlr.RangeTestResult(10**x, 2.3 - 0.5 * rises + 2 * falls, accuracies)
        bounds.append(np.log10(found.max_lr))
        ends.append(x[np.nanargmax(found.smoothed_accuracies)])
    assert -2.3 < np.median(bounds) < -1.6
    assert np.median(ends) > -1.3  # where the very best lies: towards the plateau's far end


# -- real data -----------------------------------------------------------------------------------------


def test_bounds_found_on_digits_train_as_well_as_bounds_picked_by_hand(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    path = Path(__file__).parent.parent / "benchmarks" / "range_test.py"
    spec = importlib.util.spec_from_file_location("range_test_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "BY_HAND", [(0.0005, 0.005), (0.001, 0.01), (0.002, 0.02)])
    torch.set_num_threads(1)
    compared = benchmark.compare("digits", seeds=5)
    assert compared["points between them"] > -0.5
