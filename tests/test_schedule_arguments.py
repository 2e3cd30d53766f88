"""Every argument of every policy is checked; the error names the argument and the value."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import fastlr
from fastlr import Schedule

# -- the table: what no argument of a kind may be ------------------------------------------------------------

NOT_NUMERIC = [np.True_, torch.tensor(True), np.array(True), bytearray(b"3"), memoryview(b"3"), np.array("3")]
NOT_REAL = [*NOT_NUMERIC, math.nan, math.inf, -math.inf, -1.0, -5e-324, "0.1", None, [0.1], 1j, True, 10**400,
            np.float64("nan"), torch.tensor([0.1, 0.2])]  # fmt: skip
NOT_COUNT = [*NOT_NUMERIC, -1, 1.0, 1.5, math.nan, math.inf, "3", None, [3], True, 2**63 - 1, 2**70]
NOT_WORD = ["cubic", "", None, 3, ["linear"], np.array(["linear"])]
NOT_FLAG = [1, 0.0, None, "yes"]
REFUSED = {
    "real": NOT_REAL,
    "positive": [*NOT_REAL, 0, 0.0],
    "size": [bad for bad in NOT_REAL if bad is not None],
    "count": [*NOT_COUNT, 0],
    "word": NOT_WORD,
    "flag": NOT_FLAG,
    "unit": [*NOT_WORD, "updates", "step"],
}

CYCLE = {"base": "real", "max": "real", "step_size_up": "real", "step_size_down": "size",
         "interpolation": "word", "inverted": "flag"}  # fmt: skip
RAMP = {"start": "real", "end": "real", "steps": "count"}
PHASES = {"total_steps": "count", "pct_start": "real", "anneal_strategy": "word", "three_phase": "flag"}
# policy -> (valid arguments, what kind each one is)
POLICIES: dict[type[Schedule], tuple[dict[str, Any], dict[str, str]]] = {
    fastlr.Constant: ({"value": 0.1}, {"value": "real"}),
    fastlr.Triangular: ({"base": 0.1, "max": 0.6, "step_size_up": 20}, CYCLE),
    fastlr.Triangular2: ({"base": 0.1, "max": 0.6, "step_size_up": 20}, CYCLE),
    fastlr.ExpRange: (
        {"base": 0.1, "max": 0.6, "step_size_up": 20, "gamma": 0.9},
        {**CYCLE, "gamma": "positive", "decay_base": "flag"},
    ),
    fastlr.OneCycle: (
        {"max_lr": 0.6, "total_steps": 20},
        {**PHASES, "max_lr": "real", "div_factor": "positive", "final_div_factor": "positive"},
    ),
    fastlr.OneCycleMomentum: (
        {"base_momentum": 0.1, "max_momentum": 0.6, "total_steps": 20},
        {**PHASES, "base_momentum": "real", "max_momentum": "real"},
    ),
    fastlr.LinearRamp: ({"start": 0.1, "end": 0.6, "steps": 20}, RAMP),
    fastlr.Cosine: ({"start": 0.1, "end": 0.6, "steps": 20}, RAMP),
    fastlr.Polynomial: (
        {"start": 0.1, "end": 0.6, "steps": 20, "power": 2.0},
        {**RAMP, "power": "positive"},
    ),
    fastlr.OneMinusSqrt: ({"start": 0.1, "end": 0.6, "steps": 20}, RAMP),
    fastlr.InverseSqrt: ({"start": 0.1, "timescale": 20}, {"start": "real", "timescale": "count"}),
    fastlr.CosineWarmRestarts: (
        {"start": 0.1, "end": 0.6, "first_period": 20},
        {"start": "real", "end": "real", "first_period": "count", "mult": "count"},
    ),
    fastlr.Exponential: ({"start": 0.1, "gamma": 0.9}, {"start": "real", "gamma": "positive"}),
    fastlr.TimeBased: ({"start": 0.1, "decay": 0.9}, {"start": "real", "decay": "real"}),
    fastlr.StepDecay: (
        {"start": 0.1, "every": 20, "gamma": 0.9},
        {"start": "real", "every": "count", "gamma": "positive"},
    ),
    fastlr.MultiStep: (
        {"start": 0.1, "milestones": [20], "gamma": 0.9},
        {"start": "real", "gamma": "positive"},
    ),
    fastlr.Scaled: ({"schedule": fastlr.Constant(1.0), "factor": 0.5}, {"factor": "real"}),
    fastlr.PerEpoch: (
        {"schedule": fastlr.Constant(1.0, unit="epoch"), "updates_per_epoch": 20},
        {"updates_per_epoch": "count"},
    ),
    fastlr.InSamples: (
        {"schedule": fastlr.Constant(1.0, unit="epoch"), "samples": 20},
        {"samples": "count"},
    ),
    fastlr.InTokens: (
        {"schedule": fastlr.Constant(1.0, unit="sample"), "tokens": 20},
        {"tokens": "count"},
    ),
    fastlr.Shifted: ({"schedule": fastlr.Constant(1.0), "by": 20}, {"by": "real"}),
}


def label(value: object) -> str:
    shown = "" if isinstance(value, memoryview) else repr(value)  # which says where it lies
    return f"{type(value).__name__}:{shown}"[:30]


@pytest.mark.parametrize(
    ("policy", "name", "bad"),
    [
        pytest.param(policy, name, bad, id=f"{policy.__name__}-{name}-{label(bad)}")
        for policy, (_, kinds) in POLICIES.items()
        for name, kind in {"unit": "unit", **kinds}.items()
        for bad in REFUSED[kind]
    ],
)
def test_refused(policy: type[Schedule], name: str, bad: object) -> None:
    valid, _ = POLICIES[policy]
    policy(**valid)
    with pytest.raises(ValueError, match=rf"^{name} must be .*got {re.escape(repr(bad))}"):
        policy(**{**valid, name: bad})


def test_the_table_names_every_argument() -> None:
    for policy, (_, kinds) in POLICIES.items():
        elsewhere = {"unit", "schedule", "milestones"}
        assert {field.name for field in dataclasses.fields(policy)} - elsewhere == set(kinds), policy
    named = {getattr(fastlr.schedules, name) for name in fastlr.schedules.__all__ if name[0].isupper()}
    assert named == {*POLICIES, Schedule, fastlr.schedules.Joined, fastlr.Tabulated}


# -- arguments that do not fit each other, and the rest ------------------------------------------------------

ONE = fastlr.Constant(1.0)
EPOCHS = fastlr.Constant(1.0, unit="epoch")
DOES_NOT_FIT = {
    "base > max": (
        lambda: fastlr.Triangular(0.6, 0.1, 20),
        r"max must be >= base, got base=0\.6, max=0\.1; swap them, or pass inverted=True",
    ),
    "momentum base > max": (
        lambda: fastlr.OneCycleMomentum(0.95, 0.85, 20),
        r"max_momentum must be >= base_momentum=0\.95, got 0\.85",
    ),
    "pair's base > max": (
        lambda: fastlr.one_cycle(0.1, 20, base_momentum=0.95, max_momentum=0.85),
        r"max_momentum must be >= base_momentum=0\.95, got 0\.85",
    ),
    "no cycle": (
        lambda: fastlr.Triangular(0.1, 0.6, 0),
        r"step_size_up \+ step_size_down must be >= 1 and finite, got 0\.0 \+ 0\.0",
    ),
    "cycle within an update": (
        lambda: fastlr.Triangular(0.1, 0.6, 0.3, 0.4),
        r"step_size_up \+ step_size_down must be >= 1 and finite, got 0\.3 \+ 0\.4",
    ),
    "infinite cycle": (
        lambda: fastlr.Triangular(0.1, 0.6, 1e308),
        r"step_size_up \+ step_size_down must be >= 1 and finite, got 1e\+308",
    ),
    "geometric from 0": (
        lambda: fastlr.Triangular(0.0, 0.6, 20, interpolation="geometric"),
        r"base must be > 0 for geometric interpolation, got 0\.0",
    ),
    "growing dips": (
        lambda: fastlr.ExpRange(0.1, 0.6, 20, gamma=1.01, inverted=True),
        r"gamma must be in \(0, 1\] with inverted=True, got 1\.01",
    ),
    "pct_start": (lambda: fastlr.OneCycle(0.1, 20, 1.01), r"pct_start must be in \[0, 1\], got 1\.01"),
    "three_phase pct_start": (
        lambda: fastlr.OneCycle(0.1, 20, 0.51, three_phase=True),
        r"pct_start must be in \[0, 0\.5\] with three_phase=True, got 0\.51",
    ),
    "milestones descend": (
        lambda: fastlr.MultiStep(0.1, [20, 10], 0.5),
        r"milestones must ascend, got \[20, 10\]",
    ),
    "milestone < 0": (lambda: fastlr.MultiStep(0.1, [-1], 0.5), "milestones must be an integer >= 0, got -1"),
    "fractional milestone": (lambda: fastlr.MultiStep(0.1, [1.5], 0.5), "milestones must be an .* got 1.5"),
    "milestones a number": (lambda: fastlr.MultiStep(0.1, 7, 0.5), "milestones must be a sequence, got 7"),
    "milestones None": (lambda: fastlr.MultiStep(0.1, None, 0.5), "milestones must be a sequence, got None"),
    "table of NaN": (lambda: fastlr.Tabulated([0.1, math.nan]), "value 1 must be .* got nan"),
    "table of callable": (lambda: fastlr.Tabulated(lambda t: -t, 3), "value 1 must be .* got -1"),
    "table of words": (lambda: fastlr.Tabulated(["a"]), "value 0 must be a finite number >= 0, got 'a'"),
    "empty table": (lambda: fastlr.Tabulated([]), "a table needs at least one value, got none"),
    "short table": (lambda: fastlr.Tabulated([1, 2], 3), "steps=3 values are needed, got 2"),
    "table of a number": (lambda: fastlr.Tabulated(3.0), "source must be a sequence, got 3.0"),
    "matrix": (lambda: fastlr.Tabulated(np.ones((2, 1))), "source must be one-dimensional, got array"),
    "column": (lambda: fastlr.Tabulated(torch.ones(2, 1)), "source must be one-dimensional, got tensor"),
    "0-d": (lambda: fastlr.Tabulated(torch.tensor(1.0)), "source must be one-dimensional, got tensor"),
    "no table": (lambda: fastlr.Tabulated(), "Tabulated needs a callable or the values"),
    "callable without steps": (lambda: fastlr.Tabulated(math.sqrt), "steps is needed with a callable"),
    "callable for half a step": (lambda: fastlr.Tabulated(math.sqrt, 1.5), "steps must be .* got 1.5"),
    "no values": (lambda: fastlr.Tabulated([1.0], 0), "steps must be an integer >= 1, got 0"),
    "join a number": (lambda: ONE.then(0.1, at=5), "after must be a schedule, got 0.1"),
    "join nowhere": (lambda: ONE.then(ONE), "Constant has no end: say where to leave it"),
    "join at 0": (lambda: ONE.then(ONE, at=0), "at must be an integer >= 1, got 0"),
    "join at NaN": (lambda: ONE.then(ONE, at=math.nan), "at must be an integer >= 1, got nan"),
    "join units": (lambda: ONE.then(EPOCHS, at=5), "must share a unit, got 'update' and 'epoch'; convert"),
    "join numbers": (lambda: fastlr.schedules.Joined((ONE, 3), (5,)), "parts must be a schedule, got 3"),
    "join a schedule": (lambda: fastlr.schedules.Joined(ONE, (5,)), "parts must be a sequence, got Constant"),
    "join at a number": (lambda: fastlr.schedules.Joined((ONE, ONE), 5), "starts must be a sequence, got 5"),
    "join backwards": (
        lambda: fastlr.schedules.Joined((ONE, ONE, ONE), (5, 3)),
        r"starts must ascend, got \[5, 3\]",
    ),
    "too few starts": (lambda: fastlr.schedules.Joined((ONE, ONE), ()), "2 parts need 1 starts, got 0"),
    "scale a number": (lambda: fastlr.Scaled(3.0, 2.0), "schedule must be a schedule, got 3.0"),
    "scale by a schedule": (lambda: ONE * ONE, "factor must be a finite number >= 0, got Constant"),
    "scale beyond floats": (lambda: ONE * 1e200 * 1e200, "factor must be a finite number >= 0, got inf"),
    "updates in updates": (lambda: ONE.in_updates(5), "only a schedule in epochs .* got one in updates"),
    "samples in samples": (
        lambda: fastlr.Constant(1.0, unit="sample").in_samples(5), "the schedule counts samples already"),
    "shift between clocks": (lambda: fastlr.Shifted(ONE, 0.5), "by must be an integer >= 0, got 0.5"),
    "epochs of a number": (lambda: fastlr.PerEpoch(3.0, 2), "schedule must be a schedule, got 3.0"),
    "clock < 0": (lambda: ONE(-1), "clock must be an integer >= 0, got -1"),
    "clock between": (lambda: ONE(0.5), "clock must be an integer >= 0, got 0.5"),
    "clock of 64 bits": (lambda: ONE(2**63), f"clock must be an integer >= 0, got {2**63}"),
    "values backwards": (lambda: ONE.values(5, 4), "stop must be an integer >= 5, got 4"),
    "values from < 0": (lambda: ONE.values(-1, 4), "start must be an integer >= 0, got -1"),
    "unknown type": (lambda: Schedule.from_dict({"type": "Nope"}), "type must be the name .* got 'Nope'"),
    "function's name": (lambda: Schedule.from_dict({"type": "one_cycle"}), "type must be .* got 'one_cycle'"),
    "no type": (lambda: Schedule.from_dict({"value": 1.0}), "type must be the name of a schedule, got None"),
    "the base class's name": (
        lambda: Schedule.from_dict({"type": "Schedule"}), "type must be .* got 'Schedule'"),
    "saved as a word": (lambda: Schedule.from_dict("Cosine"), "a schedule must be what its .* got 'Cosine'"),
    "unknown field": (
        lambda: Schedule.from_dict({"type": "Constant", "value": 1.0, "steps": 3}),
        "Constant has the fields unit, value, got value, steps",
    ),
    "missing field": (
        lambda: Schedule.from_dict({"type": "LinearRamp", "start": 1.0, "steps": 3}),
        "LinearRamp has the fields unit, start, end, steps, got start, steps",
    ),
    "table of a dict": (lambda: fastlr.Tabulated({0: 0.1}), "source must be a sequence, got {0: 0.1}"),
    "table of a set": (lambda: fastlr.Tabulated({0.1}), "source must be a sequence, got {0.1}"),
    "table of a word": (lambda: fastlr.Tabulated("12"), "source must be a sequence, got '12'"),
    "complex array": (lambda: fastlr.Tabulated(np.array([1j])), "value 0 must be a finite number >= 0, got"),
    "complex tensor": (lambda: fastlr.Constant(torch.tensor(1 + 0j)), "value must be a finite number"),
    "milestones of no order": (lambda: fastlr.MultiStep(0.1, {1, 2}, 0.5), "milestones must be a sequence"),
    "infinite last rate": (
        lambda: fastlr.OneCycle(0.1, 20, final_div_factor=1e-320),
        "OneCycle must be finite, but at update 6 it is nan; its arguments leave the range of float64",
    ),
    "infinite first rate": (lambda: fastlr.OneCycle(0.1, 20, div_factor=1e-320), "at update 0 it is inf"),
    "infinite ratio": (
        lambda: fastlr.Triangular(1e-310, 1.0, 20, interpolation="geometric"), "at update 10 it is inf"),
    "infinite milestone": (lambda: fastlr.MultiStep(1.0, [1, 2], 1e300), "at update 2 it is inf"),

    "infinite between whole clocks": (
        lambda: fastlr.Triangular(0.0, 1e308, 4.5, 1.0) * 2.05, "times a peak of 1e.308 leaves the range"),
    "infinite scaled": (lambda: fastlr.Constant(1e308) * 10, "Scaled must be finite, but at update 0"),
    "infinite before the next": (
        lambda: fastlr.Exponential(1.0, 2.0).then(ONE, at=5000), "Joined must be finite, but at update 4999"),
    "beyond the clock": (
        lambda: EPOCHS.in_updates(2**40).in_samples(2**40),
        f"InSamples would count {2**80} samples, beyond a 64-bit clock; use fewer",
    ),
    "shifted beyond the clock": (
        lambda: fastlr.Shifted(EPOCHS, 2**40).in_updates(2**40), f"PerEpoch would count {-(2**80)} updates"),
    "bad saved value": (
        lambda: Schedule.from_dict({"type": "Constant", "value": -1.0}),
        "value must be a finite number >= 0, got -1.0",
    ),
    "the base class": (lambda: Schedule()(0), "abstract class Schedule"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), DOES_NOT_FIT.values(), ids=DOES_NOT_FIT)
def test_refused_with_a_reason(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(("start", "end"), [(0.1, 1e308), (1.7e308, 0.1)])
def test_restarts_between_any_finite_numbers_are_finite(start: float, end: float) -> None:
    values = fastlr.CosineWarmRestarts(start, end, 20).values(0, 45)
    assert np.isfinite(values).all()
