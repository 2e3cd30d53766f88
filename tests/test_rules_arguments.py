"""The constructors of every rule take what torch's take, in the same places and with the same defaults."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import numpy as np
import pytest
import torch
import typing_extensions
from helpers import parameters, train
from rule_table import RULES, Rule, assert_same_run, taking_exact_roots, with_rules

import fastlr
from fastlr.optim._groups import OF_ALL_GROUPS, STAGE_DEFAULTS, TorchOptions

# How torch makes a step, which here is always the same; what of it asks for nothing else is taken.
TAKEN: dict[str, tuple[bool | None, ...]] = {
    "foreach": (None, False),
    "fused": (None, True),
    "capturable": (None, False, True),
    "differentiable": (None, False),
}
REFUSED = {
    "foreach": (True, "foreach must be False or None, got True: every step updates all parameters in one"),
    "fused": (False, "fused must be True or None, got False: every step is fused; leave it out"),
    "differentiable": (True, "differentiable must be False or None, got True: no gradient flows"),
}
WRITTEN_FOR = (2, 13)  # torch's signatures may grow


def arguments(kind: type) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(kind).parameters)
    found.pop("self", None)
    return found


def takes_torch_options(rule: Rule) -> bool:
    """All of them, where none stands among the arguments by position as in torch's."""
    return (
        typing.get_type_hints(rule.fused.__init__)["step_options"] == typing_extensions.Unpack[TorchOptions]
    )


def of_torch(rule: Rule) -> dict[str, inspect.Parameter]:
    if tuple(map(int, torch.__version__.split(".")[:2])) != WRITTEN_FOR:
        pytest.skip(f"compares with the signatures of PyTorch {WRITTEN_FOR[0]}.{WRITTEN_FOR[1]}")
    return arguments(getattr(torch.optim, rule.torch.__name__, rule.torch))


@with_rules
def test_names_order_and_defaults_are_torchs(rule: Rule) -> None:
    theirs, ours = of_torch(rule), arguments(rule.fused)
    positional = [
        [name for name, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD] for found in (theirs, ours)
    ]
    assert positional[0] == positional[1]
    passed_on = set(TAKEN) if takes_torch_options(rule) else set()
    assert set(theirs) <= set(ours) | passed_on
    for name, theirs_one in theirs.items():
        if name not in TAKEN:
            assert ours[name].default == theirs_one.default, name
            assert ours[name].kind == theirs_one.kind, name
        elif name in ours:
            assert ours[name].default is None, name
    # And nothing of ours where a positional argument of torch's may come to stand.
    own = set(ours) - set(theirs) - {"step_options"}
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)
    assert own <= {"state_dtype", "momentum_dtype", "decoupled_weight_decay"}


def test_the_options_of_a_step_are_all_there() -> None:
    assert set(typing.get_type_hints(TorchOptions)) == {*TAKEN, *OF_ALL_GROUPS, *STAGE_DEFAULTS}


def options_of(rule: Rule) -> list[str]:
    ours = arguments(rule.fused)
    return [name for name in TAKEN if name in ours or takes_torch_options(rule)]


@with_rules
def test_options_that_ask_for_nothing_else_are_taken(rule: Rule) -> None:
    model = parameters([(4,)])
    for name in options_of(rule):
        for value in TAKEN[name]:
            optimizer = rule.make(model, **{name: value})
            assert name not in optimizer.param_groups[0]


