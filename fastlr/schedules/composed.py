"""Schedules made from values or from other schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, SupportsFloat

from fastlr import _core
from fastlr._checks import ENDLESS, count, describe, items, real
from fastlr.schedules._base import Schedule, Segment, Unit, schedule

Native = tuple[list[Segment], list[float]]


@dataclass(frozen=True, init=False)
class Tabulated(Schedule):
    """The values of a callable or an array, one per clock unit.

    Args:
        source: ``f(t) -> float`` for t = 0 .. steps - 1, or a sequence, array or 1-d tensor of values.
            All values are finite and >= 0.
        steps: how many values to take, >= 1; may be left out for an array.

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
        self._set(table=tuple(real(f"value {t}", value) for t, value in enumerate(values)), unit=unit)
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
class Joined(Schedule):
    """Schedules one after another, each from its own zero; made by :meth:`Schedule.then`.

    Args:
        parts: the schedules, all of one unit.
        starts: the clocks at which the second and later ones begin, ascending.
    """

    parts: tuple[Schedule, ...]
    starts: tuple[int, ...]

    def _validate(self) -> None:
        parts = tuple(schedule("parts", part) for part in items("parts", self.parts))
        starts = tuple(count("starts", start) for start in items("starts", self.starts))
        if len(parts) != len(starts) + 1 or not starts:
            raise ValueError(f"{len(parts)} parts need {len(parts) - 1} starts, got {len(starts)}")
        for part in parts:
            if part.unit != self.unit:
                raise ValueError(
                    f"joined schedules must share a unit, got {self.unit!r} and {part.unit!r}; "
                    "convert epochs with in_updates(updates_per_epoch)"
                )
        # A part that is itself joined becomes several, so that splitting and joining change nothing.
        flat: list[tuple[int, Schedule]] = []
        stops = (*starts, ENDLESS)
        for start, stop, part in zip((0, *starts), stops, parts, strict=True):
            if start >= stop:
                raise ValueError(f"starts must ascend, got {list(starts)}")
            inner = (
                zip((0, *part.starts), part.parts, strict=True) if isinstance(part, Joined) else [(0, part)]
            )
            flat += [(start + shift, leaf) for shift, leaf in inner if start + shift < stop]
        self._set(parts=tuple(leaf for _, leaf in flat), starts=tuple(start for start, _ in flat[1:]))

    @property
    def duration(self) -> int | None:
        last = self.parts[-1].duration
        return None if last is None else self.starts[-1] + last

    @property
    def _last(self) -> int:
        return min(self.starts[-1] + self.parts[-1]._last, ENDLESS)

    @property
    def peak(self) -> float:
        return max(part.peak for part in self.parts)

    def _segments(self) -> Native:
        segments: list[Segment] = []
        table: list[float] = []
        bounds = (0, *self.starts, ENDLESS)
        for part, start, stop in zip(self.parts, bounds[:-1], bounds[1:], strict=True):
            inner, values = part._segments()
            segments += [
                s._replace(
                    begin=s.begin + start,
                    origin=s.origin + start,
                    table_begin=s.table_begin + len(table),
                )
                for s in inner
                if s.begin + start < stop
            ]
            table += values
        return segments, table


@dataclass(frozen=True)
class Scaled(Schedule):
    """A schedule multiplied by a factor >= 0; made by ``schedule * factor``.

    >>> from fastlr import Constant
    >>> (2.0 * Constant(0.1))(0)
    0.2
    """

    schedule: Schedule
    factor: float

    def _validate(self) -> None:
        factor = real("factor", self.factor)
        inner = schedule("schedule", self.schedule)
        if isinstance(inner, Scaled):
            factor = real("factor", factor * inner.factor)
            inner = inner.schedule
        self._set(schedule=inner, factor=factor, unit=inner.unit)

    @property
    def duration(self) -> int | None:
        return self.schedule.duration

    @property
    def _last(self) -> int:
        return self.schedule._last

    @property
    def peak(self) -> float:
        return self.schedule.peak * self.factor

    def _segments(self) -> Native:
        segments, table = self.schedule._segments()
        return [s._replace(factor=s.factor * self.factor) for s in segments], table


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


@dataclass(frozen=True)
class _Held(Schedule):
    """A schedule in a coarser unit, each of its values held for several units of a finer clock."""

    schedule: Schedule

    @property
    def _ticks(self) -> int:
        """Units of this clock to one of the schedule's."""
        raise NotImplementedError

    @property
    def duration(self) -> int | None:
        last = self.schedule.duration
        return None if last is None else last * self._ticks

    @property
    def _last(self) -> int:
        return min((self.schedule._last + 1) * self._ticks - 1, ENDLESS)

    @property
    def peak(self) -> float:
        return self.schedule.peak

    def _segments(self) -> Native:
        segments, table = self.schedule._segments()
        n = self._ticks
        return [
            s._replace(begin=s.begin * n, origin=s.origin * n, tick=s.tick * n)
            for s in segments
            if s.begin * n < ENDLESS
        ], table


@dataclass(frozen=True)
class PerEpoch(_Held):
    """A schedule in epochs, held during each epoch's updates; made by :meth:`Schedule.in_updates`."""

    updates_per_epoch: int

    def _validate(self) -> None:
        if schedule("schedule", self.schedule).unit != "epoch":
            raise ValueError(f"only a schedule in epochs can be converted, got one in {self.schedule.unit}s")
        self._set(updates_per_epoch=count("updates_per_epoch", self.updates_per_epoch), unit="update")

    @property
    def _ticks(self) -> int:
        return self.updates_per_epoch


@dataclass(frozen=True)
class InSamples(_Held):
    """A schedule in epochs or updates, clocked in samples; made by :meth:`Schedule.in_samples`."""

    samples: int

    def _validate(self) -> None:
        if schedule("schedule", self.schedule).unit == "sample":
            raise ValueError("the schedule counts samples already; use it as it is")
        self._set(samples=count("samples", self.samples), unit="sample")

    @property
    def _ticks(self) -> int:
        return self.samples
