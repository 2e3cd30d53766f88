"""Schedules against PyTorch's own schedulers, stepped in a loop.

Where PyTorch computes the value from the step count, ours is the same double. Where it multiplies its
last value, it drifts, and the difference is bounded relative to the peak.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import fastlr

STEPS = 10_000


def stepped(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], count: int, lr: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """The learning rates and momenta of a scheduler's first ``count`` updates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    optimizer.step()  # else PyTorch warns that the scheduler was stepped first
    group = optimizer.param_groups[0]
    seen = []
    for _ in range(count - 1):
        seen.append((group["lr"], group["momentum"]))
        scheduler.step()
    seen.append((group["lr"], group["momentum"]))
    lrs, momenta = np.array(seen).T
    return lrs, momenta


def assert_same(schedule: fastlr.Schedule, expected: np.ndarray) -> None:
    values = schedule.values(0, len(expected))
    different = np.flatnonzero(values != expected)
    assert not different.size, (
        f"first of {different.size} differences: {schedule!r} says {values[different[0]]!r} at "
        f"{different[0]}, PyTorch {expected[different[0]]!r}"
    )


def assert_rounds_the_same(schedule: fastlr.Schedule, expected: np.ndarray) -> None:
    """The same float32 for the update; in float64 as near as PyTorch's own cosines are to exact ones."""
    values = schedule.values(0, len(expected))
    assert np.abs(values - expected).max() <= 4 * np.finfo(float).eps * expected.max()
    assert np.array_equal(values.astype(np.float32), expected.astype(np.float32))


# -- CyclicLR: the same bits ------------------------------------------------------------------------------

SIZES = {
    "symmetric": (2000, None),
    "slow-down": (100, 300),
    "odd": (7, 3),
    "fractional": (12.5, 40.25),
    "thirds": (1000 / 3, 500 / 7),
    "almost-a-jump": (33.3, 0.1),
    "long": (6000, 9000),
}
MODES = {
    "triangular": (fastlr.Triangular, {}),
    "triangular2": (fastlr.Triangular2, {}),
    "exp_range": (fastlr.ExpRange, {"gamma": 0.99994}),
    "exp_range-fast": (fastlr.ExpRange, {"gamma": 0.9}),
    "exp_range-1": (fastlr.ExpRange, {"gamma": 1.0}),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("mode", MODES.keys())
def test_cyclic(mode: str, sizes: tuple[float, float | None]) -> None:
    policy, options = MODES[mode]
    lrs, momenta = stepped(
        lambda optimizer: lr_scheduler.CyclicLR(
            optimizer,
            base_lr=0.001,
            max_lr=0.006,
            step_size_up=sizes[0],
            step_size_down=sizes[1],
            mode=mode.split("-")[0],
            base_momentum=0.8,
            max_momentum=0.9,
            **options,
        ),
        STEPS + 1,
    )
    assert_same(policy(0.001, 0.006, *sizes, **options), lrs)
    assert_same(policy(0.8, 0.9, *sizes, inverted=True, **options), momenta)


@pytest.mark.parametrize("mode", ["triangular", "exp_range-fast"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (0.5, 0.5), (0.3, 0.9)], ids=str)
def test_cyclic_of_a_few_updates(mode: str, sizes: tuple[float, float]) -> None:
    policy, options = MODES[mode]
    lrs, _ = stepped(
        lambda optimizer: lr_scheduler.CyclicLR(
            optimizer, 0.01, 0.07, *sizes, mode=mode.split("-")[0], cycle_momentum=False, **options
        ),
        STEPS + 1,
    )
    assert_same(policy(0.01, 0.07, *sizes, **options), lrs)


# -- OneCycleLR and CosineAnnealingWarmRestarts: the same updates -------------------------------------------

PHASES = {
    "default": (10_001, 0.3),
    "thirds": (10_007, 1 / 3),
    "short-rise": (12_345, 0.0123),
    "two-updates-up": (10_000, 2.5 / 10_000),
    "half": (10_010, 0.5),
}


@pytest.mark.parametrize(("total_steps", "pct_start"), PHASES.values(), ids=PHASES.keys())
@pytest.mark.parametrize("three_phase", [False, True], ids=["two-phase", "three-phase"])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_one_cycle(anneal: str, three_phase: bool, total_steps: int, pct_start: float) -> None:
    check_one_cycle(anneal, three_phase, total_steps, pct_start)


@pytest.mark.parametrize("pct_start", [0.9, 1.0])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_one_cycle_that_mostly_rises(anneal: str, pct_start: float) -> None:
    check_one_cycle(anneal, False, 10_000, pct_start)


def check_one_cycle(anneal: str, three_phase: bool, total_steps: int, pct_start: float) -> None:
    shared = {
        "max_lr": 0.37,
        "total_steps": total_steps,
        "pct_start": pct_start,
        "anneal_strategy": anneal,
        "div_factor": 23.0,
        "final_div_factor": 1e3,
        "three_phase": three_phase,
        "base_momentum": 0.83,
        "max_momentum": 0.96,
    }
    lrs, momenta = stepped(
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, cycle_momentum=True, **shared), total_steps
    )
    lr, momentum = fastlr.one_cycle(**shared)
    same = assert_rounds_the_same if anneal == "cos" else assert_same
    same(lr, lrs)
    same(momentum, momenta)


