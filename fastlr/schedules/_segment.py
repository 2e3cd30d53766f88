"""The native form of a schedule: segments and the values of their tables."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastlr import _core
from fastlr._checks import ENDLESS


class Segment(NamedTuple):
    """The native Segment's fields; what each means stands in ``csrc/schedule.h``."""

    curve: _core.Curve
    start: float = 0.0
    end: float = 0.0
    offset: float = 0.0
    span: float = 0.0
    up: float = 0.0
    gamma: float = 0.0
    period: int = 1
    count: int = 0  # type: ignore[assignment]  # hides tuple.count
    window: _core.Window = _core.Window.LINEAR
    decay: _core.Decay = _core.Decay.NONE
    begin: int = 0
    origin: int = 0
    tick: int = 1
    limit: int = ENDLESS
    factor: float = 1.0
    table_begin: int = 0


# Segments in order, and the values of their tables.
Native = tuple[list[Segment], list[float]]


def turning_points(segments: list[Segment], last: int) -> list[int]:
    """Clocks between which the value is monotonous, or oscillates between the values there.

    What has no end, and grows for ever, is looked at where it begins.

    Args:
        segments: in order.
        last: the clock at which the last new value is reached; ENDLESS: none.
    """
    points = {0} if last == ENDLESS else {0, last}
    for s, stop in zip(segments, [*(s.begin for s in segments[1:]), ENDLESS], strict=True):
        own = {s.begin, ENDLESS if stop == ENDLESS else stop - 1}
        grows = s.decay in (_core.Decay.HEIGHT, _core.Decay.BOTH_BOUNDS) and s.gamma > 1.0
        if s.curve in (_core.Curve.CYCLE, _core.Curve.RESTARTS) and not grows:
            rise = s.up if s.curve is _core.Curve.CYCLE else s.period / 2
            own |= {s.origin + s.tick * math.ceil(part * rise) for part in (0.5, 1.0, 1.5)}
        points |= {point for point in own if s.begin <= point < stop}
    return sorted(point for point in points if 0 <= point < ENDLESS)
