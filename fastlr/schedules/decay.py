"""Constant, ramps and decays."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastlr import _core
from fastlr._checks import ENDLESS, count, items, real
from fastlr.schedules._base import Schedule
from fastlr.schedules._segment import Native, Segment


@dataclass(frozen=True)
class Constant(Schedule):
    """Always ``value``.

    Args:
        value: >= 0.

    >>> Constant(0.1)(12345)
    0.1
    """

    value: float

    def _validate(self) -> None:
        self._set(value=real("value", self.value))

    @property
    def peak(self) -> float:
        return self.value

    def _segments(self) -> Native:
        return [Segment(_core.Curve.CONSTANT, start=self.value)], []


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From ``start`` to ``end`` in ``steps`` clock units."""

    start: float
    end: float
    steps: int

    def _validate(self) -> None:
        self._set(
            start=real("start", self.start),
            end=real("end", self.end),
            steps=count("steps", self.steps),
        )

    @property
    def duration(self) -> int:
        return self.steps

    @property
    def peak(self) -> float:
        return max(self.start, self.end)


@dataclass(frozen=True)
class LinearRamp(_Ramp):
    """``start + (end - start) * t / steps``, then ``end``.

    Args:
        start: value at clock 0, >= 0.
        end: value from clock ``steps`` on, >= 0.
        steps: clock units, >= 1.

    >>> LinearRamp(0.0, 1.0, 4).values(0, 5).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def _segments(self) -> Native:
        return [
            Segment(_core.Curve.LINE, self.start, self.end, span=float(self.steps)),
            Segment(_core.Curve.CONSTANT, self.end, begin=self.steps),
        ], []


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine, ``end + (start - end) / 2 * (1 + cos(pi t / steps))``, then ``end``.

    ``CosineAnnealingLR`` up to its ``T_max``; where that turns back up, this holds.

    Args:
        start: value at clock 0, >= 0.
        end: value from clock ``steps`` on, >= 0.
        steps: clock units, >= 1.

    >>> Cosine(1.0, 0.0, 100)(0), Cosine(1.0, 0.0, 100)(100)
    (1.0, 0.0)

    References:
        Loshchilov and Hutter, SGDR, arXiv 1608.03983.
    """

    def _segments(self) -> Native:
        return [
            Segment(_core.Curve.COSINE, self.start, self.end, span=float(self.steps), limit=self.steps)
        ], []


@dataclass(frozen=True)
class Polynomial(_Ramp):
    """``end + (start - end) * (1 - t / steps) ** power``, then ``end``.

    Args:
        start: value at clock 0, >= 0.
        end: value from clock ``steps`` on, >= 0.
        steps: clock units, >= 1.
        power: > 0.

    >>> Polynomial(1.0, 0.0, 4, power=2.0).values(0, 5).tolist()
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """

    power: float

    def _validate(self) -> None:
        super()._validate()
        self._set(power=real("power", self.power, above=True))

    def _segments(self) -> Native:
        return [
            Segment(
                _core.Curve.POLYNOMIAL,
                self.start,
                self.end,
                offset=float(self.steps),
                up=-1.0,
                span=float(self.steps),
                gamma=self.power,
                limit=self.steps,
            )
        ], []


@dataclass(frozen=True)
class OneMinusSqrt(_Ramp):
    """``end + (start - end) * (1 - sqrt(t / steps))``, then ``end``: fast at first, and slower and slower.

    Args:
        start: value at clock 0, >= 0.
        end: value from clock ``steps`` on, >= 0.
        steps: clock units, >= 1.

    >>> OneMinusSqrt(1.0, 0.0, 16).values(0, 5).round(3).tolist()
    [1.0, 0.75, 0.646, 0.567, 0.5]

    References:
        Haegele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
        arXiv 2405.18392.
    """

    def _segments(self) -> Native:
        return [
            Segment(
                _core.Curve.POLYNOMIAL,
                self.end,
                self.start,
                up=1.0,
                span=float(self.steps),
                gamma=0.5,
                limit=self.steps,
            )
        ], []


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """``start / sqrt((t + timescale) / timescale)``, half of ``start`` at clock ``3 * timescale``.

    After a linear warm-up over ``timescale`` this is the decay of the Transformer; see
    :func:`fastlr.inverse_sqrt` and :func:`fastlr.noam`.

    Args:
        start: value at clock 0, >= 0.
        timescale: clock units, >= 1.

    >>> InverseSqrt(1.0, timescale=100)(0), InverseSqrt(1.0, timescale=100)(300)
    (1.0, 0.5)

    References:
        Vaswani et al., Attention Is All You Need, arXiv 1706.03762.
    """

    start: float
    timescale: int

    def _validate(self) -> None:
        self._set(start=real("start", self.start), timescale=count("timescale", self.timescale))

    @property
    def peak(self) -> float:
        return self.start

    def _segments(self) -> Native:
        timescale = float(self.timescale)
        return [
            Segment(_core.Curve.POLYNOMIAL, self.start, offset=timescale, up=1.0, span=timescale, gamma=-0.5)
        ], []


