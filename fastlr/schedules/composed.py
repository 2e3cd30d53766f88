"""Schedules made from values, or read from a later clock on; with those that methods of schedules make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, SupportsFloat

import numpy as np

from fastlr import _core
from fastlr._checks import ENDLESS, count, describe, items, real
from fastlr.schedules._base import InSamples, InTokens, Joined, PerEpoch, Scaled, Schedule, Unit, schedule
from fastlr.schedules._segment import Native, Segment

__all__ = ["InSamples", "InTokens", "Joined", "PerEpoch", "Scaled", "Shifted", "Tabulated"]


@dataclass(frozen=True, init=False)
class Tabulated(Schedule):
    """The values of a callable or an array, one per clock unit.

    Args:
        source: ``f(t) -> float`` for t = 0 .. steps - 1, or a sequence, array or 1-d tensor of values.
            All values are finite and >= 0.
        steps: how many values to take, >= 1; may be left out for an array.
        table: the values, in place of a source.

    >>> Tabulated(lambda t: 0.1 / (1 + t), steps=3).values(0, 3).tolist()
    [0.1, 0.05, 0.03333333333333333]
    """

    table: tuple[float, ...]

    _closed: ClassVar[bool] = False

    def __init__(
        self,
        source: Callable[[int], SupportsFloat] | Iterable[SupportsFloat] | None = None,
        steps: int | None = None,
        *,
        unit: Unit = "update",
        table: Iterable[SupportsFloat] | None = None,
    ) -> None:
        source = table if source is None else source
        if source is None:
            raise TypeError("Tabulated needs a callable or the values")
        if callable(source):
            if steps is None:
                raise TypeError("steps is needed with a callable: how many values to take from it")
            values = [source(t) for t in range(count("steps", steps))]
        else:
            if getattr(source, "ndim", 1) != 1:
                raise ValueError(f"source must be one-dimensional, got {describe(source)}")
            values = list(items("source", source))
            if steps is not None and len(values) < count("steps", steps):
                raise ValueError(f"steps={steps} values are needed, got {len(values)}")
            values = values[:steps]
        if not values:
            raise ValueError("a table needs at least one value, got none")
        # A run's table is long: floats are looked at all together, and one by one to say which is wrong.
        array = np.array(values) if set(map(type, values)) == {float} else None
        if array is None or not (np.isfinite(array) & (array >= 0.0)).all():
            values = [real(f"value {t}", value) for t, value in enumerate(values)]
        self._set(table=tuple(values), unit=unit)
        self.__post_init__()

    @property
    def duration(self) -> int:
        return len(self.table)

    @property
    def peak(self) -> float:
        return max(self.table)

    def _segments(self) -> Native:
        size = len(self.table)
        return [Segment(_core.Curve.TABLE, count=size, limit=size - 1)], list(self.table)


@dataclass(frozen=True)
class Shifted(Schedule):
    """A schedule read ``by`` clock units further on: its value at clock t is the schedule's at t + by.

    Where t + by is beyond a 64-bit clock, it stands still.

    Args:
        schedule: what is read.
        by: clock units of the schedule, >= 0.

    >>> from fastlr import LinearRamp
    >>> Shifted(LinearRamp(0.0, 1.0, 4), by=2).values(0, 3).tolist()
    [0.5, 0.75, 1.0]
    """

    schedule: Schedule
    by: int

    def _validate(self) -> None:
        inner = schedule("schedule", self.schedule)
        by = count("by", self.by, 0)
        if isinstance(inner, Shifted):
            by = count("by", by + inner.by, 0)
            inner = inner.schedule
        self._set(schedule=inner, by=by, unit=inner.unit)

    @property
    def duration(self) -> int | None:
        last = self.schedule.duration
        return None if last is None else max(last - self.by, 0)

    @property
    def _last(self) -> int:
        return (
            self.schedule._last if self.schedule._last == ENDLESS else max(self.schedule._last - self.by, 0)
        )

    @property
    def peak(self) -> float:
        return self.schedule.peak

    def _segments(self) -> Native:
        segments, table = self.schedule._segments()
        # What begins at or before the shift is hidden by the last segment that does.
        first = max(i for i, s in enumerate(segments) if s.begin <= self.by or i == 0)
        return [
            s._replace(begin=max(s.begin - self.by, 0), origin=s.origin - self.by) for s in segments[first:]
        ], table
