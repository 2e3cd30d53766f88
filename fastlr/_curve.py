"""Reading a noisy curve: smoothing without a shift, and where it is best."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

# Width of the smoothing kernel (its standard deviation) as part of the swept range, on the axis of the
# sweep: a fifth of a decade of five. Wider, it flattens the edge where training breaks down; narrower,
# losses of small batches leave several minima.
_WIDTH = 0.04

# An improvement counts where it exceeds this many of its own standard errors. The best of many points is
# looked for, which by chance alone is two to three of them off; for losses, whose noise is not normal,
# spikes left over add to that.
_SIGNIFICANT, _SIGNIFICANT_IF_SPIKY = 4.0, 5.0

# What rounding makes of a constant is no improvement either.
_ROUNDING = 1e-9


class Fit(NamedTuple):
    """Straight lines fitted around each point.

    Attributes:
        level: of the line at the point.
        slope: of the line.
        error: the level's standard error, in units of the points' noise.
        noise: by how much the point is off the line that is fitted around it, but without it.
    """

    level: Array
    slope: Array
    error: Array
    noise: Array


def fit(x: Array, y: Array) -> Fit:
    """Local linear regression with a Gaussian kernel: centred, and without a shift at the ends either."""
    n = len(x)
    level, slope, error, noise = np.empty((4, n))
    for i, centre in enumerate(x):
        first, last = max(i - 2, 0), min(i + 2, n - 1)
        width = max(_WIDTH * (x[-1] - x[0]), (x[last] - x[first]) / (last - first))
        low, high = np.searchsorted(x, centre - 3 * width), np.searchsorted(x, centre + 3 * width, "right")
        d = x[low:high] - centre
        w = np.exp(-0.5 * (d / width) ** 2)
        s0, s1, s2 = w.sum(), w @ d, w @ (d * d)
        of_level = w * (s2 - s1 * d) / (s0 * s2 - s1 * s1)
        level[i] = of_level @ y[low:high]
        slope[i] = (w * (s0 * d - s1) / (s0 * s2 - s1 * s1)) @ y[low:high]
        error[i] = np.linalg.norm(of_level)
        noise[i] = (y[i] - level[i]) / (1 - of_level[i - low])
    return Fit(level, slope, error, noise)


def medians(y: Array) -> Array:
    """Medians of five, which one or two outlying batches do not move."""
    if len(y) < 3:
        return y
    around = np.lib.stride_tricks.sliding_window_view(np.pad(y, 2, mode="reflect"), 5)
    middle: Array = np.median(around, axis=1)
    return middle


def sound_part(y: Array) -> int:
    """How many points there are before a falling curve is back where it started for good.

    What follows is training that has broken down; losses that grow without bound there would pull the
    smooth curve's minimum down in rate. Not to cut earlier is on purpose: an end chosen by the data makes
    an outlier the last point, where the curve then seems to fall still.
    """
    return max(int(np.flatnonzero(y <= _start(y))[-1]) + 1, _opening(len(y)))


def _opening(n: int) -> int:
    """How many points make up the level that a curve starts from."""
    return max(3, n // 10)


def _start(y: Array) -> float:
    return float(np.median(y[: _opening(len(y))]))


class Best(NamedTuple):
    """Where a curve is lowest, or why that is no answer.

    Attributes:
        curve: the smooth curve, over the curve's sound part.
        start: the level that it starts from.
        lowest: index of its lowest point.
        settled: index from which on it improves no more than its noise: the first point within a standard
            error of the lowest. On a plateau the lowest is anywhere, and often at its far end, where
            training is about to break down.
        reason: why that point is no answer; None: it is one.
    """

    curve: Fit
    start: float
    lowest: int
    settled: int
    reason: str | None


def best(x: Array, y: Array, name: str, *, spiky: bool, ended_early: bool) -> Best:
    """The lowest point of a curve ``y(x)`` of at least three points; ``spiky`` as losses of batches are."""
    calm = medians(y) if spiky else y
    end = sound_part(calm)
    curve = fit(x[:end], calm[:end])
    # A median, as spikes would blow up a mean; times what makes it a normal's standard deviation. Medians
    # of five scatter less than the losses do, and less independently.
    noise = 1.4826 * float(np.median(np.abs(y[:end] - curve.level))) if spiky else _rms(curve.noise)
    start, lowest = _start(calm), int(curve.level.argmin())
    error = noise * math.hypot(curve.error[lowest], 1 / math.sqrt(_opening(len(y))))
    reason = None
    needed = (_SIGNIFICANT_IF_SPIKY if spiky else _SIGNIFICANT) * error + _ROUNDING * abs(start)
    if not start - curve.level[lowest] > needed:
        reason = (
            f"{name} improves nowhere in the sweep by more than its noise; sweep to higher rates, use "
            "larger batches, or check that the model learns at all"
        )
    elif lowest < _opening(len(y)):
        reason = f"{name} is best at the sweep's first rates; lower start_lr"
    elif lowest == len(y) - 1 and not ended_early:
        reason = f"{name} still improves at the sweep's last rate; raise end_lr"
    typical = 1.4826 * float(np.median(np.abs(curve.noise)))  # not blown up where the curve bends
    slack = typical * np.hypot(curve.error, curve.error[lowest])
    settled = int(np.flatnonzero(curve.level <= curve.level[lowest] + slack)[0])
    return Best(curve, start, lowest, settled, reason)


def _rms(values: Array) -> float:
    return math.sqrt(float((values**2).mean()))
