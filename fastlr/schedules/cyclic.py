"""Policies that rise and fall: Smith's cycles and the one-cycle policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, SupportsFloat

from fastlr import _core
from fastlr._checks import choice, count, flag, real
from fastlr.schedules._base import Schedule
from fastlr.schedules._segment import Native, Segment

Interpolation = Literal["linear", "geometric", "parabolic", "sinusoidal"]
AnnealStrategy = Literal["cos", "linear"]

_WINDOWS = {
    "linear": _core.Window.LINEAR,
    "geometric": _core.Window.GEOMETRIC,
    "parabolic": _core.Window.PARABOLIC,
    "sinusoidal": _core.Window.SINUSOIDAL,
}


@dataclass(frozen=True)
class Triangular(Schedule):
    r"""The triangular policy: the value rises from ``base`` to ``max`` and falls back, cycle by cycle.

    With :math:`T = \text{up} + \text{down}`, :math:`c = \lfloor 1 + t/T \rfloor`,
    :math:`x = 1 + t/T - c` and :math:`s` rising from 0 to 1 over the first ``up`` updates of a cycle:
    ``base + (max - base) * w(s)``. Bit for bit ``torch.optim.lr_scheduler.CyclicLR``.

    Args:
        base: lower bound, >= 0.
        max: upper bound, >= base.
        step_size_up: clock units of the rise, >= 0.
        step_size_down: of the fall, >= 0; default: as the rise. A side of no length is a jump; both
            together are at least 1.
        interpolation: the window ``w(s)``: ``"linear"`` (s), ``"geometric"`` (straight on a log axis;
            needs base > 0), ``"parabolic"`` (Welch, s * (2 - s)) or ``"sinusoidal"`` (Hann,
            (1 - cos(pi s)) / 2).
        inverted: start at ``max`` and dip to ``base``, as momentum is cycled against the rate.

    >>> schedule = Triangular(0.001, 0.006, step_size_up=4)
    >>> schedule(0), schedule(4), schedule(8)
    (0.001, 0.006, 0.001)

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186.
    """

    base: float
    max: float
    step_size_up: float
    step_size_down: float | None = None
    interpolation: Interpolation = "linear"
    inverted: bool = field(default=False, kw_only=True)

    _decay: ClassVar[_core.Decay] = _core.Decay.NONE

    def _validate(self) -> None:
        base, top = real("base", self.base), real("max", self.max)
        if base > top:
            raise ValueError(
                f"max must be >= base, got base={base!r}, max={top!r}; swap them, or pass inverted=True "
                "for a cycle that starts at max"
            )
        up = real("step_size_up", self.step_size_up)
        down = up if self.step_size_down is None else real("step_size_down", self.step_size_down)
        if not 1.0 <= up + down < math.inf:
            raise ValueError(f"step_size_up + step_size_down must be >= 1 and finite, got {up!r} + {down!r}")
        self._set(interpolation=choice("interpolation", self.interpolation, _WINDOWS))
        if self.interpolation == "geometric" and base == 0.0:
            raise ValueError("base must be > 0 for geometric interpolation, got 0.0")
        self._set(base=base, max=top, step_size_up=up, inverted=flag("inverted", self.inverted))
        if self.step_size_down is not None:
            self._set(step_size_down=down)

    @property
    def _cycle(self) -> float:
        down = self.step_size_up if self.step_size_down is None else self.step_size_down
        return self.step_size_up + down

    @property
    def peak(self) -> float:
        return self.max

    def _segments(self) -> Native:
        return [
            Segment(
                _core.Curve.CYCLE,
                start=self.max if self.inverted else self.base,
                end=self.base if self.inverted else self.max,
                span=self._cycle,
                up=self.step_size_up,
                gamma=getattr(self, "gamma", 0.0),
                window=_WINDOWS[self.interpolation],
                decay=self._decay,
            )
        ], []

    def cycle_ends(self, total: int) -> list[int]:
        """The clocks in 1 .. ``total`` at which a cycle ends, where Smith stops training.

        >>> Triangular(0.001, 0.006, 2000).cycle_ends(9000)
        [4000, 8000]
        """
        cycles = int(count("total", total, 0) / self._cycle) + 1
        ends = (math.ceil(k * self._cycle) for k in range(1, cycles + 1))
        return [end for end in ends if end <= total]


@dataclass(frozen=True)
class Triangular2(Triangular):
    """As :class:`Triangular`, the height halved after every cycle: ``2 ** -(c - 1)``.

    >>> schedule = Triangular2(0.0, 0.8, step_size_up=4)
    >>> schedule(4), schedule(12), schedule(20)
    (0.8, 0.4, 0.2)
    """

    _decay: ClassVar[_core.Decay] = _core.Decay.HALVING


@dataclass(frozen=True)
class ExpRange(Triangular):
    """As :class:`Triangular`, the height shrunk by ``gamma ** t``.

    PyTorch's exp_range (the default here) shrinks the height above ``base``; in Smith's paper both
    bounds decline, which is ``decay_base=True``: the whole value is multiplied by ``gamma ** t``.

    Args:
        gamma: factor per clock unit, > 0; below 1 the cycles shrink. Above 1 they grow without bound,
            which an inverted cycle, whose dips would fall below 0, cannot.
        decay_base: let the lower bound decline as well.

    >>> ExpRange(0.1, 0.5, 1, gamma=0.5)(1), ExpRange(0.1, 0.5, 1, gamma=0.5, decay_base=True)(1)
    (0.30000000000000004, 0.25)
    """

    gamma: float = field(kw_only=True)
    decay_base: bool = field(default=False, kw_only=True)

    def _validate(self) -> None:
        super()._validate()
        gamma = real("gamma", self.gamma, above=True)
        if self.inverted and gamma > 1.0:
            raise ValueError(f"gamma must be in (0, 1] with inverted=True, got {gamma!r}")
        self._set(gamma=gamma, decay_base=flag("decay_base", self.decay_base))

    @property
    def _decay(self) -> _core.Decay:  # type: ignore[override]
        return _core.Decay.BOTH_BOUNDS if self.decay_base else _core.Decay.HEIGHT

    @property
    def peak(self) -> float:
        return self.max if self.gamma <= 1.0 else math.inf


@dataclass(frozen=True)
class _OneCycleBase(Schedule):
    _closed: ClassVar[bool] = False

    def _validate_phases(
        self, total_steps: object, pct_start: SupportsFloat, anneal: object, three_phase: object
    ) -> None:
        pct = real("pct_start", pct_start)
        three_phase = flag("three_phase", three_phase)
        limit = 0.5 if three_phase else 1.0
        if pct > limit:
            raise ValueError(
                f"pct_start must be in [0, {limit:g}]{' with three_phase=True' if three_phase else ''}, "
                f"got {pct!r}"
            )
        self._set(
            anneal_strategy=choice("anneal_strategy", anneal, ("cos", "linear")),
            total_steps=count("total_steps", total_steps),
            pct_start=pct,
            three_phase=three_phase,
        )


def _one_cycle_segments(
    levels: Sequence[float], total_steps: int, pct_start: float, anneal: AnnealStrategy
) -> list[Segment]:
    """Segments through ``levels`` (three or four), with OneCycleLR's phase ends.

    A phase shorter than one update has no length: it is left at once, at its end value. (PyTorch lets
    it end before update 0, so that the peak is never reached, or divides by zero.)
    """
    ends = [pct_start * total_steps - 1, float(total_steps - 1)]
    if len(levels) == 4:
        ends.insert(1, 2 * pct_start * total_steps - 2)
    curve = _core.Curve.COSINE if anneal == "cos" else _core.Curve.LINE
    segments: list[Segment] = []
    begin, start = 0, 0.0
    for level, target, end in zip(levels[:-1], levels[1:], ends, strict=True):
        end = max(end, start)
        if math.floor(end) >= begin:
            segments.append(Segment(curve, level, target, offset=start, span=end - start, begin=begin))
        begin, start = max(begin, math.floor(end) + 1), end
    segments[-1] = segments[-1]._replace(limit=total_steps - 1)
    return segments


@dataclass(frozen=True)
class OneCycle(_OneCycleBase):
    r"""The learning rate of the one-cycle policy: up from ``max_lr / div_factor`` to ``max_lr``, then down
    to ``max_lr / div_factor / final_div_factor`` at the last update. ``OneCycleLR``: bit for bit
    with linear annealing; half a cosine is evaluated without its cancellation near the end.

    Where a phase would be shorter than one update it has no length here, and the peak is reached at once;
    PyTorch lets it end before update 0, so that the peak is never reached, or divides by zero.

    Args:
        max_lr: the peak, >= 0.
        total_steps: updates in all, >= 1; the last is number ``total_steps - 1``.
        pct_start: part of them that the rise takes, in [0, 1].
        anneal_strategy: ``"cos"`` or ``"linear"``.
        div_factor: initial rate = max_lr / div_factor, > 0.
        final_div_factor: last rate = initial rate / final_div_factor, > 0.
        three_phase: fall back to the initial rate as fast as it rose, then anneal (pct_start <= 0.5).

    >>> schedule = OneCycle(0.5, total_steps=100, pct_start=0.1, div_factor=25)
    >>> round(schedule(0), 9), schedule(9), schedule(99) < 1e-5
    (0.02, 0.5, True)

    References:
        Smith and Topin, Super-Convergence, arXiv 1708.07120.
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: AnnealStrategy = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def _validate(self) -> None:
        self._validate_phases(self.total_steps, self.pct_start, self.anneal_strategy, self.three_phase)
        self._set(
            max_lr=real("max_lr", self.max_lr),
            div_factor=real("div_factor", self.div_factor, above=True),
            final_div_factor=real("final_div_factor", self.final_div_factor, above=True),
        )

    @property
    def duration(self) -> int:
        return self.total_steps

    @property
    def peak(self) -> float:
        initial = self.max_lr / self.div_factor
        return max(self.max_lr, initial, initial / self.final_div_factor)

    def _segments(self) -> Native:
        initial = self.max_lr / self.div_factor
        levels = [initial, self.max_lr, initial / self.final_div_factor]
        if self.three_phase:
            levels.insert(2, initial)
        return _one_cycle_segments(levels, self.total_steps, self.pct_start, self.anneal_strategy), []


