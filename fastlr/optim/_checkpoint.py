"""What an optimizer's state_dict holds, and how it is read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastlr import _core
from fastlr._checks import count, flag, plain
from fastlr.optim._groups import check_owner, clock_of, plain_options, without_tensors
from fastlr.optim._runtime import Runtime
from fastlr.schedules import Schedule


def drop_momentum(state: dict[Any, dict[str, Any]], key: object) -> None:
    """Takes a momentum buffer out of a copied state, whose inner dicts are still the original's."""
    entry = {name: value for name, value in state.pop(key, {}).items() if name != "momentum_buffer"}
    if entry:
        state[key] = entry


def pack(groups: list[dict[str, Any]], plan: _core.Plan, state_dict: dict[str, Any]) -> None:
    """Makes a state_dict of plain values, without buffers that hold nothing yet."""
    empty = set(plan.uninitialized())
    for own, group in zip(groups, state_dict["param_groups"], strict=True):
        for p, key in zip(own["params"], group["params"], strict=True):
            if p in empty:
                drop_momentum(state_dict["state"], key)
        group |= plain_options(group, plan.options())
        for key, value in group.items():
            if isinstance(value, Schedule):
                group[key] = value.to_dict()
            elif isinstance(value, torch.dtype):
                group[key] = str(value).removeprefix("torch.")
            else:
                group[key] = plain(value)  # somebody may have written NumPy's into the group


class Loaded(NamedTuple):
    """What a file brings.

    Attributes:
        state_dict: with groups that are complete, checked and live again, and without momenta.
        momenta: the buffers, in the types that their groups keep momentum in. PyTorch would cast them to
            their parameters' type, which loses what float32 momenta hold.
        clockless: the schedules that go on beside a file without a clock, in words.
    """

    state_dict: dict[str, Any]
    momenta: dict[torch.Tensor, torch.Tensor]
    clockless: list[str]


def unpack(
    own_groups: list[dict[str, Any]],
    plan: _core.Plan,
    checked: Callable[[dict[str, Any], str], dict[str, Any]],
    state_dict: dict[str, Any],
) -> Loaded | None:
    """Reads and checks a state_dict; None where it is PyTorch that says what is wrong.

    Args:
        own_groups: the optimizer's groups; they stay as they are.
        plan: its native step.
        checked: see ``FusedOptimizer._checked``.
    """
    _check_form(state_dict)
    saved_groups = state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (own_groups, saved_groups)]
    if sizes[0] != sizes[1]:
        return None

    scheduled = plan.scheduled()
    groups: list[dict[str, Any]] = []
    momenta: dict[torch.Tensor, torch.Tensor] = {}
    clockless: list[str] = []
    state = {
        key: dict(entry) if isinstance(entry, dict) else entry for key, entry in state_dict["state"].items()
    }
    for own, saved in zip(own_groups, saved_groups, strict=True):
        where = f" of the file's parameter group {len(groups)}"
        group = {**own, "fresh": False, **saved}
        group |= {"fresh": flag(f"fresh{where}", group["fresh"]), **without_tensors(group, plan.options())}
        for key in ("updates", "samples", *(f"{option.name}_start" for option in scheduled)):
            group[key] = count(f"{key}{where}", group[key], 0)
        for option in scheduled:
            name = option.name
            if f"{name}_schedule" in saved:
                owner = saved[f"{name}_schedule"]
                schedule = None if owner is None else Schedule.from_dict(owner)
            else:
                schedule = own[f"{name}_schedule"]
                at = group["updates" if schedule is None else clock_of(schedule)]
                group[f"{name}_start"] = min(own[f"{name}_start"], at)
            group[f"{name}_schedule"] = schedule
            if schedule is not None:
                check_owner(option, schedule, where)
        if group["momentum_dtype"] == "float32":
            group["momentum_dtype"] = torch.float32
        group |= checked(group, where)
        groups.append(group)
        for key, parameter in zip(saved["params"], own["params"], strict=True):
            buffer = state[key].pop("momentum_buffer", None) if key in state else None
            if buffer is None:
                if key in state and not state[key]:
                    del state[key]
                continue
            if buffer.shape != parameter.shape or buffer.is_complex() != parameter.is_complex():
                raise ValueError(
                    f"the file's momentum_buffer {key} has shape {tuple(buffer.shape)} and "
                    f"{buffer.dtype}, its parameter {tuple(parameter.shape)} and {parameter.dtype}"
                )
            momenta[parameter] = Runtime.new_momentum(parameter, group).copy_(buffer)
    found = [group["lr"] for group in groups]
    plan.publish(groups)  # what schedules own follows from the clock, not from the file
    for place, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for option in scheduled:
            name = option.name
            schedule = group[f"{name}_schedule"]
            if schedule is None or (unit := clock_of(schedule)) in saved:
                continue
            clockless.append(
                f"the {name} schedule of parameter group {place} goes on at {unit}={group[unit]} with "
                f"{group[name]!r}"
                + (f" (the file's last {name} is {found[place]!r})" if name == "lr" else "")
            )
    return Loaded({**state_dict, "state": state, "param_groups": groups}, momenta, clockless)


def _check_form(state_dict: dict[str, Any]) -> None:
    """Raises ValueError for what no optimizer's state_dict looks like."""
    for name, kind in (("param_groups", list), ("state", dict)):
        if not isinstance(found := state_dict.get(name), kind):
            got = type(found).__name__ if name in state_dict else f"the keys {list(state_dict)}"
            raise ValueError(
                f"state_dict must hold a {kind.__name__} under {name!r}, as an optimizer's does, got {got}"
            )
    for place, group in enumerate(state_dict["param_groups"]):
        params = group.get("params") if isinstance(group, dict) else group
        if not isinstance(group, dict) or not isinstance(params, list):
            raise ValueError(
                f"the file's parameter group {place} must be a dict with a list under 'params', got "
                f"{type(params).__name__}"
            )
        if len(set(params)) != len(params):
            raise ValueError(f"the file's parameter group {place} has parameters twice: {params}")
        for key in params:
            entry = state_dict["state"].get(key, {})
            buffer = entry.get("momentum_buffer") if isinstance(entry, dict) else entry
            if not isinstance(entry, dict) or not isinstance(buffer, (torch.Tensor, type(None))):
                raise ValueError(
                    f"the file's state of parameter {key} must be a dict with a tensor as momentum_buffer, "
                    f"got {type(entry if not isinstance(entry, dict) else buffer).__name__}"
                )
