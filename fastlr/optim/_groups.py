"""What a parameter group of a fused optimizer may hold, besides the rule's own options."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from fastlr._checks import flag
from fastlr.schedules import Schedule

# Hyperparameters that a schedule can drive. For each, a group holds the value that the next step uses
# under its name, its owner under "<name>_schedule" (a Schedule or None), and the clock at which the
# schedule's zero lies under "<name>_start".
SCHEDULED = ("lr", "momentum")


def clock_of(schedule: Schedule) -> str:
    """The group's clock that a schedule follows."""
    return "samples" if schedule.unit == "sample" else "updates"


def tensor_rates(group: dict[str, Any]) -> dict[str, float]:
    """Those of a group's rates that are tensors of one number, as torch's may be, as numbers."""
    rates = {name: group[name] for name in SCHEDULED}
    return {k: v.item() for k, v in rates.items() if isinstance(v, torch.Tensor) and v.numel() == 1}


def check_owner(name: str, schedule: Schedule, where: str) -> None:
    """Raises ValueError for a schedule that cannot drive a hyperparameter."""
    if schedule.unit == "epoch":
        raise ValueError(
            f"{name}{where} counts epochs, which an optimizer cannot see; convert it with "
            "schedule.in_updates(updates_per_epoch)"
        )
    if name == "momentum" and not schedule.peak < 1.0:
        raise ValueError(
            f"momentum{where} must stay in [0, 1), but its schedule peaks at {schedule.peak!r}; from 1 on "
            "gradients are never forgotten and the buffer grows without bound"
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
