"""Every argument of every public name of fastlr.optim and fastlr.schedules, given what it may not be.

An error names argument and value, and nothing has changed.

What a policy's constructor refuses stands in test_schedule_arguments.py, torch's own checks of parameters in
test_optimizer.py.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import parameters, train

import fastlr

NAN, INF, HUGE = math.nan, math.inf, 10**400
EPOCHS = fastlr.Constant(0.1, unit="epoch")
NOT_NUMBERS = ["0.1", [0.1], 1j, np.complex64(1j), True, np.bool_(True), torch.tensor(0.1), b"1"]
NOT_FLAGS = ["False", "no", "", 0, 1, 0.0, [True], torch.tensor(True)]
NOT_COUNTS = [-1, 0.5, 1.0, NAN, "3", [3], True, 2**63 - 1, 2**63, HUGE, 10**5000, torch.tensor(0.5)]

# what no argument of a kind may be
REFUSED: dict[str, list[Any]] = {
    "rate": [-0.1, NAN, INF, HUGE, -HUGE, 10**5000, EPOCHS, None, *NOT_NUMBERS],
    "new rate": [-0.1, NAN, INF, HUGE, EPOCHS, *NOT_NUMBERS],
    "momentum": [-0.1, 1.0, 1.5, NAN, HUGE, EPOCHS, fastlr.Constant(1.0), None, *NOT_NUMBERS],
    "new momentum": [-0.1, 1.0, NAN, HUGE, EPOCHS, fastlr.Constant(1.0), *NOT_NUMBERS],
    "number": [NAN, INF, HUGE, None, fastlr.Constant(0.1), *NOT_NUMBERS],
    "decay": [-1, -1e-300, NAN, INF, HUGE, None, EPOCHS, *NOT_NUMBERS],
    "new decay": [-1, NAN, HUGE, EPOCHS, *NOT_NUMBERS],
    "up to one": [-0.1, 1.5, NAN, HUGE, EPOCHS, fastlr.Constant(1.5), None, *NOT_NUMBERS],
    "betas": [None, 0.9, (), (0.9,), (0.9, 0.99, 0.999), "ab", {0.9: 0.99}, (0.9, 1.0), (-0.1, 0.99),
              (NAN, 0.9), (0.9, "0.99"), (True, 0.9), (0.9, None), (0.9, EPOCHS),
              (fastlr.Constant(1.0), 0.9)],
    "new betas": [(0.9,), (0.9, 1.0), (NAN, 0.9), (0.9, EPOCHS)],
    "number >= 0": [-1, -1e-300, NAN, INF, HUGE, None, fastlr.Constant(0.1), *NOT_NUMBERS],
    "real": [-1, NAN, INF, HUGE, 10**5000, None, "0.1", 1j, np.complex64(1j), True, np.array([1j]),
             torch.tensor([0.1, 0.2])],
    "size": [-1, NAN, INF, HUGE, "0.1", 1j, True],
    "flag": [None, *NOT_FLAGS],
    "dtype": [torch.bfloat16, torch.float64, "float32", np.float32, float, 32],
    "true": [False, *NOT_FLAGS],
    "false": [True, *NOT_FLAGS],
    "either": NOT_FLAGS,
    "mode": ["cosine", "Triangular", "", None, 3, ["triangular"]],
    "word": ["cubic", "", None, 3, ["linear"], np.array(["linear"])],
    "count": [None, *NOT_COUNTS],
    "new count": NOT_COUNTS,
    "count >= 1": [0, None, *NOT_COUNTS],
    "new count >= 1": [0, *NOT_COUNTS],
    "group": [-1, 2, "0", 0.0, True, [0], HUGE],
    "start": ["later", "", None, 3],
    "schedule": [0.1, None, "Cosine", [0.1]],
    "saved": [None, "Cosine", 3, {}, {"type": "Schedule"}, {"type": "one_cycle"}, {"type": ["Cosine"]}],
    "state_dict": [None, [], {}, {"state": {}}, {"param_groups": []}, {"state": [], "param_groups": []}],
}  # fmt: skip

SGD = {"lr": "rate", "momentum": "momentum", "dampening": "number", "weight_decay": "decay",
       "nesterov": "flag", "maximize": "flag", "state_dtype": "dtype", "momentum_dtype": "dtype"}  # fmt: skip
ADAM = {"lr": "rate", "betas": "betas", "eps": "number >= 0", "weight_decay": "decay", "amsgrad": "flag",
        "maximize": "flag", "state_dtype": "dtype"}  # fmt: skip
# Of each rule's plain optimizer.
RULES: dict[str, dict[str, str]] = {
    "FusedSGD": SGD,
    "FusedAdam": {**ADAM, "decoupled_weight_decay": "flag"},
    "FusedAdamW": ADAM,
    "FusedRMSprop": {"lr": "rate", "alpha": "up to one", "eps": "number >= 0", "weight_decay": "decay",
                     "momentum": "momentum", "centered": "flag", "maximize": "flag", "state_dtype": "dtype",
                     "capturable": "either", "foreach": "false", "differentiable": "false"},
    "FusedAdagrad": {"lr": "rate", "lr_decay": "number >= 0", "weight_decay": "decay",
                     "initial_accumulator_value": "number >= 0", "eps": "number >= 0", "maximize": "flag",
                     "state_dtype": "dtype", "foreach": "false", "differentiable": "false", "fused": "true"},
    "FusedAdadelta": {"lr": "rate", "rho": "up to one", "eps": "number >= 0", "weight_decay": "decay",
                      "maximize": "flag", "state_dtype": "dtype", "capturable": "either", "foreach": "false",
                      "differentiable": "false"},
    "FusedLion": {"lr": "rate", "betas": "betas", "weight_decay": "decay", "maximize": "flag",
                  "state_dtype": "dtype"},
}  # fmt: skip
OPTIONS = {"foreach": "false", "fused": "true", "capturable": "either", "differentiable": "false"}
CYCLE = {"base_lr": "real", "max_lr": "real", "step_size_up": "real", "step_size_down": "size",
         "mode": "mode", "gamma": "real", "cycle_momentum": "flag", "base_momentum": "size",
         "max_momentum": "size", "interpolation": "word", "decay_base": "flag"}  # fmt: skip
BOUNDS = {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 4, "mode": "exp_range", "gamma": 0.5}
MOMENTA = {"cycle_momentum": True, "base_momentum": 0.8, "max_momentum": 0.9}


def sgd() -> fastlr.FusedSGD:
    model = parameters([(3,), (2,)])
    optimizer = fastlr.FusedSGD(
        [{"params": [p]} for p in model], lr=fastlr.Exponential(0.5, 0.9), momentum=0.9
    )
    train(2, (model, optimizer.step))
    return optimizer


def cyclic_sgd(arguments: dict[str, Any]) -> dict[str, Any]:
    cycled = "base_momentum" in arguments or "max_momentum" in arguments
    return {**BOUNDS, **(MOMENTA if cycled else {}), **arguments}


def built(name: str, cyclic: bool, _: object, **arguments: Any) -> object:
    return getattr(fastlr, name)(parameters([(3,)]), **(cyclic_sgd(arguments) if cyclic else arguments))


# What is called: from the arguments to test, and an optimizer that must not change (or is not there).
CALLS: dict[str, tuple[Callable[..., object], dict[str, str]]] = {
    **{
        name: (partial(built, name, False), {**kinds, **({} if "foreach" in kinds else OPTIONS)})
        for name, kinds in RULES.items()
    },
    **{
        name: (
            partial(built, name, True),
            {**CYCLE, **{key: kind for key, kind in ADAM.items() if key not in ("lr", "weight_decay")},
             "weight_decay": "new decay", **OPTIONS},
        )
        for name in ("FusedCyclicAdam", "FusedCyclicAdamW")
    },
    "FusedCyclicSGD": (
        lambda _, **a: fastlr.FusedCyclicSGD(parameters([(3,)]), **cyclic_sgd(a)),
        {**CYCLE, **{name: kind for name, kind in SGD.items() if name not in ("lr", "momentum")}, **OPTIONS},
    ),
    "FusedSGD.add_param_group": (
        lambda optimizer, **a: optimizer.add_param_group({"params": parameters([(3,)]), **a}),
        {**SGD, "differentiable": "false"},
    ),
    "FusedSGD.set_schedule": (
        lambda optimizer, **a: optimizer.set_schedule(**a),
        {"lr": "new rate", "momentum": "new momentum", "weight_decay": "new decay", "group": "group",
         "start": "start"},
    ),
    "FusedAdam.set_schedule": (
        lambda _, **a: fastlr.FusedAdam(parameters([(3,)])).set_schedule(**a),
        {"betas": "new betas", "beta1": "new momentum", "beta2": "new momentum"},
    ),
    "FusedSGD.set_clock": (
        lambda optimizer, **a: optimizer.set_clock(**a), {"updates": "new count", "samples": "new count"}
    ),
    "FusedSGD.advance_samples": (lambda optimizer, **a: optimizer.advance_samples(**a), {"samples": "count"}),
    "FusedSGD.load_state_dict": (
        lambda optimizer, **a: optimizer.load_state_dict(**a), {"state_dict": "state_dict"}
    ),
    "FusedSGD.measure_grad_norm": (
        lambda optimizer, **a: setattr(optimizer, *a.popitem()), {"measure_grad_norm": "flag"}
    ),
    "Schedule.__call__": (lambda _, **a: fastlr.Constant(0.1)(**a), {"clock": "count"}),
    "Schedule.values": (
        lambda _, **a: fastlr.Constant(0.1).values(**{"start": 0, "stop": 3, **a}),
        {"start": "count", "stop": "count"},
    ),
    "Schedule.then": (
        lambda _, **a: fastlr.Constant(0.1).then(**{"after": fastlr.Constant(0.2), "at": 3, **a}),
        {"after": "schedule", "at": "new count >= 1"},
    ),
    "Schedule.__mul__": (lambda _, **a: fastlr.Constant(0.1) * a["factor"], {"factor": "real"}),
    "Schedule.in_updates": (
        lambda _, **a: EPOCHS.in_updates(**a), {"updates_per_epoch": "count >= 1"}
    ),
    "Schedule.in_samples": (lambda _, **a: EPOCHS.in_samples(**a), {"samples": "count >= 1"}),
    "Schedule.from_dict": (lambda _, **a: fastlr.Schedule.from_dict(**a), {"data": "saved"}),
    "Triangular.cycle_ends": (
        lambda _, **a: fastlr.Triangular(0.1, 0.5, 4).cycle_ends(**a), {"total": "count"}
    ),
    "one_cycle": (
        lambda _, **a: fastlr.one_cycle(**{"max_lr": 0.1, "total_steps": 20, **a}),
        {"max_lr": "real", "total_steps": "count >= 1", "pct_start": "real", "anneal_strategy": "word",
         "div_factor": "real", "final_div_factor": "real", "three_phase": "flag", "base_momentum": "real",
         "max_momentum": "real"},
    ),
}  # fmt: skip

# Where the message says another word: that of the schedule, which takes the value as it is.
CALLED = {"base_lr": "base", "max_lr": "max", "base_momentum": "base", "max_momentum": "max",
          "data": "(type|a schedule)", "betas": "(betas|beta1|beta2)"}  # fmt: skip
# What says more of a value than its repr would.
TOLD = "the keys|counts epochs|peaks at|the name of a schedule"


def shown(value: Any) -> str:
    """How a message may show a value, as a pattern."""
    if isinstance(value, tuple):
        return "|".join([re.escape(repr(value)), *map(shown, value)])
    try:
        text = repr(value)
    except ValueError:
        return r"an integer of \d+ bits"
    return f"({re.escape(text)}|{type(value).__name__}|{TOLD})"


def label(value: object) -> str:
    try:
        return f"{type(value).__name__}:{value!r}"[:25]
    except ValueError:
        return "too-long"


@pytest.mark.parametrize(
    ("call", "name", "bad"),
    [
        pytest.param(call, name, bad, id=f"{what}-{name}-{label(bad)}")
        for what, (call, kinds) in CALLS.items()
        for name, kind in kinds.items()
        for bad in REFUSED[kind]
    ],
)
def test_refused(call: Callable[..., object], name: str, bad: Any) -> None:
    optimizer = sgd()
    before = str(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError)) as error:
        call(optimizer, **{name: bad})
    message = str(error.value)
    assert re.match(rf"({name}|{CALLED.get(name, name)})\b", message), message
    assert re.search(shown(bad), message), message
    assert str(optimizer.state_dict()) == before


ACCEPTED: dict[str, list[Any]] = {
    "foreach": [None, False, np.bool_(False)],
    "fused": [None, True],
    "capturable": [None, False, True],
    "differentiable": [None, False],
    "state_dtype": [None, torch.float32],
    "lr": [0, 0.1, np.float32(0.1), np.int64(1), fastlr.Constant(0.1)],
    "maximize": [True, np.bool_(False)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values]
)
def test_accepted(name: str, value: Any) -> None:
    optimizer = fastlr.FusedSGD(parameters([(3,)]), **{name: value})
    assert name in optimizer.param_groups[0] or name in OPTIONS
    assert not set(OPTIONS) & set(optimizer.param_groups[0])


def test_other_keywords_are_unexpected() -> None:
    for build in (fastlr.FusedSGD, lambda p, **a: fastlr.FusedCyclicSGD(p, 0.1, 0.5, **a)):
        with pytest.raises(TypeError, match=r"Fused\w*SGD\(\) got an unexpected keyword argument 'decay'"):
            build(parameters([(3,)]), decay=0.1)


WRITTEN = {
    "lr": ("a number", ["0.1", None, True, 1j]),
    "momentum": ("a number", ["0.1", False]),
    "dampening": ("a number", [None, torch.zeros(2)]),
    "weight_decay": ("a number", ["0.1", True]),
    "maximize": ("True or False", ["False", 1, None, torch.tensor(True)]),
    "nesterov": ("True or False", ["False", 0.0]),
    "updates": ("an integer of 64 bits", ["3", 1.5, 2**63]),
    "samples": ("an integer of 64 bits", [None, -(2**63) - 1]),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in WRITTEN.items() for value in values]
)
def test_what_is_written_into_a_group_is_checked_by_the_step(name: str, value: Any) -> None:
    optimizer = fastlr.FusedSGD([{"params": parameters([(3,)])}, {"params": parameters([(2,)])}], lr=0.1)
    optimizer.param_groups[1][name] = value
    got = re.escape(f"{value!r} ({type(value).__name__})")
    place = "(parameter group 1|a parameter group)"
    with pytest.raises(ValueError, match=f"{name} of {place} must be {WRITTEN[name][0]}, got {got}"):
        optimizer.step()


def test_a_momentum_of_one_is_refused_with_the_reason() -> None:
    for value in (1.0, fastlr.Constant(1.0)):
        with pytest.raises(ValueError, match="never forgotten and the buffer grows without bound"):
            fastlr.FusedSGD(parameters([(3,)]), momentum=value)


def arguments_of(function: Callable[..., Any]) -> set[str]:
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            others = parameter.annotation  # by name, of a TypedDict
            names |= set(OPTIONS) if "TorchOptions" in str(others) else {"momentum", "weight_decay"}
        else:
            names.add(name)
    return names - {"self", "params"}


def test_the_table_names_every_argument() -> None:
    def function(what: str) -> Callable[..., Any]:
        found: Any = fastlr
        for part in what.split("."):
            found = getattr(found, part)
        return found.fset if isinstance(found, property) else found

    for what, (_, kinds) in CALLS.items():
        named = set(kinds)
        if what == "FusedSGD.add_param_group":
            continue  # takes a dict
        if what == "FusedAdam.set_schedule":
            continue  # one function for all rules
        elsewhere = {"momentum"} if what == "FusedCyclicSGD" else set()
        expected = arguments_of(function(what)) - elsewhere
        assert named == ({"measure_grad_norm"} if what.endswith("grad_norm") else expected), what

    methods = {
        f"{kind.__name__}.{name}"
        for kind in (fastlr.FusedSGD, fastlr.FusedCyclicSGD, fastlr.Schedule, fastlr.Triangular)
        for base in kind.__mro__
        if base.__module__.startswith("fastlr")
        for name, value in vars(base).items()
        if not name.startswith("_") and inspect.isfunction(value) and arguments_of(value)
    }
    told = {what.split(".")[-1] for what in CALLS}
    elsewhere = {
        "step",  # a closure that is not one raises as calling it does
        "plot",  # test_plotting.py
    }
    assert {method.split(".")[-1] for method in methods} - elsewhere <= told
    public = {*fastlr.optim.__all__, *fastlr.schedules.__all__}
    policies = {name for name in fastlr.schedules.__all__ if inspect.isclass(getattr(fastlr.schedules, name))}
    assert public - policies - {"Clock", "FusedOptimizer"} == {what for what in CALLS if "." not in what}
