"""Schedules at random: every policy, and whatever can be made of several, beside the exact values.

``python -m fuzz.schedules 17`` in this folder's parent shows what seed 17 draws.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import reference

import fastlr
from fastlr import Schedule, _core

LAST_CLOCK = 2**63 - 2
WINDOWS = ["linear", "geometric", "parabolic", "sinusoidal"]


@dataclass
class Drawn:
    """A schedule and what is known of it.

    Attributes:
        exact: the exact value at a clock; None: the policy is not what the oracle has.
        error: how far from that the value may be at a clock.
        turns: clocks at which something begins or ends.
        falls: whether its values never rise; None: not said.
    """

    schedule: Schedule
    exact: Callable[[int], reference.Real] | None
    error: Callable[[int], float]
    turns: list[int]
    falls: bool | None = None


# -- the policies ------------------------------------------------------------------------------------------


def _rate(rng: Random, top: float) -> float:
    return rng.choice([0.0, top, 10 ** rng.uniform(-6, 0) * top, rng.uniform(0, top), rng.uniform(0, top)])


def _positive(rng: Random, top: float) -> float:
    return rng.choice([10 ** rng.uniform(-6, 0), rng.uniform(0.01, 1.0)]) * top


def _length(rng: Random) -> int:
    return rng.choice([1, 2, rng.randint(1, 12), rng.randint(1, 60), rng.randint(1, 9000), 2**40])


def _gamma(rng: Random) -> float:
    return rng.choice([1.0, 0.5, rng.uniform(0.05, 1.0), 1.0 - 10 ** rng.uniform(-6, -1)])


def _to_peak(peak: float, factor: float = 1.0) -> Callable[[int], float]:
    return lambda t: 2e-15 * factor * peak


def constant(rng: Random, top: float) -> Drawn:
    value = _rate(rng, top)
    return Drawn(fastlr.Constant(value), lambda t: reference.constant(t, value), lambda t: 0.0, [], True)


def ramp(rng: Random, top: float) -> Drawn:
    policy, exactly = rng.choice(
        [(fastlr.LinearRamp, reference.linear_ramp), (fastlr.Cosine, reference.cosine)]
    )
    start, end, steps = _rate(rng, top), _rate(rng, top), _length(rng)
    drawn = policy(start, end, steps)
    return Drawn(drawn, lambda t: exactly(t, start, end, steps), _to_peak(drawn.peak), [steps], start >= end)


def polynomial(rng: Random, top: float) -> Drawn:
    start, end, steps, power = _rate(rng, top), _rate(rng, top), _length(rng), rng.uniform(0.1, 5.0)
    drawn = fastlr.Polynomial(start, end, steps, power)
    exact = lambda t: reference.polynomial(t, start, end, steps, power)  # noqa: E731
    return Drawn(drawn, exact, _to_peak(drawn.peak), [steps], start >= end)


def root(rng: Random, top: float) -> Drawn:
    start, end, steps = _rate(rng, top), _rate(rng, top), _length(rng)
    if rng.random() < 0.5:
        drawn = fastlr.OneMinusSqrt(start, end, steps)
        exact = lambda t: reference.one_minus_sqrt(t, start, end, steps)  # noqa: E731
        return Drawn(drawn, exact, _to_peak(drawn.peak), [steps], start >= end)
    endless = fastlr.InverseSqrt(start, steps)
    return Drawn(
        endless, lambda t: reference.inverse_sqrt(t, start, steps), _to_peak(endless.peak), [steps], True
    )


def restarts(rng: Random, top: float) -> Drawn:
    start, end, period = _rate(rng, top), _rate(rng, top), _length(rng)
    mult = rng.choice([1, 1, 2, 3, 7, 2**50])
    drawn = fastlr.CosineWarmRestarts(start, end, period, mult)
    exact = lambda t: reference.cosine_warm_restarts(t, start, end, period, mult)  # noqa: E731
    periods = (period * mult**k for k in range(4))
    return Drawn(drawn, exact, _to_peak(drawn.peak), list(itertools.accumulate(periods)))


def power(rng: Random, top: float) -> Drawn:
    start, gamma, every = _rate(rng, top), _gamma(rng), _length(rng)
    relative = lambda exact: lambda t: 1e-15 * float(exact(t)) + 5e-324  # noqa: E731
    if rng.random() < 0.5:
        exact = lambda t: reference.exponential(t, start, gamma)  # noqa: E731
        return Drawn(fastlr.Exponential(start, gamma), exact, relative(exact), [], True)
    if rng.random() < 0.5:
        exact = lambda t: reference.step_decay(t, start, every, gamma)  # noqa: E731
        return Drawn(fastlr.StepDecay(start, every, gamma), exact, relative(exact), [every, 5 * every], True)
    milestones = sorted(rng.choices([0, 1, 5, 7, *(rng.randint(0, 90) for _ in range(4)), every], k=4))
    exact = lambda t: reference.multi_step(t, start, milestones, gamma)  # noqa: E731
    return Drawn(fastlr.MultiStep(start, milestones, gamma), exact, relative(exact), milestones, True)


def time_based(rng: Random, top: float) -> Drawn:
    start, decay = _rate(rng, top), _rate(rng, 1.0)
    exact = lambda t: reference.time_based(t, start, decay)  # noqa: E731
    return Drawn(fastlr.TimeBased(start, decay), exact, _to_peak(start), [], True)


def tabulated(rng: Random, top: float) -> Drawn:
    values = [_rate(rng, top) for _ in range(rng.choice([1, 2, 20]))]
    exact = lambda t: reference.constant(t, values[min(t, len(values) - 1)])  # noqa: E731
    return Drawn(fastlr.Tabulated(values), exact, lambda t: 0.0, [len(values)])


def cycle(rng: Random, top: float) -> Drawn:
    arguments, policy, decay = cycle_arguments(rng, top)
    drawn = policy(**arguments)
    up, down = drawn.step_size_up, drawn.step_size_down
    down = up if down is None else down
    forms = {
        "base": drawn.base, "top": drawn.max, "up": up, "down": down, "window": drawn.interpolation,
        "decay": decay, "inverted": drawn.inverted, "gamma": arguments.get("gamma", 1.0),
    }  # fmt: skip
    # The oracle is asked for the exact place in the cycle; PyTorch's formula, 1 + t/T - cycle, loses the bits
    # that the cycle's number takes up, and more on a short side.
    steep = (up + down) / min(side for side in (up, down) if side)
    if drawn.interpolation == "geometric" and drawn.max > drawn.base:
        steep *= float(1 + reference.exact.log(drawn.max / drawn.base))
    error = lambda t: 2e-15 * steep * (t // (up + down) + 1) * drawn.max  # noqa: E731
    turns = [round(part) for part in (up, up + down, 2 * up + down, 7 * (up + down))]
    return Drawn(drawn, lambda t: reference.cycle(t, **forms), error, turns)


def cycle_arguments(rng: Random, top: float) -> tuple[dict[str, Any], type[fastlr.Triangular], str]:
    """Of a cyclic policy; with the policy, and what the oracle calls its decay."""
    base, peak = sorted((_positive(rng, top), _positive(rng, top)))
    if rng.random() < 0.5:
        up, down = rng.choice(
            [(0, 7), (5, 0), (1, None), (rng.randint(1, 60), rng.randint(1, 60)), (2**41, 3)]
        )
    else:  # with no jump, which rounding could have at another clock
        up, down = rng.uniform(0.5, 40.0), rng.choice([None, rng.uniform(0.5, 40.0)])
    arguments: dict[str, Any] = {
        "base": base, "max": peak, "step_size_up": up, "step_size_down": down,
        "interpolation": rng.choice(WINDOWS), "inverted": rng.random() < 0.3,
    }  # fmt: skip
    kind = rng.choice(["none", "halving", "height", "both bounds"])
    if kind in ("height", "both bounds"):
        options = {"gamma": _gamma(rng), "decay_base": kind == "both bounds"}
        return arguments | options, fastlr.ExpRange, kind
    return arguments, fastlr.Triangular2 if kind == "halving" else fastlr.Triangular, kind


def one_cycle(rng: Random, top: float) -> Drawn:
    three_phase = rng.random() < 0.5
    total, pct = _length(rng), rng.uniform(0.0, 0.5 if three_phase else 1.0)
    shared = {
        "total_steps": total, "pct_start": pct, "anneal_strategy": rng.choice(["cos", "linear"]),
        "three_phase": three_phase,
    }  # fmt: skip
    if rng.random() < 0.3:
        low, high = sorted((_rate(rng, top), _rate(rng, top)))
        arguments = {"base_momentum": low, "max_momentum": high, **shared}
        drawn, exactly = fastlr.OneCycleMomentum(**arguments), reference.one_cycle_momentum
    else:
        arguments = {"max_lr": _rate(rng, top) / 2, "div_factor": rng.uniform(0.5, 30.0), **shared}
        drawn, exactly = fastlr.OneCycle(**arguments), reference.one_cycle
    rise = pct * total - 1
    phases = [rise, total - 1 - (2 if three_phase else 1) * rise]
    turns = [max(round(end), 0) for end in (rise, 2 * rise, total - 1)]
    if min(phases) < 1.0:  # of no length here; the oracle would divide by zero, as PyTorch does
        return Drawn(drawn, None, lambda t: 0.0, turns)
    return Drawn(drawn, lambda t: exactly(t, **arguments), _to_peak(drawn.peak, total / min(phases)), turns)


POLICIES = [
    constant, ramp, ramp, polynomial, root, restarts, power, power, time_based, tabulated, cycle, cycle,
    cycle, one_cycle,
]  # fmt: skip
# What compositions are refused for that count too far.
REFUSED = ("beyond a 64-bit clock", "must ascend")


# The curves that are computed alike to the bit everywhere; cycles by their window and decay.
ALIKE = {
    _core.Curve.CONSTANT, _core.Curve.LINE, _core.Curve.COSINE, _core.Curve.RESTARTS, _core.Curve.TIME_BASED,
    _core.Curve.EXPONENTIAL, _core.Curve.TABLE,
}  # fmt: skip


def needs_pow(schedule: Schedule) -> bool:
    """Whether a GPU may compute other last bits than the host."""
    return not all(
        s.curve in ALIKE
        or (
            s.curve is _core.Curve.CYCLE
            and s.window is not _core.Window.GEOMETRIC
            and s.decay in (_core.Decay.NONE, _core.Decay.HALVING)
        )
        for s in schedule._segments()[0]
    )


# -- what is made of them ----------------------------------------------------------------------------------


def draw(rng: Random, unit: str = "update", top: float = 1.0, depth: int = 3) -> Drawn:
    """A schedule of that unit, whose values lie in [0, top]."""
    kind = rng.random() if depth else 1.0
    if kind < 0.25:
        return _joined(rng, unit, top, depth - 1)
    if kind < 0.35:
        return _scaled(rng, unit, top, depth - 1)
    if kind < 0.45:
        return _shifted(rng, unit, top, depth - 1)
    if kind < 0.6 and unit != "epoch":
        return _held(rng, unit, top, depth - 1)
    drawn = rng.choice(POLICIES)(rng, top)
    drawn.schedule = dataclasses.replace(drawn.schedule, unit=unit)
    return drawn


def _joined(rng: Random, unit: str, top: float, depth: int) -> Drawn:
    a, b = draw(rng, unit, top, depth), draw(rng, unit, top, depth)
    at = rng.choice([1, rng.randint(1, 90), *a.turns, 2**53, 2**62]) or 1
    parts = [a, b]

    def part(t: int) -> tuple[Drawn, int]:
        return (parts[0], t) if t < at else (parts[1], t - at)

    def exact(t: int) -> reference.Real:
        side, local = part(t)
        assert side.exact is not None
        return side.exact(local)

    def error(t: int) -> float:
        side, local = part(t)
        return side.error(local)

    known = a.exact is not None and b.exact is not None
    turns = [*(t for t in a.turns if t < at), at, *(at + t for t in b.turns)]
    return Drawn(a.schedule.then(b.schedule, at), exact if known else None, error, turns)


def _scaled(rng: Random, unit: str, top: float, depth: int) -> Drawn:
    factor = rng.choice([0.0, 1.0, rng.uniform(0.0, 1.0), 2.0**-30])
    inner = draw(rng, unit, top, depth)
    exactly = inner.exact
    return Drawn(
        rng.choice([inner.schedule * factor, factor * inner.schedule]),
        None if exactly is None else lambda t: exactly(t) * factor,
        lambda t: inner.error(t) * factor + 3e-16 * inner.schedule.peak * factor + 5e-324,
        inner.turns,
        inner.falls,
    )


def _shifted(rng: Random, unit: str, top: float, depth: int) -> Drawn:
    inner = draw(rng, unit, top, depth)
    by = rng.choice([0, 1, rng.randint(0, 99), *inner.turns, 2**53, 2**62])
    exactly = inner.exact
    return Drawn(
        fastlr.Shifted(inner.schedule, by),
        None if exactly is None else lambda t: exactly(t + by),
        lambda t: inner.error(t + by) if t + by <= LAST_CLOCK else 1e300,
        [t - by for t in inner.turns if t >= by],
        inner.falls,
    )


# Units whose values another unit can hold.
HELD = {"update": ["epoch"], "sample": ["epoch", "update"], "token": ["epoch", "update", "sample"]}


def _held(rng: Random, unit: str, top: float, depth: int) -> Drawn:
    inner = draw(rng, rng.choice(HELD[unit]), top, depth)
    ticks = rng.choice([1, 2, rng.randint(1, 9), 391])
    exactly = inner.exact
    return Drawn(
        getattr(inner.schedule, f"in_{unit}s")(ticks),
        None if exactly is None else lambda t: exactly(t // ticks),
        lambda t: inner.error(t // ticks),
        [t * ticks for t in inner.turns],
        inner.falls,
    )


def of_seed(seed: int) -> Drawn:
    """The schedule of a seed, which counts what a clock can."""
    rng = Random(f"schedule {seed}")
    while True:
        try:
            drawn = draw(rng, rng.choice(["update", "sample", "token", "epoch"]))
            drawn.schedule(0)
        except ValueError as error:
            if not any(
                reason in str(error) for reason in ("beyond a 64-bit clock", "no parts", "must ascend")
            ):
                raise
            continue
        return drawn


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(of_seed(int(argument)).schedule)
