"""From a fused optimizer to torch's optimizer and scheduler, in mid-run too."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastlr._checks import flag
from fastlr.optim._buffers import EMA_BUFFERS
from fastlr.optim._from_torch import kept_by
from fastlr.optim._groups import STAGE_DEFAULTS
from fastlr.optim._replaced import CHANGES, is_replaced, own_method, replace
from fastlr.optim._schedules_to_torch import (
    Driven,
    NoCounterpart,
    Other,
    Source,
    ValuesLR,
    by_tick,
    move,
    one,
    scheduler_of,
    values_of,
)
from fastlr.schedules import Constant, Schedule

# The schedules that drive a group's options, by their names, and where their zeros are.
_Followed: TypeAlias = dict[str, tuple[Schedule, int]]

_TORCH: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}
# What changes a fused optimizer, and torch's do not have.
_OURS = (
    *("set_schedule", "scale_lr", "handed_over", "load_torch"),
    *("set_clock", "advance_samples", "advance_tokens", "advance_epoch"),
)
# What of stages alone changes nothing.
_IDLE_ALONE = ("ema_warmup", "ema_dtype", "rounding_seed")
_REMEDIES = {
    "max_grad_norm": "set it to None and call torch.nn.utils.clip_grad_norm_() before each step",
    "max_grad_value": "set it to None and call torch.nn.utils.clip_grad_value_() before each step",
    "ema_decay": "set it to None in the groups and keep averages with torch.optim.swa_utils.AveragedModel",
    "state_dtype": "load state_dict() into torch's optimizer, which casts the state to the parameters' type",
}


def to_torch(fused: Any, options: dict[str, bool | None]) -> tuple[torch.optim.Optimizer, Any]:
    """What :meth:`FusedOptimizer.to_torch` of one returns."""
    name = type(fused).__name__
    if is_replaced(fused):
        raise ValueError(f"the {name} was given to torch before; go on with what to_torch() returned then")
    fused._refuse_handed_over("to_torch()")
    ours = next(kind for kind in type(fused).__mro__ if kind.__module__.startswith("fastlr.optim."))
    if method := own_method(fused, ours):
        raise ValueError(
            f"{name} has a {method}() of its own, which torch's optimizer would not do; make a fastlr."
            f"{ours.__name__} of its groups, load its state_dict() there, and move that"
        )
    given = {option: flag(option, value) for option, value in options.items() if value is not None}
    clock = fused.sync()
    fused._check_owned()
    kind = _kind_of(fused)
    if unknown := [option for option in given if option not in inspect.signature(kind.__init__).parameters]:
        raise TypeError(f"{unknown[0]} must be left out, as torch.optim.{kind.__name__} does not take it")
    followed = [_schedules_of(fused, place) for place in range(len(fused.param_groups))]
    unit = _unit_of(followed)
    optimizer = _optimizer(fused, kind, given)
    values = [dict(group) for group in optimizer.param_groups]
    scheduler = None
    if any(followed):
        scheduler = _scheduler(fused, optimizer, followed, clock[0 if unit == "update" else 1])
        its = kept_by(scheduler)  # a file of torch's may have left others there
        for group, kept in zip(optimizer.param_groups, values, strict=True):
            group.update({name: value for name, value in kept.items() if name not in its})
        for each in (scheduler, *getattr(scheduler, "_schedulers", ())):
            each._last_lr = [group["lr"] for group in optimizer.param_groups]
    instead = {name: f"call {name}() of that one, or give it to fastlr.fuse()" for name in CHANGES}
    instead |= {
        name: f"give that one to fastlr.fuse(), and call {name}() of what it returns" for name in _OURS
    }
    replace(fused, f"to_torch() has turned into a torch.optim.{kind.__name__}", instead, ("state_dict",))
    return optimizer, scheduler


def torch_class(fused: Any) -> type[torch.optim.Optimizer]:
    """Torch's class of a fused optimizer's rule."""
    if fused._rule not in _TORCH:
        raise ValueError(f"{type(fused).__name__} has no counterpart in torch.optim; keep it")
    return torch.optim.AdamW if fused._fixed.get("decoupled_weight_decay") else _TORCH[fused._rule]


def _kind_of(fused: Any) -> type[torch.optim.Optimizer]:
    """The same; raises for what it cannot do."""
    kind = torch_class(fused)
    # Adam of PyTorch 2.6 would take the group's key, and not look at it.
    can_decouple = kind is torch.optim.AdamW or "decoupled_weight_decay" in inspect.signature(kind).parameters
    found: dict[str, Any] = {"max_grad_norm": fused.max_grad_norm}
    for group in fused.param_groups:
        idle = {option: value for option, value in STAGE_DEFAULTS.items() if option not in _IDLE_ALONE}
        idle["state_dtype"] = None
        found |= {option: group[option] for option, value in idle.items() if group[option] != value}
        decays = group["weight_decay"] != 0.0 or group["weight_decay_schedule"] is not None
        if not can_decouple and group.get("decoupled_weight_decay") and decays:
            found["decoupled_weight_decay"] = True
    for option, value in found.items():
        if value is not None:
            remedy = _REMEDIES.get(option, f"turn {option} off in the groups, if the run goes on without")
            raise ValueError(f"torch.optim.{kind.__name__} has no {option}, got {value!r}; {remedy}")
    return kind


def _schedules_of(fused: Any, place: int) -> _Followed:
    """What drives a group's options, and where its zeros are."""
    group = fused.param_groups[place]
    found = {}
    for option in fused._options.scheduled:
        schedule = group[f"{option.name}_schedule"]
        if schedule is None:
            continue
        if schedule.unit not in ("update", "epoch"):
            raise ValueError(
                f"the {option.name} schedule of parameter group {place} counts {schedule.unit}s, which no "
                f"scheduler of torch's does; put a number or a schedule in updates in its place with "
                "set_schedule()"
            )
        found[option.name] = (schedule, group[f"{option.name}_start"])
    return found


