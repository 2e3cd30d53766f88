"""Torch's schedulers as schedules, by their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import lr_scheduler

from fastlr.schedules import (
    Constant,
    Cosine,
    CosineWarmRestarts,
    Exponential,
    ExpRange,
    LinearRamp,
    MultiStep,
    OneCycle,
    OneCycleMomentum,
    Polynomial,
    Schedule,
    Shifted,
    StepDecay,
    Triangular,
    Triangular2,
)

# Of the larger one, by which two rates differ that a scheduler's own rounding may have parted.
_DRIFT = 1e-13
# The same where the rates are float32 tensors.
_DRIFT_OF_TENSORS = 1e-6

TickUnit: TypeAlias = Literal["update", "epoch"]
# What drives options of a group, by their names, in a scheduler's ticks.
Schedules: TypeAlias = dict[str, Schedule]


class NoFormula(Exception):
    """A scheduler does what no schedule but a table says."""


def torch_kind(scheduler: lr_scheduler.LRScheduler) -> Any:
    """Torch's class that a scheduler is one of."""
    return next(kind for kind in type(scheduler).__mro__ if kind.__module__ == lr_scheduler.__name__)


def formula_of(scheduler: lr_scheduler.LRScheduler) -> Any:
    """Torch's class whose formula is a scheduler's; the base class where it has another."""
    kind = torch_kind(scheduler)
    for name in ("get_lr", "_get_closed_form_lr", "_update_lr", "scale_fn", "_anneal_func"):
        own = name in vars(scheduler)  # in this object alone
        if own or getattr(type(scheduler), name, None) is not getattr(kind, name, None):
            return lr_scheduler.LRScheduler
    return kind


def value(schedule: Schedule, clock: int) -> float:
    """As a call, but says nothing past the schedule's end."""
    return schedule._native.value(clock)


def same_rate(group: dict[str, Any], a: float, b: float, scale: float = 0.0) -> bool:
    """Whether two of a group's rates differ by no more than a scheduler's rounding."""
    drift = _DRIFT_OF_TENSORS if isinstance(group["lr"], torch.Tensor) else _DRIFT
    return abs(a - b) <= drift * max(abs(a), abs(b), abs(scale))


def by_formula(s: Any, place: int, tick: int, rate: float | None, unit: TickUnit) -> Schedules:
    """What a single scheduler drives of a group, from the scheduler's own zero.

    Args:
        s: the scheduler.
        place: the group's.
        tick: the scheduler's, from which on it has to be right.
        rate: the group's then; None: the scheduler's own.
        unit: of its ticks.

    Raises:
        NoFormula: there is none, or none with such arguments.
    """
    try:
        return _by_formula(s, place, tick, rate, unit)
    except ValueError as error:  # of a schedule, which does not take what torch's scheduler does
        raise NoFormula from error


def _by_formula(s: Any, place: int, tick: int, rate: float | None, unit: TickUnit) -> Schedules:
    if hasattr(s, "_schedulers"):  # made of several
        raise NoFormula
    kind, group, base = formula_of(s), s.optimizer.param_groups[place], float(s.base_lrs[place])
    if kind is lr_scheduler.CyclicLR:
        return _cyclic(s, place, unit)
    if kind is lr_scheduler.OneCycleLR:
        return _one_cycle(s, group, unit)
    if kind is lr_scheduler.CosineAnnealingWarmRestarts:
        if rate is not None and (s.T_cur, s.T_i) != period_of(s, tick):  # as made with last_epoch=...
            raise NoFormula
        return {"lr": CosineWarmRestarts(base, float(s.eta_min), s.T_0, s.T_mult, unit=unit)}
    swings = kind is lr_scheduler.CosineAnnealingLR
    shape = (lambda top: _swing(s, top, unit)) if swings else _factors(s, kind, unit)
    if shape is None:
        raise NoFormula
    if rate is None and kind is lr_scheduler.ConstantLR and s.total_iters < 1:  # as in a SequentialLR
        return {"lr": Constant(base, unit=unit)}
    schedule = shape(base)
    if rate is None or same_rate(group, value(schedule, tick), rate, base):
        return {"lr": schedule}
    if swings:
        return {"lr": _swing_from(s, schedule, tick, rate, unit)}
    factor = value(shape(1.0), tick)
    if factor > 0.0:
        return {"lr": shape(rate / factor)}
    there = Constant(rate, unit=unit)
    return {"lr": schedule.then(there, at=tick) if tick else there}