@pytest.mark.parametrize("mult", [1, 2, 3])
@pytest.mark.parametrize("first_period", [1, 50, 777, 20_000])
def test_cosine_warm_restarts(first_period: int, mult: int) -> None:
    lrs, _ = stepped(
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, first_period, mult, eta_min=0.0003
        ),
        STEPS + 1,
    )
    assert_rounds_the_same(fastlr.CosineWarmRestarts(0.1, 0.0003, first_period, mult), lrs)


# -- schedulers that multiply their last value --------------------------------------------------------------

CHAINED = {
    "StepLR": (
        lambda optimizer: lr_scheduler.StepLR(optimizer, 300, 0.7),
        fastlr.StepDecay(0.1, 300, 0.7),
        1e-12,
    ),
    "StepLR-every-update": (
        lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.9997),
        fastlr.StepDecay(0.1, 1, 0.9997),
        1e-12,
    ),
    "MultiStepLR": (
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 60, 120, 120, 5000, 10_000], 0.3),
        fastlr.MultiStep(0.1, [1, 60, 120, 120, 5000, 10_000], 0.3),
        1e-12,
    ),
    "ExponentialLR": (
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9998),
        fastlr.Exponential(0.1, 0.9998),
        1e-12,
    ),
    "LinearLR-up": (
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.25, 1.0, STEPS),
        fastlr.LinearRamp(0.025, 0.1, STEPS),
        1e-12,
    ),
    "LinearLR-down": (
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 7777),
        fastlr.LinearRamp(0.1, 0.001, 7777),
        1e-12,
    ),
    "PolynomialLR-1": (
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, STEPS, 1.0),
        fastlr.Polynomial(0.1, 0.0, STEPS, 1.0),
        1e-12,
    ),
    "PolynomialLR-2.5": (
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 7777, 2.5),
        fastlr.Polynomial(0.1, 0.0, 7777, 2.5),
        1e-12,
    ),
    "PolynomialLR-0.5": (
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, STEPS, 0.5),
        fastlr.Polynomial(0.1, 0.0, STEPS, 0.5),
        1e-12,
    ),
    "CosineAnnealingLR": (
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        fastlr.Cosine(0.1, 0.0, STEPS),
        1e-11,
    ),
    "CosineAnnealingLR-eta_min": (
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.01),
        fastlr.Cosine(0.1, 0.01, STEPS),
        1e-11,
    ),
    "ConstantLR": (
        lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.25, 400),
        fastlr.Constant(0.025).then(fastlr.Constant(0.1), at=400),
        1e-12,
    ),
    "LambdaLR": (
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.01 * t)),
        fastlr.TimeBased(0.1, 0.01),
        1e-12,
    ),
    "SequentialLR": (
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 500),
                lr_scheduler.CosineAnnealingLR(optimizer, 9500),
            ],
            [500],
        ),
        fastlr.LinearRamp(0.001, 0.1, 500).then(fastlr.Cosine(0.1, 0.0, 9500)),
        1e-11,
    ),
}


@pytest.mark.filterwarnings("ignore:.*ended at update:UserWarning")
@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("case", CHAINED.keys())
def test_chained(case: str) -> None:
    make, schedule, tolerance = CHAINED[case]
    expected, _ = stepped(make, STEPS + 1)
    drift = np.abs(schedule.values(0, len(expected)) - expected).max() / schedule.peak
    assert drift <= tolerance