@with_rules
def test_options_that_ask_for_something_else_are_refused(rule: Rule) -> None:
    model = parameters([(4,)])
    for name in options_of(rule):
        if name in REFUSED:
            value, message = REFUSED[name]
            with pytest.raises(ValueError, match=message):
                rule.make(model, **{name: value})
        with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
            rule.make(model, **{name: "no"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        rule.make(model, nope=None)


@with_rules
def test_groups_are_asked_as_the_constructor_is(rule: Rule) -> None:
    model = parameters([(4,), (4,)])
    optimizer = rule.make(model[:1])
    for name, values in TAKEN.items():
        for value in values:
            rule.make([{"params": model, name: value}])
        bad = {"no": "be True or False, got 'no'"}
        if name in REFUSED:
            bad[REFUSED[name][0]] = REFUSED[name][1].split(" must ")[1]
        for value, message in bad.items():
            for place, call in ((0, lambda g: rule.make([g])), (1, optimizer.add_param_group)):
                with pytest.raises(ValueError, match=f"^{name} of parameter group {place} must {message}"):
                    call({"params": model[1:], name: value})
    assert len(optimizer.param_groups) == 1


@with_rules
def test_groups_of_torchs_optimizer_are_taken(rule: Rule) -> None:
    reference = rule.torch(parameters([(4,)]), lr=0.25)
    fused = rule.fused([dict(group) for group in reference.param_groups])
    assert fused.param_groups[0]["lr"] == 0.25
    fused.load_state_dict(reference.state_dict())


@with_rules
def test_arguments_by_position_are_torchs(rule: Rule) -> None:
    """Each of another value than its default."""
    other = {
        "lr": 0.125, "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.25, "nesterov": True, "alpha": 0.75,
        "betas": (0.5, 0.75), "eps": 0.5, "amsgrad": True, "centered": True, "lr_decay": 0.5, "rho": 0.5,
        "initial_accumulator_value": 0.5, "maximize": True, "foreach": False, "capturable": False,
        "differentiable": False,
    }  # fmt: skip
    names = [name for name, p in of_torch(rule).items() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    values = [other[name] for name in names]
    ours, theirs = parameters([(9,)]), parameters([(9,)])
    fused, reference = rule.fused(ours, *values), taking_exact_roots(rule.torch(theirs, *values))
    for name in set(names) - set(TAKEN):
        assert fused.param_groups[0][name] == reference.param_groups[0][name] == other[name]
    reference.param_groups[0]["foreach"] = False
    train(3, (theirs, reference.step), (ours, fused.step))
    assert_same_run(rule, (reference, theirs), (fused, ours))


# What lies out of range, by option; each rule has some.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "lr": [-0.1, float("nan"), float("inf")],
    "weight_decay": [-0.1, float("nan")],
    "eps": [-1e-9, float("inf")],
    "momentum": [-0.1, 1.0],
    "alpha": [-0.1, 1.1],
    "rho": [-0.1, 1.1, float("nan")],
    "lr_decay": [-0.1],
    "initial_accumulator_value": [-0.1],
    "beta1": [1.0],
    "beta2": [-0.1],
}


@with_rules
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(rule: Rule, name: str) -> None:
    held = "betas" if name.startswith("beta") else name
    if held not in arguments(rule.fused):
        pytest.skip("an option of other rules")
    for value in OUT_OF_RANGE[name]:
        given = {"beta1": (value, 0.5), "beta2": (0.5, value)}.get(name, value)
        model = parameters([(4,), (4,)])
        with pytest.raises(ValueError, match=rf"^{name} of parameter group 0 must be .*, got "):
            rule.make(model, **{held: given})
        optimizer = rule.make(model[:1])
        with pytest.raises(ValueError, match=rf"^{name} of parameter group 1 must be .*, got "):
            optimizer.add_param_group({"params": model[1:], held: given})
        train(1, (model[:1], optimizer.step))
        before, kept = model[0].detach().clone(), optimizer.param_groups[0][held]
        optimizer.param_groups[0][held] = given
        with pytest.raises(ValueError, match=rf"^{name} of parameter group 0 must be .*, got "):
            optimizer.step()
        assert torch.equal(before, model[0].detach())
        optimizer.param_groups[0][held] = kept
        optimizer.step()


@with_rules
def test_a_repr_names_the_rule_and_its_options(rule: Rule) -> None:
    text = repr(rule.make(parameters([(4,)]), lr=fastlr.Constant(0.25)))
    assert text.startswith(f"{rule.fused.__name__} (")
    assert all(f"    {name}: " in text for name in arguments(rule.fused) if name in RULES["SGD"].full)
    assert "lr: 0.25" in text


def test_entries_of_a_tuple_have_no_name_of_their_own_in_a_group() -> None:
    model = parameters([(4,)])
    with pytest.raises(ValueError, match="beta1 of parameter group 0 stands in betas, got 0"):
        fastlr.FusedAdam([{"params": model, "beta1": 0.5}])
    optimizer = fastlr.FusedAdam(model)
    with pytest.raises(TypeError, match="betas and beta1 are both given"):
        optimizer.set_schedule(betas=(0.5, 0.6), beta1=0.7)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_cyclic_optimizers_name_what_is_wrong_with_their_momentum() -> None:
    model = parameters([(4,)])
    for kind in (fastlr.FusedCyclicSGD, fastlr.FusedCyclicAdam):
        with pytest.raises(ValueError, match=r"base_momentum=0\.95, max_momentum=0\.9; swap"):
            kind(model, 0.1, 0.2, cycle_momentum=True, base_momentum=0.95)
    betas: Any = np.array([0.9, 0.99])
    with pytest.raises(ValueError, match="betas of parameter group 0 must be a tuple of 2"):
        fastlr.FusedCyclicAdam(model, 0.1, 0.2, cycle_momentum=True, betas=betas)


@pytest.mark.parametrize("cycled", [False, True], ids=["fixed", "cycled"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (fastlr.FusedCyclicSGD, "lr"), (fastlr.FusedCyclicSGD, "momentum"), (fastlr.FusedCyclicAdam, "lr"),
        (fastlr.FusedCyclicAdam, "beta1"), (fastlr.FusedCyclicAdamW, "beta1"),
        (fastlr.FusedCyclicAdamW, "beta2"),
    ],
)  # fmt: skip
def test_cyclic_optimizers_refuse_an_owner_of_what_they_set(kind: Any, name: str, cycled: bool) -> None:
    """Which a group that another optimizer has used brings."""
    group = {"params": parameters([(4,)]), f"{name}_schedule": fastlr.Constant(0.5), f"{name}_start": 0}
    told = f"^{name}_schedule of parameter group 0 is Constant.*, of another optimizer, but {kind.__name__} s"
    with pytest.raises(ValueError, match=told):
        kind([group], 0.1, 0.2, cycle_momentum=cycled)


@with_rules
def test_schedules_for_nothing_in_a_group_are_refused(rule: Rule) -> None:
    """Of an option that none can drive, and beside another one."""
    model = parameters([(4,)])
    constant, other = fastlr.Constant(0.25), fastlr.Constant(0.5)
    with pytest.raises(ValueError, match=r"^maximize_schedule of parameter group 0 is for nothing, as no"):
        rule.fused([{"params": model, "maximize_schedule": constant}])
    with pytest.raises(
        ValueError, match=r"^lr of parameter group 0 is .*0\.25.*, and lr_schedule .*0\.5.*; le"
    ):
        rule.fused([{"params": model, "lr": constant, "lr_schedule": other}])
    with pytest.raises(ValueError, match=r"^lr of .* is 0\.125, and lr_schedule .*, which says 0\.5; leave"):
        rule.fused([{"params": model, "lr": 0.125, "lr_schedule": other}])
    for same in (fastlr.Constant(0.5), 0.5):  # as groups of another optimizer have them
        optimizer = rule.fused([{"params": model, "lr": same, "lr_schedule": other}])
        assert optimizer.param_groups[0]["lr"] == 0.5


def test_groups_of_adagrad_begin_with_their_own_sums_and_torchs_do_not() -> None:
    sums = []
    for kind in (fastlr.FusedAdagrad, torch.optim.Adagrad):
        (p,) = parameters([(4,)])
        optimizer: Any = kind([{"params": [p], "initial_accumulator_value": 0.5}])
        p.grad = torch.zeros_like(p)
        optimizer.step()
        sums.append(optimizer.state[p]["sum"].tolist())
    assert sums == [[0.5] * 4, [0.0] * 4]
