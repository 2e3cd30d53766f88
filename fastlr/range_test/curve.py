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
# looked for, which by chance alone is two to three of them off. Of losses, which are freed of spikes first,
# medians are taken, whose standard error is this much larger than a mean's.
_SIGNIFICANT, _OF_MEDIANS = 4.5, math.sqrt(math.pi / 2)

# What rounding makes of a constant is no improvement either.
_ROUNDING = 1e-9

# What lies within the first of these parts of the whole improvement from the best counts as being as good; or
# within so many standard errors of the difference, but not beyond the second part. Where that is so over more
# than this factor of rates, the curve has a plateau and not a peak, and that begins where the curve comes
# within the second part, as the kernel rounds the corner. Broad peaks of real curves span half a decade.
_AS_GOOD, _AS_GOOD_ERRORS, _NEARLY_AS_GOOD, _PLATEAU = 0.02, 1.7, 0.05, 10.0

# Where the curve climbs from the first to the second of these parts of its fall faster than the kernel can
# follow, and by more than this many times its noise, there is an edge: what follows is left out, as it would
# be smeared over what was before. Elsewhere it stays, as the end of a fit is noisier than its middle.
_EDGE_FROM, _EDGE_TO, _EDGE_NOISE = 0.25, 0.75, 4.0

# Fewer points within the kernel's width than this do not tell an edge from chance.
_EDGE_POINTS = 4


class Fit(NamedTuple):
    """Straight lines fitted around each of some places.

    Attributes:
        level: of the line at the place.
        slope: of the line.
        error: the level's standard error, in units of the points' noise.
        weights: with which each point enters the level, shape (places, points).
    """

    level: Array
    slope: Array
    error: Array
    weights: Array


def fit(x: Array, y: Array, at: Array, span: float) -> Fit:
    """Local linear regression with a Gaussian kernel: centred, and without a shift at the ends either.

    Args:
        x: ascending, shape (n,), n >= 3.
        y: shape (n,).
        at: the places, shape (m,).
        span: the swept range of x, which the kernel's width is a part of.
    """
    middle = np.clip(np.searchsorted(x, at), 0, len(x) - 1)
    first, last = np.maximum(middle - 2, 0), np.minimum(middle + 2, len(x) - 1)
    # Where points are sparse, wide enough to reach a few of them.
    width = np.maximum(_WIDTH * span, (x[last] - x[first]) / (last - first))
    d = x - at[:, None]
    w = np.exp(-0.5 * (d / width[:, None]) ** 2)
    w[np.abs(d) > 3 * width[:, None]] = 0.0
    s0, s1, s2 = w.sum(1), (w * d).sum(1), (w * d * d).sum(1)
    scale = 1 / (s0 * s2 - s1 * s1)
    of_level = w * (s2[:, None] - s1[:, None] * d) * scale[:, None]
    of_slope = w * (s0[:, None] * d - s1[:, None]) * scale[:, None]
    return Fit(of_level @ y, of_slope @ y, np.linalg.norm(of_level, axis=1), of_level)


def medians(y: Array) -> Array:
    """Medians of five, which one or two outlying batches do not move; at the ends of the last five."""
    if len(y) < 5:
        return y
    middle = np.median(np.lib.stride_tricks.sliding_window_view(y, 5), axis=1)
    return np.concatenate([middle[:1], middle[:1], middle, middle[-1:], middle[-1:]])


def _sound_part(y: Array) -> int:
    """How many points there are before a falling curve is back where it started for good.

    What follows is training that has broken down; losses that grow without bound there would pull the
    smooth curve's minimum down in rate. Not to cut earlier before it is known that there is a fall is on
    purpose: an end chosen by the data makes an outlier the last point, where the curve then seems to fall.
    """
    return max(int(np.flatnonzero(y <= _start(y))[-1]) + 1, _opening(len(y)))


