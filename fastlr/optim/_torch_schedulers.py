"""What a live scheduler will do from where it stands, as schedules."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.optim import lr_scheduler, swa_utils

from fastlr._checks import describe
from fastlr.optim._replaced import is_replaced
from fastlr.optim._scheduler_formulas import (
    NoFormula,
    Schedules,
    TickUnit,
    by_formula,
    formula_of,
    momentum_of,
    same_rate,
    settles,
    torch_kind,
    value,
    whole_ticks,
)
from fastlr.optim._scheduler_tables import (
    Simulation,
    every,
    is_function,
    last_tick,
    numbers_of,
    timm_tables,
)
from fastlr.optim._schedules_to_torch import Source, ValuesLR, by_tick, one, source_of
from fastlr.schedules import Constant, Schedule, Shifted, Tabulated

# NOTE: [where a scheduler stands]
# A scheduler's ticks are its calls of step(). Torch's schedulers that look at the tick alone go on from it.
# Those that multiply the group's present rate go on from that, wherever it has got to: their schedule is the
# one of the group's first rate where this explains the present one, and else the one that does. What has no
# formula is a table of what a copy of the scheduler does.


class Followed(NamedTuple):
    """A scheduler as schedules.

    Attributes:
        now: how many ticks it has made.
        groups: what drives the options of each parameter group, in updates.
    """

    now: int
    groups: list[Schedules]


def follow(
    optimizer: torch.optim.Optimizer, scheduler: Any, updates_per_tick: int, horizon: int | None
) -> Followed:
    """What a scheduler will do with each group of its optimizer, from where it stands.

    Raises:
        TypeError, ValueError: it cannot be followed; the message says why, and what to do.
    """
    unit: TickUnit = "epoch" if updates_per_tick > 1 else "update"
    groups: list[Schedules]
    if _is_timms(scheduler, "Scheduler"):
        _check_timm(scheduler, optimizer, updates_per_tick)
        now, tables = timm_tables(optimizer, scheduler, updates_per_tick, horizon)
        groups = [{"lr": Tabulated(table, unit=unit)} for table in tables]
    else:
        for each in every(scheduler):
            _check(each, optimizer)
        now = _position(scheduler)
        if now < 0:
            raise ValueError(
                f"the {type(scheduler).__name__} stands at {now}, before its first tick; call "
                "scheduler.step(epoch) with the epoch, >= 0, that the run is in"
            )
        end = None
        if horizon is not None:
            end = last_tick(horizon, updates_per_tick, now, type(scheduler).__name__)
        reader = _Reader(optimizer, scheduler, unit, end)
        groups = [reader.schedules(place) for place in range(len(optimizer.param_groups))]
    if updates_per_tick > 1:
        groups = [
            {name: each.in_updates(updates_per_tick) for name, each in group.items()} for group in groups
        ]
    return Followed(now, groups)


# -- what can be followed ----------------------------------------------------------------------------------


def _check(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    name = type(scheduler).__name__
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        raise ValueError(_follows_metric(name, scheduler.factor))
    if isinstance(scheduler, swa_utils.SWALR):
        raise ValueError(
            f"{name} leaves its rate to another scheduler's; fuse with that one, and where averaging begins "
            "call set_schedule(lr=fastlr.LinearRamp(rate, swa_lr, anneal_epochs * updates)); ema_decay keeps "
            "averages in the step"
        )
    if not isinstance(scheduler, lr_scheduler.LRScheduler):
        remedy = "where a framework wraps one, pass the scheduler inside"
        if isinstance(scheduler, (list, tuple)):
            remedy = "of several that the loop steps in turn make one, ChainedScheduler(several, optimizer)"
        raise TypeError(
            "scheduler must be one of torch.optim.lr_scheduler or timm.scheduler, got "
            f"{describe(scheduler)}; {remedy}"
        )
    _check_pair(scheduler, optimizer)
    kind = torch_kind(scheduler)
    if inspect.unwrap(scheduler.step) != kind.step.__get__(scheduler):
        raise ValueError(
            f"{name} has a step() of its own, and what it does cannot be told beforehand; fuse the optimizer "
            "alone and give it a schedule: set_schedule(lr=fastlr.Tabulated(rate_of_update, steps))"
        )
    bases = getattr(scheduler, "base_lrs", optimizer.param_groups)
    if len(bases) != len(optimizer.param_groups):
        raise ValueError(
            f"the {name} knows {len(bases)} parameter groups, and its optimizer has "
            f"{len(optimizer.param_groups)}; make it anew after add_param_group()"
        )
    if kind is lr_scheduler.CosineAnnealingWarmRestarts:
        _check_restarts(scheduler)


def _check_restarts(scheduler: Any) -> None:
    if scheduler.T_cur != int(scheduler.T_cur):
        restarts = f"{float(scheduler.base_lrs[0])!r}, {scheduler.eta_min!r}, {scheduler.T_0} * len(loader)"
        raise ValueError(
            f"the {type(scheduler).__name__} was called with a part of an epoch, step({scheduler.last_epoch} "
            "+ ...), so that its tick is the caller's; fuse the optimizer alone, call set_schedule(lr="
            f'fastlr.CosineWarmRestarts({restarts}, {scheduler.T_mult}), start="zero") and '
            "set_clock(updates=...)"
        )


def _check_pair(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    name = type(scheduler).__name__
    if is_replaced(scheduler):
        raise ValueError(f"the {name} was given to fastlr.fuse() before, and stands where it stood then")
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            f"the {name} is of another optimizer, a {type(scheduler.optimizer).__name__}; pass the two that "
            "belong together"
        )


def _follows_metric(name: str, factor: float) -> str:
    return (
        f"{name} follows a metric, which no schedule can; fuse the optimizer alone, and where step(metric) "
        f"would reduce the rate call scale_lr({factor!r})"
    )


def _is_timms(scheduler: Any, name: str) -> bool:
    """Whether it is of a class of timm's, which need not be installed."""
    kinds = [kind for kind in type(scheduler).__mro__ if kind.__module__.startswith("timm.scheduler.")]
    return any(kind.__name__ == name for kind in kinds)


