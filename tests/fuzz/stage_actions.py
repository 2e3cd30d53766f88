"""What people do between the steps of steps.py to what every optimizer takes, whatever its rule."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import through_file

import fastlr
from fuzz.halves import HALVES, RESTS
from fuzz.memory import as_reals, assert_twins, laid_out, random_values, rounded, same_bits
from fuzz.stages import (
    ALWAYS_DECOUPLED,
    EMA,
    MASTER,
    TOP_DECAY,
    WRONG,
    Averaging,
    Limits,
    decouples,
    drawn_bound,
    drawn_seed,
    keepings,
)

if TYPE_CHECKING:
    from fuzz.steps import Group, Pair, Run


def enter_averages(run: Run) -> None:
    optimizer, rng = run.optimizer, run.stage_rng
    run.note("averaged_weights()")
    if all(group.averaging.decay is None for group in run.groups):
        with pytest.raises(ValueError, match="keeps no averages"), optimizer.averaged_weights():
            pass
        return
    before = [pair.ours.detach().clone() for pair in run.pairs]
    leaves = rng.choice([nullcontext(), pytest.raises(KeyError)])
    with leaves, optimizer.averaged_weights():
        values = iter(before)
        for group in run.groups:
            for pair in group.pairs:
                value = next(values)
                if pair.shares:  # which is what was copied last
                    continue
                if pair.average is None or group.averaging.decay is None:
                    assert same_bits(value, pair.ours.detach()), "it has no average"
                else:
                    expected = rounded(pair.average.values, pair.dtype)
                    assert_twins("averaged", pair.ours.detach(), expected, pair.dtype)
        if rng.random() < 0.3:
            with pytest.raises(RuntimeError, match=r"inside averaged_weights\(\)"):
                optimizer.step()
        if rng.random() < 0.3:
            run.check_slots()
        if not isinstance(leaves, nullcontext):
            raise KeyError
    for value, pair in zip(before, run.pairs, strict=True):
        assert same_bits(value, pair.ours.detach()), "it has not come back"


def operate_on_average(run: Run) -> None:
    """Moved, laid out otherwise, written, deleted."""
    averaged = [pair for pair in run.pairs if pair.average is not None]
    if not averaged:
        return
    rng = run.stage_rng
    pair = rng.choice(averaged)
    average, entry = pair.average, run.optimizer.state[pair.ours]
    assert average is not None
    kind = rng.choice(["moved", "laid out", "written", "deleted", "None", "new"])
    run.note(f"average of parameter {position(run, pair)}: {kind}")
    if kind == "moved":
        entry[EMA].data = entry[EMA].data.clone()
    elif kind == "laid out":
        entry[EMA] = laid_out(rng, entry[EMA].cpu())[0]
    elif kind == "written":
        entry[EMA].zero_()
        average.values.zero_()
    elif kind == "new":
        values = random_values(rng, entry[EMA].shape, entry[EMA].dtype)
        entry[EMA] = laid_out(rng, values)[0]
        average.values.copy_(as_reals(values))
    else:
        pair.average = entry[EMA] = None
        if kind == "deleted":
            del entry[EMA]


def convert_averages(run: Run) -> None:
    """By a file, to the type that a group asks for."""
    place = run.stage_rng.randrange(len(run.groups))
    averaging = run.groups[place].averaging
    averaging.dtype = None if averaging.dtype is not None else torch.float32
    run.note(f"group {place}: ema_dtype = {averaging.dtype}, and its own file loaded")
    run.optimizer.param_groups[place]["ema_dtype"] = averaging.dtype
    run.optimizer.load_state_dict(through_file(run.optimizer.state_dict()))
    run.convert_slots()


def set_decay(run: Run) -> None:
    rng = run.stage_rng
    place, start = rng.choice([None, rng.randrange(len(run.groups))]), rng.choice(["now", "zero"])
    zero: Callable[[fastlr.Schedule], int] = run.clock if start == "now" else lambda schedule: 0
    made = Averaging(run.new_owner(TOP_DECAY, zero, rng))
    run.note(f"set_schedule({made.given()['ema_decay']}, group={place}, start={start!r}) for ema_decay")
    run.optimizer.set_schedule(ema_decay=made.given()["ema_decay"], group=place, start=start)
    for group in run.groups if place is None else [run.groups[place]]:
        group.averaging.decay = made.decay


def set_by_hand(run: Run) -> None:
    rng = run.stage_rng
    place = rng.randrange(len(run.groups))
    own, averaging = run.optimizer.param_groups[place], run.groups[place].averaging
    if not isinstance(averaging.decay, tuple):
        drawn = rng.choice([None, 0.0, 0.5, rng.uniform(0.0, TOP_DECAY)])
        kind = rng.choice([float, np.float64, np.float32, torch.tensor])
        own["ema_decay"] = averaging.decay = None if drawn is None else kind(drawn)
    if rng.random() < 0.3:
        averaging.warmup = not averaging.warmup
        own["ema_warmup"] = rng.choice([bool, np.bool_])(averaging.warmup)
    run.note(f"group {place}: {averaging.given()}")


def set_limits(run: Run) -> None:
    run.limits = Limits.drawn(run.stage_rng)
    run.note(f"{run.limits}")
    for name, value in run.limits.given().items():
        setattr(run.optimizer, name, value)


def set_stages_by_hand(run: Run) -> None:
    rng = run.stage_rng
    place = rng.randrange(len(run.groups))
    own, group = run.optimizer.param_groups[place], run.groups[place]
    name = rng.choice(
        ["max_grad_value", "max_grad_value", "cautious", "stochastic_rounding", "rounding_seed"]
    )
    drawn: Any
    if name == "max_grad_value":
        drawn = drawn_bound(rng)
    elif name == "cautious":
        drawn = decouples(run, group) and not group.staging.cautious
    elif name == "stochastic_rounding":
        drawn = not group.staging.stochastic_rounding
        if drawn and (group.staging.master_weights or (False, True) not in keepings(group)):
            return
    else:
        drawn = drawn_seed(rng)
    kinds = [bool, np.bool_] if isinstance(drawn, bool) else [float, np.float64, np.float32, torch.tensor]
    value = None if drawn is None else rng.choice(kinds)(drawn)
    run.note(f"group {place}: {name} = {value!r}")
    own[name] = value
    setattr(group.staging, name, None if value is None else type(drawn)(value))


def keep_otherwise(run: Run) -> None:
    """With masters or without; by a file, as state is then of another type."""
    place = run.stage_rng.randrange(len(run.groups))
    group = run.groups[place]
    kept = dict(
        zip(("master_weights", "stochastic_rounding"), run.stage_rng.choice(keepings(group)), strict=True)
    )
    run.note(f"group {place}: {kept}, and its own file loaded")
    for name, value in kept.items():
        run.optimizer.param_groups[place][name] = value
        setattr(group.staging, name, value)
    run.optimizer.load_state_dict(through_file(run.optimizer.state_dict()))
    run.convert_slots()


def halves_of(run: Run) -> list[tuple[Group, Pair]]:
    return [(group, pair) for group in run.groups for pair in group.pairs if pair.dtype in HALVES]


def with_masters(run: Run) -> list[Pair]:
    return [pair for _, pair in halves_of(run) if pair.rest is not None]


def write_parameter(run: Run) -> None:
    """In its place, so that the master has to follow."""
    halves = with_masters(run) or [pair for _, pair in halves_of(run)]
    if not halves:
        return
    rng = run.stage_rng
    pair = rng.choice(halves)
    values = pair.ours.detach().cpu().clone(memory_format=torch.contiguous_format)
    kind = rng.choice(["scaled", "drawn", "one number", "every second"])
    number = rng.choice([0.0, -0.0, math.inf, -math.inf, math.nan])
    if kind == "scaled":
        values *= rng.choice([1.5, -1.0])
    elif kind == "drawn":
        values = random_values(rng, values.shape, values.dtype)
    else:
        values.view(-1)[:: 1 if kind == "one number" else 2] = number
    run.note(f"parameter {position(run, pair)} written: {kind}")
    with torch.no_grad():
        pair.ours.copy_(values)
    pair.theirs.data = values.to(pair.theirs.dtype)


def operate_on_master(run: Run) -> None:
    """Moved, laid out otherwise, written, deleted."""
    pairs = with_masters(run)
    if not pairs:
        return
    rng = run.stage_rng
    pair = rng.choice(pairs)
    entry, kind = (
        run.optimizer.state[pair.ours],
        rng.choice(["moved", "laid out", "zero", "new", "deleted", "None"]),
    )
    run.note(f"master of parameter {position(run, pair)}: {kind}")
    if kind == "moved":
        entry[MASTER].data = entry[MASTER].data.clone()
    elif kind == "laid out":
        entry[MASTER] = laid_out(rng, entry[MASTER].cpu())[0]
    elif kind == "zero":
        entry[MASTER].zero_()
        pair.rest = torch.zeros_like(pair.rest)
    elif kind == "new":
        pair.rest = drawn_rest(rng, pair)
        entry[MASTER] = laid_out(rng, pair.rest)[0]
    else:
        pair.rest = entry[MASTER] = None
        if kind == "deleted":
            del entry[MASTER]


def drawn_rest(rng: Random, pair: Pair) -> torch.Tensor:
    """Lower halves, of which some are halfway; whole masters, of which some round to something else."""
    if pair.dtype is torch.bfloat16:
        generator = torch.Generator("cpu").manual_seed(rng.randrange(2**31))
        drawn = torch.randint(-(2**15), 2**15, pair.ours.shape, generator=generator, device="cpu")
        drawn.view(-1)[::3] = rng.choice([-(2**15), 2**15 - 1, 0])
        return drawn.to(torch.int16)
    near = pair.theirs.detach() * (1 + 2.0**-12)
    return torch.where(random_values(rng, near.shape, near.dtype) > 0, near, near + 1)


def position(run: Run, pair: Pair) -> int:
    return [other is pair for other in run.pairs].index(True)


def fail(run: Run) -> None:
    """A step with the gradients that there are."""
    rng = run.stage_rng
    place = rng.randrange(len(run.groups))
    spoils = [spoil_master, spoil_master, overlap_master, round_float16_by_chance, *CONFLICTS]
    kind = rng.choice(spoils)
    run.fail_by(lambda: kind(run, place) if kind in CONFLICTS else kind(run))


def put(own: dict[str, Any], name: str, value: Any) -> Any:
    """What fail_by() takes."""
    before = own[name]
    own[name] = value
    return f"{name} = {value!r}", lambda: own.__setitem__(name, before)


def live_masters(run: Run) -> list[Pair]:
    """Those that the next step reads."""
    return [
        pair
        for group, pair in halves_of(run)
        if group.staging.master_weights and pair.rest is not None and pair.ours.grad is not None
    ]


def spoil_master(run: Run) -> Any:
    live = live_masters(run)
    if not live:
        return None
    pair = run.stage_rng.choice(live)
    other = RESTS[torch.float16 if pair.dtype is torch.bfloat16 else torch.bfloat16]
    shape = pair.ours.shape
    wrong = [
        torch.zeros(3, 3, 3, dtype=RESTS[pair.dtype]),
        torch.zeros(shape, dtype=other),
        torch.zeros(shape, dtype=pair.dtype),
    ]
    return put(run.optimizer.state[pair.ours], MASTER, run.stage_rng.choice(wrong))


def overlap_master(run: Run) -> Any:
    """Lets a master lie where other memory of the step is."""
    live = [pair for pair in live_masters(run) if pair.ours.numel()]
    if not live:
        return None
    pair = run.stage_rng.choice(live)
    entry = run.optimizer.state[pair.ours]
    if pair.dtype is torch.bfloat16:
        return put(entry, MASTER, pair.ours.detach().view(torch.int16))
    others = [
        entry[name]
        for other, name in run.live_state()
        if other is pair and entry[name].dtype is torch.float32
    ]
    return put(entry, MASTER, run.stage_rng.choice(others)) if others else None


def round_float16_by_chance(run: Run) -> Any:
    for place, group in enumerate(run.groups):
        if any(pair.dtype is torch.float16 and pair.ours.grad is not None for pair in group.pairs):
            return put(run.optimizer.param_groups[place], "stochastic_rounding", True)
    return None


def keep_in_two_ways(run: Run, place: int) -> Any:
    own, staging = run.optimizer.param_groups[place], run.groups[place].staging
    if staging.stochastic_rounding:
        _, back = put(own, "master_weights", True)
        return "stochastic_rounding with master_weights", back
    return put(own, "stochastic_rounding", True) if staging.master_weights else None


def spare_without_decoupling(run: Run, place: int) -> Any:
    own, group = run.optimizer.param_groups[place], run.groups[place]
    if not decouples(run, group):
        return put(own, "cautious", True)
    if group.staging.cautious and "decoupled_weight_decay" in group.options:
        _, back = put(own, "decoupled_weight_decay", False)
        return "cautious with decoupled_weight_decay=False", back
    return None


CONFLICTS = (keep_in_two_ways, spare_without_decoupling)


def add_wrong_group(run: Run) -> None:
    """Nothing of it stays."""
    rng, optimizer = run.stage_rng, run.optimizer
    dtype = rng.choice(HALVES)
    wrong: list[dict[str, Any]] = [
        {"master_weights": True, "stochastic_rounding": True},
        {"rounding_seed": -1.0, "stochastic_rounding": dtype is torch.bfloat16},
        *({name: rng.choice(values)} for name, values in WRONG.items()),
    ]
    if dtype is torch.float16:
        wrong.append({"stochastic_rounding": True})
    if run.rule.fused not in ALWAYS_DECOUPLED:
        decoupled = {"decoupled_weight_decay": False} if "decoupled_weight_decay" in run.rule.options else {}
        wrong.append({"cautious": True, **decoupled})
    given = {"params": [torch.nn.Parameter(torch.zeros(3, dtype=dtype))], **rng.choice(wrong)}
    run.note(f"a group is refused: {given}")
    before = dict(given)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(given)
    assert given.keys() == before.keys()
    assert len(optimizer.param_groups) == len(run.groups)


def exchange_scalers(run: Run) -> None:
    """Each loads the other's file, or is copied."""
    scalers = run.scalers
    way = run.stage_rng.choice(["files", "deepcopy", "pickle"])
    run.note(f"the GradScalers through {way}")
    if way == "files":
        files = scalers.theirs.state_dict(), scalers.ours.state_dict()
        made = fastlr.GradScaler(scalers.device), torch.amp.GradScaler("cpu")
        for scaler, file in zip(made, files, strict=True):
            scaler.load_state_dict(file)
        scalers.ours, scalers.theirs = map(scalers.ready, made)
    elif way == "deepcopy":
        scalers.ours = scalers.ready(copy.deepcopy(scalers.ours))
    else:
        scalers.ours = scalers.ready(pickle.loads(pickle.dumps(scalers.ours)))


ACTIONS: tuple[Callable[[Run], None], ...] = (
    *(enter_averages, enter_averages, operate_on_average, operate_on_average, convert_averages, set_decay),
    *(set_by_hand, set_by_hand, set_limits, exchange_scalers),
    *(
        set_stages_by_hand,
        set_stages_by_hand,
        keep_otherwise,
        keep_otherwise,
        write_parameter,
        write_parameter,
    ),
    *(operate_on_master, operate_on_master, fail, fail, add_wrong_group),
)