# -- where PyTorch turns back, overflows or divides by zero ------------------------------------------------


def test_cosine_holds_where_torch_turns_back_up() -> None:
    schedule = fastlr.Cosine(0.1, 0.001, 100)
    expected, _ = stepped(lambda o: lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.001), 201)
    with pytest.warns(UserWarning, match="Cosine ended at update 100"):
        values = schedule.values(0, 201)
    assert np.abs(values[:101] - expected[:101]).max() < 1e-12
    assert expected[200] == pytest.approx(0.1)
    assert (values[100:] == 0.001).all()


def test_triangular2_beyond_the_cycle_at_which_torch_overflows() -> None:
    schedule = fastlr.Triangular2(0.0, 1.0, 1, 1)
    expected, _ = stepped(
        lambda o: lr_scheduler.CyclicLR(o, 0.0, 1.0, 1, 1, "triangular2", cycle_momentum=False), 2 * 1024
    )
    assert_same(schedule, expected)
    values = schedule.values(0, 10_000)
    cycles = np.arange(5000)
    assert (values[0::2] == 0.0).all()
    assert (values[1::2] == np.ldexp(1.0, -np.minimum(cycles, 1075))).all()
    assert values[2 * 1074 + 1] == 5e-324  # the last height that a double holds
    assert values[2 * 1075 + 1] == 0.0


@pytest.mark.parametrize(
    ("total_steps", "pct_start", "three_phase"),
    [(100, 0.0, False), (100, 0.01, False), (100, 0.005, False), (100, 0.0, True), (100, 0.01, True)],
)
@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_one_cycle_without_a_rise_starts_at_the_peak(
    anneal: str, total_steps: int, pct_start: float, three_phase: bool
) -> None:
    # PyTorch lets such a phase end before update 0 (never reaching the peak), or divides by zero.
    lr, momentum = fastlr.one_cycle(
        0.5, total_steps, pct_start, anneal, div_factor=4.0, final_div_factor=8.0, three_phase=three_phase
    )
    values = lr.values(0, total_steps)
    assert values[0] == pytest.approx(0.5, rel=1e-15)
    assert values[-1] == 0.5 / 4 / 8
    assert (np.diff(values) < 0).all()
    assert values[1] < 0.125 if three_phase else values[1] > 0.49
    momenta = momentum.values(0, total_steps)
    assert momenta[0] == pytest.approx(0.85, rel=1e-15)
    assert momenta[-1] == 0.95
    assert (np.diff(momenta) >= 0).all()


def test_one_cycle_without_a_rise_follows_torch_from_update_1_on() -> None:
    # pct_start * total_steps == 1: PyTorch divides by zero at update 0; the fall itself agrees.
    total = 10_000
    schedule = fastlr.OneCycle(0.5, total, 1 / total)
    with pytest.raises(ZeroDivisionError):
        stepped(lambda o: lr_scheduler.OneCycleLR(o, 0.5, total, pct_start=1 / total), 1)
    parts = np.arange(1, total) / (total - 1)
    final = 0.5 / 25 / 1e4
    expected = final + (0.5 - final) / 2 * (np.cos(np.pi * parts) + 1)
    assert np.abs(schedule.values(1, total) - expected).max() < 1e-15


@pytest.mark.parametrize("total_steps", [1, 2, 3])
@pytest.mark.parametrize("pct_start", [0.0, 0.3, 0.5, 1.0])
def test_one_cycle_of_hardly_any_steps(total_steps: int, pct_start: float) -> None:
    schedule = fastlr.OneCycle(0.5, total_steps, pct_start)
    values = schedule.values(0, total_steps)
    assert np.isfinite(values).all()
    assert values.max() <= 0.5
    assert values.min() >= 0.5 / 25 / 1e4


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [
        (0, 4, [1.0, 0.75, 0.5, 0.25, 1.0, 0.75]),
        (4, 0, [0.0, 0.25, 0.5, 0.75, 0.0, 0.25]),
        (0, 1, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (1, 0, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_cycle_side_of_no_length_is_a_jump(up: int, down: int, expected: list[float]) -> None:
    assert fastlr.Triangular(0.0, 1.0, up, down).values(0, 6).tolist() == expected
    flipped = fastlr.Triangular(0.0, 1.0, up, down, inverted=True).values(0, 6)
    assert flipped.tolist() == [1.0 - value for value in expected]
