"""Groups and checkpoints of torch's optimizer and scheduler, as a fused optimizer loads them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    MultiplicativeLR,
    OneCycleLR,
    SequentialLR,
)

from fastlr._checks import count, describe
from fastlr.optim._groups import REFUSED_OPTIONS
from fastlr.optim._scheduler_formulas import Schedules, value
from fastlr.optim._scheduler_tables import every, numbers_of
from fastlr.optim._torch_schedulers import follow

# What the schedulers that cycle a momentum keep in groups besides.
_OF_CYCLES = ("max_lr", "min_lr", "max_momentum", "base_momentum")


def checked_tick(updates_per_tick: int | None) -> int:
    """How many updates there are to a scheduler's ``step()``."""
    if updates_per_tick is None:
        raise ValueError(
            "updates_per_tick must be given with a scheduler, as neither object knows it: 1 where "
            "scheduler.step() is called after each update, len(loader) where it is called once an epoch; "
            "got None"
        )
    return count("updates_per_tick", updates_per_tick)


def kept_by(scheduler: Any) -> tuple[str, ...]:
    """What a scheduler keeps in its optimizer's groups, which the schedules have instead."""
    if scheduler is None:
        return ()
    cycles = any(isinstance(each, (CyclicLR, OneCycleLR)) for each in every(scheduler))
    return ("initial_lr", *(_OF_CYCLES if cycles else ()))


def plain(values: dict[str, Any], options: Container[str], leave_out: Iterable[str]) -> dict[str, Any]:
    """A group, or the defaults, of torch's optimizer without what says how its step is made.

    Rates and betas that are tensors become numbers; all is copied.

    Args:
        options: the optimizer's, by their names; what else stands there is somebody's own.
        leave_out: what else.
    """
    gone = {*REFUSED_OPTIONS, *leave_out}
    found = {name: copy.deepcopy(held) for name, held in values.items() if name not in gone}
    numbers = {name: _number(held) for name, held in found.items() if name in options}
    return {**found, **numbers, "lr": numbers_of(values)["lr"]}


def _number(held: Any) -> Any:
    if isinstance(held, torch.Tensor) and held.numel() == 1:
        return held.item()
    return tuple(map(_number, held)) if isinstance(held, (tuple, list)) else held


def driven_by(
    optimizer: torch.optim.Optimizer, scheduler: Any, updates_per_tick: int | None, horizon: int | None
) -> list[dict[str, Any]]:
    """What a fused optimizer's groups hold in a file, for a scheduler that stands where it stands.

    Args:
        scheduler: None: there is none, and the clock is zero.
    """
    if scheduler is None:
        for name, value in (("updates_per_tick", updates_per_tick), ("horizon", horizon)):
            if value is not None:
                count(name, value)
        return [{"updates": 0, "samples": 0} for _ in optimizer.param_groups]
    tick = checked_tick(updates_per_tick)
    now, groups = follow(optimizer, scheduler, tick, horizon)
    return [
        {
            "updates": now * tick,
            "samples": 0,
            **{f"{name}_schedule": schedule for name, schedule in schedules.items()},
            **_said(group, schedules, now * tick),
        }
        for group, schedules in zip(optimizer.param_groups, groups, strict=True)
    ]


def _said(group: dict[str, Any], schedules: Schedules, clock: int) -> dict[str, Any]:
    """A group's entries with what schedules say, from which torch's numbers differ by their rounding."""
    said: dict[str, Any] = {}
    for name, schedule in schedules.items():
        if name not in ("beta1", "beta2"):
            said[name] = value(schedule, clock)
            continue
        betas = list(said.get("betas", _number(group["betas"])))
        betas[name == "beta2"] = value(schedule, clock)
        said["betas"] = tuple(betas)
    return said


