"""What people write into parameter groups and bounds: schedules, numbers beside them, arrays."""

from __future__ import annotations

import copy
from collections import UserList
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, parameters, train, twins
from rule_table import Rule, with_rules

import fastlr

RAMP = fastlr.LinearRamp(0.0, 0.5, 10)
with_backends = pytest.mark.usefixtures("backend")


def weight() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.full((5,), 0.5)
    return p


@with_backends
@with_rules
def test_a_written_schedule_is_adopted_at_the_next_step(rule: Rule) -> None:
    """Every option that a schedule can drive, as set_schedule() would have put it in charge."""
    ours, theirs = twins([(9,), (3, 4)])
    writing, told = (rule.make([{"params": [p]} for p in model], **rule.full) for model in (ours, theirs))
    train(2, (ours, writing.step), (theirs, told.step))
    for place in range(2):
        group = writing.param_groups[place]
        for name, schedule in rule.drives.items():
            if name.startswith("beta"):
                betas = list(group["betas"])
                betas[int(name[-1]) - 1] = schedule
                group["betas"] = tuple(betas)
            else:
                group[name] = schedule
    told.set_schedule(**rule.drives)
    train(4, (ours, writing.step), (theirs, told.step), start=2)
    assert_same(theirs, ours)
    assert [{**g, "params": 0} for g in writing.param_groups] == [
        {**g, "params": 0} for g in told.param_groups
    ]
    assert all(writing.param_groups[0][f"{name}_start"] == 2 for name in rule.drives)


@pytest.mark.parametrize(
    "what", ["state_dict", "sync", "deepcopy", "set_schedule", "scale_lr", "advance_epoch"]
)
def test_it_is_adopted_before_whatever_takes_the_schedules_is_done(what: str) -> None:
    opt = fastlr.FusedSGD([{"params": [weight()]}, {"params": [weight()]}], lr=RAMP)
    opt.step()
    schedule = fastlr.Exponential(0.25, 0.5, unit="epoch")
    opt.param_groups[1]["lr"] = schedule  # over a schedule that was there
    did = {
        "state_dict": opt.state_dict,
        "sync": opt.sync,
        "deepcopy": lambda: copy.deepcopy(opt),
        "set_schedule": lambda: opt.set_schedule(momentum=0.5),
        "scale_lr": lambda: opt.scale_lr(0.5),
        "advance_epoch": opt.advance_epoch,
    }[what]()
    factor = 0.5 if what == "scale_lr" else 1.0
    saved = opt.state_dict()["param_groups"] if what != "state_dict" else did["param_groups"]
    now = 1 if what == "advance_epoch" else 0
    assert [group["lr"] for group in saved] == [RAMP(1) * factor, 0.25 * 0.5**now * factor]
    assert fastlr.Schedule.from_dict(saved[0]["lr_schedule"]) == (RAMP * factor if factor != 1.0 else RAMP)
    opt.step()
    opt.advance_epoch()
    assert opt.param_groups[1]["lr"] == 0.25 * 0.5 ** (now + 1) * factor


BAD: dict[str, tuple[str, Any, type[Exception], str]] = {
    "range": (
        "momentum",
        fastlr.Constant(1.0),
        ValueError,
        r"^momentum of .* 1 must stay in .* peaks at 1.0",
    ),
    "unit": ("lr", fastlr.Constant(0.1, unit="token"), ValueError, "counts tokens, but .* group 0 samples"),
    "nothing to drive": (
        "dampening",
        RAMP,
        ValueError,
        r"^dampening of parameter group 1 must be a number, g",
    ),
    "word": ("lr", "fast", ValueError, "^lr of parameter group 1 must be a number, got 'fast'"),
    "a dict": ("lr", RAMP.to_dict(), ValueError, "^lr of parameter group 1 must be a number, got {"),
}