@dataclass(frozen=True)
class CosineWarmRestarts(Schedule):
    """Half cosines from ``start`` to ``end``, restarted after ``first_period``, then after periods that
    grow by ``mult``. ``CosineAnnealingWarmRestarts``, without its cancellation
    near a period's end.

    Args:
        start: value after each restart, >= 0.
        end: value that a period falls towards, >= 0.
        first_period: clock units, >= 1.
        mult: integer >= 1.

    >>> schedule = CosineWarmRestarts(1.0, 0.0, first_period=10, mult=2)
    >>> schedule(0), round(schedule(5), 9), schedule(10), round(schedule(20), 9), schedule(30)
    (1.0, 0.5, 1.0, 0.5, 1.0)

    References:
        Loshchilov and Hutter, SGDR, arXiv 1608.03983.
    """

    start: float
    end: float
    first_period: int
    mult: int = 1

    def _validate(self) -> None:
        self._set(
            start=real("start", self.start),
            end=real("end", self.end),
            first_period=count("first_period", self.first_period),
            mult=count("mult", self.mult),
        )

    @property
    def peak(self) -> float:
        return max(self.start, self.end)

    def _segments(self) -> Native:
        return [
            Segment(
                _core.Curve.RESTARTS,
                self.start,
                self.end,
                period=self.first_period,
                count=self.mult,
            )
        ], []


@dataclass(frozen=True)
class Exponential(Schedule):
    """``start * gamma ** t``.

    Args:
        start: value at clock 0, >= 0.
        gamma: factor per clock unit, > 0.

    >>> Exponential(1.0, 0.5).values(0, 4).tolist()
    [1.0, 0.5, 0.25, 0.125]
    """

    start: float
    gamma: float

    def _validate(self) -> None:
        self._set(start=real("start", self.start), gamma=real("gamma", self.gamma, above=True))

    @property
    def peak(self) -> float:
        return self.start if self.gamma <= 1.0 or self.start == 0.0 else math.inf

    def _segments(self) -> Native:
        return [Segment(_core.Curve.EXPONENTIAL, self.start, gamma=self.gamma)], []


@dataclass(frozen=True)
class TimeBased(Schedule):
    """``start / (1 + decay * t)``.

    Args:
        start: value at clock 0, >= 0.
        decay: per clock unit, >= 0.

    >>> TimeBased(1.0, 1.0).values(0, 4).tolist()
    [1.0, 0.5, 0.3333333333333333, 0.25]
    """

    start: float
    decay: float

    def _validate(self) -> None:
        self._set(start=real("start", self.start), decay=real("decay", self.decay))

    @property
    def peak(self) -> float:
        return self.start

    def _segments(self) -> Native:
        return [Segment(_core.Curve.TIME_BASED, self.start, gamma=self.decay)], []


@dataclass(frozen=True)
class StepDecay(Schedule):
    """``start * gamma ** floor(t / every)``.

    Args:
        start: value at clock 0, >= 0.
        every: clock units between drops, >= 1.
        gamma: factor of each drop, > 0.

    >>> schedule = StepDecay(1.0, every=30, gamma=0.5)
    >>> schedule(29), schedule(30), schedule(60)
    (1.0, 0.5, 0.25)
    """

    start: float
    every: int
    gamma: float

    def _validate(self) -> None:
        self._set(
            start=real("start", self.start),
            every=count("every", self.every),
            gamma=real("gamma", self.gamma, above=True),
        )

    @property
    def peak(self) -> float:
        return self.start if self.gamma <= 1.0 or self.start == 0.0 else math.inf

    def _segments(self) -> Native:
        return [Segment(_core.Curve.EXPONENTIAL, self.start, gamma=self.gamma, period=self.every)], []


@dataclass(frozen=True)
class MultiStep(Schedule):
    """``start * gamma ** k``, where ``k`` milestones are at or before the clock.

    Args:
        start: value at clock 0, >= 0.
        milestones: clocks in ascending order, >= 0; one that stands twice counts twice.
        gamma: factor of each drop, > 0.

    >>> schedule = MultiStep(0.1, [60, 120, 160], 0.5)
    >>> schedule(59), schedule(60), schedule(120), schedule(160)
    (0.1, 0.05, 0.025, 0.0125)
    """

    start: float
    milestones: tuple[int, ...]
    gamma: float

    def _validate(self) -> None:
        milestones = tuple(count("milestones", m, 0) for m in items("milestones", self.milestones))
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must ascend, got {list(milestones)}")
        self._set(
            start=real("start", self.start),
            milestones=milestones,
            gamma=real("gamma", self.gamma, above=True),
        )

    @property
    def peak(self) -> float:
        return self.start and self.start * max(1.0, self.gamma ** len(self.milestones))

    def _segments(self) -> Native:
        counts = {0: 0} | {milestone: k for k, milestone in enumerate(self.milestones, 1)}
        return [
            Segment(
                _core.Curve.EXPONENTIAL,
                self.start,
                gamma=self.gamma,
                count=count,
                period=ENDLESS,
                begin=begin,
            )
            for begin, count in counts.items()
        ], []
