"""Plans: the sizes, rates and numbers of updates of Smith et al., and the noise scale at every sample."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlr
from fastlr import BatchPlan

N = 50_000
FIFTHS = fastlr.MultiStep(0.1, [60, 120, 160], 0.2, unit="epoch")
PAPER: dict[str, Any] = {"batch_size": 128, "dataset_size": N, "epochs": 200, "momentum": 0.9}


def paper_plan(**options: Any) -> BatchPlan:
    return BatchPlan.from_schedule(FIFTHS, **PAPER, **options)


# -- the table of arXiv 1711.00489 ---------------------------------------------------------------

# Options; batch sizes, rates and momentum by phase; updates; what the paper reports. Counted with
# tail="carry": an update goes on over an epoch's end, and one that a phase's end cuts counts as one, so that
# a phase of n samples has ceil(n / B).
TABLE = {
    "decay": (
        {"mode": "decay"},
        ([128] * 4, [0.1, 0.02, 0.004, 0.0008], 0.9),
        78_126, "about 80,000",
    ),
    "hybrid": (
        {"mode": "hybrid"},
        ([128, 640, 640, 640], [0.1, 0.1, 0.02, 0.004], 0.9),
        34_376, "same curve",
    ),
    "increase": (
        {"max_batch_size": 5120},
        ([128, 640, 3200, 5120], [0.1, 0.1, 0.1, 0.032], 0.9),
        29_142, "about 29,000",
    ),
    "increase without a cap": (
        {},
        ([128, 640, 3200, 16_000], [0.1] * 4, 0.9),
        28_876, "about 29,000",
    ),
    "raised rate": (
        {"max_batch_size": 5120, "lr_scale": 5.0},
        ([640, 3200, 5120, 5120], [0.5, 0.5, 0.16, 0.032], 0.9),
        6_408, "under 6,500",
    ),
    "raised momentum": (
        {"max_batch_size": 5120, "lr_scale": 5.0, "raised_momentum": 0.98},
        ([3200, 5120, 5120, 5120], [0.5, 0.16, 0.032, 0.0064], 0.98),
        2_306, "under 2,500",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "phases", "updates", "paper"), TABLE.values(), ids=TABLE.keys())
def test_the_papers_table(
    options: dict[str, Any], phases: tuple[list[int], list[float], float], updates: int, paper: str
) -> None:
    plan = paper_plan(**options)
    sizes, rates, momentum = phases
    assert [phase.batch_size for phase in plan.phases] == sizes
    assert [phase.start_sample for phase in plan.phases] == [0, 60 * N, 120 * N, 160 * N]
    assert [phase.lr for phase in plan.phases] == pytest.approx(rates, rel=1e-12)
    assert {phase.momentum for phase in plan.phases} == {momentum}
    assert plan.total_updates == updates
    assert plan.total_updates == sum(1 for _ in plan.updates_from())
    spans = zip([60, 60, 40, 40], sizes, strict=True)
    assert plan.total_updates == sum(math.ceil(epochs * N / size) for epochs, size in spans)
    number = int(paper.replace(",", "").split()[-1]) if paper != "same curve" else None
    if paper.startswith("under"):
        assert updates < number
    elif number:
        assert abs(updates - number) < 0.025 * number


def test_a_rate_that_is_not_decayed_stays_the_same_to_the_bit() -> None:
    plan = paper_plan(max_batch_size=5120)
    assert {phase.lr for phase in plan.phases[:3]} == {0.1}
    assert {phase.last_lr for phase in plan.phases[:3]} == {0.1}


@pytest.mark.parametrize(
    ("tail", "updates"),
    # At 128 an epoch of 50,000 has 390 full batches and one of 80; at 640 78 and one of 80.
    [("carry", 23_438 + 10_938), ("keep", 60 * 391 + 140 * 79), ("drop", 60 * 390 + 140 * 78)],
)
def test_tail_rules_count(tail: str, updates: int) -> None:
    plan = BatchPlan.from_phases([(0, 128), (60, 640)], dataset_size=N, epochs=200, lr=0.1, tail=tail)
    assert plan.total_updates == updates == sum(1 for _ in plan.updates_from())


# -- square-root scaling, worked out by hand -------------------------------------------------------

# A decay by f is a batch larger by 1 / f**2, and a batch larger by k a rate higher by sqrt(k).
HALVES = fastlr.MultiStep(0.08, [1, 2, 3], 0.5, unit="epoch")
ADAM: dict[str, Any] = {"batch_size": 4, "dataset_size": 1024, "epochs": 4, "momentum": 0.9,
                        "scaling": "sqrt"}  # fmt: skip
SQUARE_ROOT = {
    "increase": ({}, [4, 16, 64, 256], [0.08] * 4),
    "decay": ({"mode": "decay"}, [4] * 4, [0.08, 0.04, 0.02, 0.01]),
    # Of the batch's 64 the cap takes 36, which is a rate of 0.02 * sqrt(36 / 4), then of 0.01 * 3.
    "capped": ({"max_batch_size": 36}, [4, 16, 36, 36], [0.08, 0.08, 0.06, 0.03]),
    "hybrid": ({"mode": "hybrid"}, [4, 16, 16, 16], [0.08, 0.08, 0.04, 0.02]),
    "hybrid, two drops": (
        {"mode": "hybrid", "hybrid_drops": 2}, [4, 16, 64, 64], [0.08, 0.08, 0.08, 0.04]),
    # Multiples of 12 up to 16 and 64 are 12 and 60: rates of 0.04 * sqrt(3) and 0.02 * sqrt(15).
    "coarse": (
        {"granularity": 12, "max_batch_size": 100},
        [4, 12, 60, 100], [0.08, 0.04 * 3**0.5, 0.02 * 15**0.5, 0.01 * 5]),
    # Twice the rate is four times the batch.
    "raised": ({"lr_scale": 2.0}, [16, 64, 256, 1024], [0.16] * 4),
    "raised, capped": ({"lr_scale": 2.0, "max_batch_size": 100}, [16, 64, 100, 100], [0.16, 0.16, 0.1, 0.05]),
    "raised, rate alone": ({"lr_scale": 2.0, "batch_scale": "none"}, [4, 16, 64, 256], [0.16] * 4),
    "raised, batch in proportion": (
        {"lr_scale": 2.0, "batch_scale": "linear"}, [8, 32, 128, 512], [0.16] * 4),
    "raised, batch by the root": ({"lr_scale": 4.0, "batch_scale": "sqrt"}, [8, 32, 128, 512], [0.32] * 4),
}  # fmt: skip


@pytest.mark.parametrize(("options", "sizes", "rates"), SQUARE_ROOT.values(), ids=SQUARE_ROOT.keys())
def test_square_root_scaling(options: dict[str, Any], sizes: list[int], rates: list[float]) -> None:
    plan = BatchPlan.from_schedule(HALVES, **ADAM, **options)
    samples = [0, 1024, 2048, 3072]
    assert [plan.phase_at(sample).batch_size for sample in samples] == sizes
    assert [plan.lr(sample) for sample in samples] == pytest.approx(rates, rel=1e-12)
    assert [plan.momentum(sample) for sample in samples] == [0.9] * 4
    # lr * sqrt(N / B), without momentum.
    noise = [rate * (1024 / size) ** 0.5 for rate, size in zip(rates, sizes, strict=True)]
    assert [plan.noise_scale(sample) for sample in samples] == pytest.approx(noise, rel=1e-12)
    assert [plan.phase_at(sample).noise_scale for sample in samples] == pytest.approx(noise, rel=1e-12)


def test_a_rate_that_square_root_scaling_keeps_is_the_same_to_the_bit() -> None:
    plan = BatchPlan.from_schedule(FIFTHS, **PAPER, scaling="sqrt", max_batch_size=12_800)
    assert plan.batch_sizes == (128, 3200, 12_800, 12_800)
    assert {plan.phases[0].lr, plan.phases[1].lr} == {0.1}
    # 0.1 / 25 * sqrt(100) and 0.1 / 125 * sqrt(100)
    assert [phase.lr for phase in plan.phases[2:]] == pytest.approx([0.04, 0.008], rel=1e-12)


@pytest.mark.parametrize("mode", ["increase", "decay"])
def test_without_a_growing_batch_the_scalings_agree(mode: str) -> None:
    kept = {"mode": mode, "max_batch_size": 128}
    linear, root = (paper_plan(**kept, scaling=scaling) for scaling in ("linear", "sqrt"))
    assert linear == paper_plan(**kept)
    assert linear != root
    assert (linear.starts, linear.batch_sizes) == (root.starts, root.batch_sizes)
    assert linear.lr.values(0, 1000).tobytes() == root.lr.values(0, 1000).tobytes()
    assert [phase.lr for phase in linear.phases] == [phase.lr for phase in root.phases]


def test_scaling_goes_where_the_plan_goes() -> None:
    plan = BatchPlan.from_schedule(HALVES, **ADAM)
    state = plan.to_dict()
    assert state["scaling"] == "sqrt"
    assert BatchPlan.from_dict(json.loads(json.dumps(state))) == plan == pickle.loads(pickle.dumps(plan))
    assert BatchPlan.from_dict({**state, "scaling": "linear"}) != plan
    old = {name: value for name, value in state.items() if name != "scaling"}
    assert BatchPlan.from_dict(old).scaling == "linear"  # of a file that knows none
    assert "Batch plan (increase, sqrt scaling): 4 epochs" in str(plan)
    assert "scaling" not in str(paper_plan())
    grown = plan.grown(0, 64)
    assert (grown.scaling, grown.lr) == ("sqrt", plan.lr)
    assert grown.noise_scale(0) == pytest.approx(plan.noise_scale(0) / 4)  # 16 times the batch
    by_hand = BatchPlan.from_phases([(0, 4), (1, 64)], dataset_size=1024, epochs=2, lr=0.5, scaling="sqrt")
    assert [phase.noise_scale for phase in by_hand.phases] == [8.0, 2.0]


# -- schedules of every kind -----------------------------------------------------------------------

SMALL: dict[str, Any] = {"batch_size": 8, "dataset_size": 500, "epochs": 40, "momentum": 0.8}
SCHEDULES = {
    "cosine by epochs": fastlr.Cosine(0.1, 0.001, 40, unit="epoch"),
    "cosine by updates": fastlr.Cosine(0.1, 0.001, 2500),
    "cosine by samples": fastlr.Cosine(0.1, 0.001, 20_000, unit="sample"),
    "cosine to zero": fastlr.Cosine(0.1, 0.0, 20_000, unit="sample"),
    "exponential": fastlr.Exponential(0.1, 0.9, unit="epoch"),
    "time-based": fastlr.TimeBased(0.1, 0.001, unit="sample"),
    "steps in updates": fastlr.StepDecay(0.1, every=700, gamma=0.5),
    "steps in samples": fastlr.MultiStep(0.1, [3333, 7777], 0.3, unit="sample"),
    "warm-up, then cosine": fastlr.LinearRamp(0.01, 0.1, 2000, unit="sample").then(
        fastlr.Cosine(0.1, 0.0, 18_000, unit="sample")
    ),
    "one-cycle": fastlr.OneCycle(0.1, 2500, pct_start=0.2),
    "plateau, then decay": fastlr.Constant(0.1, unit="sample").then(
        fastlr.Polynomial(0.1, 0.01, 9_999, 2.0, unit="sample"), at=10_001
    ),
    "constant": fastlr.Constant(0.1, unit="epoch"),
    "a table": fastlr.Tabulated([0.1] * 10 + [0.05] * 10 + [0.01] * 20, unit="epoch"),
}
OPTIONS = {
    "increase": {"max_batch_size": 100},
    "fine": {"max_batch_size": 64, "granularity": 1},
    "hybrid": {"mode": "hybrid", "hybrid_drops": 2, "max_batch_size": 100},
    "decay": {"mode": "decay"},
    "raised": {"max_batch_size": 64, "lr_scale": 3.0, "raised_momentum": 0.9},
    "square root": {"max_batch_size": 64, "lr_scale": 4.0, "batch_scale": "sqrt"},
    "rate alone": {"max_batch_size": 64, "lr_scale": 4.0, "batch_scale": "none"},
}
ADAPTIVE = {
    "increase": {"max_batch_size": 100},
    "fine": {"max_batch_size": 64, "granularity": 1},
    "hybrid": {"mode": "hybrid", "hybrid_drops": 2, "max_batch_size": 100},
    "decay": {"mode": "decay"},
    "raised": {"max_batch_size": 100, "lr_scale": 3.0},
    "in proportion": {"max_batch_size": 100, "lr_scale": 4.0, "batch_scale": "linear"},
}


@pytest.mark.filterwarnings("ignore:.*holds its last value:UserWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_noise_scale_is_the_schedules_at_every_sample(
    schedule: fastlr.Schedule, options: dict[str, Any]
) -> None:
    plan = BatchPlan.from_schedule(schedule, **SMALL, **options)
    samples = np.unique(np.concatenate([np.arange(0, 20_000, 37), plan.starts]))
    per_tick = {"epoch": 500, "update": 8, "sample": 1}[schedule.unit]
    gain = {"sqrt": 2.0, "none": 4.0}.get(options.get("batch_scale", ""), 1.0)
    for sample in samples.tolist():
        given = schedule(sample // per_tick) * 500 / (8 * (1 - 0.8)) * gain
        assert plan.noise_scale(sample) == pytest.approx(given, rel=1e-8, abs=1e-12)
    sizes = list(plan.batch_sizes)
    assert sizes == sorted(sizes)
    assert sizes[-1] <= options.get("max_batch_size", 8)
    if options.get("mode") == "hybrid":
        assert len(set(sizes)) <= 3
    # The rate is never above the raised start, and the batch is the largest allowed one.
    top = 0.1 * options.get("lr_scale", 1.0)
    assert plan.lr.values(0, 20_000).max() <= top * (1 + 1e-8)


@pytest.mark.filterwarnings("ignore:.*holds its last value:UserWarning")
@pytest.mark.parametrize("options", ADAPTIVE.values(), ids=ADAPTIVE.keys())
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_of_adaptive_rules_the_rate_over_the_batchs_root_is_the_schedules(
    schedule: fastlr.Schedule, options: dict[str, Any]
) -> None:
    plan = BatchPlan.from_schedule(schedule, **SMALL, **options, scaling="sqrt")
    per_tick = {"epoch": 500, "update": 8, "sample": 1}[schedule.unit]
    gain = 2.0 if "batch_scale" in options else 1.0  # 4 times the rate, for twice the batch's root
    for sample in np.unique(np.concatenate([np.arange(0, 20_000, 37), plan.starts])).tolist():
        given = schedule(sample // per_tick) / 8**0.5 * gain
        taken = plan.lr(sample) / plan.phase_at(sample).batch_size ** 0.5
        assert taken == pytest.approx(given, rel=1e-8, abs=1e-12)
        assert plan.noise_scale(sample) == pytest.approx(given * 500**0.5, rel=1e-8, abs=1e-12)
    assert list(plan.batch_sizes) == sorted(plan.batch_sizes)
    assert plan.batch_sizes[-1] <= options.get("max_batch_size", 8)
    if options.get("mode") == "hybrid":
        assert len(set(plan.batch_sizes)) <= 3
    assert plan.lr.values(0, 20_000).max() <= 0.1 * options.get("lr_scale", 1.0) * (1 + 1e-8)


@pytest.mark.filterwarnings("ignore:.*holds its last value:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_saved_plans_are_the_same(schedule: fastlr.Schedule) -> None:
    plan = BatchPlan.from_schedule(schedule, **SMALL, max_batch_size=100)
    loaded = BatchPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert loaded == plan == pickle.loads(pickle.dumps(plan))
    assert loaded.lr.values(0, 20_000).tobytes() == plan.lr.values(0, 20_000).tobytes()
    assert hash(loaded) == hash(plan)


def test_a_step_takes_effect_at_its_sample_and_smooth_growth_between_updates() -> None:
    steps = BatchPlan.from_schedule(SCHEDULES["steps in samples"], **SMALL, granularity=1)
    assert steps.starts == (0, 3333, 7777)
    assert steps.batch_sizes == (8, 26, 88)
    assert steps.phases[1].lr == pytest.approx(0.03 * 26 / 8)  # 26.67 is exact: the rate takes the rest
    smooth = BatchPlan.from_schedule(SCHEDULES["cosine by samples"], **SMALL, max_batch_size=40)
    sizes = dict(zip(smooth.starts, smooth.batch_sizes, strict=True))
    assert set(sizes.values()) == {8, 16, 24, 32, 40}
    assert all(update.size == update.batch_size for update in list(smooth.updates_from())[:-1])


def test_growth_follows_the_drop_of_a_smooth_schedule_closely() -> None:
    plan = BatchPlan.from_schedule(SCHEDULES["cosine by samples"], **SMALL, max_batch_size=64, granularity=1)
    for sample in range(0, 20_000, 97):
        exact = min(8 * 0.1 / SCHEDULES["cosine by samples"](sample), 64)
        taken = plan.phase_at(sample).batch_size
        late = SCHEDULES["cosine by samples"](max(sample - taken, 0))
        assert min(math.floor(8 * 0.1 / late), 64) <= taken <= exact * (1 + 1e-9)


def test_a_warm_up_keeps_the_batch() -> None:
    plan = BatchPlan.from_schedule(SCHEDULES["warm-up, then cosine"], **SMALL, max_batch_size=64)
    assert {plan.phase_at(sample).batch_size for sample in range(0, 2000, 50)} == {8}
    assert plan.lr(0) == pytest.approx(0.01)
    assert plan.lr(1000) == pytest.approx(0.055)


def test_hand_written_phases() -> None:
    plan = BatchPlan.from_phases(
        [(0, 32), (0.5, 16), (1.25, 64)],
        dataset_size=100, epochs=2, lr=fastlr.StepDecay(0.1, 1, 0.5, unit="epoch"), momentum=0.9,
    )  # fmt: skip
    assert [(p.start_sample, p.stop_sample, p.batch_size) for p in plan.phases] == [
        (0, 50, 32), (50, 125, 16), (125, 200, 64),
    ]  # fmt: skip
    assert (plan.lr(99), plan.lr(100), plan.momentum(150)) == (0.1, 0.05, 0.9)


def test_an_optimizer_reads_a_plan() -> None:
    import torch

    plan = paper_plan(max_batch_size=5120)
    opt = fastlr.FusedSGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.lr, momentum=plan.momentum)
    opt.advance_samples(160 * N - 1)
    assert opt.param_groups[0]["lr"] == 0.1
    opt.advance_samples(1)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.032)
    assert opt.param_groups[0]["momentum"] == 0.9


# -- what is shown -----------------------------------------------------------------------------------


def test_print_shows_phases_and_totals() -> None:
    text = str(paper_plan(max_batch_size=5120, micro_batch_size=256, ranks=2))
    lines = text.splitlines()
    assert [row.split()[0] for row in lines[4:8]] == ["0", "60", "120", "160"]
    cells = lines[6].split("  ")
    assert [cell.strip() for cell in cells if cell.strip()] == [
        "120", "2,000,000", "3,200", "200 x 8 x 2", "0.1", "0.9", "15.63", "625",
    ]  # fmt: skip
    assert lines[9].split() == ["total", "10,000,000", "29,142"]
    assert "78,125 updates, 2.7 times as many" in lines[10]
    assert max(map(len, lines)) <= 110


def test_the_guide_shows_what_is_printed() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "growing.md").read_text("utf-8")
    assert f"```\n{paper_plan(max_batch_size=5120, micro_batch_size=256)}\n```" in guide
    for _, _, updates, _ in TABLE.values():
        assert f"| {updates:,} |" in guide or updates == 28_876


def test_a_long_plan_stays_readable() -> None:
    plan = BatchPlan.from_schedule(SCHEDULES["cosine by epochs"], **SMALL, granularity=1, max_batch_size=500)
    assert len(str(plan).splitlines()) < 40
    many = BatchPlan.from_phases(
        [(k / 100, 1 + k % 7) for k in range(100)], dataset_size=500, epochs=1, lr=1.0
    )
    assert "68 of 100 batch sizes are not shown." in str(many)


def test_a_plan_can_be_drawn() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    figure = paper_plan(max_batch_size=5120).plot()
    figure.canvas.draw()
    batches, rates, scales = figure.axes
    line = batches.lines[0]
    assert sorted(set(line.get_ydata())) == [128, 640, 3200, 5120]
    drop = line.get_xdata()[line.get_ydata() > 128][0]
    assert drop == 60
    assert rates.lines[0].get_ydata().min() == pytest.approx(0.032)
    assert scales.lines[0].get_ydata()[-1] == pytest.approx(3.125)
    assert scales.get_xlabel() == "epochs"
    drawn = BatchPlan.from_schedule(HALVES, **ADAM).plot()
    assert drawn.axes[0].get_title(loc="left").startswith("Batch plan (increase, sqrt scaling):")
    assert drawn.axes[2].lines[0].get_ydata()[0] == 0.08 * 16


# -- any plan ----------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    size, epochs = draw(st.integers(5, 60)), draw(st.integers(1, 5))
    starts = sorted(draw(st.sets(st.integers(1, size * epochs - 1), max_size=4)))
    sizes = [draw(st.integers(1, size)) for _ in range(len(starts) + 1)]
    tail = draw(st.sampled_from(["carry", "keep"]))
    lr = fastlr.Constant(0.1, unit="sample")
    return BatchPlan((0, *starts), tuple(sizes), lr, lr, size, epochs, tail)


@settings(deadline=None)
@given(plans())
def test_updates_cover_every_sample_once_and_change_at_the_named_sample(plan: BatchPlan) -> None:
    updates = list(plan.updates_from())
    end = 0
    for update in updates:
        assert update.start == end
        end += update.size
        assert update.next_start == end
        phase = plan.phase_at(update.start)
        assert update.batch_size == phase.batch_size
        assert end <= phase.stop_sample
        cut = end == phase.stop_sample or (plan.tail == "keep" and end % plan.dataset_size == 0)
        assert update.size == phase.batch_size or (cut and update.size < phase.batch_size)
        if plan.tail == "keep":
            assert update.start // plan.dataset_size == (end - 1) // plan.dataset_size
    assert end == plan.total_samples
    assert len(updates) == plan.total_updates == sum(phase.updates for phase in plan.phases)
    assert set(plan.starts) <= {update.start for update in updates}


@settings(deadline=None)
@given(plans(), st.data())
def test_updates_from_anywhere_are_the_same(plan: BatchPlan, data: st.DataObject) -> None:
    updates = list(plan.updates_from())
    k = data.draw(st.integers(0, len(updates) - 1))
    assert list(plan.updates_from(updates[k].start)) == updates[k:]
    size = data.draw(st.integers(1, plan.dataset_size))
    grown = plan.grown(updates[k].start, size)
    before = [(update.start, update.size) for update in grown.updates_from()][:k]
    assert before == [(update.start, update.size) for update in updates[:k]]
    assert all(u.batch_size >= size for u in grown.updates_from(updates[k].start))


# -- bad input ---------------------------------------------------------------------------------------

BAD = {
    "max below start": (lambda: paper_plan(max_batch_size=100), r"max_batch_size must be >= .*128, got 100"),
    "max below the raised start": (
        lambda: paper_plan(max_batch_size=512, lr_scale=5.0), r"max_batch_size must be >= .*640, got 512"),
    "rises": (
        lambda: BatchPlan.from_schedule(fastlr.CosineWarmRestarts(0.1, 0.0, 10, unit="epoch"), **PAPER),
        r"rises at sample 500,000 \(epoch 10\) after its peak.*only falls"),
    "falls to zero without a cap": (
        lambda: BatchPlan.from_schedule(fastlr.Cosine(0.1, 0.0, 199, unit="epoch"), **PAPER),
        r"more than the data set's 50,000 samples; give a smaller batch_size or max_batch_size"),
    "zero throughout": (
        lambda: BatchPlan.from_schedule(fastlr.Constant(0.0), **PAPER), "the schedule is 0 throughout"),
    "no schedule": (lambda: BatchPlan.from_schedule(0.1, **PAPER), "schedule must be a schedule, got 0.1"),
    "mode": (lambda: paper_plan(mode="grow"), "mode must be one of increase, hybrid, decay, got 'grow'"),
    "hybrid_drops": (lambda: paper_plan(mode="hybrid", hybrid_drops=0), "hybrid_drops must be .* >= 1"),
    "hybrid_drops elsewhere": (lambda: paper_plan(hybrid_drops=2), 'hybrid_drops needs mode="hybrid"'),
    "lr_scale": (lambda: paper_plan(lr_scale=0.5), "lr_scale must be a finite number >= 1, got 0.5"),
    "batch_scale": (lambda: paper_plan(batch_scale="log"), "batch_scale must be one of linear, sqrt, none"),
    "scaling": (
        lambda: paper_plan(scaling="log"), "scaling must be one of linear, sqrt, got 'log'"),
    "scaling by hand": (
        lambda: BatchPlan.from_phases([(0, 8)], dataset_size=100, epochs=3, lr=0.1, scaling="none"),
        "scaling must be one of linear, sqrt, got 'none'"),
    "raised momentum of an adaptive rule": (
        lambda: paper_plan(scaling="sqrt", raised_momentum=0.98),
        'raised_momentum needs scaling="linear".*leave it out, got 0.98'),
    "a square above the data set": (
        lambda: paper_plan(scaling="sqrt"),
        "batch size at sample 6,000,000 would be 80,000, more than the data set's .*max_batch_size"),
    "a square beyond any data set": (
        lambda: paper_plan(scaling="sqrt", lr_scale=1e200),
        r"first batch must .* lr_scale=1e\+200 makes it inf"),
    "lower momentum": (lambda: paper_plan(raised_momentum=0.5), r"must be .*\[0.9, 1\), got 0.5"),
    "momentum 1": (lambda: paper_plan(raised_momentum=1.0), r"raised_momentum must be .*\[0.9, 1\)"),
    "batch of no samples": (
        lambda: BatchPlan.from_schedule(FIFTHS, **{**PAPER, "batch_size": 0}),
        "batch_size must be an integer >= 1, got 0"),
    "zero-sample phase": (
        lambda: BatchPlan.from_phases([(0, 8), (1, 16), (1, 32)], dataset_size=100, epochs=2, lr=0.1),
        "phase 1 has no samples: it starts at sample 100, and the next one at 100"),
    "phases that do not ascend": (
        lambda: BatchPlan.from_phases([(0, 8), (2, 16), (1, 32)], dataset_size=100, epochs=3, lr=0.1),
        "phase 1 has no samples"),
    "phases begin late": (
        lambda: BatchPlan.from_phases([(1, 8)], dataset_size=100, epochs=3, lr=0.1),
        "the first phase must start at sample 0, got 100"),
    "phase after the run": (
        lambda: BatchPlan.from_phases([(0, 8), (3, 16)], dataset_size=100, epochs=3, lr=0.1),
        "the last phase starts at sample 300, but the run ends at 300"),
    "no phases": (
        lambda: BatchPlan.from_phases([], dataset_size=100, epochs=3, lr=0.1), "each phase needs a start"),
    "not pairs": (
        lambda: BatchPlan.from_phases([8], dataset_size=100, epochs=3, lr=0.1), r"must be pairs"),
    "batch above the data set": (
        lambda: BatchPlan.from_phases([(0, 101)], dataset_size=100, epochs=3, lr=0.1),
        "batch size at sample 0 would be 101, more than the data set's 100"),
    "phase with nothing but a tail": (
        lambda: BatchPlan.from_phases([(0, 8), (2.9, 64)], dataset_size=100, epochs=3, lr=0.1, tail="drop"),
        "phase 1, from sample 290 with batch size 64, has no update"),
    "tail": (
        lambda: BatchPlan.from_phases([(0, 8)], dataset_size=100, epochs=3, lr=0.1, tail="cut"),
        "tail must be one of carry, keep, drop, got 'cut'"),
    "rate in updates": (
        lambda: BatchPlan.from_phases([(0, 8)], dataset_size=100, epochs=3, lr=fastlr.Constant(0.1)),
        "lr of phases with batches of several sizes cannot count updates"),
    "momentum above 1": (
        lambda: BatchPlan.from_phases([(0, 8)], dataset_size=100, epochs=3, lr=0.1, momentum=1.0),
        r"momentum must stay in \[0, 1\)"),
    "ranks": (
        lambda: paper_plan(max_batch_size=5120, ranks=3),
        "128 samples cannot be shared evenly between 3 ranks; .* multiples of 3, such as 126 or 129"),
    "micro-batches": (
        lambda: BatchPlan.from_phases([(0, 97)], dataset_size=100, epochs=1, lr=0.1, micro_batch_size=16),
        "a batch of 97 samples on 1 rank cannot be cut .*multiples of 16, such as 96 or 112"),
    "not a plan's dict": (lambda: BatchPlan.from_dict({"starts": [0]}), "must be what BatchPlan.to_dict"),
    "past the run": (lambda: paper_plan().phase_at(200 * N), "the run ends at sample 10,000,000"),
    "no update there": (
        lambda: next(paper_plan().updates_from(1)), "no update of the plan begins at sample 1"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_schedule_that_ends_early_warns() -> None:
    with pytest.warns(UserWarning, match="ended at epoch 9 and holds its last value"):
        BatchPlan.from_schedule(fastlr.Tabulated([0.1] * 10, unit="epoch"), **SMALL)


def test_a_plan_of_many_phases_is_told_in_a_line() -> None:
    smooth = fastlr.Cosine(0.1, 0.001, 200, unit="epoch")
    plan = BatchPlan.from_schedule(smooth, batch_size=16, dataset_size=N, epochs=200)
    assert repr(plan) == (
        f"<BatchPlan of 200 phases, batch 16 from sample 0 to batch {plan.batch_sizes[-1]:,} from sample "
        f"9,950,000; 200 epochs of 50,000 samples, {plan.total_updates:,} updates>"
    )


def test_a_plan_of_few_phases_is_written_as_in_code() -> None:
    plan = paper_plan()
    assert eval(repr(plan), vars(fastlr.schedules) | {"BatchPlan": BatchPlan}) == plan
