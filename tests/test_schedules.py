"""Schedules against exact arithmetic, joined, scaled, saved, and at the ends of their clocks."""

import copy
import dataclasses
import io
import itertools
import json
import math
import pickle
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
import torch
from mpmath import cos as mpcos
from mpmath import mpf, workprec
from mpmath import pi as mppi

import fastlr
from fastlr import Schedule

LAST_CLOCK = 2**63 - 2

# A sum and a product may round up once each: (max - base) * 1 + base can be one ulp above max.
ROUNDING = 1 + 4 * np.finfo(np.float64).eps

pytestmark = pytest.mark.filterwarnings("ignore:.*holds its last value:UserWarning")


# -- against the exact value -------------------------------------------------------------------------------

# The oracle's functions take the policies' arguments.
CLOSED_FORMS = {
    "constant": (fastlr.Constant, reference.constant, {"value": 0.1}),
    "ramp-up": (fastlr.LinearRamp, reference.linear_ramp, {"start": 0.003, "end": 0.7, "steps": 9999}),
    "ramp-down": (fastlr.LinearRamp, reference.linear_ramp, {"start": 0.7, "end": 0.0, "steps": 777}),
    "ramp-of-1": (fastlr.LinearRamp, reference.linear_ramp, {"start": 0.7, "end": 0.1, "steps": 1}),
    "cosine": (fastlr.Cosine, reference.cosine, {"start": 0.1, "end": 0.0, "steps": 9000}),
    "cosine-up": (fastlr.Cosine, reference.cosine, {"start": 0.003, "end": 0.7, "steps": 9999}),
    "restarts": (
        fastlr.CosineWarmRestarts,
        reference.cosine_warm_restarts,
        {"start": 0.3, "end": 0.01, "first_period": 99},
    ),
    "restarts-mult": (
        fastlr.CosineWarmRestarts,
        reference.cosine_warm_restarts,
        {"start": 0.3, "end": 0.01, "first_period": 7, "mult": 3},
    ),
    **{
        f"polynomial-{power}": (
            fastlr.Polynomial,
            reference.polynomial,
            {"start": 0.3, "end": 0.0, "steps": 9999, "power": power},
        )
        for power in (0.1, 0.5, 1.0, 2.5)
    },
    "polynomial-up": (
        fastlr.Polynomial,
        reference.polynomial,
        {"start": 0.01, "end": 0.3, "steps": 8000, "power": 0.5},
    ),
    "one-minus-sqrt": (
        fastlr.OneMinusSqrt,
        reference.one_minus_sqrt,
        {"start": 0.3, "end": 0.01, "steps": 9999},
    ),
    "inverse-sqrt": (fastlr.InverseSqrt, reference.inverse_sqrt, {"start": 0.3, "timescale": 4000}),
    "exponential": (fastlr.Exponential, reference.exponential, {"start": 0.1, "gamma": 0.9997}),
    "time-based": (fastlr.TimeBased, reference.time_based, {"start": 0.1, "decay": 0.013}),
    "step-decay": (fastlr.StepDecay, reference.step_decay, {"start": 0.1, "every": 30, "gamma": 0.97}),
    **{
        f"multi-step-{name}": (
            fastlr.MultiStep,
            reference.multi_step,
            {"start": 0.1, "milestones": milestones, "gamma": 0.2},
        )
        for name, milestones in {
            "usual": [60, 120, 160, 9000],
            "doubled": [0, 0, 5, 5, 5],
            "none": [],
        }.items()
    },
    **{
        f"one-cycle-{anneal}-{3 if three_phase else 2}": (
            fastlr.OneCycle,
            reference.one_cycle,
            {
                "max_lr": 0.4,
                "total_steps": 9001,
                "pct_start": 1 / 3,
                "anneal_strategy": anneal,
                "three_phase": three_phase,
            },
        )
        for anneal, three_phase in itertools.product(("cos", "linear"), (False, True))
    },
    "one-cycle-momentum": (
        fastlr.OneCycleMomentum,
        reference.one_cycle_momentum,
        {"base_momentum": 0.85, "max_momentum": 0.95, "total_steps": 9000, "three_phase": True},
    ),
}


