"""Schedules as torch's schedulers, placed where a run stands."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import lr_scheduler

from fastlr.optim._scheduler_formulas import period_of
from fastlr.schedules import (
    Constant,
    Cosine,
    CosineWarmRestarts,
    Exponential,
    ExpRange,
    Joined,
    LinearRamp,
    MultiStep,
    OneCycle,
    OneCycleMomentum,
    PerEpoch,
    Polynomial,
    Scaled,
    Schedule,
    StepDecay,
    Triangular,
    Triangular2,
)


class NoCounterpart(Exception):
    """Torch has no scheduler that does what schedules do."""


@dataclass(frozen=True)
class _Spec:
    """A scheduler of torch's for one group.

    Attributes:
        kind: its class.
        base: the group's ``base_lr`` that it goes by.
        shared: arguments that all groups have in common.
        own: arguments that each group has its own of.
    """

    kind: Any
    base: float
    shared: dict[str, Any]
    own: dict[str, float]

    def goes_with(self, other: _Spec) -> bool:
        return self.kind is other.kind and all(
            value == other.shared[name]
            or (isinstance(value, float) and math.isclose(value, other.shared[name], rel_tol=1e-12))
            for name, value in self.shared.items()
        )


class Driven(NamedTuple):
    """What drives one group: its schedules, from their common zero, by options."""

    lr: Schedule
    momentum: Schedule | None


def scheduler_of(optimizer: torch.optim.Optimizer, driven: list[Driven], tick: int) -> Any:
    """Torch's scheduler for all groups, after so many ticks; the groups' values are left to the caller.

    Raises:
        NoCounterpart: there is none.
    """
    columns = [_specs(each.lr, each.momentum) for each in driven]
    first = columns[0]
    for column in columns[1:]:
        if [begin for begin, _ in column] != [begin for begin, _ in first]:
            raise NoCounterpart
        if not all(a.goes_with(b) for (_, a), (_, b) in zip(first, column, strict=True)):
            raise NoCounterpart
    begins = [begin for begin, _ in first]
    for (begin, spec), end in zip(first, [*begins[1:], tick + 1], strict=True):
        if spec.kind is lr_scheduler.OneCycleLR and end - begin > spec.shared["total_steps"]:
            raise NoCounterpart  # it fails there, where ours holds
    for group, column in zip(optimizer.param_groups, columns, strict=True):
        group["lr"] = group["initial_lr"] = column[0][1].base
    made = []
    for i, (_, spec) in enumerate(first):
        row = [column[i][1] for column in columns]
        own = {name: [each.own[name] for each in row] for name in spec.own}
        made.append(spec.kind(optimizer, **spec.shared, **own))
        made[-1].base_lrs = [each.base for each in row]
    if len(made) == 1:
        move(made[0], tick)
        return made[0]
    sequence = lr_scheduler.SequentialLR(optimizer, made, begins[1:])
    active = bisect_right(begins[1:], tick)
    for i, scheduler in enumerate(made[: active + 1]):
        last = tick if i == active else begins[i + 1] - 1
        move(scheduler, last - begins[i])
    sequence.last_epoch = tick
    return sequence


def by_tick(schedule: Schedule) -> tuple[int, Schedule]:
    """How long a schedule holds each value, and the schedule of these."""
    if isinstance(schedule, Scaled) and isinstance(schedule.schedule, PerEpoch):
        held, inner = by_tick(schedule.schedule)
        return held, inner * schedule.factor
    if isinstance(schedule, PerEpoch):
        return schedule.updates_per_epoch, schedule.schedule
    return 1, schedule


def move(scheduler: Any, tick: int) -> None:
    """Moves a scheduler to where so many calls of its ``step()`` bring it."""
    scheduler.last_epoch = tick
    scheduler._step_count = tick + 1
    if isinstance(scheduler, lr_scheduler.CosineAnnealingWarmRestarts):
        scheduler.T_cur, scheduler.T_i = period_of(scheduler, tick)


def _specs(schedule: Schedule, momentum: Schedule | None) -> list[tuple[int, _Spec]]:
    """The schedulers that follow one another, and at which ticks they begin."""
    if momentum is not None:
        return [(0, _with_momentum(schedule, momentum))]
    parts = list(schedule.parts) if isinstance(schedule, Joined) else [schedule]
    begins = [0, *(schedule.starts if isinstance(schedule, Joined) else ())]
    specs: list[tuple[int, _Spec]] = []
    while parts:
        part, begin = parts.pop(0), begins.pop(0)
        then = parts[0] if parts else None
        length = begins[0] - begin if begins else math.inf
        specs.append((begin, _spec(part, then, length)))
        if then is not None and _is_included(part, then, length):
            del parts[0], begins[0]
        elif isinstance(part, Cosine) and length > part.steps:  # it holds, where torch's turns up again
            specs.append((begin + part.steps, _constant(part.end)))
    return specs


def _is_included(part: Schedule, then: Schedule, length: float) -> bool:
    """Whether torch's scheduler of a part does what follows it as well."""
    if isinstance(part, Constant):
        return isinstance(then, Constant) and 0.0 < part.value <= then.value
    if isinstance(part, Cosine) and length == part.steps:
        low, high = sorted((part.start, part.end))
        return then == Triangular(
            low, high, part.steps, None, "sinusoidal", inverted=part.start < part.end, unit=part.unit
        )
    if isinstance(part, (LinearRamp, Polynomial)) and length == part.steps:
        return then == Constant(part.end, unit=part.unit)
    return False