@pytest.mark.parametrize(("key", "value", "error", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_adopted_changes_nothing(
    key: str, value: Any, error: type[Exception], message: str
) -> None:
    model = [weight(), weight()]
    decay = fastlr.Constant(0.5, unit="sample")
    opt = fastlr.FusedSGD([{"params": [p]} for p in model], lr=0.1, weight_decay=decay, momentum=0.5)
    kept = opt.param_groups[1][key]
    before = copy.deepcopy(opt.state_dict())
    opt.param_groups[1][key] = value
    with pytest.raises(error, match=message) as raised:
        opt.step()
    assert raised.value.__context__ is None
    assert opt.param_groups[1][key] is value
    assert torch.equal(model[0], torch.ones(5))
    opt.param_groups[1][key] = kept
    assert str(opt.state_dict()) == str(before)
    opt.step()


def test_a_block_that_hands_options_over_takes_numbers_only() -> None:
    opt = fastlr.FusedSGD([weight()], lr=RAMP)
    with opt.handed_over():
        opt.param_groups[0]["lr"] = fastlr.Constant(0.5)
        with pytest.raises(ValueError, match=r"^lr of parameter group 0 must be a number, got Constant"):
            opt.step()
        opt.param_groups[0]["lr"] = 0.5
    assert opt.param_groups[0]["lr_schedule"] == RAMP


def test_a_number_beside_a_schedule_is_never_ignored() -> None:
    """Live, and in groups that another optimizer leaves."""
    opt = fastlr.FusedSGD([weight()], lr=fastlr.Constant(0.125), momentum=RAMP)
    opt.step()
    moved = fastlr.FusedSGD(opt.param_groups)
    assert (moved.param_groups[0]["lr"], moved.param_groups[0]["momentum"]) == (0.125, RAMP(0))
    left = [dict(group) for group in opt.param_groups]
    left[0]["lr"] = 0.5
    with pytest.raises(
        ValueError, match=r"^lr of .* 0 is 0\.5, and lr_schedule .*0\.125\), which says 0\.125; "
    ):
        fastlr.FusedSGD(left)
    left[0]["lr_schedule"] = None
    assert fastlr.FusedSGD(left).param_groups[0]["lr"] == 0.5
    opt.param_groups[0]["lr"] = 0.5
    with pytest.raises(
        RuntimeError, match=r"lr of parameter group 0 was set to 0\.5 by something else, but a"
    ):
        opt.step()

    betas = fastlr.FusedAdamW([weight()], betas=(0.9, RAMP))
    left = [dict(betas.param_groups[0], betas=(0.9, 0.75))]
    with pytest.raises(ValueError, match=r"^beta2 of parameter group 0 is 0\.75, and beta2_schedule"):
        fastlr.FusedAdamW(left)


FORMS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "float32": lambda values: np.array(values, np.float32),
    "tensor": torch.tensor,
    "of a configuration": UserList,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [fastlr.FusedCyclicSGD, fastlr.FusedCyclicAdamW])
def test_bounds_of_groups_take_what_holds_numbers(kind: Any, form: str) -> None:
    groups = [{"params": parameters([(3,)])} for _ in range(2)]
    opt = kind(groups, FORMS[form]([0.125, 0.25]), FORMS[form]([0.5, 0.75]), 4)
    found = [(group["lr"], group["lr_schedule"](4)) for group in opt.param_groups]
    assert found == [(0.125, 0.5), (0.25, 0.75)]
    assert copy.deepcopy(opt).param_groups[1]["lr"] == 0.25
    with pytest.raises(ValueError, match=r"^max_lr has 3 values for 2 groups"):
        kind(groups, 0.1, FORMS[form]([0.5, 0.75, 1.0]), 4)


def test_a_bound_may_be_an_array_of_no_dimension() -> None:
    opt = fastlr.FusedCyclicSGD([weight()], np.float32(0.125), np.array(0.5), 4)
    assert opt.param_groups[0]["lr_schedule"] == fastlr.Triangular(0.125, 0.5, 4)


def test_a_number_that_was_written_into_a_file_is_not_passed_over_in_silence() -> None:
    def made() -> fastlr.FusedAdamW:
        betas = (fastlr.LinearRamp(0.5, 0.9, 10), 0.99)
        return fastlr.FusedAdamW([torch.zeros(2)], lr=fastlr.Cosine(0.1, 0.0, 10), betas=betas)

    optimizer = made()
    optimizer.set_clock(updates=4)
    file = optimizer.state_dict()
    made().load_state_dict(file)
    file["param_groups"][0]["lr"] *= 1.0 + 1e-12  # as another machine rounds
    made().load_state_dict(file)
    file["param_groups"][0] |= {"lr": 0.5, "betas": (0.6, 0.99)}
    message = (
        r"lr of parameter group 0 is 0\.5, and the schedule says 0\.0654.*; "
        r"beta1 of parameter group 0 is 0\.6, and the schedule says 0\.66.*\. "
        r"set_schedule\(lr=\.\.\.\) takes such a value back"
    )
    loaded = made()
    with pytest.warns(UserWarning, match=message):
        loaded.load_state_dict(file)
    assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    loaded.param_groups[0]["lr"] = 0.7  # which the next step refuses
    made().load_state_dict(loaded.state_dict())
    assert loaded.param_groups[0]["lr"] == 0.7
    loaded.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    with loaded.handed_over():  # whose numbers no file holds
        loaded.param_groups[0]["lr"] = 0.7
        file = loaded.state_dict()
    made().load_state_dict(file)


def test_a_scheduler_for_frameworks_tells_the_rate_of_a_written_schedule() -> None:
    optimizer = fastlr.FusedSGD([torch.zeros(2)], lr=0.1)
    scheduler = fastlr.integrations.ReadOnlyScheduler(optimizer)
    optimizer.param_groups[0]["lr"] = fastlr.LinearRamp(0.2, 0.4, 10)
    assert scheduler.get_lr() == [0.2]
    scheduler.step()
    assert scheduler.get_last_lr() == [0.2]
