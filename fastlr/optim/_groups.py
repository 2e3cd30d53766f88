"""What a parameter group of a fused optimizer may hold, besides the rule's own options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

import torch

from fastlr import _core
from fastlr._checks import flag
from fastlr.schedules import Schedule

# NOTE: [what drives an option]
# For each option that a schedule can drive, a group holds the value that the next step uses under its
# name, its owner under "<name>_schedule" (a Schedule or None), and the clock at which the schedule's zero
# lies under "<name>_start".


def clock_of(schedule: Schedule) -> str:
    """The group's clock that a schedule follows."""
    return "samples" if schedule.unit == "sample" else "updates"


def without_tensors(group: dict[str, Any], options: Iterable[_core.Option]) -> dict[str, Any]:
    """Those of a group's numbers that are tensors of one, as torch's rates may be, as numbers."""
    values = {option.name: group[option.name] for option in options if not option.flag}
    return {k: v.item() for k, v in values.items() if isinstance(v, torch.Tensor) and v.numel() == 1}


def plain_options(group: dict[str, Any], options: Iterable[_core.Option]) -> dict[str, Any]:
    """The hyperparameters that steps take, whatever their types, as Python's own; some may be missing."""
    return {
        option.name: (bool if option.flag else float)(group[option.name])
        for option in options
        if option.name in group
    }


def check_owner(option: _core.Option, schedule: Schedule, where: str) -> None:
    """Raises ValueError for a schedule that cannot drive an option."""
    if schedule.unit == "epoch":
        raise ValueError(
            f"{option.name}{where} counts epochs, which an optimizer cannot see; convert it with "
            "schedule.in_updates(updates_per_epoch)"
        )
    if not option.bounds(schedule.peak):
        raise ValueError(
            f"{option.name}{where} must stay {option.range}, but its schedule peaks at {schedule.peak!r}"
            f"{option.reason}"
        )


class TorchOptions(TypedDict, total=False):
    """Options of torch's optimizers that say how a step is made, which here is always the same.

    What asks for nothing else is accepted: ``fused=True``, ``foreach=False``, ``differentiable=False``,
    ``capturable`` either way, and None for each.
    """

    foreach: bool | None
    fused: bool | None
    capturable: bool | None
    differentiable: bool | None


# What each may not be, and why.
_REFUSED_OPTIONS = {
    "foreach": (True, "every step updates all parameters in one native pass"),
    "fused": (False, "every step is fused"),
    "capturable": (None, ""),
    "differentiable": (True, "no gradient flows through a step"),
}


def check_torch_options(options: dict[str, Any], made: str) -> None:
    for name, value in options.items():
        if name not in _REFUSED_OPTIONS:
            raise TypeError(f"{made} got an unexpected keyword argument {name!r}")
        refused, reason = _REFUSED_OPTIONS[name]
        if value is not None and flag(name, value) is refused:
            raise ValueError(f"{name} must be {not refused} or None, got {value!r}: {reason}; leave it out")