@pytest.mark.parametrize(("policy", "exactly", "arguments"), CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_closed_form_is_exact_to_1e_15_of_the_peak(
    policy: type[Schedule], exactly: Callable[..., reference.Real], arguments: dict[str, Any]
) -> None:
    schedule = policy(**arguments)
    values = schedule.values(0, 10_001).tolist()
    error = max(abs(value - exactly(t, **arguments)) for t, value in enumerate(values))
    assert error <= 1e-15 * schedule.peak


def ulps(value: float, exact: Any) -> float:
    """How far apart they are, in units of the last place; the oracle has 200 bits."""
    return float(abs(mpf(value) - exact)) / math.ulp(float(exact))


@workprec(200)
def test_half_a_cosine_keeps_its_precision_close_to_its_end() -> None:
    total = 9000
    for t in (1, 2, 4500, 4501, 8000, 8990, 8998, 8999):
        exact = (1 + mpcos(mppi * t / total)) / 2
        assert ulps(fastlr.Cosine(1.0, 0.0, total)(t), exact) <= 2.0
        assert ulps(fastlr.CosineWarmRestarts(1.0, 0.0, total)(t), exact) <= 2.0
    # Where PyTorch's own is 176 units off.
    schedule = fastlr.OneCycle(1.0, total, pct_start=0.5, final_div_factor=1e30)
    for t in (8900, 8990, 8997):
        exact = (1 - mpcos(mppi * (total - 1 - t) / (total - 1 - (0.5 * total - 1)))) / 2
        assert ulps(schedule(t), exact) <= 2.0, t


@workprec(200)
def test_integer_powers_are_rounded_once() -> None:
    draws = random.Random(0)
    for _ in range(300):
        gamma = draws.choice([draws.uniform(0.3, 1.2), 1.0 - 10 ** draws.uniform(-12, -2)])
        schedule = fastlr.Exponential(1.0, gamma)
        for t in (1, 2, 3, draws.randrange(1000), draws.randrange(10**6), draws.randrange(10**12)):
            exact = mpf(gamma) ** t
            if 1e-280 < exact < 1e300:
                assert ulps(schedule(t), exact) <= 0.5000001, (gamma, t)
    assert fastlr.Exponential(1.0, 0.5)(1074) == 5e-324
    assert fastlr.Exponential(1.0, 0.5)(1075) == 0.0


WINDOWS = ["linear", "geometric", "parabolic", "sinusoidal"]
DECAYS = {
    "none": (fastlr.Triangular, {}),
    "halving": (fastlr.Triangular2, {}),
    "height": (fastlr.ExpRange, {"gamma": 0.9997}),
    "both bounds": (fastlr.ExpRange, {"gamma": 0.9997, "decay_base": True}),
}


@pytest.mark.parametrize("inverted", [False, True], ids=["upright", "inverted"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("up", "down"), [(1000, 1000), (60, 140), (12.5, 7.25)])
def test_cycle(window: str, decay: str, inverted: bool, up: float, down: float) -> None:
    policy, options = DECAYS[decay]
    schedule = policy(0.01, 0.06, up, down, window, inverted=inverted, **options)
    exactly = partial(
        reference.cycle, base=0.01, top=0.06, up=up, down=down, window=window, decay=decay,
        gamma=options.get("gamma", 1.0), inverted=inverted,
    )  # fmt: skip
    clocks = np.unique(np.r_[0:300, np.geomspace(1, 10_000, 400).astype(int), 9900:10_001]).tolist()
    for t in clocks:
        # 1 + t/T - cycle, which is PyTorch's formula, loses the bits that the cycle's number takes up.
        cycle = t // (up + down) + 1
        assert abs(schedule(t) - exactly(t)) <= 1e-15 * cycle * schedule.peak, t


def test_exp_range_is_pytorchs_or_the_papers() -> None:
    kept = fastlr.ExpRange(0.01, 0.06, 50, gamma=0.99)
    falling = fastlr.ExpRange(0.01, 0.06, 50, gamma=0.99, decay_base=True)
    assert kept(10_000) == 0.01
    assert falling(100) == 0.01 * 0.99**100
    assert falling(150) == 0.06 * 0.99**150
    assert kept(150) == 0.01 + (0.06 - 0.01) * 0.99**150


@pytest.mark.parametrize("window", WINDOWS)
def test_window_goes_through_its_landmarks(window: str) -> None:
    middle = {"linear": 2.5, "geometric": 2.0, "parabolic": 3.25, "sinusoidal": 2.5}[window]
    values = fastlr.Triangular(1.0, 4.0, 10, 20, window).values(0, 31)
    assert values[[0, 5, 10, 20, 30]] == pytest.approx([1.0, middle, 4.0, middle, 1.0], rel=1e-15)
    assert (np.diff(values[:11]) > 0).all()
    assert (np.diff(values[10:]) < 0).all()


# -- all policies in one list ------------------------------------------------------------------------------

RAMP = fastlr.LinearRamp(0.0, 0.1, 10)
EVERY_POLICY: dict[str, Schedule] = {
    **{name: policy(**arguments) for name, (policy, _, arguments) in CLOSED_FORMS.items()},
    **{
        f"{decay} {window}": policy(0.01, 0.06, 60, 140, window, **options)
        for (decay, (policy, options)), window in itertools.product(DECAYS.items(), WINDOWS)
    },
    "inverted": fastlr.Triangular(0.85, 0.95, 60, 140, inverted=True),
    "tabulated": fastlr.Tabulated([0.3, 0.1, 0.2]),
    "joined": RAMP.then(fastlr.Tabulated([0.3, 0.1])).then(fastlr.Cosine(0.1, 0.0, 90), at=20),
    "joined-samples": fastlr.Constant(1.0, unit="sample").then(fastlr.Constant(2.0, unit="sample"), at=7),
    "scaled": 2.0 * RAMP.then(fastlr.MultiStep(0.1, [5, 9], 0.5)),
    "per-epoch": fastlr.MultiStep(0.1, [60, 120], 0.2, unit="epoch").in_updates(391),
    "per-epoch-joined": fastlr.LinearRamp(0.0, 0.1, 5, unit="epoch")
    .then(fastlr.Tabulated([0.1, 0.2], unit="epoch"))
    .in_updates(7),
}
every_policy = pytest.mark.parametrize("name", EVERY_POLICY)


@every_policy
def test_values_are_the_calls(name: str) -> None:
    schedule = EVERY_POLICY[name]
    values = schedule.values(3, 500)
    assert values.dtype == np.float64
    assert values.shape == (497,)
    assert values.tolist() == [schedule(t) for t in range(3, 500)]
    assert schedule.values(5, 5).shape == (0,)


@every_policy
def test_survives_every_way_of_copying(name: str) -> None:
    schedule = EVERY_POLICY[name]
    data = json.loads(json.dumps(schedule.to_dict()))
    file = io.BytesIO()
    torch.save(schedule, file)
    file.seek(0)
    others = (
        Schedule.from_dict(data),
        pickle.loads(pickle.dumps(schedule)),
        torch.load(file, weights_only=True),
    )
    for other in others:
        assert other is not schedule
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert other.to_dict() == schedule.to_dict()
        assert other.values(0, 300).tobytes() == schedule.values(0, 300).tobytes()
    assert copy.deepcopy(schedule) == copy.copy(schedule) == schedule


@every_policy
def test_is_immutable(name: str) -> None:
    schedule = EVERY_POLICY[name]
    for field in dataclasses.fields(schedule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, field.name, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del schedule.unit


@every_policy
def test_any_clock_of_63_bits_works(name: str) -> None:
    schedule = EVERY_POLICY[name]
    clocks = [2**31, 2**32 + 1, 2**53 + 1, 2**62, LAST_CLOCK - 1]
    for clock in clocks:
        assert 0.0 <= schedule(clock) <= schedule.peak * ROUNDING
        assert schedule.values(clock, clock + 1).tolist() == [schedule(clock)]


def test_policies_differ() -> None:
    assert len(set(EVERY_POLICY.values())) == len(EVERY_POLICY)
    assert fastlr.Triangular(0.1, 0.2, 5) != fastlr.Triangular2(0.1, 0.2, 5)
    assert fastlr.Constant(0.1) != fastlr.Constant(0.1, unit="sample")


@pytest.mark.parametrize(
    ("schedule", "peak", "late"),
    [
        (fastlr.Exponential(1.0, 2.0), np.inf, np.inf),
        (fastlr.Exponential(0.0, 2.0), 0.0, 0.0),
        (fastlr.StepDecay(0.0, 3, 2.0), 0.0, 0.0),
        (fastlr.MultiStep(1.0, [1, 2, 3], 2.0), 8.0, 8.0),
        (fastlr.MultiStep(0.0, [1, 2], 1e300), 0.0, 0.0),
        (fastlr.ExpRange(0.1, 0.2, 3, gamma=2.0, decay_base=True), np.inf, np.inf),
    ],
)
def test_what_grows_says_so(schedule: Schedule, peak: float, late: float) -> None:
    assert schedule.peak == peak
    assert schedule(5000) == late


def test_what_would_grow_beyond_floats_where_nobody_looks_is_no_error() -> None:
    left = fastlr.Triangular(0.1, 0.5, 10**6).then(fastlr.Exponential(1.0, 1.01), at=100)
    assert left(50) == fastlr.Triangular(0.1, 0.5, 10**6)(50)
    assert fastlr.ExpRange(0.1, 0.5, 10**6, gamma=1.01)(0) == 0.1
    assert fastlr.Exponential(1.0, 2.0).then(fastlr.Constant(0.1), at=1000)(1000) == 0.1


@pytest.mark.parametrize(
    ("ints", "floats"),
    [
        (fastlr.Constant(1), fastlr.Constant(1.0)),
        (fastlr.Triangular(0, 1, 10, 20), fastlr.Triangular(0.0, 1.0, 10.0, 20.0)),
        (fastlr.ExpRange(0, 1, 10, gamma=1), fastlr.ExpRange(0.0, 1.0, 10.0, gamma=1.0)),
        (fastlr.OneCycle(1, 100, 1), fastlr.OneCycle(1.0, np.int64(100), np.float64(1.0))),
        (fastlr.Polynomial(1, 0, 5, 2), fastlr.Polynomial(1.0, 0.0, np.int32(5), 2.0)),
        (fastlr.MultiStep(1, [3, 4], 1), fastlr.MultiStep(1.0, torch.tensor([3, 4]), np.float32(1.0))),
        (fastlr.Constant(1) * 2, fastlr.Constant(1.0) * 2.0),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_int_and_float_arguments_are_equal(ints: Schedule, floats: Schedule) -> None:
    assert ints == floats
    assert hash(ints) == hash(floats)
    assert json.dumps(ints.to_dict()) == json.dumps(floats.to_dict())


# -- ends -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (fastlr.LinearRamp(0.0, 1.0, 10), 10),
        (fastlr.Cosine(1.0, 0.0, 10), 10),
        (fastlr.Polynomial(1.0, 0.0, 10, 2.0), 10),
        (fastlr.OneMinusSqrt(1.0, 0.0, 10), 10),
        (fastlr.OneCycle(1.0, 10), 9),
        (fastlr.OneCycleMomentum(0.8, 0.9, 10), 9),
        (fastlr.Tabulated([3.0, 2.0, 1.0]), 2),
        (fastlr.Constant(1.0).then(fastlr.OneCycle(1.0, 10), at=5), 14),
        (fastlr.LinearRamp(0.0, 1.0, 10) * 0.5, 10),
        (fastlr.LinearRamp(0.0, 1.0, 10, unit="epoch").in_updates(3), 32),
        (fastlr.Tabulated([3.0, 2.0, 1.0], unit="epoch").in_updates(3), 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else str(value),
)
def test_holds_its_last_value_and_warns_once(schedule: Schedule, last: int) -> None:
    for ask in (
        lambda s: [s(last + 1), s(last + 9), s(LAST_CLOCK), *s.values(last + 1, last + 3)],
        lambda s: [*s.values(last, last + 2), s(last + 1)],
    ):
        fresh = Schedule.from_dict(schedule.to_dict())
        end = fresh(last)  # neither these nor an empty range past the end warn
        assert fresh.values(0, last + 1)[-1] == end
        assert fresh.values(last + 5, last + 5).size == 0
        with pytest.warns(UserWarning, match=rf"ended at update {last} and holds") as caught:
            held = ask(fresh)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert set(held) == {end}


@pytest.mark.parametrize(
    ("schedule", "total", "ends"),
    [
        (fastlr.Triangular(0.1, 0.2, 2000), 9000, [4000, 8000]),
        (fastlr.Triangular(0.1, 0.2, 2000), 8000, [4000, 8000]),
        (fastlr.Triangular(0.1, 0.2, 2000), 7999, [4000]),
        (fastlr.Triangular2(0.1, 0.2, 1, 2), 10, [3, 6, 9]),
        (fastlr.Triangular(0.1, 0.2, 1.1), 11, [3, 5, 7, 9, 11]),
        (fastlr.Triangular(0.1, 0.2, 2.5, 1.25), 11, [4, 8]),
        (fastlr.ExpRange(0.1, 0.2, 10, gamma=0.9), 0, []),
    ],
)
def test_cycle_ends(schedule: fastlr.Triangular, total: int, ends: list[int]) -> None:
    assert schedule.cycle_ends(total) == ends


# -- made from values and from other schedules -------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [[0.5, 0.25, 0.125], (0.5, 0.25, 0.125), np.array([0.5, 0.25, 0.125]), torch.tensor([0.5, 0.25, 0.125]),
     iter([0.5, 0.25, 0.125]), np.array([0.5, 0.25, 0.125], np.float32)],
    ids=["list", "tuple", "array", "tensor", "iterator", "float32"],
)  # fmt: skip
def test_tabulated(source: object) -> None:
    schedule = fastlr.Tabulated(source)
    assert schedule == fastlr.Tabulated(lambda t: 0.5 / 2**t, steps=3)
    assert schedule.values(0, 5).tolist() == [0.5, 0.25, 0.125, 0.125, 0.125]
    assert schedule.duration == 3


def test_tabulated_takes_as_many_values_as_asked() -> None:
    assert fastlr.Tabulated([3, 2, 1], steps=2) == fastlr.Tabulated([3, 2])
    cosine = fastlr.Cosine(0.1, 0.0, 20)
    assert fastlr.Tabulated(cosine, steps=21).values(0, 21).tolist() == cosine.values(0, 21).tolist()


JOINED_PARTS = [
    fastlr.LinearRamp(0.0, 0.4, 40),
    fastlr.OneCycle(0.4, 100, 0.3, three_phase=True),
    fastlr.Tabulated(np.linspace(0.1, 0.9, 9)),
    fastlr.MultiStep(0.1, [0, 7, 7, 30], 0.5),
    2.0 * fastlr.Constant(0.1).then(fastlr.Cosine(0.1, 0.0, 10), at=6),
]


@pytest.mark.parametrize("at", [1, 2, 7, 8, 29, 30, 31, 58, 59, 60, 99, 100, 150])
def test_join_cuts_anywhere(at: int) -> None:
    # 29 and 59 lie at phase ends of the one-cycle, 7 and 30 at milestones.
    for before, after in itertools.permutations(JOINED_PARTS, 2):
        joined = before.then(after, at)
        assert joined.values(0, at).tolist() == before.values(0, at).tolist()
        assert joined.values(at, at + 120).tolist() == after.values(0, 120).tolist()
        assert joined.peak == max(before.peak, after.peak)


def test_join_inside_join_replaces_what_comes_after() -> None:
    first, second, third = fastlr.Constant(1.0), fastlr.Constant(2.0), fastlr.Constant(3.0)
    joined = first.then(second, at=10).then(third, at=5)
    assert joined == first.then(third, at=5)
    assert first.then(second.then(third, at=10), at=5) == first.then(second, at=5).then(third, at=15)
    assert RAMP.then(RAMP).then(RAMP).duration == 30


def test_per_epoch_of_joined_tables() -> None:
    epochs = fastlr.Tabulated([0.5, 0.4], unit="epoch").then(fastlr.Tabulated([0.3, 0.2], unit="epoch"))
    shifted = fastlr.Constant(1.0).then(2.0 * epochs.in_updates(3), at=4)
    assert shifted.values(0, 18).tolist() == [1.0] * 4 + [1.0] * 3 + [0.8] * 3 + [0.6] * 3 + [0.4] * 5


FAR_EPOCHS = fastlr.MultiStep(1.0, [5, 2**62 + 3], 0.5, unit="epoch")


@pytest.mark.parametrize(
    ("schedule", "clock", "expected"),
    [
        (fastlr.CosineWarmRestarts(1.0, 0.0, 1, 2), 2**62 - 1, 1.0),
        (fastlr.CosineWarmRestarts(1.0, 0.0, 2**40, 2**62), 2**41, 1.0),
        (fastlr.CosineWarmRestarts(1.0, 0.0, 1, 2**62), 2**61 + 1, 0.5),
        (fastlr.CosineWarmRestarts(1.0, 0.0, LAST_CLOCK, LAST_CLOCK), LAST_CLOCK, 1.0),
        (fastlr.LinearRamp(0.0, 1.0, 2**62), 2**61, 0.5),
        (fastlr.OneCycle(1.0, LAST_CLOCK, 0.5), 2**62, 1.0),
        (fastlr.OneCycle(1.0, LAST_CLOCK, 1.0), LAST_CLOCK - 1, 1.0),
        (RAMP.then(fastlr.Constant(0.5), at=2**62), 2**62, 0.5),
        (fastlr.Constant(0.5).then(fastlr.LinearRamp(0.0, 1.0, 2**62), at=2**62 + 2**61), LAST_CLOCK, 0.5),
        (fastlr.Constant(0.5).then(RAMP.then(RAMP, at=2**62), at=2**62 + 2**61), LAST_CLOCK, 0.1),
        (fastlr.MultiStep(1.0, [2**40, 2**61], 0.5, unit="epoch").in_updates(2**20), 2**60, 0.5),
        (fastlr.LinearRamp(0.0, 1.0, 2**40, unit="epoch").in_updates(2**30), 2**62, 2.0**-8),
        (fastlr.Constant(0.5, unit="epoch").in_updates(LAST_CLOCK), LAST_CLOCK, 0.5),
        (fastlr.StepDecay(1.0, LAST_CLOCK, 0.5), LAST_CLOCK, 0.5),
        (fastlr.Shifted(fastlr.Tabulated([0.5, 0.25]), LAST_CLOCK), LAST_CLOCK, 0.25),
        (fastlr.Shifted(fastlr.MultiStep(1.0, [2**62], 0.5), 2**62), 2**62, 0.5),
        (fastlr.Shifted(FAR_EPOCHS, 4).in_updates(2), LAST_CLOCK, 0.25),
    ],
)  # fmt: skip
def test_clocks_beyond_int64_are_never_computed(schedule: Schedule, clock: int, expected: float) -> None:
    assert schedule(clock) == pytest.approx(expected, rel=1e-15)