def from_checkpoints(
    own: Any,
    kind: Any,
    optimizer_state: dict[str, Any],
    scheduler_state: dict[str, Any],
    scheduler: Callable[[torch.optim.Optimizer], Any],
    updates_per_tick: int | None,
    horizon: int | None,
) -> dict[str, Any]:
    """What a fused optimizer's own file would hold of a run whose checkpoints are torch's.

    Args:
        own: the fused optimizer.
        kind: torch's class of its rule.
    """
    if not callable(scheduler):
        raise TypeError(
            "scheduler must be the class of the file's scheduler, or a function that makes one of an "
            f"optimizer (a SequentialLR, a LambdaLR), got {describe(scheduler)}"
        )
    checked_tick(updates_per_tick)
    _check_file("optimizer_state", optimizer_state, {"state": dict, "param_groups": list})
    _check_file("scheduler_state", scheduler_state, {})
    sizes = [
        [len(g["params"]) for g in groups] for groups in (own.param_groups, optimizer_state["param_groups"])
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"optimizer_state must have this optimizer's parameter groups, of {sizes[0]} parameters, got "
            f"groups of {sizes[1]}"
        )
    # All of the file's optimizer but its parameters: a scheduler looks at groups alone.
    beside = kind([{"params": [torch.zeros(1) for _ in range(size)]} for size in sizes[0]])
    _check_rule(kind, beside, optimizer_state["param_groups"])
    made = _made(scheduler, beside)
    _check_scheduler(made, scheduler_state)
    beside.load_state_dict({"state": {}, "param_groups": copy.deepcopy(optimizer_state["param_groups"])})
    beside.state.update(dict.fromkeys(optimizer_state["state"]))  # how timm's are told to have begun
    try:
        made.load_state_dict(copy.deepcopy(scheduler_state))
        for each in every(made):
            each.optimizer = beside
        driven = driven_by(beside, made, updates_per_tick, horizon)
    except (AttributeError, KeyError) as error:
        missing = error.name if isinstance(error, AttributeError) else error.args[0]
        raise ValueError(
            f"scheduler_state must be that of a {type(made).__name__}, but has no {missing}; got the keys "
            f"{list(scheduler_state)}"
        ) from error
    undriven = {f"{option.name}_schedule": None for option in own._options.scheduled}
    left = {*own.defaults, *kept_by(made)} - {*beside.defaults}
    groups = [
        {**plain(group, beside.defaults, left), **undriven, **found}
        for group, found in zip(optimizer_state["param_groups"], driven, strict=True)
    ]
    return {"state": optimizer_state["state"], "param_groups": groups}


def _check_file(name: str, value: Any, kinds: dict[str, type]) -> None:
    """Raises ValueError for what is no ``state_dict()``. kinds: what it holds at least."""
    fits = isinstance(value, dict) and bool(value)
    if not fits or not all(isinstance(value.get(key), kind) for key, kind in kinds.items()):
        got = f"the keys {list(value)}" if fits else describe(value)
        held = " and ".join(f"a {kind.__name__} under {key!r}" for key, kind in kinds.items())
        raise ValueError(
            f"{name} must be what state_dict() of torch's returned{held and ', with '}{held}, got {got}"
        )


# What torch's optimizers have come to have (Adagrad its eps), which older files have not.
_LATER = {"maximize", "decoupled_weight_decay", "eps", *REFUSED_OPTIONS}


def _check_rule(kind: Any, beside: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where a file is of another optimizer than its state, if it has any, would show."""
    for place, group in enumerate(groups):
        if missing := [name for name in beside.defaults if name not in group and name not in _LATER]:
            raise ValueError(
                f"optimizer_state must be that of a torch.optim.{kind.__name__}, but parameter group {place} "
                f"has no {missing[0]}; got the keys {list(group)}"
            )


def _arguments(kind: type) -> set[str]:
    """Of a scheduler's class, those that its file has under their names."""
    made: Any = kind.__init__  # type: ignore[misc]
    return {*inspect.signature(made).parameters} - {"self", "optimizer", "last_epoch", "verbose"}


def _check_scheduler(made: Any, state: dict[str, Any]) -> None:
    """Raises for a file of another scheduler, which has what this one does not know.

    What it has not shows when it is loaded.
    """
    if not hasattr(made, "load_state_dict"):
        raise TypeError(
            f"scheduler must be a function that returns a scheduler, but returned {describe(made)}"
        )
    kinds = [kind for kind in vars(lr_scheduler).values() if isinstance(kind, type)]
    known = set().union(*(_arguments(kind) for kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)))
    own = vars(made).keys() | set().union(*(_arguments(kind) for kind in type(made).__mro__))
    if strange := [name for name in state if name in known and name not in own]:
        raise ValueError(
            f"scheduler_state must be that of a {type(made).__name__}, but has {strange[0]}; got the keys "
            f"{list(state)}"
        )
    inner, states = getattr(made, "_schedulers", []), state.get("_schedulers", [])
    if len(inner) != len(states):
        raise ValueError(
            f"scheduler_state must be that of a {type(made).__name__} of {len(inner)} schedulers, got one of "
            f"{len(states)}"
        )
    for each, its_state in zip(inner, states, strict=True):
        _check_scheduler(each, its_state)


def _made(scheduler: Callable[[torch.optim.Optimizer], Any], optimizer: torch.optim.Optimizer) -> Any:
    """The file's scheduler, before its state is loaded."""
    if not isinstance(scheduler, type):
        return scheduler(optimizer)
    incomplete = (LambdaLR, MultiplicativeLR, SequentialLR, ChainedScheduler)
    if issubclass(scheduler, incomplete):
        raise TypeError(
            f"a file of a {scheduler.__name__} does not say all; pass a function that makes it: "
            f"scheduler=lambda optimizer: {scheduler.__name__}(optimizer, ...)"
        )
    made: Any = scheduler.__new__(scheduler)  # all that it knows is in its state
    vars(made).update(optimizer=optimizer)
    if issubclass(scheduler, CyclicLR):
        made._scale_fn_custom = None  # of which its load_state_dict() asks first
    return made