def _check_timm(scheduler: Any, optimizer: torch.optim.Optimizer, updates_per_tick: int) -> None:
    name = type(scheduler).__name__
    if _is_timms(scheduler, "PlateauLRScheduler"):
        raise ValueError(_follows_metric(name, scheduler.lr_scheduler.factor))
    _check_pair(scheduler, optimizer)
    if scheduler.param_group_field != "lr":
        raise ValueError(f"{name} must drive 'lr', got {scheduler.param_group_field!r}; fuse without it")
    if not scheduler.t_in_epochs and updates_per_tick != 1:
        raise ValueError(
            f"updates_per_tick must be 1 with this {name}, which counts updates (t_in_epochs=False), got "
            f"{updates_per_tick}"
        )


# -- torch's schedulers ------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A schedule, and the outermost scheduler's tick at which it has its zero."""

    schedule: Schedule
    zero: int

    def read_from(self, tick: int) -> Schedule:
        """The same with its zero at a tick; before it begins it holds its first value."""
        by = tick - self.zero
        if by >= 0:
            return Shifted(self.schedule, by) if by else self.schedule
        first = Constant(value(self.schedule, 0), unit=self.schedule.unit)
        return first.then(self.schedule, at=-by)


# By options of a group.
_Parts: TypeAlias = dict[str, _Part]


def _position(scheduler: Any) -> int:
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):  # which counts nothing
        return max(map(_position, scheduler._schedulers))
    return int(scheduler.last_epoch)


