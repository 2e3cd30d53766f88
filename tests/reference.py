"""What fastlr is tested against: every formula once more, slowly and independently.

Schedules are computed with 200 bits. A float argument stands for exactly the double that it is, so
that all that a test sees is the rounding of the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from mpmath import MPContext

# -- schedules: the exact value at clock t -------------------------------------------------------------

exact = MPContext()
exact.prec = 200
Real: TypeAlias = "exact.mpf"


def _half_cosine(start: float, end: float, part: Real) -> Real:
    """From start (part 0) to end (part 1)."""
    return end + (exact.mpf(start) - end) * (1 + exact.cos(exact.pi * part)) / 2


def _straight(start: float, end: float, part: Real) -> Real:
    return start + (exact.mpf(end) - start) * part


def constant(t: int, value: float) -> Real:
    return exact.mpf(value)


def linear_ramp(t: int, start: float, end: float, steps: int) -> Real:
    return _straight(start, end, exact.mpf(min(t, steps)) / steps)


def cosine(t: int, start: float, end: float, steps: int) -> Real:
    return _half_cosine(start, end, exact.mpf(min(t, steps)) / steps)


def cosine_warm_restarts(t: int, start: float, end: float, first_period: int, mult: int = 1) -> Real:
    period = first_period
    if mult == 1:
        t %= period
    while t >= period:
        t, period = t - period, period * mult
    return _half_cosine(start, end, exact.mpf(t) / period)


def polynomial(t: int, start: float, end: float, steps: int, power: float) -> Real:
    return end + (exact.mpf(start) - end) * (exact.mpf(max(steps - t, 0)) / steps) ** exact.mpf(power)


def exponential(t: int, start: float, gamma: float) -> Real:
    return start * exact.mpf(gamma) ** t


def time_based(t: int, start: float, decay: float) -> Real:
    return start / (1 + exact.mpf(decay) * t)


def step_decay(t: int, start: float, every: int, gamma: float) -> Real:
    return exponential(t // every, start, gamma)


def multi_step(t: int, start: float, milestones: Sequence[int], gamma: float) -> Real:
    return exponential(sum(m <= t for m in milestones), start, gamma)


def cycle(
    t: int,
    base: float,
    top: float,
    up: float,
    down: float,
    *,
    window: str = "linear",
    decay: str = "none",
    gamma: float = 1.0,
    inverted: bool = False,
) -> Real:
    """Smith's cycles: ``decay`` is "none", "halving", "height" or "both bounds"."""
    first, second = (top, base) if inverted else (base, top)
    length = exact.mpf(up) + down
    number = int(exact.floor(t / length))
    place = t - number * length
    s = place / up if place < up else (length - place) / down
    if window == "geometric":
        height = first * (exact.mpf(second) / first) ** s - first
    else:
        shape = {"linear": s, "parabolic": s * (2 - s), "sinusoidal": (1 - exact.cos(exact.pi * s)) / 2}
        height = (exact.mpf(second) - first) * shape[window]
    if decay == "halving":
        return first + exact.ldexp(height, -number)
    if decay == "height":
        return first + height * exact.mpf(gamma) ** t
    if decay == "both bounds":
        return (first + height) * exact.mpf(gamma) ** t
    return first + height


def one_cycle(
    t: int,
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> Real:
    initial = exact.mpf(max_lr) / div_factor
    levels = [initial, max_lr, initial / final_div_factor]
    if three_phase:
        levels.insert(2, initial)
    return _through_phases(t, levels, total_steps, pct_start, anneal_strategy)


def one_cycle_momentum(
    t: int,
    base_momentum: float,
    max_momentum: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    three_phase: bool = False,
) -> Real:
    levels = [max_momentum, base_momentum, max_momentum] + [max_momentum] * three_phase
    return _through_phases(t, levels, total_steps, pct_start, anneal_strategy)


def _through_phases(
    t: int, levels: Sequence[Real], total_steps: int, pct_start: float, anneal_strategy: str
) -> Real:
    """Through three levels (up, down) or four (up, down, out); held after update ``total_steps - 1``."""
    rise = exact.mpf(pct_start) * total_steps - 1
    ends = [0, rise, total_steps - 1] if len(levels) == 3 else [0, rise, 2 * rise, total_steps - 1]
    t = min(t, total_steps - 1)
    phase = next(i for i, end in enumerate(ends[1:]) if t <= end)
    part = (t - exact.mpf(ends[phase])) / (ends[phase + 1] - ends[phase])
    curve = _half_cosine if anneal_strategy == "cos" else _straight
    return curve(levels[phase], levels[phase + 1], part)


# -- SGD: one element ----------------------------------------------------------------------------------


def sgd_nesterov(
    p: float, g: float, m: float | None, lr: float, momentum: float, weight_decay: float
) -> tuple[float, float]:
    """Parameter and momentum after an update (m None: the first), in rational arithmetic.

    Every line is exact until it is rounded to a double once, as a fused multiply-add does; the product
    ``m * momentum`` is rounded before.
    """
    g = float(Fraction(weight_decay) * Fraction(p) + Fraction(g))
    m = g if m is None else float(Fraction(g) + Fraction(m * momentum))
    u = float(Fraction(m) * Fraction(momentum) + Fraction(g))
    return float(Fraction(u) * Fraction(-lr) + Fraction(p)), m


# -- the gradients' norm -------------------------------------------------------------------------------

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


def _sum_in_lanes(values: Floats) -> float:
    """Value i to lane i % 256, each lane in order, then lanes 128 apart, 64 apart, ..., 1 apart."""
    lanes = np.zeros(256)
    for row in np.pad(values, (0, -len(values) % 256)).reshape(-1, 256):
        lanes += row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def squared_norm(gradients: Sequence[Floats]) -> float:
    """In chunks of 8,192, then over all chunks. Exact to the bit where squares are exact in float64."""
    flat = [np.ascontiguousarray(g).reshape(-1) for g in gradients]
    chunks = [g[i : i + 8192] for g in flat for i in range(0, len(g), 8192)]
    return _sum_in_lanes(np.array([_sum_in_lanes(chunk**2) for chunk in chunks]))