def _constant(value: float) -> _Spec:
    return _Spec(lr_scheduler.ConstantLR, value, {"factor": 1.0, "total_iters": 0}, {})


def _spec(part: Schedule, then: Schedule | None, length: float) -> _Spec:
    if isinstance(part, Constant):
        if isinstance(then, Constant) and _is_included(part, then, length):
            shared = {"factor": part.value / then.value, "total_iters": int(length)}
            return _Spec(lr_scheduler.ConstantLR, then.value, shared, {})
        return _constant(part.value)
    if isinstance(part, StepDecay):
        return _Spec(lr_scheduler.StepLR, part.start, {"step_size": part.every, "gamma": part.gamma}, {})
    if isinstance(part, MultiStep):
        drops = {"milestones": list(part.milestones), "gamma": part.gamma}
        return _Spec(lr_scheduler.MultiStepLR, part.start, drops, {})
    if isinstance(part, Exponential):
        return _Spec(lr_scheduler.ExponentialLR, part.start, {"gamma": part.gamma}, {})
    if isinstance(part, LinearRamp) and part.start > 0.0:
        base = max(part.start, part.end)
        shared = {"start_factor": part.start / base, "end_factor": part.end / base, "total_iters": part.steps}
        return _Spec(lr_scheduler.LinearLR, base, shared, {})
    if isinstance(part, Polynomial) and part.end == 0.0:
        shared = {"total_iters": part.steps, "power": part.power}
        return _Spec(lr_scheduler.PolynomialLR, part.start, shared, {})
    if isinstance(part, Cosine):
        return _Spec(
            lr_scheduler.CosineAnnealingLR, part.start, {"T_max": part.steps, "eta_min": part.end}, {}
        )
    if isinstance(part, CosineWarmRestarts):
        shared = {"T_0": part.first_period, "T_mult": part.mult, "eta_min": part.end}
        return _Spec(lr_scheduler.CosineAnnealingWarmRestarts, part.start, shared, {})
    if isinstance(part, Triangular):
        return _cyclic(part)
    if isinstance(part, OneCycle):
        return _one_cycle(part)
    raise NoCounterpart


def _cyclic(part: Triangular) -> _Spec:
    if part.interpolation != "linear" or getattr(part, "decay_base", False):
        raise NoCounterpart
    mode = {Triangular: "triangular", Triangular2: "triangular2", ExpRange: "exp_range"}[type(part)]
    first, second = (part.max, part.base) if part.inverted else (part.base, part.max)
    shared = {
        "step_size_up": part.step_size_up,
        "step_size_down": part.step_size_down,
        "mode": mode,
        "gamma": getattr(part, "gamma", 1.0),
        "cycle_momentum": False,
    }
    if 0.0 in (part.step_size_up, part.step_size_down):  # a jump, where torch's divides by zero
        raise NoCounterpart
    return _Spec(lr_scheduler.CyclicLR, first, shared, {"base_lr": first, "max_lr": second})


