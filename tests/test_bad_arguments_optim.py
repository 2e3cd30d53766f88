"""Every argument of every public name of fastlr.optim and fastlr.schedules, given what it may not be.

An error names argument and value, and nothing has changed.

What a policy's constructor refuses stands in test_schedule_arguments.py, torch's own checks of parameters in
test_optimizer.py.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

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
    "rate": [-0.1, NAN, INF, HUGE, -HUGE, 10**5000, None, *NOT_NUMBERS],
    "new rate": [-0.1, NAN, INF, HUGE, *NOT_NUMBERS],
    "momentum": [-0.1, 1.0, 1.5, NAN, HUGE, fastlr.Constant(1.0), None, *NOT_NUMBERS],
    "new momentum": [-0.1, 1.0, NAN, HUGE, fastlr.Constant(1.0), *NOT_NUMBERS],
    "up to one": [-0.1, 1.1, NAN, HUGE, fastlr.Constant(1.1), None, *NOT_NUMBERS],
    "new up to one": [-0.1, 1.1, NAN, HUGE, fastlr.Constant(1.1), *NOT_NUMBERS],
    "betas": [None, 0.9, (), (0.9,), (0.9, 0.99, 0.999), {0.9, 0.99}, {0.9: 0.99}, "ab",
              np.array([0.9, 0.99]), (1.0, 0.9), (0.9, 1.0), [-0.1, 0.9], (NAN, 0.9), (0.9, HUGE),
              (0.9, None), (fastlr.Constant(1.0), 0.9), *((bad, 0.9) for bad in NOT_NUMBERS)],
    "new betas": [0.9, (0.9,), (0.9, 1.0), (0.9, "0.9"), {0.9, 0.99}],
    "number": [NAN, INF, HUGE, None, fastlr.Constant(0.1), *NOT_NUMBERS],
    "number >= 0": [-1, -1e-300, NAN, INF, HUGE, None, fastlr.Constant(0.1), *NOT_NUMBERS],
    "real": [-1, NAN, INF, HUGE, 10**5000, None, "0.1", 1j, np.complex64(1j), True, np.array([1j]),
             torch.tensor([0.1, 0.2])],
    "bound": [-1, NAN, INF, HUGE, 10**5000, None, "0.1", 1j, np.complex64(1j), True],
    "rate of a cycle": [-0.1, 0.01, NAN, INF, HUGE, EPOCHS, *NOT_NUMBERS],
    "limit": [0, -1, NAN, INF, HUGE, fastlr.Constant(0.1), *NOT_NUMBERS],
    "size": [-1, NAN, INF, HUGE, "0.1", 1j, True],
    "flag": [None, *NOT_FLAGS],
    "dtype": [torch.bfloat16, torch.float64, "float32", np.float32, float, 32],
    "true": [False, *NOT_FLAGS],
    "false": [True, *NOT_FLAGS],
    "either": NOT_FLAGS,
    "mode": ["cosine", "Triangular", "", None, 3, ["triangular"]],
    "unit": ["cubic", "", None, 3, ["sample"]],
    "word": ["cubic", "", None, 3, ["linear"], np.array(["linear"])],
    "count": [None, *NOT_COUNTS],
    "new count": NOT_COUNTS,
    "count >= 1": [0, None, *NOT_COUNTS],
    "new count >= 1": [0, *NOT_COUNTS],
    "group": [-1, 2, "0", 0.0, True, [0], HUGE],
    "start": ["later", "", None, 3],
    "schedule": [0.1, None, "Cosine", [0.1]],
    "saved": [None, "Cosine", 3, {}, {"type": "Schedule"}, {"type": "one_cycle"}, {"type": ["Cosine"]}],
    "model": [None, 3, ["parameters"]],
    "optimizer": [None, 3, "SGD", [torch.zeros(1)]],
    "scheduler": [3, "StepLR", [0.1]],
    "scheduler's class": [None, 3, "StepLR", [0.1]],
    "scheduler_state": [None, [], {}, 3],
    "state_dict": [None, [], {}, {"state": {}}, {"param_groups": []}, {"state": [], "param_groups": []}],
}  # fmt: skip

# Of each optimizer: its arguments, which its groups take too, but for the options of torch's optimizers.
STAGES = {"ema_decay": "new momentum", "ema_warmup": "flag", "ema_dtype": "dtype"}
COMMON = {"lr": "rate", "weight_decay": "rate", "maximize": "flag", "state_dtype": "dtype", **STAGES}
SGD = {**COMMON, "momentum": "momentum", "dampening": "number", "nesterov": "flag", "momentum_dtype": "dtype",
       "decoupled_weight_decay": "flag"}  # fmt: skip
ADAMW = {**COMMON, "betas": "betas", "eps": "number >= 0", "amsgrad": "flag"}
ADAM = {**ADAMW, "decoupled_weight_decay": "flag"}
RMSPROP = {**COMMON, "alpha": "up to one", "momentum": "momentum", "eps": "number >= 0", "centered": "flag"}
ADAGRAD = {**COMMON, "lr_decay": "number >= 0", "initial_accumulator_value": "number >= 0",
           "eps": "number >= 0"}  # fmt: skip
ADADELTA = {**COMMON, "rho": "up to one", "eps": "number >= 0"}
LION = {**COMMON, "betas": "betas"}
OF_TORCH = {"foreach": "false", "fused": "true", "capturable": "either", "differentiable": "false"}
OF_ALL_GROUPS = {"max_grad_norm": "limit", "nonfinite": "word"}
OPTIONS = {**OF_TORCH, **OF_ALL_GROUPS}
CYCLE = {"base_lr": "bound", "max_lr": "bound", "step_size_up": "real", "step_size_down": "size",
         "mode": "mode", "gamma": "real", "cycle_momentum": "flag", "base_momentum": "size",
         "max_momentum": "size", "interpolation": "word", "decay_base": "flag"}  # fmt: skip
BOUNDS = {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 4, "mode": "exp_range", "gamma": 0.5}
MOMENTA = {"cycle_momentum": True, "base_momentum": 0.8, "max_momentum": 0.9}


class Kind(NamedTuple):
    """An optimizer.

    Attributes:
        kinds: of what its groups take.
        of_torch: which of OF_TORCH it takes.
        needed: arguments without which there is none.
        driven: what a schedule can drive, besides the kinds of the same names.
    """

    fused: type[fastlr.FusedOptimizer]
    kinds: dict[str, str]
    of_torch: tuple[str, ...] = tuple(OF_TORCH)
    needed: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {}

    @property
    def options(self) -> dict[str, str]:
        """What it takes that no group does."""
        of_torch = {name: OF_TORCH[name] for name in self.of_torch}
        return {**OF_ALL_GROUPS, **of_torch, **({"lr": "rate of a cycle"} if self.fused in CYCLIC else {})}

    def build(self, given: dict[str, Any], *groups: dict[str, Any]) -> fastlr.FusedOptimizer:
        made = groups or ({},)
        return self.fused(
            [{"params": parameters([(3,)]), **group} for group in made], **self.needed(given), **given
        )

    def trained(self) -> fastlr.FusedOptimizer:
        optimizer = self.build({}, {}, {})
        train(2, ([p for group in optimizer.param_groups for p in group["params"]], optimizer.step))
        return optimizer

    @property
    def scheduled(self) -> dict[str, str]:
        """What set_schedule() takes, in kinds for which None means no change."""
        kinds = {name: kind.removeprefix("new ") for name, kind in self.kinds.items()} | {"lr": "rate"}
        if "betas" in kinds:
            kinds |= {"beta1": "momentum", "beta2": "momentum"}
        if self.fused in CYCLIC:
            kinds["momentum" if "betas" not in kinds else "beta1"] = "momentum"
        return {name: f"new {kind}" for name, kind in kinds.items() if f"new {kind}" in REFUSED}


def cycle(given: dict[str, Any]) -> dict[str, Any]:
    cycled = "base_momentum" in given or "max_momentum" in given
    needed = {**BOUNDS, **(MOMENTA if cycled else {})}
    return {name: value for name, value in needed.items() if name not in given}


def cyclic(kinds: dict[str, str], *without: str) -> dict[str, str]:
    return {**CYCLE, **{name: kind for name, kind in kinds.items() if name not in ("lr", *without)}}


CYCLIC = (fastlr.FusedCyclicSGD, fastlr.FusedCyclicAdam, fastlr.FusedCyclicAdamW)
# weight_decay=None is the class's own there
CYCLIC_ADAM = {**cyclic(ADAMW), "weight_decay": "new rate"}
KINDS = {
    "FusedSGD": Kind(fastlr.FusedSGD, SGD),
    "FusedCyclicSGD": Kind(fastlr.FusedCyclicSGD, cyclic(SGD, "momentum"), needed=cycle),
    "FusedAdam": Kind(fastlr.FusedAdam, ADAM),
    "FusedAdamW": Kind(fastlr.FusedAdamW, ADAMW),
    "FusedCyclicAdam": Kind(fastlr.FusedCyclicAdam, CYCLIC_ADAM, needed=cycle),
    "FusedCyclicAdamW": Kind(fastlr.FusedCyclicAdamW, CYCLIC_ADAM, needed=cycle),
    "FusedLion": Kind(fastlr.FusedLion, LION),
    "FusedRMSprop": Kind(fastlr.FusedRMSprop, RMSPROP, ("foreach", "capturable", "differentiable")),
    "FusedAdagrad": Kind(fastlr.FusedAdagrad, ADAGRAD, ("foreach", "fused", "differentiable")),
    "FusedAdadelta": Kind(fastlr.FusedAdadelta, ADADELTA, ("foreach", "capturable", "differentiable")),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def torchs(**given: Any) -> dict[str, Any]:
    """A pair of torch's."""
    optimizer = torch.optim.SGD(parameters([(3,)]), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {"optimizer": optimizer, "scheduler": scheduler, "updates_per_tick": 1, **given}


def files(**given: Any) -> dict[str, Any]:
    """Of a pair of torch's with the groups of a trained optimizer."""
    optimizer = torch.optim.SGD([{"params": parameters([(3,)])} for _ in range(2)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    states = {"optimizer_state": optimizer.state_dict(), "scheduler_state": scheduler.state_dict()}
    return {**states, "scheduler": type(scheduler), "updates_per_tick": 1, **given}


Table = dict[str, tuple[Callable[..., object], dict[str, str]]]


def calls_of(name: str, kind: Kind) -> Table:
    return {
        name: (lambda _, **a: kind.build(a), {**kind.kinds, **kind.options}),
        f"{name}.add_param_group": (
            lambda optimizer, **a: optimizer.add_param_group({"params": parameters([(3,)]), **a}),
            {**kind.kinds, **OPTIONS},
        ),
        f"{name}.set_schedule": (
            lambda optimizer, **a: optimizer.set_schedule(**a),
            {**kind.scheduled, "group": "group", "start": "start"},
        ),
        f"{name}.load_state_dict": (
            lambda optimizer, **a: optimizer.load_state_dict(**a), {"state_dict": "state_dict"}
        ),
    }  # fmt: skip


# What is called: from the arguments to test, and an optimizer that must not change (or is not there).
CALLS: Table = {
    **{what: call for name, kind in KINDS.items() for what, call in calls_of(name, kind).items()},
    "FusedSGD.set_clock": (
        lambda optimizer, **a: optimizer.set_clock(**a),
        {"updates": "new count", "samples": "new count", "tokens": "new count",
         "epochs": "new count"},
    ),
    "FusedSGD.scale_lr": (
        lambda optimizer, **a: optimizer.scale_lr(**{"factor": 0.5, **a}),
        {"factor": "real", "group": "group"},
    ),
    "fuse": (
        lambda _, **a: fastlr.fuse(**torchs(**a)),
        {"optimizer": "optimizer", "scheduler": "scheduler", "updates_per_tick": "count >= 1",
         "horizon": "new count >= 1"},
    ),
    "FusedSGD.to_torch": (
        lambda optimizer, **a: optimizer.to_torch(**a),
        {"foreach": "either", "fused": "either", "capturable": "either"},
    ),
    "FusedSGD.load_torch": (
        lambda optimizer, **a: optimizer.load_torch(**files(**a)),
        {"optimizer_state": "state_dict", "scheduler_state": "scheduler_state",
         "scheduler": "scheduler's class", "updates_per_tick": "count >= 1", "horizon": "new count >= 1"},
    ),
    "FusedSGD.advance_samples": (lambda optimizer, **a: optimizer.advance_samples(**a), {"samples": "count"}),
    "FusedSGD.advance_tokens": (lambda optimizer, **a: optimizer.advance_tokens(**a), {"tokens": "count"}),
    "FusedSGD.measure_grad_norm": (
        lambda optimizer, **a: setattr(optimizer, *a.popitem()), {"measure_grad_norm": "flag"}
    ),
    "FusedSGD.copy_averages_to": (lambda optimizer, **a: optimizer.copy_averages_to(**a), {"model": "model"}),
    "FusedSGD.averaged_state_dict": (
        lambda optimizer, **a: optimizer.averaged_state_dict(**{"model": torch.nn.Linear(1, 1), **a}),
        {"model": "model", "buffers": "word"},
    ),
    "FusedSGD.average_buffers": (lambda optimizer, **a: optimizer.average_buffers(**a), {"model": "model"}),
    "FusedSGD.averaged_weights": (
        lambda optimizer, **a: optimizer.averaged_weights(**a).__enter__(), {"buffers": "word"}
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
    "Schedule.in_tokens": (lambda _, **a: EPOCHS.in_tokens(**a), {"tokens": "count >= 1"}),
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
    "with_warmup": (
        lambda _, **a: fastlr.with_warmup(**{"after": fastlr.Constant(0.2), "warmup_steps": 3, **a}),
        {"after": "schedule", "warmup_steps": "count", "start_lr": "real"},
    ),
    "cosine_with_warmup": (
        lambda _, **a: fastlr.cosine_with_warmup(
            **{"max_lr": 0.1, "warmup_steps": 3, "total_steps": 9, **a}),
        {"max_lr": "real", "warmup_steps": "count", "total_steps": "count >= 1", "start_lr": "real",
         "end_lr": "real", "cooldown_steps": "count", "unit": "unit"},
    ),
    "warmup_stable_decay": (
        lambda _, **a: fastlr.warmup_stable_decay(
            **{"max_lr": 0.1, "warmup_steps": 3, "stable_steps": 9, "decay_steps": 3, **a}),
        {"max_lr": "real", "warmup_steps": "count", "stable_steps": "count", "decay_steps": "count >= 1",
         "decay": "word", "start_lr": "real", "end_lr": "real", "unit": "unit"},
    ),
    "inverse_sqrt": (
        lambda _, **a: fastlr.inverse_sqrt(**{"max_lr": 0.1, "warmup_steps": 3, **a}),
        {"max_lr": "real", "warmup_steps": "count", "timescale": "new count >= 1", "start_lr": "real",
         "unit": "unit"},
    ),
    "noam": (
        lambda _, **a: fastlr.noam(**{"model_size": 64, "warmup_steps": 3, **a}),
        {"model_size": "count >= 1", "warmup_steps": "count >= 1", "factor": "real", "unit": "unit"},
    ),
    "tri_stage": (
        lambda _, **a: fastlr.tri_stage(
            **{"max_lr": 0.1, "warmup_steps": 3, "hold_steps": 3, "decay_steps": 3, **a}),
        {"max_lr": "real", "warmup_steps": "count", "hold_steps": "count", "decay_steps": "count >= 1",
         "init_lr_scale": "real", "final_lr_scale": "real", "unit": "unit"},
    ),
}  # fmt: skip

# Where the message says another word: that of the schedule, which takes the value as it is.
CALLED = {"base_lr": "base", "max_lr": "max", "base_momentum": "base", "max_momentum": "max",
          "data": "(type|a schedule)", "betas": "beta[12s]"}  # fmt: skip
# What says more of a value than its repr would.
TOLD = "the keys|peaks at|the name of a schedule"


def shown(value: Any) -> str:
    """How a message may show a value, or the part of it that is wrong, as a pattern."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return "|".join(shown(part) for part in value)
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


@functools.cache
def untouched(name: str) -> tuple[fastlr.FusedOptimizer, str]:
    """A trained optimizer, one for all that is refused, and its state."""
    optimizer = KINDS.get(name, KINDS["FusedSGD"]).trained()
    return optimizer, str(optimizer.state_dict())


@pytest.mark.parametrize(
    ("what", "name", "bad"),
    [
        pytest.param(what, name, bad, id=f"{what}-{name}-{label(bad)}")
        for what, (_, kinds) in CALLS.items()
        for name, kind in kinds.items()
        for bad in REFUSED[kind]
    ],
)
def test_refused(what: str, name: str, bad: Any) -> None:
    optimizer, before = untouched(what.split(".")[0])
    with pytest.raises((ValueError, TypeError)) as error:
        CALLS[what][0](optimizer, **{name: bad})
    message = str(error.value)
    assert re.match(rf"({name}|{CALLED.get(name, name)})\b", message), message
    assert re.search(shown(bad), message), message
    assert str(optimizer.state_dict()) == before


ACCEPTED: dict[str, list[Any]] = {
    "rate": [0, 0.1, np.float32(0.1), np.int64(1), fastlr.Constant(0.1)],
    "momentum": [0, 0.9, np.float64(0.9), fastlr.Constant(0.9)],
    "up to one": [0, 1, np.float32(0.5), fastlr.Constant(0.5)],
    "betas": [(0, 0.9), [0.9, np.float32(0.99)], (fastlr.Constant(0.9), fastlr.Constant(0.99))],
    "number >= 0": [0, np.float64(0.5)],
    "flag": [True, np.bool_(False)],
    "dtype": [None, torch.float32],
    "false": [None, False, np.bool_(False)],
    "true": [None, True],
    "either": [None, False, True],
    "limit": [None, 2, np.float32(0.1)],
}


@every_kind
def test_accepted(kind: Kind) -> None:
    for name, found in {**kind.kinds, **kind.options}.items():
        for value in ACCEPTED.get(found.removeprefix("new "), []):
            given = {"nesterov": {"momentum": 0.9}, "ema_warmup": {"ema_decay": 0.9}}.get(name, {})
            if name in CYCLE or (name == "nesterov" and kind.fused in CYCLIC):
                continue
            group = kind.build({**given, name: value}).param_groups[0]
            held = "state_dtype" if name == "momentum_dtype" else name
            assert held in group or name in OPTIONS
            assert not set(OPTIONS) & set(group)
            numbers = group[held] if name == "betas" else [group.get(held)]
            assert all(type(number) in (float, bool, torch.dtype, type(None)) for number in numbers)


@every_kind
def test_other_keywords_are_unexpected(kind: Kind) -> None:
    for name in {"decay", "lr", "rho", "decoupled_weight_decay"} - {*kind.kinds, *kind.options}:
        with pytest.raises(
            TypeError, match=rf"Fused\w*(\.__init__)?\(\) got an unexpected keyword .* '{name}'"
        ):
            kind.build({name: 0.1})


@every_kind
def test_what_no_schedule_can_drive_is_said_with_what_it_can(kind: Kind) -> None:
    optimizer = kind.trained()
    names = [name for name in kind.scheduled if name != "betas"]
    before = str(optimizer.state_dict())
    unknown = [name for name in ("momentum", "beta1", "alpha", "rho", "eps", "nesterov") if name not in names]
    for name in unknown:
        with pytest.raises(
            TypeError, match=f"^set_schedule\\(\\) got '{name}', which is nothing that a"
        ) as error:
            optimizer.set_schedule(**{name: 0.5})
        told = str(error.value).split("; that are ")[1].split(", ")
        assert sorted(told) == sorted(names)
    if "betas" not in kind.scheduled:
        with pytest.raises(TypeError, match="got 'betas'"):
            optimizer.set_schedule(betas=(0.9, 0.99))
    assert str(optimizer.state_dict()) == before


@every_kind
def test_a_schedule_that_leaves_the_range_on_the_way_is_refused(kind: Kind) -> None:
    beyond = fastlr.LinearRamp(0.5, 1.5, 100)
    for name, found in kind.scheduled.items():
        if found in ("new momentum", "new up to one"):
            with pytest.raises(
                ValueError, match=f"^{name} of parameter group 0 must stay in .* peaks at 1.5"
            ):
                kind.trained().set_schedule(**{name: beyond})


@pytest.mark.parametrize("name", ["FusedAdamW", "FusedCyclicAdamW"])
def test_the_decay_of_adamw_is_always_decoupled(name: str) -> None:
    optimizer = KINDS[name].trained()
    before = str(optimizer.state_dict())
    refused = f"decoupled_weight_decay of parameter group 2 must be True in {name}, got False; leave it out"
    with pytest.raises(ValueError, match=refused):
        optimizer.add_param_group({"params": parameters([(3,)]), "decoupled_weight_decay": False})
    assert str(optimizer.state_dict()) == before
    optimizer.add_param_group({"params": parameters([(3,)]), "decoupled_weight_decay": True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'decoupled_weight_decay'"):
        KINDS[name].build({"decoupled_weight_decay": False})


@pytest.mark.parametrize("name", ["FusedSGD", "FusedCyclicSGD"])
def test_two_names_for_the_type_of_state_must_agree(name: str) -> None:
    optimizer = KINDS[name].trained()
    for both in [(None, torch.float32), (torch.float32, None)]:
        group = dict(zip(("momentum_dtype", "state_dtype"), both, strict=True), params=parameters([(3,)]))
        if both[1] is None:  # which says nothing
            optimizer.add_param_group(group)
            assert optimizer.param_groups[-1]["state_dtype"] is torch.float32
            continue
        with pytest.raises(
            ValueError, match="momentum_dtype of parameter group 2 is another name for state_dtype"
        ):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 2


# What a step takes of what was written into a group, by the kind of the option: the type that it asks for,
# and what is something else; a range, and what is beyond it.
_BELOW_ONE = (r"in \[0, 1\)", [-0.1, 1.0, NAN])
_TRUTHS = [True, np.True_, np.array(False), torch.tensor(True), torch.tensor([False])]
WRITTEN_TYPES = {
    "number": ("a number", ["0.1", None, *_TRUTHS, 1j, torch.zeros(2)]),
    "number or None": ("a number or None", ["0.1", *_TRUTHS, 1j, torch.zeros(2)]),
    "flag": ("True or False", ["False", 1, 0.0, None, torch.tensor(True)]),
    "betas": ("a tuple of 2 numbers", [0.9, (), (0.9,), [0.9, 0.9, 0.9], "ab", None, np.array([0.9, 0.9])]),
    "clock": ("an integer of 64 bits", ["3", 1.5, True, 2**63, None, -(2**63) - 1]),
}
WRITTEN_RANGES = {
    "rate": ("finite and >= 0", [-1e-9, NAN, INF]),
    "new rate": ("finite and >= 0", [-1e-9, NAN, INF]),
    "number >= 0": ("finite and >= 0", [-1.0, NAN, INF]),
    "number": ("finite", [NAN, -INF]),
    "momentum": _BELOW_ONE,
    "new momentum": _BELOW_ONE,
    "up to one": (r"in \[0, 1\]", [-0.1, 1.1, NAN]),
}


def refusing_steps(kind: Kind) -> list[tuple[str, Any, str, str]]:
    """Under which key to write which value, and what the step says of which option."""
    found: list[tuple[str, Any, str, str]] = []
    for key in ("updates", "samples"):
        expected, values = WRITTEN_TYPES["clock"]
        found += [(key, value, key, f"{expected}, got {got(value)}") for value in values]
    for key, what in kind.kinds.items():
        if key in CYCLE or what == "dtype":
            continue
        if what == "betas":
            expected, values = WRITTEN_TYPES["betas"]
            found += [(key, value, key, f"{expected}, got {got(value)}") for value in values]
            for place, part in enumerate(("beta1", "beta2")):
                tuples = lambda value, place=place: (*(0.5,) * place, value, *(0.5,) * (1 - place))  # noqa: E731
                expected, values = WRITTEN_TYPES["number"]
                found += [(key, tuples(v), part, f"{expected}, got {got(v)}") for v in values]
                expected, values = _BELOW_ONE
                found += [(key, tuples(v), part, f"{expected}, got {v}") for v in values]
            continue
        numbers = "number or None" if key == "ema_decay" else "number"
        expected, values = WRITTEN_TYPES["flag" if what == "flag" else numbers]
        found += [(key, value, key, f"{expected}, got {got(value)}") for value in values]
        expected, values = WRITTEN_RANGES.get(what, ("", []))
        found += [(key, value, key, f"{expected}, got {value}") for value in values]
    return found


def got(value: object) -> str:
    return re.escape(f"{value!r} (") + r"(\w+\.)?" + re.escape(f"{type(value).__name__})")


@every_kind
def test_what_is_written_into_a_group_is_checked_by_the_step(kind: Kind) -> None:
    optimizer = kind.trained()
    optimizer.set_schedule(lr=0.1)
    train(1, ([p for group in optimizer.param_groups for p in group["params"]], optimizer.step))
    group = optimizer.param_groups[1]
    before = str(optimizer.state_dict())
    for key, value, name, expected in refusing_steps(kind):
        kept, group[key] = group[key], value
        with pytest.raises(
            ValueError, match=f"^{name} of (parameter group 1|a parameter group) must be {expected}"
        ):
            optimizer.step()
        group[key] = kept
    assert str(optimizer.state_dict()) == before


def test_a_momentum_of_one_is_refused_with_the_reason() -> None:
    for value in (1.0, fastlr.Constant(1.0)):
        with pytest.raises(ValueError, match="never forgotten and the buffer grows without bound"):
            fastlr.FusedSGD(parameters([(3,)]), momentum=value)


def arguments_of(function: Callable[..., Any]) -> set[str]:
    names = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            of_torch = "TorchOptions" in str(parameter.annotation)
            names |= {*OF_ALL_GROUPS, *STAGES, *(OF_TORCH if of_torch else ())}
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
        if what.endswith((".add_param_group", ".measure_grad_norm")):
            continue  # takes a dict, is set
        if what.endswith(".set_schedule"):  # what a schedule can drive depends on the rule
            options = {option.name for option in KINDS[what.split(".")[0]].trained()._options.scheduled}
            assert set(kinds) - {"betas"} == options | {"group", "start"}
            continue
        elsewhere = {"momentum"} if what == "FusedCyclicSGD" else set()  # with cycles it is None or fixed
        assert set(kinds) == arguments_of(function(what)) - elsewhere, what

    methods = {
        f"{kind.__name__}.{name}"
        for kind in (*(made.fused for made in KINDS.values()), fastlr.Schedule, fastlr.Triangular)
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
    torchs = {"GradScaler"}  # whose arguments are
    assert public - policies - torchs - {"Clock", "EpochClock", "TokenClock", "FusedOptimizer"} == {
        what for what in CALLS if "." not in what
    }
