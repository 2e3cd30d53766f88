"""Any schedule that can be made has the exact values, whichever way it is read, saved, split or joined."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import warnings
from random import Random

import numpy as np
import pytest

import fastlr
from fastlr import Schedule
from fuzz import seeds
from fuzz.schedules import LAST_CLOCK, POLICIES, Drawn, of_seed

pytestmark = pytest.mark.filterwarnings("ignore:.*holds its last value:UserWarning")

# A sum and a product may round up once each: (max - base) * 1 + base can be one ulp above max.
ROUNDING = 1 + 4 * np.finfo(np.float64).eps
SPAN = 40


def clocks(drawn: Drawn, rng: Random) -> list[int]:
    """Where something happens, one before and one after, and some in between and far away."""
    around = [0, *drawn.turns, 2**31, 2**53, 2**62, LAST_CLOCK]
    near = {t + step for t in around for step in (-1, 0, 1)} | {t // 2 for t in drawn.turns}
    near |= {rng.randrange(200) for _ in range(12)}
    return sorted(t for t in near if 0 <= t <= LAST_CLOCK)


@pytest.mark.parametrize("seed", seeds(120))
def test_a_schedule_is_its_formula_however_it_is_put_together(seed: int) -> None:
    drawn, rng = of_seed(seed), Random(seed)
    schedule = drawn.schedule
    asked = clocks(drawn, rng)
    single = [schedule(t) for t in asked]

    assert all(math.isfinite(value) and value >= 0.0 for value in single)
    assert max(single) <= schedule.peak * ROUNDING
    if drawn.falls is not None:
        signs = [(b > a) - (b < a) for a, b in itertools.pairwise(single)]
        assert (1 if drawn.falls else -1) not in signs
    if drawn.exact is not None:
        for t, value in zip(asked, single, strict=True):
            assert abs(value - drawn.exact(t)) <= drawn.error(t), f"{schedule} at {t}"

    for t, value in zip(asked, single, strict=True):
        start = max(t - rng.randrange(3), 0)
        assert t == LAST_CLOCK or schedule.values(start, t + 1).tolist()[-1] == value
    first = rng.randrange(60)
    assert schedule.values(first, first + SPAN).tolist() == [schedule(first + i) for i in range(SPAN)]

    copies = {
        "dict": Schedule.from_dict(schedule.to_dict()),
        "json": Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))),
        "pickle": pickle.loads(pickle.dumps(schedule)),
        "deepcopy": copy.deepcopy([schedule])[0],
        "repr": eval(repr(schedule), dict(vars(fastlr.schedules))),
    }
    for way, made in copies.items():
        assert made == schedule, way
        assert hash(made) == hash(schedule), way
        assert [made(t) for t in asked] == single, way
        assert made.duration == schedule.duration, way


@pytest.mark.parametrize("seed", seeds(120))
def test_a_schedule_split_and_joined_is_itself(seed: int) -> None:
    drawn, rng = of_seed(seed), Random(seed)
    schedule = drawn.schedule
    places = [t for t in clocks(drawn, rng) if t > 0]
    rng.shuffle(places)
    at, rest = next((t, made) for t in [*places, 1] if (made := shifted(schedule, t)))
    joined = schedule.then(rest, at)
    assert joined.unit == schedule.unit
    for t in clocks(drawn, rng):
        assert joined(t) == schedule(t), t
        if at + t <= LAST_CLOCK:
            assert rest(t) == schedule(at + t), t
    if later := shifted(rest, 3):
        again = joined.then(later, at + 3)
        assert again.values(0, SPAN).tobytes() == schedule.values(0, SPAN).tobytes()


def shifted(schedule: Schedule, by: int) -> Schedule | None:
    """The schedule read further on, where that counts nothing beyond 64 bits."""
    try:
        made = fastlr.Shifted(schedule, by)
        made(0)
    except ValueError as error:
        if "beyond a 64-bit clock" not in str(error):
            raise
        return None
    return made


@pytest.mark.parametrize("seed", seeds(120))
def test_a_schedule_stands_still_after_its_end_and_says_so_once(seed: int) -> None:
    drawn = of_seed(seed)
    schedule = Schedule.from_dict(drawn.schedule.to_dict())
    end = schedule.duration
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = [schedule(t) for t in clocks(drawn, Random(seed)) if end is None or t < end]
        assert len(before) > 0 or end == 0
        assert not caught
        if end is not None and end < LAST_CLOCK:
            held = {schedule(t) for t in (end, end + 1, end + 7, LAST_CLOCK) if t <= LAST_CLOCK}
            assert len(held) == 1
            assert len(caught) == 1
            assert "holds its last value" in str(caught[0].message)


def test_the_schedules_are_of_many_kinds() -> None:
    drawn = [of_seed(seed) for seed in range(300)]
    kinds = {kind for one in drawn for kind in _kinds(one.schedule.to_dict())}
    assert kinds == {name for name in fastlr.schedules.__all__ if name[0].isupper()} - {"Schedule"}
    assert sum(one.exact is not None for one in drawn) > 250
    assert len(POLICIES) > 8


def _kinds(data: object) -> set[str]:
    if isinstance(data, dict):
        return {data["type"]}.union(*map(_kinds, data.values()))
    if isinstance(data, list):
        return set().union(*map(_kinds, data))
    return set()