def whole_ticks(ticks: float) -> int:
    """A number of ticks that may have been worked out as a float. Raises NoFormula for a fraction."""
    if ticks != int(ticks):
        raise NoFormula
    return int(ticks)


def period_of(s: Any, tick: int) -> tuple[int, int]:
    """Of CosineAnnealingWarmRestarts: how far a tick is in its period, and how long that is."""
    done, length = tick % s.T_0 if s.T_mult == 1 else tick, s.T_0
    while done >= length:
        done -= length
        length *= s.T_mult
    return done, length


def settles(s: Any) -> float:
    """The tick from which on a scheduler that multiplies the rate multiplies by 1; inf: there is none."""
    kind = formula_of(s)
    if kind is lr_scheduler.MultiStepLR:
        return max(s.milestones, default=0)
    if kind in (lr_scheduler.ConstantLR, lr_scheduler.LinearLR, lr_scheduler.PolynomialLR):
        return float(max(math.ceil(s.total_iters), 0))
    if kind in (lr_scheduler.StepLR, lr_scheduler.ExponentialLR, lr_scheduler.CosineAnnealingLR):
        return math.inf
    raise NoFormula


def _factors(s: Any, kind: type, unit: TickUnit) -> Callable[[float], Schedule] | None:
    """The schedule of a first rate, for a scheduler that multiplies the present one; None: it does not."""
    if kind is lr_scheduler.StepLR:
        return lambda base: StepDecay(base, whole_ticks(s.step_size), float(s.gamma), unit=unit)
    if kind is lr_scheduler.MultiStepLR:
        milestones = tuple(int(m) for m in sorted(s.milestones.elements()) if m == int(m) >= 0)
        return lambda base: MultiStep(base, milestones, float(s.gamma), unit=unit)
    if kind is lr_scheduler.ExponentialLR:
        return lambda base: Exponential(base, float(s.gamma), unit=unit)
    if kind is lr_scheduler.ConstantLR:
        return lambda base: _until(s, Constant(base * s.factor, unit=unit), base)
    if kind is lr_scheduler.LinearLR:
        if s.total_iters < 1:
            return lambda base: Constant(base * s.start_factor, unit=unit)
        return lambda base: _until(
            s,
            LinearRamp(base * s.start_factor, base * s.end_factor, whole_ticks(s.total_iters), unit=unit),
            base * s.end_factor,
        )
    if kind is lr_scheduler.PolynomialLR:
        if s.total_iters < 1:
            return lambda base: Constant(base, unit=unit)
        return lambda base: _until(
            s, Polynomial(base, 0.0, whole_ticks(s.total_iters), float(s.power), unit=unit), 0.0
        )
    return None


def _until(s: Any, first: Schedule, then: float) -> Schedule:
    """Holds a value for ever, and not only for lack of another, from the scheduler's last tick on."""
    last = whole_ticks(s.total_iters)
    return first.then(Constant(then, unit=first.unit), at=last) if last > 0 else first


def _swing(s: Any, top: float, unit: TickUnit) -> Schedule:
    """CosineAnnealingLR, which turns up again."""
    bottom, steps = float(s.eta_min), s.T_max
    low, high = sorted((top, bottom))
    wave: Any = {"interpolation": "sinusoidal", "unit": unit}
    if steps != int(steps):
        return Triangular(low, high, steps, inverted=top > bottom, **wave)
    back = Triangular(low, high, int(steps), inverted=top < bottom, **wave)
    return Cosine(top, bottom, int(steps), unit=unit).then(back)


