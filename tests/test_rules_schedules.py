"""Schedules of every option that one can drive, against torch's optimizers and schedulers."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_same, parameters, train, twins
from rule_table import RULES, Rule, assert_same_run, close_on_devices, drive, with_rules

import fastlr

pytestmark = pytest.mark.usefixtures("backend")

# -- against torch with the values set by hand ------------------------------------------------------

# Each option alone, and all together.
DRIVEN = [
    (rule, names)
    for rule in RULES.values()
    for names in (*((name,) for name in rule.drives), tuple(rule.drives))
]


@pytest.mark.parametrize(
    ("rule", "names"), DRIVEN, ids=[f"{rule.torch.__name__}-{'+'.join(names)}" for rule, names in DRIVEN]
)
def test_schedules_equal_values_set_by_hand(rule: Rule, names: tuple[str, ...], backend: str) -> None:
    """Of one group, beside one with schedules of its own for some, and one that has fixed values."""
    drives = {name: rule.drives[name] for name in names}
    other = {name: 0.5 * schedule for name, schedule in rule.drives.items() if name in ("lr", "weight_decay")}
    ours, theirs = twins([(9,), (5, 3), (7,)])
    fused, reference = (
        make([{"params": [p]} for p in model], **rule.full)
        for make, model in ((rule.make, ours), (rule.make_torch, theirs))
    )
    fused.set_schedule(group=0, **drives)
    fused.set_schedule(group=1, **other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some end
        for step in range(25):
            drive(reference.param_groups[0], drives, step)
            drive(reference.param_groups[1], other, step)
            for mine, his in zip(fused.param_groups, reference.param_groups, strict=True):
                for key in {*rule.full, "lr", *(("betas",) if "betas" in his else ())}:
                    assert mine[key] == his[key], key
            train(1, (theirs, reference.step), (ours, fused.step), start=step)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))
    for name, schedule in drives.items():
        assert fused.param_groups[0][f"{name}_schedule"] is schedule
        assert fused.param_groups[2][f"{name}_schedule"] is None


@with_rules
def test_schedules_in_the_constructor_and_in_groups_are_those_of_set_schedule(rule: Rule) -> None:
    drives: dict[str, Any] = dict(rule.drives)
    if "beta1" in drives:
        drives["betas"] = (drives.pop("beta1"), drives.pop("beta2"))
    made = rule.fused(parameters([(9,)]), **{**rule.full, **drives})
    grouped = rule.fused([{"params": parameters([(9,)]), **drives}], **rule.full)
    added = rule.fused(parameters([(3,)]), **rule.full)
    added.add_param_group({"params": parameters([(9,)]), **drives})
    put = rule.fused(parameters([(9,)]), **rule.full)
    put.set_schedule(**rule.drives)
    groups = [o.state_dict()["param_groups"][-1] for o in (made, grouped, added, put)]
    for group in groups:
        group["params"] = [0]
    assert groups[0] == groups[1] == groups[2] == groups[3]


@with_rules
def test_schedules_in_samples_drive_every_option(rule: Rule) -> None:
    ours, theirs = twins([(9,)])
    drives = {name: fastlr.Triangular(0.1, 0.9, 64, unit="sample") for name in rule.drives}
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    fused.set_schedule(**drives)
    for step in range(8):
        drive(reference.param_groups[0], drives, 24 * step)
        fused.step() if step == 3 else None  # without a gradient: it counts, and takes no samples
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        fused.zero_grad()
        fused.advance_samples(24)
    assert fused.sync() == (9, 8 * 24)
    assert_same(theirs, ours)


@with_rules
def test_writing_what_a_schedule_owns_is_an_error(rule: Rule) -> None:
    for name, schedule in rule.drives.items():
        model = parameters([(9,)])
        optimizer = rule.make(model, **rule.full)
        optimizer.set_schedule(**{name: schedule})
        train(2, (model, optimizer.step))
        drive(optimizer.param_groups[0], {name: fastlr.Constant(0.0625)}, 0)
        before = model[0].detach().clone()
        with pytest.raises(RuntimeError, match=rf"{name} of parameter group 0 was set to 0\.0625"):
            optimizer.step()
        assert_same([before], [model[0].detach()])
        optimizer.set_schedule(**{name: 0.0625})
        optimizer.step()


# -- betas ------------------------------------------------------------------------------------------

ADAMS = pytest.mark.parametrize("kind", [fastlr.FusedAdam, fastlr.FusedAdamW], ids=lambda kind: kind.__name__)
BETA1, BETA2 = fastlr.Triangular(0.5, 0.9, 4), fastlr.Exponential(0.75, 0.5)


@ADAMS
def test_betas_stay_a_tuple_of_floats_and_have_an_owner_each(kind: Any) -> None:
    model = parameters([(9,)])
    optimizer = kind(model, betas=(BETA1, 0.25))
    group = optimizer.param_groups[0]
    for step in range(4):
        assert group["betas"] == (BETA1(step), 0.25)
        assert [type(beta) for beta in group["betas"]] == [float, float]
        assert type(group["betas"]) is tuple
        train(1, (model, optimizer.step))
    assert (group["beta1_schedule"], group["beta2_schedule"]) == (BETA1, None)


# What set_schedule() is given after three updates with (BETA1, 0.25), and what betas and owners are then.
SET: dict[str, tuple[dict[str, Any], tuple[float, float], tuple[Any, Any]]] = {
    "beta1": ({"beta1": BETA2}, (0.75, 0.25), (BETA2, None)),
    "beta1-from-zero": ({"beta1": BETA2, "start": "zero"}, (0.75 / 8, 0.25), (BETA2, None)),
    "beta2": ({"beta2": BETA2}, (BETA1(3), 0.75), (BETA1, BETA2)),
    "betas": ({"betas": (BETA2, BETA1)}, (0.75, 0.5), (BETA2, BETA1)),
    "numbers": ({"betas": (0.5, 0.125)}, (0.5, 0.125), (None, None)),
    "list": ({"betas": [0.5, BETA2]}, (0.5, 0.75), (None, BETA2)),
    "one-number": ({"beta1": 0.0}, (0.0, 0.25), (None, None)),
}  # fmt: skip


@ADAMS
@pytest.mark.parametrize(("given", "betas", "owners"), SET.values(), ids=SET.keys())
def test_set_schedule_of_betas(
    kind: Any, given: dict[str, Any], betas: tuple[float, float], owners: tuple[Any, Any]
) -> None:
    model = parameters([(9,)])
    optimizer = kind(model, betas=(BETA1, 0.25))
    train(3, (model, optimizer.step))
    optimizer.set_schedule(weight_decay=fastlr.LinearRamp(0.0, 1.0, 4), **given)
    group = optimizer.param_groups[0]
    assert group["betas"] == betas
    assert (group["beta1_schedule"], group["beta2_schedule"]) == owners
    train(1, (model, optimizer.step))
    assert group["weight_decay"] == (1.0 if given.get("start") == "zero" else 0.25)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "beta1-of-1": ({"betas": (1.0, 0.9)}, ValueError, r"beta1 of parameter group 0 must be in \[0, 1\)"),
    "peak": ({"betas": (0.9, fastlr.Constant(1.0))}, ValueError, r"beta2 .* stay in \[0, 1\).*peaks at 1"),
    "one": ({"betas": (0.9,)}, ValueError, "betas.* must be a tuple of 2 numbers or"),
    "number": ({"betas": 0.9}, ValueError, "betas.* must be a tuple of 2 numbers or"),
    "word": ({"betas": ("0.9", 0.9)}, TypeError, "beta1 of parameter group 0 must be a number or a fastlr"),
}  # fmt: skip


@ADAMS
@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_betas(kind: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = parameters([(4,), (4,)])
    with pytest.raises(error, match=message):
        kind(model, **arguments)
    optimizer = kind(model[:1])
    before = optimizer.state_dict()
    with pytest.raises(error, match=message):
        optimizer.set_schedule(**arguments)
    with pytest.raises(error, match=message.replace("group 0", "group 1")):
        optimizer.add_param_group({"params": model[1:], **arguments})
    assert optimizer.state_dict() == before


@with_rules
def test_what_no_schedule_can_drive_is_named(rule: Rule) -> None:
    optimizer = rule.make(parameters([(4,)]))
    for name in {"momentum", "beta1", "alpha", "rho", "eps"} - set(rule.drives):
        with pytest.raises(TypeError, match=rf"got {name!r}, which is nothing .* in {rule.fused.__name__}"):
            optimizer.set_schedule(**{name: 0.5})


# -- torch's schedulers -------------------------------------------------------------------------------


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@ADAMS
def test_one_cycle_drives_lr_and_beta1_as_one_cycle_lr_does(kind: Any, anneal: Any, backend: str) -> None:
    ours, theirs = twins([(9,), (5, 3)])
    cycle = {"max_lr": 0.05, "total_steps": 30, "anneal_strategy": anneal}
    lr, beta1 = fastlr.one_cycle(**cycle)
    rule = RULES[kind.__name__.removeprefix("Fused")]
    fused = kind(ours, lr=lr, betas=(beta1, 0.99))
    reference = rule.make_torch(theirs, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(reference, **cycle)
    for step in range(30):
        # The cosine of torch's is rounded on its way; in the last bits the two may differ.
        mine, his = fused.param_groups[0], reference.param_groups[0]
        assert mine["lr"] == pytest.approx(his["lr"], rel=1e-13)
        assert mine["betas"] == pytest.approx(his["betas"], rel=1e-13)
        his["lr"], his["betas"] = mine["lr"], mine["betas"]
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        if step < 29:
            scheduler.step()
    assert_same_run(rule, (reference, theirs), (fused, ours), backend == "cuda")


MODES = {
    "triangular": {"mode": "triangular"},
    "triangular2": {"mode": "triangular2", "step_size_down": 7},
    "exp_range": {"mode": "exp_range", "gamma": 0.99},
}
CYCLED = {
    "rate": {"cycle_momentum": False},
    "rate+beta1": {"cycle_momentum": True},
    "rate+beta1-bounds": {"cycle_momentum": True, "base_momentum": 0.25, "max_momentum": 0.75},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("cycled", CYCLED.values(), ids=CYCLED.keys())
@pytest.mark.parametrize(
    ("kind", "rule"),
    [(fastlr.FusedCyclicAdam, RULES["Adam"]), (fastlr.FusedCyclicAdamW, RULES["AdamW"])],
    ids=["Adam", "AdamW"],
)
def test_cyclic_adam_equals_adam_with_cyclic_lr(
    kind: Any, rule: Rule, mode: dict[str, Any], cycled: dict[str, Any], backend: str
) -> None:
    cycle = {"base_lr": 1e-3, "max_lr": 6e-3, "step_size_up": 5, **mode, **cycled}
    ours, theirs = twins([(33,), (7, 5)])
    options = {"eps": 1e-6, "amsgrad": True}
    fused = kind(ours, **cycle, **options)
    reference = rule.make_torch(theirs, lr=1e-3, **options)
    scheduler = torch.optim.lr_scheduler.CyclicLR(reference, **cycle)
    for step in range(30):
        for key in ("lr", "betas", "weight_decay", "decoupled_weight_decay"):
            if key in reference.param_groups[0]:  # PyTorch 2.6 has no decoupled_weight_decay in Adam's
                assert fused.param_groups[0][key] == reference.param_groups[0][key]
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        scheduler.step()
    assert_same_run(rule, (reference, theirs), (fused, ours), backend == "cuda")


BAD_CYCLIC: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"cycle_momentum": True, "betas": (0.8, 0.999)}, "the first cannot be fixed and cycled"),
    "schedule": ({"cycle_momentum": True, "betas": (BETA1, 0.999)}, "the first cannot be fixed and cycled"),
    "bounds": ({"base_momentum": 0.8}, "base_momentum=0.8 needs cycle_momentum=True"),
    "betas": ({"betas": (0.9,)}, "betas.* must be a tuple of 2"),
    "cycled-betas": ({"betas": (0.9,), "cycle_momentum": True}, "betas.* must be a tuple"),
    "momentum-of-1": ({"cycle_momentum": True, "max_momentum": 1.0}, "beta1 .* must stay in"),
    "swapped": ({"base_lr": 1.0}, "max_lr must be >= base_lr, got base_lr=1.0, max_lr=0.5; swap them$"),
    "mode": ({"mode": "cosine"}, "mode must be triangular, triangular2 or exp_range, got 'cosine'"),
}


@pytest.mark.parametrize("kind", [fastlr.FusedCyclicAdam, fastlr.FusedCyclicAdamW], ids=["Adam", "AdamW"])
@pytest.mark.parametrize(("arguments", "message"), BAD_CYCLIC.values(), ids=BAD_CYCLIC.keys())
def test_bad_cyclic_arguments(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(parameters([(4,)]), **{"base_lr": 0.1, "max_lr": 0.5, **arguments})


@pytest.mark.parametrize(
    ("kind", "decay"), [(fastlr.FusedCyclicAdam, 0.0), (fastlr.FusedCyclicAdamW, 0.01)], ids=["Adam", "AdamW"]
)
def test_groups_of_cyclic_adam_cycle_on_their_own(kind: Any, decay: float) -> None:
    model = parameters([(3,), (3,), (3,)])
    groups = [{"params": model[:1]}, {"params": model[1:2], "max_lr": 0.9, "betas": (0.9, 0.5)}]
    optimizer = kind(groups, 0.1, 0.5, 4, cycle_momentum=True)
    optimizer.add_param_group({"params": model[2:], "cycle_momentum": False, "weight_decay": 0.25})
    first, second, third = optimizer.param_groups
    assert first["lr_schedule"] == fastlr.Triangular(0.1, 0.5, 4)
    assert second["lr_schedule"] == fastlr.Triangular(0.1, 0.9, 4)
    beta1 = fastlr.Triangular(0.8, 0.9, 4, inverted=True)
    assert first["beta1_schedule"] == second["beta1_schedule"] == beta1
    assert (third["beta1_schedule"], third["betas"]) == (None, (0.9, 0.999))
    assert second["betas"] == (0.9, 0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, decay, 0.25]


@pytest.mark.parametrize(("name", "value"), list(itertools.product(["RMSprop", "SGD"], [0.0, 0.5])))
def test_momentum_scheduled_through_zero(name: str, value: float, backend: str) -> None:
    """Where it is zero, the buffer rests, as in torch; it is there because a schedule drives it."""
    rule = RULES[name]
    values = [0.5, 0.0, 0.75, 0.0, value, 0.9]
    ours, theirs = twins([(9,)])
    fused = rule.make(ours, momentum=fastlr.Tabulated(values))
    reference = rule.make_torch(theirs, momentum=0.5)
    for step, momentum in enumerate(values):
        reference.param_groups[0]["momentum"] = momentum
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
    assert_same_run(rule, (reference, theirs), (fused, ours), backend == "cuda")