class _Reader:
    """Reads a scheduler and what it is made of, tick by tick of the outermost one.

    Args:
        unit: of its ticks.
        end: the tick at which the run ends; None: nobody said.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scheduler: Any, unit: TickUnit, end: int | None
    ) -> None:
        self._groups = optimizer.param_groups
        self._scheduler = scheduler
        self._now = _position(scheduler)
        self._unit = unit
        self._end = end
        self._simulation = Simulation(optimizer, scheduler, self._now)
        self._factors: dict[tuple[Callable[[int], Any], int], list[Any]] = {}

    def schedules(self, place: int) -> Schedules:
        """Of a group, over the scheduler's whole run: exact from now on, as far as known before."""
        group, now = self._groups[place], self._now
        present = numbers_of(group)
        if present["lr"] < 0.0:
            raise ValueError(
                f"the rate of parameter group {place} must be >= 0, got {present['lr']!r}, as the "
                f"{type(self._scheduler).__name__} left it"
            )
        parts = self._parts(self._scheduler, place, now, now, present["lr"], None)
        found = {}
        for option, part in parts.items():
            schedule, there = part.read_from(0), present[option]
            if not same_rate(group, value(schedule, now), there, value(schedule, 0)):
                # Somebody has written another one, which stays until the next tick.
                rest = self._constant(there).then(Shifted(schedule, now + 1), at=1)
                schedule = schedule.then(rest, at=now) if now else rest
            found[option] = schedule
        return found

    def _constant(self, rate: float) -> Schedule:
        return Constant(rate, unit=self._unit)

    def _parts(self, s: Any, place: int, at: int, tick: int, rate: float | None, until: int | None) -> _Parts:
        """What a scheduler drives of a group.

        Args:
            s: the scheduler.
            place: the group's.
            at: the outermost scheduler's tick from which on it has to be right.
            tick: the scheduler's own then.
            rate: the group's then; None: the scheduler begins there, with its own.
            until: the outermost scheduler's tick at which another one takes over; None: never.
        """
        kind = formula_of(s)
        try:
            if kind is lr_scheduler.SequentialLR and rate is not None:
                return self._sequential(s, place, at, tick, rate, until)
            if kind is lr_scheduler.ChainedScheduler and rate is not None:
                return self._chained(s, place, at, rate, until)
            return self._single(s, place, at, tick, rate, until)
        except NoFormula:
            return self._table(s, place, at, until)

    def _single(
        self, s: Any, place: int, at: int, tick: int, rate: float | None, until: int | None
    ) -> _Parts:
        """The same of one that is not made of several; raises NoFormula where only copies of it know."""
        zero = at - tick
        if type(s) is ValuesLR:
            parts = {other.name: self._sourced(other.values, zero) for other in s.others[place]}
            parts["lr"] = self._lambda(s, place, zero, until)
            return parts
        if formula_of(s) is lr_scheduler.LambdaLR:
            return {"lr": self._lambda(s, place, zero, until)}
        found = by_formula(s, place, tick, rate, self._unit)
        return {name: _Part(schedule, zero) for name, schedule in found.items()}

    def _last_tick(self, s: Any, at: int, until: int | None) -> int:
        """The outermost scheduler's tick up to which one has to be right that begins at another of its."""
        if until is not None:
            return until
        if self._end is not None:
            return max(self._end, at + 1)  # it may begin when the run has ended
        inner = sorted({type(each).__name__ for each in every(s) if each is not s})
        made_of = f" of {', '.join(inner)}" if inner else ""
        return last_tick(None, 1, self._now, f"{type(s).__name__}{made_of}")

    def _table(self, s: Any, place: int, at: int, until: int | None) -> _Parts:
        stop = self._last_tick(s, at, until)
        cycled = {momentum_of(each) for each in every(s) if getattr(each, "cycle_momentum", False)}
        for each in every(s):
            if isinstance(each, ValuesLR):
                cycled |= {other.name for other in each.others[place]}
        return {name: self._simulated(place, name, at, stop) for name in ("lr", *sorted(cycled))}

    def _simulated(self, place: int, option: str, start: int, stop: int) -> _Part:
        return self._tabulated(self._simulation.values(place, option, start, stop), start, option)

    def _tabulated(self, values: list[float], zero: int, option: str = "lr") -> _Part:
        for tick, given in enumerate(values, zero):
            if not 0.0 <= given < math.inf:
                raise ValueError(
                    f"the {type(self._scheduler).__name__} gives {given!r} as {option} after {tick} steps, "
                    "which must be finite and >= 0; mend it, or fuse the optimizer alone"
                )
        return _Part(Tabulated(values, unit=self._unit), zero)

    def _lambda(self, s: Any, place: int, zero: int, until: int | None) -> _Part:
        base, function = float(s.base_lrs[place]), s.lr_lambdas[place]
        if function is one:
            return _Part(self._constant(base), zero)
        if base == 1.0 and source_of(function) is not None:
            try:
                return self._sourced(function, zero)
            except NoFormula:  # of other ticks, so that it is as any function
                pass
        if not is_function(function):  # a call may change it
            raise NoFormula
        steps = self._last_tick(s, zero, until) - zero
        if (function, steps) not in self._factors:  # which groups often have in common
            self._factors[function, steps] = [function(tick) for tick in range(steps)]
        factors = self._factors[function, steps]
        bases = {float(each) for each in s.base_lrs}
        # So that groups with rates of their own have one table in common, which a file holds once.
        if len(bases) > 1 and all(type(each) is float and 0.0 <= base * each < math.inf for each in factors):
            return _Part(Tabulated(factors, unit=self._unit) * base, zero)
        return self._tabulated([float(base * factor) for factor in factors], zero)

    def _sourced(self, function: Callable[[int], float], zero: int) -> _Part:
        """What to_torch() has made a function of. Raises NoFormula where a tick is something else here."""
        schedule, start, held = source_of(function) or Source(Constant(0.0), 0, 0)
        tick, per_tick = (1, schedule) if held == 1 else by_tick(schedule)
        if tick != held or per_tick.unit != self._unit or start % held:
            raise NoFormula
        return _Part(per_tick, zero + start // held)

    def _sequential(self, s: Any, place: int, at: int, tick: int, rate: float, until: int | None) -> _Parts:
        zero = at - tick
        present = numbers_of(self._groups[place])
        active = bisect_right(s._milestones, tick)
        begins = [zero, *(zero + whole_ticks(milestone) for milestone in s._milestones)]
        ends: list[int | None] = [*(begin if until is None else min(begin, until) for begin in begins[1:])]
        kept: list[tuple[int, int | None, _Parts]] = []
        for i, (child, begin, end) in enumerate(zip(s._schedulers, begins, [*ends, until], strict=True)):
            if end is not None and end <= begin:
                continue
            if i < active:
                parts = self._past(child, place, begin, end)
            elif i == active:
                parts = self._parts(child, place, at, _position(child), rate, end)
            else:
                parts = self._parts(child, place, begin, 0, None, end)
            kept.append((begin, end, parts))
        joined: _Parts = {}
        first = kept[0][0]
        for option in dict.fromkeys(name for _, _, parts in kept for name in parts):
            whole: Schedule | None = None
            left = present[option]  # by whoever drove it last
            for begin, end, parts in kept:
                part = parts.get(option, _Part(self._constant(left), begin))
                piece = part.read_from(begin)
                whole = piece if whole is None else whole.then(piece, at=begin - first)
                if end is not None and end > at:
                    left = value(piece, end - 1 - begin)
            assert whole is not None  # one of them is the active one
            joined[option] = _Part(whole, first)
        return joined

    def _past(self, s: Any, place: int, begin: int, end: int | None) -> _Parts:
        """What a scheduler did that another one has followed, as far as its formula says."""
        try:
            return self._single(s, place, begin, 0, None, end)
        except NoFormula:
            return {"lr": _Part(self._constant(numbers_of(self._groups[place])["lr"]), begin)}

    def _chained(self, s: Any, place: int, at: int, rate: float, until: int | None) -> _Parts:
        """Factors multiplied: a table while more than one changes, then what the last one says."""
        leaves = [each for each in every(s) if formula_of(each) is not lr_scheduler.ChainedScheduler]
        ends = {id(leaf): settles(leaf) for leaf in leaves}
        lasting = [leaf for leaf in leaves if ends[id(leaf)] == math.inf]
        if len(lasting) > 1:
            raise NoFormula
        ahead = [ends[id(leaf)] - leaf.last_epoch for leaf in leaves if leaf not in lasting]
        settled = at + int(max([0, *ahead]))
        if until is not None and settled >= until:
            raise NoFormula
        if settled > at:
            rate = value(self._simulated(place, "lr", settled, settled + 1).schedule, 0)
        last = _Part(self._constant(rate), settled)
        if lasting:
            tick = lasting[0].last_epoch + settled - at
            last = _Part(by_formula(lasting[0], place, tick, rate, self._unit)["lr"], settled - tick)
        if settled == at:
            return {"lr": last}
        table = self._simulated(place, "lr", at, settled)
        return {"lr": table._replace(schedule=table.schedule.then(last.read_from(settled)))}
