"""What all schedules share: the base class, and the schedules that its methods make."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from fastlr import _core, plotting
from fastlr._checks import ENDLESS, choice, count, describe, items, real
from fastlr._tables import html_table
from fastlr.schedules._segment import Native, Segment, turning_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit = Literal["update", "sample", "token", "epoch"]

_UNITS = ("update", "sample", "token", "epoch")
# Those whose clock moves by what an update consumed.
_CONSUMED = ("sample", "token")


def schedule(name: str, value: object) -> Schedule:
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a schedule, got {describe(value)}")
    return value


# Abstract, so that jsonargparse, and LightningCLI with it, takes subclasses for an argument of this type,
# which it does not for a plain dataclass.
@dataclass(frozen=True)
class Schedule(ABC):
    """What all schedules share. Immutable, hashable, comparable by value.

    Args:
        unit: what the clock counts: ``"update"`` (applied updates), ``"sample"``, ``"token"`` or
            ``"epoch"``. An optimizer counts updates, and one of the others besides, as it is told:
            ``opt.advance_epoch()`` stands where ``scheduler.step()`` stood once an epoch.
    """

    unit: Unit = field(default="update", kw_only=True)

    # What the values are.
    quantity: ClassVar[str] = "learning rate"

    # Whether the formula has a value of its own at clock == duration (a ramp's end), or stops one before.
    _closed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._set(unit=choice("unit", self.unit, _UNITS))
        self._validate()
        for clock in turning_points(self._segments()[0], self._last):
            value = self._native.value(clock)
            if not math.isfinite(value):
                raise ValueError(
                    f"{type(self).__name__} must be finite, but at {self.unit} {clock} it is {value!r}; its "
                    "arguments leave the range of float64"
                )

    def _validate(self) -> None:  # noqa: B027  # some have nothing to check
        """Checks the fields and stores them in their canonical type."""

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def _segments(self) -> Native:
        """The native form: segments in order, and the values of their tables."""

    @property
    def duration(self) -> int | None:
        """How many clock units the schedule lasts; None: it has no end."""
        return None

    @property
    @abstractmethod
    def peak(self) -> float:
        """The largest value that it takes (for joined schedules an upper bound)."""

    @property
    def last(self) -> int | None:
        """The clock at which the last new value is reached; None: none that a clock can show.

        >>> from fastlr import Cosine, Triangular
        >>> Cosine(0.1, 0.0, 100).last, Triangular(0.1, 0.5, 20).last
        (100, None)
        """
        return None if self._last == ENDLESS else self._last

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
        # Natively whatever is no update is one clock, to which an optimizer gives its unit.
        return _core.Schedule(segments, table, end=self._last, in_samples=self.unit != "update")

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

    def plot(self, steps: int | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draws the values of ``steps`` clock units (default: its duration). Needs matplotlib.

        Returns the figure; with ``path`` it is saved as well, in the format of the suffix.
        """
        return plotting.plot_schedules({type(self).__name__: self}, steps, path)

    def _repr_html_(self) -> str:
        """Its arguments and some of its values, as a notebook shows them."""
        arguments = [(f.name, repr(getattr(self, f.name))) for f in dataclasses.fields(self)]
        last = self.last
        clocks = (0,) if last is None else sorted({last * quarter // 4 for quarter in range(5)})
        values = [(f"at {self.unit} {clock:,}", f"{self._native.value(clock):.6g}") for clock in clocks]
        if last is None:
            values.append(("at most", f"{self.peak:.6g}"))
        return html_table(f"{type(self).__name__}: {self.quantity}", [*arguments, *values])

    def then(self, after: Schedule, at: int | None = None) -> Schedule:
        """This schedule up to clock ``at`` (default: its duration), from there on ``after`` from its zero.

        Args:
            after: of the same unit.
            at: clock units, >= 1; needed where this schedule has no end.

        >>> from fastlr import Constant, LinearRamp
        >>> LinearRamp(0.0, 1.0, 4).then(Constant(1.0)).values(2, 6).tolist()
        [0.5, 0.75, 1.0, 1.0]
        """
        schedule("after", after)
        if at is None:
            if self.duration is None:
                raise ValueError(
                    f"{type(self).__name__} has no end: say where to leave it, then(..., at=...)"
                )
            at = self.duration
        return Joined((self, after), (count("at", at),), unit=self.unit)

    def __mul__(self, factor: float) -> Schedule:
        return Scaled(self, factor)

    __rmul__ = __mul__

    def in_updates(self, updates_per_epoch: int) -> Schedule:
        """A schedule in epochs as one in updates: epoch ``k``'s value during all its updates.

        This is what calling a torch scheduler's ``step()`` once after each epoch does, as long as every
        epoch has so many updates that are applied; ``opt.advance_epoch()`` needs to know no number.

        Args:
            updates_per_epoch: >= 1.

        >>> from fastlr import StepDecay
        >>> per_epoch = StepDecay(0.1, every=30, gamma=0.5, unit="epoch")
        >>> schedule = per_epoch.in_updates(updates_per_epoch=100)
        >>> schedule(2999), schedule(3000)
        (0.1, 0.05)
        """
        return PerEpoch(self, updates_per_epoch)

    def in_samples(self, samples: int) -> Schedule:
        """A schedule in epochs or updates as one in samples: each value is held for so many samples.

        Args:
            samples: of an epoch (the data set's size), or of an update (the batch size), >= 1.

        >>> from fastlr import MultiStep
        >>> schedule = MultiStep(0.1, [60], 0.5, unit="epoch").in_samples(50_000)
        >>> schedule(2_999_999), schedule(3_000_000)
        (0.1, 0.05)
        """
        return InSamples(self, samples)

    def in_tokens(self, tokens: int) -> Schedule:
        """A schedule in epochs, updates or samples as one in tokens: each value is held for so many tokens.

        Args:
            tokens: of an epoch, of an update (the batch size), or of a sample (the sequence length), >= 1.

        >>> from fastlr import LinearRamp
        >>> schedule = LinearRamp(0.0, 1.0, 4, unit="sample").in_tokens(2048)
        >>> schedule(2047), schedule(2048), schedule.unit
        (0.0, 0.25, 'token')
        """
        return InTokens(self, tokens)

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

        if not isinstance(data, dict):
            raise ValueError(f"a schedule must be what its to_dict() returned, got {describe(data)}")
        fields = dict(data)
        name = fields.pop("type", None)
        kind = _kinds().get(name) if isinstance(name, str) else None
        if kind is None:
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
        return read_schedule, (self.to_dict(),)


# NOTE: [pickled schedules]
# Our optimizers' state_dict holds schedules as dicts. Others save param_groups as they are, as torch's
# ZeroRedundancyOptimizer does. So a schedule is pickled as the call of one function with such a dict, which
# it checks, and torch.load(weights_only=True) is told that this function is safe.
def read_schedule(data: dict[str, Any]) -> Schedule:
    """:meth:`Schedule.from_dict`, by a name of its own, as a pickle needs it."""
    return Schedule.from_dict(data)


torch.serialization.add_safe_globals([read_schedule])


def _kinds() -> dict[str, type[Schedule]]:
    """The package's schedules by their names, which stand in what ``to_dict()`` returns."""
    kinds = Schedule.__subclasses__()
    for kind in kinds:  # while it grows
        kinds += kind.__subclasses__()
    return {
        kind.__name__: kind
        for kind in kinds
        if kind.__module__.startswith(f"{__package__}.") and not kind.__name__.startswith("_")
    }


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

    def __post_init__(self) -> None:
        super().__post_init__()
        # Cycles come closest to their bounds at clocks that no formula tells.
        if math.isfinite(self.schedule.peak) and not math.isfinite(self.peak):
            raise ValueError(
                f"Scaled must be finite, but {self.factor!r} times a peak of {self.schedule.peak!r} leaves "
                "the range of float64; use a smaller factor"
            )

    @property
    def peak(self) -> float:
        return self.schedule.peak * self.factor

    def _segments(self) -> Native:
        segments, table = self.schedule._segments()
        return [s._replace(factor=s.factor * self.factor) for s in segments], table


@dataclass(frozen=True)
class _Held(Schedule):
    """A schedule in a coarser unit, each of its values held for several units of a finer clock."""

    schedule: Schedule

    @property
    @abstractmethod
    def _ticks(self) -> int:
        """Units of this clock to one of the schedule's."""

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
        unit = schedule("schedule", self.schedule).unit
        if unit in _CONSUMED:
            remedy = "already; use it as it is" if unit == "sample" else "and cannot count samples"
            raise ValueError(f"the schedule counts {unit}s {remedy}")
        self._set(samples=count("samples", self.samples), unit="sample")

    @property
    def _ticks(self) -> int:
        return self.samples


@dataclass(frozen=True)
class InTokens(_Held):
    """A schedule in epochs, updates or samples, clocked in tokens; made by :meth:`Schedule.in_tokens`."""

    tokens: int

    def _validate(self) -> None:
        if schedule("schedule", self.schedule).unit == "token":
            raise ValueError("the schedule counts tokens already; use it as it is")
        self._set(tokens=count("tokens", self.tokens), unit="token")

    @property
    def _ticks(self) -> int:
        return self.tokens
