"""What an optimizer's state_dict holds, and how it is read back."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastlr import _core
from fastlr._checks import choice, count, flag, plain
from fastlr.optim._buffers import EMA, EMA_BUFFERS, checked_averages
from fastlr.optim._groups import (
    CLOCKS,
    RuleOptions,
    check_owner,
    check_rounded_by_chance,
    clock_of,
    name_of_clock,
)
from fastlr.optim._state import MASTER, STEP, RuleState, States
from fastlr.schedules import Schedule

# Numbers from which on a list is worth being shared.
_LONG = 100


def pack(
    own_groups: list[dict[str, Any]],
    options: RuleOptions,
    rule_state: RuleState,
    state_dict: dict[str, Any],
) -> None:
    """Makes a state_dict of plain values, with the state that torch's of the same rule has."""
    tables: dict[bytes, list[float]] = {}
    for own, group in zip(own_groups, state_dict["param_groups"], strict=True):
        rule_state.in_file(state_dict["state"], dict(zip(group["params"], own["params"], strict=True)), own)
        group |= options.plain(group)
        for key, value in group.items():
            if isinstance(value, Schedule):
                group[key] = _sharing(value.to_dict(), tables)
            elif isinstance(value, torch.dtype):
                group[key] = str(value).removeprefix("torch.")
            else:
                group[key] = plain(value)  # somebody may have written NumPy's into the group


def _sharing(value: Any, tables: dict[bytes, list[float]]) -> Any:
    """What a schedule's to_dict() returned, where tables that are the same are one list.

    torch.save() writes an object once, however often it stands in a file, and a table may have a value for
    each update of the run, in each of many groups.

    Args:
        tables: those met before, by their bits.
    """
    if isinstance(value, dict):
        return {key: _sharing(each, tables) for key, each in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) > _LONG and all(type(each) is float for each in value):
        return tables.setdefault(array("d", value).tobytes(), value)
    return [_sharing(each, tables) for each in value]


class Loaded(NamedTuple):
    """What a file brings.

    Attributes:
        state_dict: with groups that are complete, checked and live again, and without the rule's state.
        states: the rule's state, in the types that the groups keep it in.
        clockless: the schedules that go on beside a file without a clock, in words.
        overruled: the values that stand in a file beside schedules of its own which say others, in words.
        left_out: options of the file whose averages or masters were not read with it, in words.
    """

    state_dict: dict[str, Any]
    states: States
    clockless: list[str]
    overruled: list[str]
    left_out: list[str]


