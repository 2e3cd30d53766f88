"""What schedulers will do as tables: copies of them are asked, beside groups without parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch

from fastlr._checks import count


def every(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from every(inner)


def is_function(called: Any) -> bool:
    """Whether it is a function, of which no copy is made, and not an object that a call may change."""
    if isinstance(called, partial):
        return is_function(called.func)
    return isinstance(called, (FunctionType, BuiltinFunctionType, MethodType))


def _stand_in(optimizer: torch.optim.Optimizer) -> Any:
    """What a copied scheduler takes for its optimizer: groups without parameters."""

    def step() -> None:
        """Nothing: a scheduler looks whether it is one that it has wrapped."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    return SimpleNamespace(param_groups=groups, defaults=optimizer.defaults, step=step, _opt_called=True)


def copy_beside(scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler's copy, whose optimizer is a stand-in for its own."""
    memo: dict[int, Any] = {id(optimizer): _stand_in(optimizer)}
    for each in every(scheduler):
        functions = [*getattr(each, "lr_lambdas", ()), getattr(each, "_scale_fn_custom", None)]
        # A method's object, which may be a whole trainer, is not the scheduler's.
        memo |= {id(function): function for function in functions if isinstance(function, MethodType)}
    return copy.deepcopy(scheduler, memo)


class Simulation:
    """The rates of a scheduler from now on, by a copy that is stepped as far as somebody asks."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, now: int) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._now = now
        self._copy: Any = None
        self._seen: list[list[dict[str, float]]] = []

    def _keep(self) -> None:
        self._seen.append([numbers_of(group) for group in self._copy.optimizer.param_groups])

    def values(self, place: int, option: str, start: int, stop: int) -> list[float]:
        """Of one group, at the ticks start .. stop - 1; fewer where torch's scheduler goes no further."""
        if self._copy is None:
            self._copy = copy_beside(self._scheduler, self._optimizer)
            self._keep()
        while len(self._seen) < stop - self._now:
            try:
                self._copy.step()
            except ValueError as error:
                if "total steps" not in str(error):  # OneCycleLR's end
                    raise
                break
            self._keep()
        return [row[place][option] for row in self._seen[start - self._now : stop - self._now]]


def numbers_of(group: dict[str, Any]) -> dict[str, float]:
    """What schedulers, and those that to_torch() makes, write into a group, by the names of options."""
    found = {"lr": float(group["lr"])}
    if -1e-12 * float(group.get("initial_lr", 0.0)) <= found["lr"] < 0.0:
        found["lr"] = 0.0  # which torch's sums miss by their rounding
    for name in ("momentum", "weight_decay", "alpha", "rho"):
        if name in group:
            found[name] = float(group[name])
    for place, value in enumerate(group.get("betas", ()), 1):
        found[f"beta{place}"] = float(value)
    return found


def last_tick(horizon: int | None, updates_per_tick: int, now: int, of: str) -> int:
    """How many ticks a run of so many updates has.

    Args:
        horizon: updates.
        now: ticks behind it.
        of: what needs to know, in words.
    """
    if horizon is None:
        raise ValueError(
            f"horizon must be given with {of}, which a table of its values follows: how many updates the "
            "whole run has, those already made included"
        )
    ticks = -(-count("horizon", horizon) // updates_per_tick)
    if ticks <= now:
        raise ValueError(
            f"horizon must be > {now * updates_per_tick}, the updates that the scheduler has behind it, as "
            f"it counts those of the whole run, got {horizon}"
        )
    return ticks


def timm_tables(
    optimizer: torch.optim.Optimizer, scheduler: Any, updates_per_tick: int, horizon: int | None
) -> tuple[int, list[list[float]]]:
    """Where a scheduler of timm's stands, and the rates of each group over the run.

    Timm's are asked for a tick and keep none: where they stand is where the groups have their present rates,
    and of several such ticks the one that somebody has given the scheduler as ``last_epoch``.

    Raises:
        ValueError: that is at several ticks, or at none.
    """
    name, ticks = type(scheduler).__name__, "epochs" if scheduler.t_in_epochs else "updates"
    copied = copy_beside(scheduler, optimizer)
    rows = []
    for tick in range(last_tick(horizon, updates_per_tick, 0, name)):
        (copied.step if scheduler.t_in_epochs else copied.step_update)(tick)
        rows.append([numbers_of(group)["lr"] for group in copied.optimizer.param_groups])
    present = [numbers_of(group)["lr"] for group in optimizer.param_groups]
    first = [
        base * group.get("lr_scale", 1.0)
        for base, group in zip(scheduler.base_values, optimizer.param_groups, strict=True)
    ]
    if present == first and not optimizer.state:  # nobody has told it a tick, and its first may differ
        rows[0] = first
    places = [tick for tick, row in enumerate(rows) if row == present]
    where = getattr(scheduler, "last_epoch", None)  # somebody has said it, in torch's word
    if where is not None:
        where = count("last_epoch", where, 0)
        if where not in places:
            rate = f"{rows[where][0]!r}" if where < len(rows) else f"none, as the horizon ends at {len(rows)}"
            raise ValueError(
                f"last_epoch of the {name} is {where}, and its rate there {rate}, but the present one is "
                f"{present[0]!r}; give it the number that step() was last called with"
            )
    elif len(places) != 1 and (optimizer.state or 0 not in places):
        remedy = "say which, scheduler.last_epoch = ..., and call this again"
        if not places:
            remedy = (
                "fuse the optimizer alone, call set_schedule(lr=fastlr.Tabulated(rate_of_update, steps), "
                'start="zero") and set_clock(updates=...)'
            )
        raise ValueError(
            f"{name} keeps no count, and the present rate, {present[0]!r}, is that of "
            f"{_some(places, ticks)}; {remedy}"
        )
    now = places[0] if where is None else where
    return now, [list(column) for column in zip(*rows, strict=True)]


def _some(places: list[int], ticks: str) -> str:
    """Ticks in words."""
    if not places:
        return f"no one of the run's {ticks}"
    if places[-1] - places[0] == len(places) - 1:
        return f"{len(places)} {ticks} of the run, {places[0]} to {places[-1]}"
    return f"{len(places)} {ticks} of the run, from {places[0]} on"
