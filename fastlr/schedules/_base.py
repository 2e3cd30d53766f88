"""What all schedules share: the base class, its native form and the checks of arguments."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from fastlr import _core
from fastlr._checks import ENDLESS, choice, count, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit = Literal["update", "sample", "epoch"]

_UNITS = ("update", "sample", "epoch")


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


def schedule(name: str, value: object) -> Schedule:
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a schedule, got {describe(value)}")
    return value


@dataclass(frozen=True)
class Schedule:
    """What all schedules share. Immutable, hashable, comparable by value.

    Args:
        unit: what the clock counts: ``"update"`` (applied updates), ``"sample"`` or ``"epoch"``.
            An optimizer takes the first two; turn epochs into updates with :meth:`in_updates`.
    """

    unit: Unit = field(default="update", kw_only=True)

    # Whether the formula has a value of its own at clock == duration (a ramp's end), or stops one before.
    _closed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._set(unit=choice("unit", self.unit, _UNITS))
        self._validate()
        if type(self) is Schedule:
            raise TypeError("Schedule is abstract; use one of its subclasses")
        for clock in self._turning_points():
            value = self._native.value(clock)
            if not math.isfinite(value):
                raise ValueError(
                    f"{type(self).__name__} must be finite, but at {self.unit} {clock} it is {value!r}; its "
                    "arguments leave the range of float64"
                )

    def _turning_points(self) -> list[int]:
        """Clocks between which the value is monotonous, or oscillates between the values there.

        What has no end, and grows for ever, is looked at where it begins.
        """
        points = {0} if self._last == ENDLESS else {0, self._last}
        segments, _ = self._segments()
        for s, stop in zip(segments, [*(s.begin for s in segments[1:]), ENDLESS], strict=True):
            own = {s.begin, ENDLESS if stop == ENDLESS else stop - 1}
            grows = s.decay in (_core.Decay.HEIGHT, _core.Decay.BOTH_BOUNDS) and s.gamma > 1.0
            if s.curve in (_core.Curve.CYCLE, _core.Curve.RESTARTS) and not grows:
                rise = s.up if s.curve is _core.Curve.CYCLE else s.period / 2
                own |= {s.origin + s.tick * math.ceil(part * rise) for part in (0.5, 1.0, 1.5)}
            points |= {point for point in own if s.begin <= point < stop}
        return sorted(point for point in points if 0 <= point < ENDLESS)

    def _validate(self) -> None:
        """Checks the fields and stores them in their canonical type."""

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _segments(self) -> tuple[list[Segment], list[float]]:
        """The native form: segments in order, and the values of their tables."""
        raise NotImplementedError

    @property
    def duration(self) -> int | None:
        """How many clock units the schedule lasts; None: it has no end."""
        return None

    @property
    def peak(self) -> float:
        """The largest value that it takes (for joined schedules an upper bound)."""
        raise NotImplementedError

    @property
    def _last(self) -> int:
        """The clock at which the last new value is reached; ENDLESS: none that a clock can show."""
        if self.duration is None:
            return ENDLESS
        return min(self.duration if self._closed else self.duration - 1, ENDLESS)

    @cached_property
    def _native(self) -> _core.Schedule:
        segments, table = self._segments()
        for s in segments:
            far = max((s.begin, s.origin, s.tick, s.limit), key=abs)
            if abs(far) > ENDLESS:
                raise ValueError(
                    f"{type(self).__name__} would count {far} {self.unit}s, beyond a 64-bit clock; use fewer "
                    "to a unit of the schedule"
                )
        return _core.Schedule(segments, table, end=self._last, in_samples=self.unit == "sample")

    def __call__(self, clock: int) -> float:
        """The value at a clock >= 0. Past its end a schedule holds its last value and warns once."""
        clock = count("clock", clock, 0)
        if clock > self._last:
            self._warn_past_end(clock)
        return self._native.value(clock)

    def values(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The values at ``start, start + 1, ..., stop - 1``: float64, shape (stop - start,)."""
        start = count("start", start, 0)
        stop = count("stop", stop, start)
        if start < stop and stop - 1 > self._last:
            self._warn_past_end(stop - 1)
        return self._native.values(start, stop)

    def _warn_past_end(self, clock: int, stacklevel: int = 3) -> None:
        if "_warned" in self.__dict__:
            return
        self._set(_warned=True)
        warnings.warn(
            f"{type(self).__name__} ended at {self.unit} {self._last} and holds its last value; "
            f"asked for {self.unit} {clock}. Join another schedule to it with then(), or stop earlier.",
            UserWarning,
            stacklevel=stacklevel,
        )

    def plot(self, steps: int | None = None, path: str | None = None) -> Figure:
        """Draws the values of ``steps`` clock units (default: its duration). Needs matplotlib.

        Returns the figure; with ``path`` it is saved as well, in the format of the suffix.
        """
        from fastlr import plotting

        return plotting.plot_schedules({type(self).__name__: self}, steps, path)

    def then(self, after: Schedule, at: int | None = None) -> Schedule:
        """This schedule up to clock ``at`` (default: its duration), from there on ``after`` from its zero.

        >>> from fastlr import Constant, LinearRamp
        >>> LinearRamp(0.0, 1.0, 4).then(Constant(1.0)).values(2, 6).tolist()
        [0.5, 0.75, 1.0, 1.0]
        """
        from fastlr.schedules import composed

        schedule("after", after)
        if at is None:
            if self.duration is None:
                raise ValueError(
                    f"{type(self).__name__} has no end: say where to leave it, then(..., at=...)"
                )
            at = self.duration
        return composed.Joined((self, after), (count("at", at),), unit=self.unit)

    def __mul__(self, factor: float) -> Schedule:
        from fastlr.schedules import composed

        return composed.Scaled(self, factor)

    __rmul__ = __mul__

    def in_updates(self, updates_per_epoch: int) -> Schedule:
        """A schedule in epochs as one in updates: epoch ``k``'s value during all its updates.

        This is what calling a torch scheduler's ``step()`` once after each epoch does.

        >>> from fastlr import StepDecay
        >>> per_epoch = StepDecay(0.1, every=30, gamma=0.5, unit="epoch")
        >>> schedule = per_epoch.in_updates(updates_per_epoch=100)
        >>> schedule(2999), schedule(3000)
        (0.1, 0.05)
        """
        from fastlr.schedules import composed

        return composed.PerEpoch(self, updates_per_epoch)

    def in_samples(self, samples: int) -> Schedule:
        """A schedule in epochs or updates as one in samples: each value is held for so many samples.

        Args:
            samples: of an epoch (the data set's size), or of an update (the batch size), >= 1.

        >>> from fastlr import MultiStep
        >>> schedule = MultiStep(0.1, [60], 0.5, unit="epoch").in_samples(50_000)
        >>> schedule(2_999_999), schedule(3_000_000)
        (0.1, 0.05)
        """
        from fastlr.schedules import composed

        return composed.InSamples(self, samples)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain numbers, strings, lists and dicts; :meth:`from_dict` reads it back."""

        def plain(value: Any) -> Any:
            if isinstance(value, Schedule):
                return value.to_dict()
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            return value

        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"type": type(self).__name__, **fields}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Schedule:
        """The schedule that :meth:`to_dict` described.

        >>> from fastlr import Triangular2
        >>> schedule = Triangular2(0.001, 0.006, 2000)
        >>> Schedule.from_dict(schedule.to_dict()) == schedule
        True
        """

        def parsed(value: Any) -> Any:
            if isinstance(value, dict):
                return Schedule.from_dict(value)
            if isinstance(value, (list, tuple)):
                return tuple(parsed(v) for v in value)
            return value

        from fastlr import schedules

        if not isinstance(data, dict):
            raise ValueError(f"a schedule must be what its to_dict() returned, got {describe(data)}")
        fields = dict(data)
        name = fields.pop("type", None)
        kind = getattr(schedules, name) if name in schedules.__all__ else None
        if not (isinstance(kind, type) and issubclass(kind, Schedule) and kind is not Schedule):
            raise ValueError(f"type must be the name of a schedule, got {describe(name)}")
        known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(kind)}
        if not {key for key, needed in known.items() if needed} <= fields.keys() <= known.keys():
            raise ValueError(f"{name} has the fields {', '.join(known)}, got {', '.join(map(str, fields))}")
        return kind(**{key: parsed(value) for key, value in fields.items()})

    def __copy__(self) -> Schedule:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return self

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], Schedule], tuple[dict[str, Any]]]:
        return Schedule.from_dict, (self.to_dict(),)