def _one_cycle(part: OneCycle) -> _Spec:
    if part.pct_start * part.total_steps <= 1.0:  # a rise of no length, where torch's divides by zero
        raise NoCounterpart
    shared = {
        "total_steps": part.total_steps,
        "pct_start": part.pct_start,
        "anneal_strategy": part.anneal_strategy,
        "div_factor": part.div_factor,
        "final_div_factor": part.final_div_factor,
        "three_phase": part.three_phase,
        "cycle_momentum": False,
    }
    return _Spec(lr_scheduler.OneCycleLR, part.max_lr / part.div_factor, shared, {"max_lr": part.max_lr})


def _with_momentum(lr: Schedule, momentum: Schedule) -> _Spec:
    """A scheduler that cycles the momentum against the rate."""
    if isinstance(lr, OneCycle) and isinstance(momentum, OneCycleMomentum):
        same: tuple[str, ...] = ("total_steps", "pct_start", "anneal_strategy", "three_phase")
        spec, low, high = _one_cycle(lr), momentum.base_momentum, momentum.max_momentum
    elif isinstance(lr, Triangular) and type(momentum) is type(lr) and momentum.inverted:
        same = ("step_size_up", "step_size_down", "interpolation", "gamma", "decay_base")
        spec, low, high = _cyclic(lr), momentum.base, momentum.max
    else:
        raise NoCounterpart
    if any(getattr(lr, name, None) != getattr(momentum, name, None) for name in same):
        raise NoCounterpart
    own = {**spec.own, "base_momentum": low, "max_momentum": high}
    return _Spec(spec.kind, spec.base, {**spec.shared, "cycle_momentum": True}, own)


# -- what torch has no scheduler for -----------------------------------------------------------------------


class Source(NamedTuple):
    """What a function of a tick gives the values of.

    Attributes:
        schedule: which.
        zero: the clock at which that has its zero, where the tick's is at 0.
        held: clock units to a tick.
    """

    schedule: Schedule
    zero: int
    held: int


def values_of(source: Source) -> Callable[[int], float]:
    """A function for a LambdaLR. ``source`` is kept as its attribute, by which :func:`source_of` finds it."""
    schedule, zero, held = source

    def value(tick: int) -> float:
        return schedule._native.value(max(tick * held - zero, 0))

    value.source = source  # type: ignore[attr-defined]  # of a function, whose state no state_dict() holds
    return value


def source_of(function: Any) -> Source | None:
    """What :func:`values_of` made a function of."""
    found = getattr(function, "source", None)
    return found if isinstance(found, Source) else None


def one(tick: int) -> float:
    """The factor of a rate that stays."""
    return 1.0


class Other(NamedTuple):
    """What drives an option of a group besides the rate.

    Attributes:
        name: the option's.
        key: under which the group holds it.
        place: of it in the tuple that stands there; None: it stands there alone.
        values: its values at a tick.
    """

    name: str
    key: str
    place: int | None
    values: Callable[[int], float]


class ValuesLR(lr_scheduler.LambdaLR):
    """LambdaLR that drives other options of the groups as well, as CyclicLR does with momentum.

    Args:
        others: what, for each group.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_lambda: list[Callable[[int], float]],
        others: list[list[Other]],
    ) -> None:
        self.others = others
        super().__init__(optimizer, lr_lambda)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rates; the other options are written at once."""
        for group, others in zip(self.optimizer.param_groups, self.others, strict=True):
            for other in others:
                value: Any = other.values(self.last_epoch)
                if other.place is not None:
                    values = list(group[other.key])
                    values[other.place] = value
                    value = tuple(values)
                group[other.key] = value
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        """As LambdaLR's: what the functions do is not in it."""
        return {name: value for name, value in super().state_dict().items() if name != "others"}
