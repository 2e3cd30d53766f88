"""What people do between the steps of steps.py to move a run, its clock of epochs and its rates.

Some runs have options that torch's optimizers have too, and no more. These move to torch and back.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

import fastlr
from fastlr import Schedule
from fastlr.schedules import PerEpoch, Scaled
from fuzz.memory import same_bits

if TYPE_CHECKING:
    from fuzz.steps import Run

# How far rates may be apart that went through torch's schedulers, of the peak.
_NEAR = 1e-11
# The updates for which a schedule that came back is compared.
_AHEAD = 40
# Why a run is not moved: what it says of such, in parts.
_STAYS = "has no decoupled_weight_decay|FusedLion has no counterpart"


def scale_lr(run: Run) -> None:
    rng = run.move_rng
    place = rng.choice([None, rng.randrange(len(run.groups))])
    factor = rng.choice([0.0, 1.0, 0.1, rng.random()])
    run.note(f"scale_lr({factor}, group={place})")
    before = [run.value(group.owners["lr"]) for group in run.groups]
    run.optimizer.scale_lr(factor, group=place)
    for at, (group, rate) in enumerate(zip(run.groups, before, strict=True)):
        if place not in (None, at):
            continue
        owner = group.owners["lr"]
        if isinstance(owner, tuple):
            schedule, start = owner
            group.owners["lr"] = (schedule * factor, start)
        else:
            group.owners["lr"] = float(owner) * factor
        found = run.optimizer.param_groups[at]["lr"]
        assert abs(found - rate * factor) <= 1e-15 * max(rate, 1e-300), (found, rate, factor)


def advance_epoch(run: Run) -> None:
    """By one, or refused where samples are counted."""
    counted = [o[0].unit for g in run.groups for o in g.all_owners().values() if isinstance(o, tuple)]
    counts_samples = "sample" in counted or (run.second != "epoch" and run.samples > 0)
    if run.second == "epoch":
        run.note("advance_epoch()")
        run.optimizer.advance_epoch()
        run.samples += 1
    elif counts_samples:
        run.note("advance_epoch() beside samples")
        before = run.optimizer.clock()
        with pytest.raises(RuntimeError, match="counts samples"):
            run.optimizer.advance_epoch()
        assert run.optimizer.clock() == before


def advance_other(run: Run) -> None:
    """Samples, in a run that counts epochs."""
    if run.second != "epoch" or run.samples == 0:
        return
    run.note("advance_samples() beside epochs")
    with pytest.raises(RuntimeError, match="counts epochs"):
        run.optimizer.advance_samples(3)


def move_to_torch_and_back(run: Run) -> None:
    """The state is the same, the values are, and so is all else; a run that cannot go stays as it was."""
    fused, rng = run.optimizer, run.move_rng
    groups = [dict(group) for group in fused.param_groups]
    state = copy.deepcopy(fused.state_dict()["state"])
    how: dict[str, Any] = rng.choice([{}, {"foreach": False}, {"foreach": True}])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.optim.lr_scheduler has nothing")
            pair = fused.to_torch(**how)
    except ValueError as error:
        if not re.search(_STAYS, str(error)):
            raise
        run.note(f"stays: {error}")
        assert all(
            now[key] is held[key]
            for held, now in zip(groups, fused.param_groups, strict=True)
            for key in held
        )
        return
    run.note(f"to torch{how} and back by {type(pair[1]).__name__}")
    tick, zero = ticks_of(run)
    horizon = run.updates + 2 * _AHEAD + tick
    given = {} if pair[1] is None else {"updates_per_tick": tick, "horizon": horizon}
    expected = [{name: ahead(run, owner) for name, owner in group.owners.items()} for group in run.groups]
    again = fastlr.fuse(*pair, **given)
    if tick > 1:  # it may be in the middle of one
        assert again.clock().updates == (run.updates - zero) // tick * tick
        again.set_clock(updates=run.updates - zero)
    taken_over(run, again)
    for group, values in zip(run.groups, expected, strict=True):
        for name, before in values.items():
            peak = max(*before, 1e-300)
            for a, b in zip(before, ahead(run, group.owners[name]), strict=True):
                assert abs(a - b) <= _NEAR * peak, (name, before, group.owners[name])
    found = again.state_dict()["state"]
    for key, entry in state.items():
        for name, value in entry.items():
            assert same_bits(value, found[key][name]), name
    run.moved += 1


def ticks_of(run: Run) -> tuple[int, int]:
    """How many updates there are to a tick of torch's scheduler, and where its first one begins."""
    driven = [owner for group in run.groups for owner in group.owners.values() if isinstance(owner, tuple)]
    held = {_held(schedule) for schedule, _ in driven}
    if len(held) == 1 and len({start % max(held) for _, start in driven}) == 1:
        return max(held), min(start for _, start in driven)
    return 1, 0


def _held(schedule: Schedule) -> int:
    inner = schedule.schedule if isinstance(schedule, Scaled) else schedule
    return inner.updates_per_epoch if isinstance(inner, PerEpoch) else 1


def ahead(run: Run, owner: Any) -> list[float]:
    """The values from now on."""
    if not isinstance(owner, tuple):
        return [float(owner)] * _AHEAD
    schedule, start = owner
    now = run.clock(schedule) - start
    return [schedule._native.value(now + k) for k in range(_AHEAD)]


def taken_over(run: Run, again: fastlr.FusedOptimizer) -> None:
    """The run goes on with another optimizer, as that says what drives its groups."""
    run.optimizer, run.cyclic, run.skipped, run.measures = again, False, None, False
    run.updates, run.samples = again.clock()
    for group, own in zip(run.groups, again.param_groups, strict=True):
        group.words = {}
        for name in group.owners:
            schedule: Schedule | None = own[f"{name}_schedule"]
            driven = schedule is not None
            group.owners[name] = (schedule, own[f"{name}_start"]) if driven else run.rule.held(own, name)
        if run.rule.fused is fastlr.FusedSGD and "decoupled_weight_decay" in group.options:
            group.options["decoupled_weight_decay"] = False  # of a decay of 0, to which it is all the same
    run.make_eager_state()
    run.convert_slots()


# All runs do these, and those that can the others.
ACTIONS: tuple[Callable[[Run], None], ...] = (scale_lr, scale_lr, advance_epoch, advance_other)
MOVES: tuple[Callable[[Run], None], ...] = (*ACTIONS, *[move_to_torch_and_back] * 4)