def _unit_of(followed: list[_Followed]) -> str:
    """What all schedules count, which is what their scheduler is stepped after.

    Raises:
        ValueError: some count updates, and others epochs.
    """
    units = {schedule.unit: name for group in followed for name, (schedule, _) in group.items()}
    if len(units) > 1:
        raise ValueError(
            f"the {units['update']} schedule counts updates, but that of {units['epoch']} epochs, and a "
            "scheduler of torch's is stepped after the ones or the others; put the latter in place anew by "
            "set_schedule(), as schedule.in_updates(updates_per_epoch)"
        )
    return next(iter(units), "update")


def _optimizer(
    fused: Any, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Torch's optimizer over the same parameters, with copies of all that the fused one holds."""
    arguments = inspect.signature(kind.__init__).parameters
    defaults = {
        name: _begun(value)
        for name, value in fused.defaults.items()
        if name in arguments and name != "params"
    }
    own = {*fused.defaults, EMA_BUFFERS, "params", "param_names"}
    groups = []
    for group in fused.param_groups:
        params: list[Any] = list(group["params"])
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        plain = fused._options.plain(group)  # whatever somebody has written
        kept = {name: value for name, value in plain.items() if name in defaults or name not in own}
        groups.append({**copy.deepcopy(kept), "params": params})
    given = {**defaults, **options}
    if idle := defaults.get("nesterov") and not defaults["momentum"] > 0.0:  # which its constructor refuses
        given["nesterov"] = False
    optimizer = kind(groups, **given)
    if idle:
        optimizer.defaults["nesterov"] = True
    saved = fused.state_dict()["state"]
    state = {key: {name: _cloned(each) for name, each in entry.items()} for key, entry in saved.items()}
    if not any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups):
        for entry in state.values():
            if "step" in entry:  # torch's other steps count on the host
                entry["step"] = entry["step"].cpu()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer._optimizer_step_pre_hooks.update(fused._optimizer_step_pre_hooks)
    optimizer._optimizer_step_post_hooks.update(fused._optimizer_step_post_hooks)
    return optimizer


def _begun(value: Any) -> Any:
    """A default without schedules, for torch's groups to come."""
    if isinstance(value, tuple):
        return tuple(map(_begun, value))
    return value(0) if isinstance(value, Schedule) else value


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _scheduler(fused: Any, optimizer: torch.optim.Optimizer, followed: list[_Followed], clock: int) -> Any:
    """Torch's scheduler where the schedules' clock stands; what it has written into the groups is to be
    overwritten."""
    every = [each for group in followed for each in group.values()]
    ticks = {by_tick(each)[0] for each, _ in every}
    tick = ticks.pop() if len(ticks) == 1 else 1
    zeros = {zero for _, zero in every}
    try:
        if len(zeros) > 1 or ticks or any({*group} - {"lr", "momentum", "beta1"} for group in followed):
            raise NoCounterpart
        driven = []
        for own, group in zip(fused.param_groups, followed, strict=True):
            inner = {name: by_tick(each)[1] for name, (each, _) in group.items()}
            lr = inner.get("lr", Constant(own["lr"]))
            driven.append(Driven(lr, inner.get("momentum", inner.get("beta1"))))
        return scheduler_of(optimizer, driven, (clock - zeros.pop()) // tick)
    except NoCounterpart:
        kinds = ", ".join(sorted({type(each).__name__ for each, _ in every}))
        warnings.warn(
            f"torch.optim.lr_scheduler has nothing that does all that the schedules ({kinds}) do; a LambdaLR "
            "gives their values, and does not stand in its state_dict()",
            UserWarning,
            stacklevel=4,
        )
    return _of_values(fused, optimizer, followed, clock, tick)


def _of_values(
    fused: Any,
    optimizer: torch.optim.Optimizer,
    followed: list[_Followed],
    clock: int,
    tick: int,
) -> Any:
    """A scheduler that gives schedules' values."""
    zeros = {zero for group in followed for _, zero in group.values()}
    if len({zero % tick for zero in zeros}) > 1:  # no tick is one of all schedules
        tick = 1
    origin = min(zeros) if tick > 1 or len(zeros) == 1 else 0

    rates: list[Callable[[int], float]] = []
    others: list[list[Other]] = []
    for group, found in zip(optimizer.param_groups, followed, strict=True):
        if "lr" in found:
            group["lr"] = 1.0
        group["initial_lr"] = group["lr"]
        of_options = {
            name: values_of(Source(schedule, zero - origin, tick)) for name, (schedule, zero) in found.items()
        }
        rates.append(of_options.pop("lr", one))
        others.append([])
        for name, values in of_options.items():
            option = fused._options.named(name)
            key, place = (name, None) if option.tuple is None else (option.tuple, option.place)
            others[-1].append(Other(name, key, place, values))
    scheduler = ValuesLR(optimizer, rates, others) if any(others) else LambdaLR(optimizer, rates)
    move(scheduler, (clock - origin) // tick)
    return scheduler