def _swing_from(s: Any, schedule: Schedule, tick: int, rate: float, unit: TickUnit) -> Schedule:
    """The same from a rate that is not its own, until its next minimum: from there on it is."""
    height = (1.0 + math.cos(math.pi * tick / s.T_max)) / 2.0
    top = s.eta_min + (rate - s.eta_min) / height if height > 0.0 else -1.0
    if top < 0.0:
        raise NoFormula
    changed = _swing(s, top, unit)
    if s.T_max != int(s.T_max):  # no tick is at a minimum, where torch's takes its first rate again
        return changed
    turn = (2 * math.floor((tick / s.T_max + 1.0) / 2.0) + 1) * int(s.T_max)
    return changed.then(Shifted(schedule, turn), at=turn)


def _cyclic(s: Any, place: int, unit: TickUnit) -> Schedules:
    if s._scale_fn_custom is not None:
        raise NoFormula
    up = _first_that(lambda up: up / s.total_size == s.step_ratio, s.step_ratio * s.total_size)
    down = _first_that(lambda down: up + down == s.total_size, s.total_size - up)
    sides = (up, None) if up == down else (up, down)

    def cycle(first: float, second: float) -> Schedule:
        low, high = sorted((float(first), float(second)))
        how: Any = {"inverted": first > second, "unit": unit}
        if s.mode == "exp_range":
            return ExpRange(low, high, *sides, gamma=float(s.gamma), **how)
        return (Triangular2 if s.mode == "triangular2" else Triangular)(low, high, *sides, **how)

    found = {"lr": cycle(s.base_lrs[place], s.max_lrs[place])}
    if s.cycle_momentum:
        found[momentum_of(s)] = cycle(s.max_momentums[place], s.base_momentums[place])
    return found


def _one_cycle(s: Any, group: dict[str, Any], unit: TickUnit) -> Schedules:
    total, first = s.total_steps, float(s._schedule_phases[0]["end_step"])
    initial, top, last = (float(group[name]) for name in ("initial_lr", "max_lr", "min_lr"))
    if not min(initial, top, last) > 0.0 or first < 0.0:  # the latter: no tick is in the rise
        raise NoFormula
    how: Any = {
        "total_steps": total,
        "pct_start": _first_that(lambda part: float(part * total) - 1 == first, (first + 1) / total),
        "anneal_strategy": _strategy_of(s),
        "three_phase": len(s._schedule_phases) == 3,
        "unit": unit,
    }
    div = _first_that(lambda div: top / div == initial, top / initial)
    final = _first_that(lambda final: initial / final == last, initial / last)
    found: Schedules = {"lr": OneCycle(top, div_factor=div, final_div_factor=final, **how)}
    if s.cycle_momentum:
        low, high = float(group["base_momentum"]), float(group["max_momentum"])
        found[momentum_of(s)] = OneCycleMomentum(low, high, **how)
    return found


def _strategy_of(s: Any) -> str:
    """How a OneCycleLR anneals; in files of PyTorch before 2.1 a function says it."""
    name: str | None = getattr(s, "_anneal_func_type", None)
    if name is not None:
        return name
    kind = lr_scheduler.OneCycleLR
    for name, function in (("cos", kind._annealing_cos), ("linear", kind._annealing_linear)):
        if s.anneal_func == function:
            return name
    raise NoFormula


def momentum_of(s: Any) -> str:
    """The option that a scheduler with ``cycle_momentum`` cycles against the rate."""
    return "beta1" if s.use_beta1 else "momentum"


def _first_that(fits: Callable[[float], bool], about: float) -> float:
    """The simplest number near one that torch's arithmetic turns into what the scheduler keeps."""
    near = [round(about, digits) for digits in (0, 1, 2, 3, 4, 6, 9, 12)]
    near += [about, math.nextafter(about, math.inf), math.nextafter(about, -math.inf)]
    close = (x for x in near if abs(x - about) <= 1e-9 * abs(about))
    return next(filter(fits, close), about)