def _opening(n: int) -> int:
    """How many points make up the level that a curve starts from."""
    return max(3, n // 10)


def _start(y: Array) -> float:
    """The level that a curve starts from: a median, without points so far off that they would shift it."""
    opening = y[: _opening(len(y))]
    off = opening - np.median(opening)
    return float(np.median(opening[np.abs(off) <= 4 * _typical(off)]))


class Best(NamedTuple):
    """Where a curve is lowest, or why that is no answer. Indices are of the places asked for.

    Attributes:
        level: of the smooth curve at each place; NaN where it has broken down.
        slope: of the smooth curve at each place.
        lowest: where it is lowest.
        settled: where it stops to fall: the lowest point of a peak, the beginning of a plateau. On a
            plateau the lowest point is anywhere, and often at its far end, where training breaks down.
        onset: where it begins to fall: the last place before a tenth of the fall is done.
        steepest: where it falls fastest.
        region: first and last place around the steepest where it falls at least half as fast.
        reason: why these are no answer; None: they are one.
    """

    level: Array
    slope: Array
    lowest: int
    settled: int
    onset: int
    steepest: int
    region: tuple[int, int]
    reason: str | None


def best(x: Array, y: Array, at: Array, rates: Array, name: str, *, spiky: bool, ended_early: bool) -> Best:
    """Where a curve ``y(x)`` of at least three points is lowest.

    Args:
        x: place of each point on the axis of the sweep, ascending.
        y: the curve's points.
        at: places to look at, on the same axis, ascending.
        rates: the learning rate at each of them.
        name: of what is measured, for the reason.
        spiky: whether single points are far off, as losses of batches are.
        ended_early: whether the sweep ended before its last rate.
    """
    calm = medians(y) if spiky else y
    span = float(x[-1] - x[0])
    end = _sound_part(calm)
    reach = int(np.searchsorted(at, x[end - 1], "right"))
    at_points = fit(x[:end], calm[:end], x[:end], span)
    at_places = at_points if at is x else fit(x[:end], calm[:end], at[:reach], span)
    level, slope, error = at_places.level.copy(), at_places.slope.copy(), at_places.error.copy()
    off = y[:end] - at_points.level
    if not spiky:  # how far each point is off the line that is fitted around it, but without it
        off /= 1 - at_points.weights.diagonal()
    # Of losses a median, as spikes would blow up a mean; the losses', as their medians of five scatter less
    # and less independently. Of accuracies a mean, as they are few.
    noise = _typical(off) if spiky else math.sqrt(float((off**2).mean()))
    start, lowest = _start(calm), int(level.argmin())
    fall = start - float(level[lowest])
    of_start = _OF_MEDIANS / math.sqrt(_opening(len(y)))
    uncertain = noise * math.hypot(error[lowest] * (_OF_MEDIANS if spiky else 1.0), of_start)
    needed = _SIGNIFICANT * uncertain + _ROUNDING * abs(start)
    reason = None
    if not fall > needed:
        reason = (
            f"{name} improves nowhere in the sweep by more than its noise; sweep to higher rates, use "
            "larger batches, or check that the model learns at all"
        )
    else:
        edge = _edge(x, calm, float(at[lowest]), float(level[lowest]), fall, noise, span)
        if edge is not None:
            inside = int(np.searchsorted(at, x[edge - 1], "right"))
            refined = fit(x[:edge], calm[:edge], at[:inside], span)
            level[:inside], slope[:inside], error[:inside] = refined[:3]
            lowest = int(level[:inside].argmin())
        if lowest < np.searchsorted(at, x[_opening(len(y)) - 1]):
            reason = f"{name} is best at the sweep's first rates; lower start_lr"
        elif lowest == len(at) - 1 and not ended_early:
            reason = f"{name} still improves at the sweep's last rate; raise end_lr"
    fall = start - float(level[lowest])
    difference = _AS_GOOD_ERRORS * _typical(off) * np.hypot(error, error[lowest])
    slack = np.clip(difference, _AS_GOOD * fall, _NEARLY_AS_GOOD * fall)
    first, last = _around(lowest, level <= level[lowest] + slack)
    settled = lowest
    if rates[last] > _PLATEAU * rates[first]:
        settled, _ = _around(lowest, level <= level[lowest] + _NEARLY_AS_GOOD * fall)
    barely = level[: lowest + 1] > start - 0.1 * fall
    onset = int(np.flatnonzero(barely)[-1]) if barely.any() else 0
    steepest = onset + int(slope[onset : lowest + 1].argmin())
    missing = np.full(len(at) - reach, np.nan)
    return Best(
        np.concatenate([level, missing]),
        np.concatenate([slope, missing]),
        lowest,
        settled,
        onset,
        steepest,
        _around(steepest, slope <= slope[steepest] / 2),
        reason,
    )


def _edge(
    x: Array, calm: Array, lowest_at: float, low: float, fall: float, noise: float, span: float
) -> int | None:
    """The first point beyond an edge on the right of the lowest place; None: there is none."""
    risen = (calm > low + _EDGE_FROM * fall) & (x > lowest_at)
    if not risen.any() or (_EDGE_TO - _EDGE_FROM) * fall < _EDGE_NOISE * noise:
        return None
    edge = int(risen.argmax())
    near = (x >= x[edge]) & (x <= x[edge] + _WIDTH * span)
    steep = near.sum() >= _EDGE_POINTS and bool((calm[near] > low + _EDGE_TO * fall).any())
    return edge if steep and edge >= _opening(len(x)) else None


def _around(place: int, where: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[int, int]:
    """The first and the last of the places in a row around one for which something holds."""
    outside = np.flatnonzero(~where)
    first = int(outside[outside < place].max(initial=-1)) + 1
    return first, int(outside[outside > place].min(initial=len(where))) - 1


def _typical(off: Array) -> float:
    """The standard deviation, were they normal: from the median, which spikes spare."""
    return 1.4826 * float(np.median(np.abs(off)))