def unpack(
    own_groups: list[dict[str, Any]],
    plan: _core.Plan,
    options: RuleOptions,
    rule_state: RuleState,
    in_own_form: Callable[[dict[str, Any], str], dict[str, Any]],
    state_dict: dict[str, Any],
) -> Loaded | None:
    """Reads and checks a state_dict; None where it is PyTorch that says what is wrong.

    Args:
        own_groups: the optimizer's groups; they stay as they are.
        plan: its native step.
        options, rule_state: its rule's.
        in_own_form: makes a file's group, completed by the optimizer's own, a checked one.
    """
    _check_form(state_dict, (*rule_state.slots, *rule_state.stage_slots, STEP))
    saved_groups = state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (own_groups, saved_groups)]
    if sizes[0] != sizes[1]:
        return None

    groups: list[dict[str, Any]] = []
    states: States = {}
    clockless: list[str] = []
    state = {
        key: dict(entry) if isinstance(entry, dict) else entry for key, entry in state_dict["state"].items()
    }
    for own, saved in zip(own_groups, saved_groups, strict=True):
        where = f" of the file's parameter group {len(groups)}"
        group = {**own, "fresh": False, EMA_BUFFERS: {}, **saved}
        if not checked_averages(group, where):
            del group[EMA_BUFFERS]
        if "samples" in saved:  # else the clock is this optimizer's own
            unit = saved.get("clock_unit", "sample")  # which older files have not
            group["clock_unit"] = choice(f"clock_unit{where}", unit, CLOCKS)
        group |= {"fresh": flag(f"fresh{where}", group["fresh"]), **options.without_tensors(group)}
        for key in ("updates", "samples", *(f"{option.name}_start" for option in options.scheduled)):
            group[key] = count(f"{key}{where}", group[key], 0)
        for option in options.scheduled:
            name = option.name
            if f"{name}_schedule" in saved:
                owner = saved[f"{name}_schedule"]  # live where others saved it, see NOTE: [pickled schedules]
                schedule = owner if isinstance(owner, (Schedule, type(None))) else Schedule.from_dict(owner)
            elif "updates" in saved and (option.tuple or name) in saved:
                # fastlr's own, of a version in which none could drive this option
                schedule = None
            else:
                schedule = own[f"{name}_schedule"]
                group[f"{name}_start"] = own[f"{name}_start"]
            group[f"{name}_schedule"] = schedule
            if schedule is not None:
                check_owner(option, schedule, where)
        group = in_own_form(group, where)
        if group["stochastic_rounding"]:
            check_rounded_by_chance(own["params"], where)
        groups.append(group)
        for key, parameter in zip(saved["params"], own["params"], strict=True):
            if key not in state:
                continue
            loaded = rule_state.from_file(key, state[key], parameter, group)
            if loaded:
                states[parameter] = loaded
            if not state[key]:
                del state[key]
    counted = options.counted(groups)
    units = {group["clock_unit"] for group in groups}
    if len(units | {counted} - {None}) > 1:
        raise ValueError(
            f"clock_unit of the file's parameter groups must be one, and that of their schedules, got "
            f"{', '.join(sorted(units))}" + (f" with schedules in {counted}s" if counted else "")
        )
    if any(group["fresh"] for group in groups) and not all(map(rule_state.is_new, states.values())):
        # A file that knows no such flag was read into a template that a first, initializing step made.
        states = {p: entry for p, entry in states.items() if not rule_state.is_new(entry)}
        for group in groups:
            group["fresh"] = False
    found = [{o.name: options.value(group, o) for o in options.scheduled} for group in groups]
    plan.publish(groups)  # what schedules own follows from the clock, not from the file
    overruled = [
        f"{option.name} of parameter group {place} is {found[place][option.name]!r}, and the schedule says "
        f"{options.value(group, option)!r}"
        for place, (group, saved) in enumerate(zip(groups, saved_groups, strict=True))
        for option in options.scheduled
        if saved.get(f"{option.name}_schedule") is not None
        and _differ(found[place][option.name], options.value(group, option))
    ]
    for place, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for option in options.scheduled:
            name = option.name
            schedule = group[f"{name}_schedule"]
            if schedule is None or (clock := clock_of(schedule)) in saved:
                continue
            clockless.append(
                f"the {name} schedule of parameter group {place} goes on at "
                f"{name_of_clock(schedule)}={group[clock]} with "
                f"{options.value(group, option)!r}"
                + (f" (the file's last {name} is {found[place]['lr']!r})" if name == "lr" else "")
            )
    left_out = [
        f"{option} of parameter group {place}"
        for place, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True))
        for option, slot in (("ema_decay", EMA), ("master_weights", MASTER))
        if own[option] in (None, False)
        and saved.get(option) not in (None, False)
        and (kept := [states[p] for p in own["params"] if p in states and rule_state.may_have(slot, p)])
        and not any(slot in entry or rule_state.is_new(entry) for entry in kept)
    ]
    complete = {**state_dict, "state": state, "param_groups": groups}
    return Loaded(complete, states, clockless, overruled, left_out)


def _differ(a: float | None, b: float | None) -> bool:
    """By more than another machine's rounding. None: an option that may be that was given none."""
    return a is not None and b is not None and abs(a - b) > 1e-9 * max(abs(a), abs(b))


def _check_form(state_dict: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raises ValueError for what no optimizer's state_dict looks like. names: of the rule's state."""
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
            if not isinstance(entry, dict):
                raise ValueError(
                    f"the file's state of parameter {key} must be a dict of tensors, "
                    f"got {type(entry).__name__}"
                )
            for name in names:
                value = entry.get(name)
                number = name == STEP and isinstance(value, (int, float))
                if not isinstance(value, (torch.Tensor, type(None))) and not number:
                    raise ValueError(
                        f"the file's state of parameter {key} must be a dict with a tensor as {name}, "
                        f"got {type(value).__name__}"
                    )