@dataclass(frozen=True)
class OneCycleMomentum(_OneCycleBase):
    """The momentum that goes with :class:`OneCycle`: ``max_momentum`` down to ``base_momentum`` while the
    rate rises, and back. See :func:`one_cycle`.

    Args:
        base_momentum: where the rate is highest, >= 0; an optimizer's momentum stays below 1.
        max_momentum: at both ends, >= base_momentum.
        total_steps: updates in all, >= 1; the last is number ``total_steps - 1``.
        pct_start: part of them in which the rate rises, in [0, 1].
        anneal_strategy: ``"cos"`` or ``"linear"``.
        three_phase: back at max_momentum as soon as it fell, and held from there (pct_start <= 0.5).

    >>> schedule = OneCycleMomentum(0.85, 0.95, total_steps=101, pct_start=0.1)
    >>> schedule(0), round(schedule(9), 3), schedule(100)
    (0.95, 0.85, 0.95)
    """

    base_momentum: float
    max_momentum: float
    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: AnnealStrategy = "cos"
    three_phase: bool = False

    quantity: ClassVar[str] = "momentum"

    def _validate(self) -> None:
        self._validate_phases(self.total_steps, self.pct_start, self.anneal_strategy, self.three_phase)
        low, high = (
            real("base_momentum", self.base_momentum),
            real("max_momentum", self.max_momentum),
        )
        if low > high:
            raise ValueError(f"max_momentum must be >= base_momentum={low!r}, got {high!r}")
        self._set(base_momentum=low, max_momentum=high)

    @property
    def duration(self) -> int:
        return self.total_steps

    @property
    def peak(self) -> float:
        return self.max_momentum

    def _segments(self) -> Native:
        levels = [self.max_momentum, self.base_momentum, self.max_momentum]
        if self.three_phase:
            levels.append(self.max_momentum)
        return _one_cycle_segments(levels, self.total_steps, self.pct_start, self.anneal_strategy), []


def one_cycle(
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.3,
    anneal_strategy: AnnealStrategy = "cos",
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
    *,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
) -> tuple[OneCycle, OneCycleMomentum]:
    """The one-cycle policy's pair of schedules, ``(lr, momentum)``, with ``OneCycleLR``'s defaults.

    Args:
        max_lr, total_steps, pct_start, anneal_strategy, div_factor, final_div_factor, three_phase: as for
            :class:`OneCycle`. ``OneCycleLR``'s ``epochs`` times ``steps_per_epoch`` are total_steps.
        base_momentum, max_momentum: as for :class:`OneCycleMomentum`.

    >>> lr, momentum = one_cycle(max_lr=0.4, total_steps=9000)
    >>> momentum(0), momentum(8999)
    (0.95, 0.95)
    """
    shared = (total_steps, pct_start, anneal_strategy)
    return (
        OneCycle(max_lr, *shared, div_factor, final_div_factor, three_phase),
        OneCycleMomentum(base_momentum, max_momentum, *shared, three_phase),
    )
