"""Moving from torch's optimizer and scheduler to a fused one in the middle of a run, and back."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import math
import pickle
import random
import re
import sys
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler as S
from torch.optim import swa_utils

import fastlr
from fastlr.optim import _to_torch

pytestmark = [
    # Copies do not know that their optimizer was stepped; and torch's own use of a deprecated argument.
    pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning"),
]

Optimizer = torch.optim.Optimizer


class Pair(NamedTuple):
    """An optimizer over two small groups, and its scheduler."""

    optimizer: Any
    scheduler: Any

    def step(self, update: int, updates_per_tick: int = 1) -> None:
        set_gradients(self.optimizer, update)
        self.optimizer.step()
        if self.scheduler is not None and (update + 1) % updates_per_tick == 0:
            self.scheduler.step()

    def run(self, start: int, stop: int, updates_per_tick: int = 1) -> Pair:
        for update in range(start, stop):
            self.step(update, updates_per_tick)
        return self


def set_gradients(optimizer: Optimizer, update: int) -> None:
    made = torch.Generator().manual_seed(update)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=made, dtype=p.dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    made = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(size, generator=made, dtype=dtype)) for size in (3, 9)]


def groups(first: float = 0.1, second: float = 0.02) -> list[dict[str, Any]]:
    a, b = parameters()
    return [{"params": [a], "lr": first, "name": "body"}, {"params": [b], "lr": second, "weight_decay": 0.01}]


def weights(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


Make = Callable[[Optimizer], Any]


def sequence(make: list[Make], milestones: list[int]) -> Make:
    return lambda o: S.SequentialLR(o, [each(o) for each in make], milestones)


def chain(*make: Make) -> Make:
    return lambda o: S.ChainedScheduler([each(o) for each in make], o)


# Each within what of the peak; 0: bit for bit.
SCHEDULERS: dict[str, tuple[Make, float]] = {
    "cyclic": (lambda o: S.CyclicLR(o, [0.01, 0.02], [0.1, 0.07], 4, 7, base_momentum=0.7), 0),
    "cyclic-triangular2": (lambda o: S.CyclicLR(o, 0.01, 0.1, 3.5, mode="triangular2"), 0),
    "cyclic-exp_range": (
        lambda o: S.CyclicLR(o, 0.01, 0.1, 5, 3, "exp_range", 0.97, cycle_momentum=False),
        0,
    ),
    "cyclic-upside-down": (lambda o: S.CyclicLR(o, 0.1, 0.01, 5), 0),
    "one-cycle": (lambda o: S.OneCycleLR(o, [0.3, 0.1], 60), 1e-15),
    "one-cycle-linear": (lambda o: S.OneCycleLR(o, 0.3, 61, pct_start=1 / 3, anneal_strategy="linear"), 0),
    "one-cycle-three-phase": (lambda o: S.OneCycleLR(o, 0.3, 59, three_phase=True, div_factor=7), 1e-15),
    "restarts": (lambda o: S.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=0.001), 1e-15),
    "step": (lambda o: S.StepLR(o, 6, 0.7), 1e-12),
    "multi-step": (lambda o: S.MultiStepLR(o, [3, 9, 9, 20], 0.3), 1e-12),
    "constant": (lambda o: S.ConstantLR(o, 0.3, 8), 1e-12),
    "linear": (lambda o: S.LinearLR(o, 0.2, 0.9, 13), 1e-12),
    "exponential": (lambda o: S.ExponentialLR(o, 0.93), 1e-12),
    "linear-to-zero": (lambda o: S.LinearLR(o, 0.1, 0.0, 13), 1e-12),  # -1e-18 and less from there on
    "polynomial": (lambda o: S.PolynomialLR(o, 30, 1.7), 1e-12),
    # counts that were worked out as 0.1 * steps
    "step-of-a-float": (lambda o: S.StepLR(o, 6.0, 0.7), 1e-12),
    "constant-of-a-float": (lambda o: S.ConstantLR(o, 0.3, 8.0), 1e-12),
    "polynomial-of-a-float": (lambda o: S.PolynomialLR(o, 30.0, 1.7), 1e-12),
    "sequence-of-floats": (
        sequence([lambda o: S.LinearLR(o, 0.1, 1.0, 7.0), lambda o: S.CosineAnnealingLR(o, 40.0)], [7.0]),
        1e-11,
    ),
    "cosine": (lambda o: S.CosineAnnealingLR(o, 12, eta_min=0.003), 1e-11),
    "cosine-of-a-fraction": (lambda o: S.CosineAnnealingLR(o, 11.5), 1e-11),
    "warm-up-cosine": (
        sequence([lambda o: S.LinearLR(o, 0.1, 1.0, 7), lambda o: S.CosineAnnealingLR(o, 40)], [7]),
        1e-11,
    ),
    "three-in-sequence": (
        sequence(
            [
                lambda o: S.ConstantLR(o, 0.5, 100),
                lambda o: S.CyclicLR(o, 0.01, 0.1, 3),
                lambda o: S.ExponentialLR(o, 0.9),
            ],
            [5, 14],
        ),
        1e-12,
    ),
    "sequence-in-sequence": (
        sequence(
            [
                sequence([lambda o: S.LinearLR(o, 0.1, 1.0, 4), lambda o: S.StepLR(o, 3, 0.8)], [5]),
                lambda o: S.PolynomialLR(o, 30),
            ],
            [12],
        ),
        1e-12,
    ),
    "chain-in-sequence": (
        sequence(
            [
                chain(lambda o: S.ConstantLR(o, 0.5, 3), lambda o: S.ExponentialLR(o, 0.9)),
                lambda o: S.StepLR(o, 4, 0.7),
            ],
            [11],
        ),
        1e-12,
    ),
    "constant-of-no-length-in-sequence": (
        sequence([lambda o: S.StepLR(o, 3), lambda o: S.ConstantLR(o, 0.3, 0)], [10]),
        1e-12,
    ),
    "chain": (chain(lambda o: S.LinearLR(o, 0.1, 1.0, 9), lambda o: S.ExponentialLR(o, 0.97)), 1e-12),
    "chain-of-three": (
        chain(
            lambda o: S.ConstantLR(o, 0.1, 6),
            chain(lambda o: S.CosineAnnealingLR(o, 15), lambda o: S.MultiStepLR(o, [2, 10], 0.5)),
        ),
        1e-11,
    ),
}


def half_then_linear(tick: int) -> float:
    return 0.5 if tick < 9 else 1.0 / (1 + tick)


class Own(S.LRScheduler):
    def get_lr(self) -> list[float]:
        return [base / (2 + self.last_epoch) for base in self.base_lrs]


# What needs a horizon.
TABULATED: dict[str, tuple[Make, float]] = {
    "lambda": (lambda o: S.LambdaLR(o, [half_then_linear, lambda tick: 0.2 + math.cos(tick) ** 2]), 0),
    "multiplicative": (lambda o: S.MultiplicativeLR(o, lambda tick: 0.9 + 0.1 * math.sin(tick)), 0),
    "lambda-in-sequence": (
        sequence([lambda o: S.StepLR(o, 3), lambda o: S.LambdaLR(o, half_then_linear)], [8]),
        1e-12,
    ),
    "chain-of-lasting": (chain(lambda o: S.StepLR(o, 3, 0.9), lambda o: S.ExponentialLR(o, 0.97)), 0),
    "chain-with-cyclic": (
        chain(lambda o: S.CyclicLR(o, 0.01, 0.1, 6), lambda o: S.ExponentialLR(o, 0.97)),
        0,
    ),
    "scale-function": (lambda o: S.CyclicLR(o, 0.01, 0.1, 6, scale_fn=lambda x: 1 / x), 0),
    "of-your-own": (Own, 0),
    # with arguments that no schedule takes
    "linear-of-a-fraction": (lambda o: S.LinearLR(o, 0.2, 0.9, 13.5), 0),
    "sequence-of-a-fraction": (
        sequence([lambda o: S.LinearLR(o, 0.1, 1.0, 7), lambda o: S.CosineAnnealingLR(o, 40)], [7.5]),
        0,
    ),
    "step-to-zero": (lambda o: S.StepLR(o, 9, 0.0), 0),
    "cyclic-growing": (lambda o: S.CyclicLR(o, 0.01, 0.1, 5, mode="exp_range", gamma=1.01), 0),
    "one-cycle-without-a-rise": (lambda o: S.OneCycleLR(o, 0.3, 60, pct_start=0.0), 0),
}
HORIZON = 150
POSITIONS = (0, 1, 8, 17, 33)
END = 45


def sgd(**options: Any) -> Optimizer:
    return torch.optim.SGD(groups(), lr=0.1, momentum=0.9, **options)


def check_goes_on(
    pair: Pair, now: int, end: int, updates_per_tick: int, tolerance: float, horizon: int | None = None
) -> None:
    """A fused optimizer of the pair beside a copy of the pair, ticks now .. end."""
    went_on = Pair(*copy.deepcopy((pair.optimizer, pair.scheduler)))
    fused = fastlr.fuse(*pair, updates_per_tick=updates_per_tick, horizon=horizon)
    assert fused.clock().updates == now * updates_per_tick
    peak = max(group["initial_lr"] for group in went_on.optimizer.param_groups)
    for update in range(now * updates_per_tick, end * updates_per_tick):
        peak = max(peak, *rates(went_on.optimizer))
        for ours, theirs in zip(fused.param_groups, went_on.optimizer.param_groups, strict=True):
            assert abs(ours["lr"] - theirs["lr"]) <= tolerance * peak, (update, ours["lr"], theirs["lr"])
            assert ours["momentum"] == pytest.approx(theirs["momentum"], abs=tolerance and 1e-15, rel=0.0)
        went_on.step(update, updates_per_tick)
        set_gradients(fused, update)
        fused.step()
    for ours, theirs in zip(weights(fused), weights(went_on.optimizer), strict=True):
        assert torch.equal(ours, theirs) if tolerance == 0 else torch.allclose(ours, theirs, 1e-6, 1e-7)


@pytest.mark.parametrize("updates_per_tick", [1, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_go_on_from_everywhere(scheduler: str, updates_per_tick: int) -> None:
    make, tolerance = SCHEDULERS[scheduler]
    for now in POSITIONS[::updates_per_tick]:
        optimizer = sgd()
        pair = Pair(optimizer, make(optimizer)).run(0, now * updates_per_tick, updates_per_tick)
        check_goes_on(pair, now, END, updates_per_tick, tolerance)


@pytest.mark.parametrize("updates_per_tick", [1, 3])
@pytest.mark.parametrize("scheduler", TABULATED)
def test_tabulated_schedulers_go_on_from_everywhere(scheduler: str, updates_per_tick: int) -> None:
    make, tolerance = TABULATED[scheduler]
    for now in POSITIONS[::updates_per_tick]:
        optimizer = sgd()
        pair = Pair(optimizer, make(optimizer)).run(0, now * updates_per_tick, updates_per_tick)
        check_goes_on(pair, now, END, updates_per_tick, tolerance, HORIZON)


# -- the other rules ---------------------------------------------------------------------------------------

RULES: dict[str, Callable[..., Optimizer]] = {
    "sgd-nesterov": lambda g, **o: torch.optim.SGD(
        g, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01, **o
    ),
    "sgd-plain": lambda g, **o: torch.optim.SGD(g, lr=0.1, maximize=True, **o),
    "adam": lambda g, **o: torch.optim.Adam(g, lr=0.1, amsgrad=True, weight_decay=0.01, **o),
    "adamw": lambda g, **o: torch.optim.AdamW(g, lr=0.1, betas=(0.8, 0.99), eps=1e-6, **o),
    "rmsprop": lambda g, **o: torch.optim.RMSprop(g, lr=0.1, momentum=0.5, centered=True, **o),
    "adagrad": lambda g, **o: torch.optim.Adagrad(
        g, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.3, **o
    ),
    "adadelta": lambda g, **o: torch.optim.Adadelta(g, lr=0.1, rho=0.8, **o),
}
STEPS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
# What cycles a momentum, of which these rules have none.
CYCLES = {name for name in (*SCHEDULERS, *TABULATED) if "cycl" in name or name.startswith(("three", "scale"))}
WITHOUT_MOMENTUM = {"adagrad", "adadelta"}


def check_rule_goes_on(
    pair: Pair, now: int, end: int, updates_per_tick: int, horizon: int | None = None
) -> fastlr.FusedOptimizer:
    went_on = Pair(*copy.deepcopy((pair.optimizer, pair.scheduler)))
    driven = {} if pair.scheduler is None else {"updates_per_tick": updates_per_tick, "horizon": horizon}
    fused = fastlr.fuse(*pair, **driven)
    for update in range(now * updates_per_tick, end * updates_per_tick):
        went_on.step(update, updates_per_tick)
        set_gradients(fused, update)
        fused.step()
    for ours, theirs in zip(fused.param_groups, went_on.optimizer.param_groups, strict=True):
        for name in {"betas", "momentum", "alpha", "rho", "weight_decay", "eps", "maximize"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-15, rel=0.0), name
    for ours, theirs in zip(weights(fused), weights(went_on.optimizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return fused


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("rule", RULES)
def test_rules_go_on_from_everywhere(rule: str, step: str) -> None:
    if step == "fused" and rule in ("rmsprop", "adadelta"):
        pytest.skip("torch has no fused step of it")
    for now in (0, 1, 6):
        pair = Pair(RULES[rule](groups(), **STEPS[step]), None).run(0, now)
        check_rule_goes_on(pair, now, 12, 1)


@pytest.mark.repetition
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *TABULATED])
@pytest.mark.parametrize("rule", RULES)
def test_every_pair_goes_on_from_everywhere(rule: str, scheduler: str) -> None:
    if rule in WITHOUT_MOMENTUM and scheduler in CYCLES:
        pytest.skip("torch's scheduler cycles a momentum, of which the rule has none")
    make, _ = {**SCHEDULERS, **TABULATED}[scheduler]
    for updates_per_tick in (1, 3):
        for now in POSITIONS:
            optimizer = RULES[rule](groups())
            pair = Pair(optimizer, make(optimizer)).run(0, now * updates_per_tick, updates_per_tick)
            check_rule_goes_on(pair, now, END, updates_per_tick, HORIZON)


@pytest.mark.parametrize("scheduler", ["cyclic", "one-cycle"])
def test_beta1_is_cycled(scheduler: str) -> None:
    optimizer = RULES["adamw"](groups())
    pair = Pair(optimizer, SCHEDULERS[scheduler][0](optimizer)).run(0, 12, 2)
    fused = check_rule_goes_on(pair, 6, 30, 2)
    assert fused.param_groups[0]["beta1_schedule"] is not None
    assert fused.param_groups[0]["betas"][1] == 0.99
    optimizer, again = fused.to_torch()
    assert again.use_beta1
    assert optimizer.param_groups[0]["betas"] == fused.param_groups[0]["betas"]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adadelta"])
def test_capturable_optimizers(name: str) -> None:
    """Which PyTorch steps on devices only: told when the steps before are made."""
    make = getattr(torch.optim, name)
    optimizer, goes_on = (make(parameters(), lr=0.01, foreach=False) for _ in range(2))
    for update in range(3):
        for each in (optimizer, goes_on):
            set_gradients(each, update)
            each.step()
    optimizer.param_groups[0]["capturable"] = True
    fused = fastlr.fuse(optimizer)
    for update in range(3, 8):
        for each in (fused, goes_on):
            set_gradients(each, update)
            each.step()
    for ours, theirs in zip(weights(fused), weights(goes_on), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_rates_and_betas_that_are_tensors() -> None:
    a, b = parameters()
    optimizer = torch.optim.Adam(
        [{"params": [a]}, {"params": [b], "lr": torch.tensor(0.02)}],
        lr=torch.tensor(0.1),
        betas=(torch.tensor(0.5), torch.tensor(0.75)),
        foreach=False,
    )
    pair = Pair(optimizer, S.StepLR(optimizer, 4, 0.5)).run(0, 6)
    went_on = Pair(*copy.deepcopy((pair.optimizer, pair.scheduler))).run(6, 15)
    fused = fastlr.fuse(*pair, updates_per_tick=1)
    assert fused.param_groups[0]["betas"] == (0.5, 0.75)
    Pair(fused, None).run(6, 15)
    assert rates(fused) == pytest.approx(rates(went_on.optimizer), rel=1e-6)
    for ours, theirs in zip(weights(fused), weights(went_on.optimizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# -- schedulers drawn at random ----------------------------------------------------------------------------


def drawn_leaf(o: Optimizer, draw: random.Random, *, multiplies: bool) -> Any:
    makes: list[Make] = [
        lambda o: S.StepLR(o, draw.randint(1, 9), draw.choice([0.5, 1.1])),
        lambda o: S.MultiStepLR(o, draw.choices(range(40), k=draw.randint(0, 4)), 0.3),
        lambda o: S.ConstantLR(o, draw.choice([0.3, 1.0]), draw.randint(0, 12)),
        lambda o: S.LinearLR(o, draw.choice([0.1, 1.0]), draw.choice([1.0, 0.3, 0.0]), draw.randint(1, 14)),
        lambda o: S.ExponentialLR(o, draw.choice([0.9, 1.01])),
        lambda o: S.PolynomialLR(o, draw.randint(1, 30), draw.choice([1.0, 0.7, 2.0])),
        lambda o: S.CosineAnnealingLR(o, draw.randint(1, 20), draw.choice([0.0, 0.001])),
    ]
    if not multiplies:
        makes += [
            lambda o: S.CyclicLR(o, 0.01, draw.choice([0.1, 0.001]), draw.randint(1, 6), mode="triangular2"),
            lambda o: S.OneCycleLR(o, 0.3, draw.randint(70, 90), cycle_momentum=draw.random() < 0.5),
            lambda o: S.CosineAnnealingWarmRestarts(o, draw.randint(1, 9), draw.randint(1, 2)),
            lambda o: S.LambdaLR(o, half_then_linear),
        ]
    return draw.choice(makes)(o)


def drawn(o: Optimizer, draw: random.Random) -> Any:
    kind = draw.choice(["one", "sequence", "chain", "chain, then a sequence"])
    if kind == "one":
        return drawn_leaf(o, draw, multiplies=False)
    if kind == "chain":
        return S.ChainedScheduler([drawn_leaf(o, draw, multiplies=True) for _ in range(3)], o)
    chain_first = [drawn_leaf(o, draw, multiplies=True) for _ in range(2)]
    first = S.ChainedScheduler(chain_first, o) if "," in kind else chain_first[0]
    rest = [drawn_leaf(o, draw, multiplies=False) for _ in range(2)]
    return S.SequentialLR(o, [first, *rest], sorted(draw.sample(range(1, 35), 2)))


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(k, marks=pytest.mark.repetition) for k in range(40, 1000, 40))]
)
def test_drawn_schedulers_go_on_there_and_back(first: int) -> None:
    followed = 0
    for seed in range(first, first + 40):
        draw = random.Random(seed)
        optimizer = sgd()
        pair = Pair(optimizer, drawn(optimizer, draw)).run(0, now := draw.choice([0, 1, 5, 12, 20, 33]))
        if draw.random() < 0.2:
            optimizer.param_groups[0]["lr"] *= 0.6
        went_on = Pair(*copy.deepcopy((pair.optimizer, pair.scheduler)))
        try:
            moved = Pair(fastlr.fuse(*pair, updates_per_tick=1, horizon=draw.choice([None, HORIZON])), None)
        except ValueError as error:
            if re.search("horizon must be given|must be finite and >= 0|the rate of .* must be", str(error)):
                continue
            raise
        followed += 1
        for update in range(now, now + 25):
            if update == now + 9:
                moved = Pair(*moved.optimizer.to_torch())
            for ours, theirs in zip(
                moved.optimizer.param_groups, went_on.optimizer.param_groups, strict=True
            ):
                assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-9, abs=1e-13), (seed, update)
                assert ours["momentum"] == pytest.approx(theirs["momentum"], abs=1e-15), (seed, update)
            went_on.step(update)
            moved.step(update)
    assert followed > 20


# -- what somebody wrote into the groups -------------------------------------------------------------------

CHANGED = ["step", "multi-step", "linear", "exponential", "polynomial", "cosine", "warm-up-cosine", "cyclic"]


@pytest.mark.parametrize("name", [*CHANGED, "constant", "one-cycle", "restarts", "chain"])
def test_a_rate_that_was_changed_by_hand_goes_on_as_torchs(name: str) -> None:
    make, tolerance = SCHEDULERS[name]
    for now in (0, 5, 15, 33):
        optimizer = sgd()
        pair = Pair(optimizer, make(optimizer)).run(0, now)
        for group in optimizer.param_groups:
            group["lr"] = 0.25 * group["lr"] + 0.003
        check_goes_on(pair, now, END, 1, tolerance)


def test_a_rate_that_is_changed_at_the_lowest_point_of_a_cosine_needs_a_table() -> None:
    optimizer = sgd()
    pair = Pair(optimizer, S.CosineAnnealingLR(optimizer, 12)).run(0, 12)
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(ValueError, match="horizon must be given with CosineAnnealingLR"):
        fastlr.fuse(*pair, updates_per_tick=1)
    check_goes_on(pair, 12, 40, 1, 1e-12, HORIZON)


def test_a_scheduler_that_torch_resumes_at_a_later_epoch() -> None:
    optimizer = sgd()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    check_goes_on(Pair(optimizer, S.CosineAnnealingLR(optimizer, 30, last_epoch=9)), 10, 45, 1, 1e-11)
    optimizer = sgd()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    # torch's does not look for the period in which that is
    late = S.CosineAnnealingWarmRestarts(optimizer, 5, 2, last_epoch=20)
    check_goes_on(Pair(optimizer, late), 21, 60, 1, 0, HORIZON)


# -- what comes along, and what stays ----------------------------------------------------------------------


def test_all_that_a_group_holds_comes_along_and_the_old_pair_stays_as_it_was() -> None:
    model = torch.nn.Linear(3, 2)
    named = [
        {"params": [("weight", model.weight)], "lr": 0.3, "name": "body", "lr_scale": 0.5, "tags": ["a"]},
        {"params": [("bias", model.bias)], "momentum": 0.0},
    ]
    optimizer = torch.optim.SGD(named, lr=0.1, momentum=0.9, foreach=True)
    scheduler = S.SequentialLR(optimizer, [S.LinearLR(optimizer), S.StepLR(optimizer, 3)], [5])
    pair = Pair(optimizer, scheduler).run(0, 8)
    optimizer.state[model.weight]["mine"] = torch.ones(2)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    before = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    held = weights(optimizer)
    fused = fastlr.fuse(*pair, updates_per_tick=1)
    body, other = fused.param_groups
    assert (body["name"], body["lr_scale"], body["tags"], body["param_names"]) == (
        "body",
        0.5,
        ["a"],
        ["weight"],
    )
    assert body["params"][0] is model.weight
    assert other["momentum"] == 0.0
    assert "initial_lr" not in body
    body["tags"].append("b")
    fused.state[model.weight]["mine"].zero_()
    set_gradients(fused, 8)
    fused.step()
    assert calls == ["hook"]
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(weights(fused), held, strict=True))
    with pytest.warns(UserWarning, match=r"state_dict\(\) of a .* it says what was then; ask that one"):
        after = (optimizer.state_dict(), scheduler.state_dict())
    assert pickle.dumps(after[1]) == pickle.dumps(before[1])
    assert after[0]["param_groups"] == before[0]["param_groups"]
    for key, entry in before[0]["state"].items():
        for name, value in entry.items():
            held_now = after[0]["state"][key][name]
            assert held_now is None if value is None else torch.equal(held_now, value)
    fused.add_param_group({"params": [("late", torch.nn.Parameter(torch.zeros(2)))]})
    assert (fused.param_groups[2]["lr"], fused.param_groups[2]["momentum"]) == (0.1, 0.9)


def test_steps_that_are_left_over_raise_and_say_what_happened() -> None:
    optimizer = sgd()
    inner = [S.LinearLR(optimizer), S.StepLR(optimizer, 3)]
    scheduler = S.SequentialLR(optimizer, inner, [5])
    copied = copy.deepcopy((optimizer, scheduler))
    fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=1)
    set_gradients(optimizer, 0)
    with pytest.raises(RuntimeError, match=r"SGD that fastlr.fuse\(\) has turned into a FusedSGD"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="SGD that fastlr"):
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    for each in (scheduler, *inner):
        with pytest.raises(
            RuntimeError, match="leave the call out, as its own step\\(\\) moves the schedule"
        ):
            each.step()
    with pytest.raises(ValueError, match=r"the SGD was given to fastlr.fuse\(\) before"):
        fastlr.fuse(optimizer)
    with pytest.raises(ValueError, match=r"the SequentialLR was given to fastlr.fuse\(\) before"):
        fastlr.fuse(sgd(), scheduler, updates_per_tick=1)
    fused.step()
    Pair(*copied).run(0, 1)
    later = Pair(*copy.deepcopy((optimizer, scheduler)))  # a copy is a pair of its own
    assert type(later.scheduler) is type(pickle.loads(pickle.dumps(scheduler))) is S.SequentialLR
    later.run(0, 1)
    again = fused.to_torch()
    with pytest.raises(RuntimeError, match=r"FusedSGD that to_torch\(\) has turned into a torch.optim.SGD"):
        fused.step()
    with pytest.raises(ValueError, match="the FusedSGD was given to torch before"):
        fused.to_torch()
    assert fastlr.fuse(*again, updates_per_tick=1).clock().updates == 1


def test_what_would_change_an_old_pair_raises_and_what_it_says_is_of_then() -> None:
    optimizer = sgd()
    scheduler = S.SequentialLR(optimizer, [S.LinearLR(optimizer), S.StepLR(optimizer, 3)], [5])
    Pair(optimizer, scheduler).run(0, 2)
    files = optimizer.state_dict(), scheduler.state_dict()
    new = {"params": [torch.nn.Parameter(torch.zeros(2))]}
    fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=1)
    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("load_state_dict", lambda o: o.load_state_dict(files[0])),
        ("add_param_group", lambda o: o.add_param_group(new)),
        ("register_step_pre_hook", lambda o: o.register_step_pre_hook(print)),
        ("register_step_post_hook", lambda o: o.register_step_post_hook(print)),
    ]
    for name, change in changes:
        message = rf"{name}\(\) of a SGD that .* a FusedSGD; call {name}\(\) of that one"
        with pytest.raises(RuntimeError, match=message):
            change(optimizer)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) of a SequentialLR .* load_torch\(\)"):
        scheduler.load_state_dict(files[1])
    S.StepLR(optimizer, 3)  # wraps the step, which goes on to raise
    with pytest.raises(RuntimeError, match="SGD that"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"the SGD was given to fastlr.fuse\(\) before"):
        fastlr.fuse(optimizer)
    for read, name in ((scheduler.get_last_lr, "get_last_lr"), (scheduler.state_dict, "state_dict")):
        with pytest.warns(UserWarning, match=rf"{name}\(\) of a SequentialLR that .* it says what was then"):
            read()
    set_gradients(optimizer, 2)
    optimizer.zero_grad()  # of parameters that are the new one's, too
    assert all(p.grad is None for group in fused.param_groups for p in group["params"])

    again, _ = run(fused, 3).to_torch()
    changes += [
        ("set_schedule", lambda o: o.set_schedule(lr=0.1)),
        ("scale_lr", lambda o: o.scale_lr(0.1)),
        ("set_clock", lambda o: o.set_clock(updates=3)),
        ("advance_samples", lambda o: o.advance_samples(3)),
        ("advance_tokens", lambda o: o.advance_tokens(3)),
        ("advance_epoch", lambda o: o.advance_epoch()),
        ("handed_over", lambda o: o.handed_over().__enter__()),
        ("load_torch", lambda o: o.load_torch(*files, scheduler=S.StepLR, updates_per_tick=1)),
    ]
    for name, change in changes:
        with pytest.raises(RuntimeError, match=rf"{name}\(\) of a FusedSGD that to_torch\(\) has turned"):
            change(fused)
    set_gradients(again, 2)
    fused.zero_grad()
    assert all(p.grad is None for group in again.param_groups for p in group["params"])
    assert (fused.clock().updates, len(fused.param_groups)) == (5, 2)


def test_an_old_pair_is_gone_with_the_last_who_knows_it() -> None:
    """And its state, which is as large as the new one's."""
    Pair(sgd(), None).run(0, 1)  # what Python makes at a first call knows its caller
    optimizer = sgd()
    pair = Pair(optimizer, S.StepLR(optimizer, 3)).run(0, 2)
    gc.collect()
    gc.disable()
    try:
        fused = fastlr.fuse(*pair, updates_per_tick=1)
        old = [weakref.ref(each) for each in pair]
        del optimizer, pair
        assert [each() for each in old] == [None, None]
        last = weakref.ref(fused)
        again = fused.to_torch()
        del fused
        assert last() is None
        assert len(again) == 2
    finally:
        gc.enable()


def test_a_scheduler_whose_class_takes_no_heirs_leaves_the_optimizer_as_it_was() -> None:
    class Alone(S.StepLR):
        def __init_subclass__(cls) -> None:
            raise TypeError("no heirs")

    optimizer = sgd()
    scheduler = Alone(optimizer, 3)
    with pytest.raises(TypeError, match="no heirs"):
        fastlr.fuse(optimizer, scheduler, updates_per_tick=1)
    Pair(optimizer, scheduler).run(0, 2)


def test_a_scheduler_that_is_not_given_is_missed() -> None:
    optimizer = sgd()
    S.StepLR(optimizer, 3)
    with pytest.warns(UserWarning, match="the SGD has a scheduler, which was not given"):
        fused = fastlr.fuse(optimizer)
    assert fused.param_groups[0]["lr_schedule"] is None
    optimizer = sgd()
    optimizer.param_groups[1]["initial_lr"] = 0.02  # as timm's leave it, and nothing else
    with pytest.warns(UserWarning, match="the SGD has a scheduler, which was not given"):
        fastlr.fuse(optimizer)


def test_the_schedules_are_those_that_one_would_write() -> None:
    written: dict[str, fastlr.Schedule] = {
        "step": fastlr.StepDecay(0.1, 6, 0.7),
        "multi-step": fastlr.MultiStep(0.1, [3, 9, 9, 20], 0.3),
        "one-cycle": fastlr.OneCycle(0.3, 60),
        "cyclic": fastlr.Triangular(0.01, 0.1, 4, 7),
        "restarts": fastlr.CosineWarmRestarts(0.1, 0.001, 5, 2),
        "warm-up-cosine": fastlr.LinearRamp(0.1 * 0.1, 0.1, 7)
        .then(fastlr.Cosine(0.1, 0.0, 40))
        .then(fastlr.Triangular(0.0, 0.1, 40, interpolation="sinusoidal"), at=47),
    }
    for name, schedule in written.items():
        optimizer = sgd()
        pair = Pair(optimizer, SCHEDULERS[name][0](optimizer)).run(0, 9)
        fused = fastlr.fuse(*pair, updates_per_tick=1)
        assert fused.param_groups[0]["lr_schedule"] == schedule
        resumed = fastlr.FusedSGD(groups(), lr=0.1, momentum=0.9)
        resumed.load_state_dict(fused.state_dict())
        assert resumed.param_groups[0]["lr_schedule"] == schedule
        assert (rates(resumed), resumed.clock()) == (rates(fused), fused.clock())


def test_a_method_that_gives_rates_is_not_copied_with_its_object() -> None:
    class Trainer:
        def rate(self, tick: int) -> float:
            return 1.0 / (1 + tick)

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("it is not the scheduler's")

    optimizer = sgd()
    scheduler = S.MultiplicativeLR(optimizer, Trainer().rate)
    fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=1, horizon=4)
    assert fused.param_groups[0]["lr_schedule"].values(0, 3) == pytest.approx([0.1, 0.05, 0.05 / 3])


def test_a_function_that_remembers_its_calls_is_copied() -> None:
    class Falling:
        calls = 0

        def __call__(self, tick: int) -> float:
            self.calls += 1
            return 1.0 / self.calls

    optimizer = sgd()
    falling = Falling()
    pair = Pair(optimizer, S.LambdaLR(optimizer, falling)).run(0, 4)
    calls = falling.calls
    check_goes_on(pair, 4, 20, 1, 0, 20)
    assert falling.calls == calls


def test_a_formula_that_one_object_has_replaced() -> None:
    optimizer = sgd()
    pair = Pair(optimizer, S.StepLR(optimizer, 3)).run(0, 4)
    scheduler = pair.scheduler
    scheduler.get_lr = lambda: [0.5, 0.25]
    fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=1, horizon=9)
    assert [g["lr_schedule"].values(4, 7).tolist() for g in fused.param_groups] == [
        [0.1 * 0.1, 0.5, 0.5],
        [0.02 * 0.1, 0.25, 0.25],
    ]


def test_a_part_that_begins_behind_the_horizon() -> None:
    optimizer = sgd()
    make = sequence([lambda o: S.StepLR(o, 3), lambda o: S.LambdaLR(o, half_then_linear)], [20])
    check_goes_on(Pair(optimizer, make(optimizer)), 0, 12, 1, 1e-12, 12)


def test_entries_of_your_own_are_kept_as_they_are() -> None:
    optimizer = sgd()
    own = {"mask": torch.ones(1), "min_lr": 1e-5, "max_lr": 3.0, "pair": (torch.ones(1), 2)}
    optimizer.param_groups[0].update(own)
    scheduler = S.LambdaLR(optimizer, half_then_linear)
    group = fastlr.fuse(optimizer, scheduler, updates_per_tick=1, horizon=9).param_groups[0]
    assert {name: group[name] for name in own} == own
    optimizer = sgd()
    scheduler = S.OneCycleLR(optimizer, 0.3, 60)
    group = fastlr.fuse(optimizer, scheduler, updates_per_tick=1).param_groups[0]
    assert not {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"} & group.keys()


# -- refusals ----------------------------------------------------------------------------------------------


class OwnStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OwnZeroGrad(torch.optim.AdamW):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


class OfNothingElse(torch.optim.SGD):
    """With other defaults, say."""


class Wrapper(torch.optim.Optimizer):
    """As accelerate's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


class OwnSchedulerStep(S.StepLR):
    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)


def with_another_group() -> Pair:
    optimizer = sgd()
    scheduler = S.StepLR(optimizer, 3)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    return Pair(optimizer, scheduler)


def with_part_of_an_epoch() -> Pair:
    optimizer = sgd()
    scheduler = S.CosineAnnealingWarmRestarts(optimizer, 5)
    scheduler.step(1.25)
    return Pair(optimizer, scheduler)


def with_sparse_gradient() -> Pair:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    return Pair(torch.optim.SGD(table.parameters(), lr=0.1), None)


def paired(make: Make) -> Pair:
    optimizer = sgd()
    return Pair(optimizer, make(optimizer))


REFUSED: dict[str, tuple[Callable[[], Pair], str]] = {
    "plateau": (
        lambda: paired(S.ReduceLROnPlateau),
        r"ReduceLROnPlateau follows a metric.* scale_lr\(0\.1\)",
    ),
    "swa": (lambda: paired(lambda o: swa_utils.SWALR(o, 0.05)), "SWALR leaves its rate.*fastlr.LinearRamp"),
    "own step": (lambda: Pair(OwnStep(groups(), lr=0.1), None), "OwnStep has a step.* hook"),
    "own zero_grad": (lambda: Pair(OwnZeroGrad(groups()), None), "OwnZeroGrad has a zero_grad.* of its own"),
    "own scheduler step": (lambda: paired(lambda o: OwnSchedulerStep(o, 3)), "OwnSchedulerStep has a step"),
    "of another": (lambda: Pair(sgd(), S.StepLR(sgd(), 3)), "StepLR is of another optimizer, a SGD"),
    "sparse": (with_sparse_gradient, "gradient of parameter 0 of group 0, shape .4, 2., is sparse"),
    "differentiable": (lambda: Pair(sgd(differentiable=True), None), "differentiable of parameter group 0"),
    "another group": (with_another_group, "StepLR knows 2 parameter groups, and its optimizer has 3"),
    "part of an epoch": (with_part_of_an_epoch, "CosineAnnealingWarmRestarts was called with a part"),
    "no horizon": (lambda: paired(lambda o: S.LambdaLR(o, float)), "horizon must be given with LambdaLR"),
    "no horizon, chained": (
        lambda: paired(TABULATED["chain-of-lasting"][0]),
        "horizon must be given with ChainedScheduler of ExponentialLR, StepLR",
    ),
    "negative": (
        lambda: paired(chain(lambda o: S.PolynomialLR(o, 17), lambda o: S.CosineAnnealingLR(o, 1, 0.2))),
        "the ChainedScheduler gives -0.0.* as lr after 10 steps, which must be finite and >= 0",
    ),
    "another rule": (lambda: Pair(torch.optim.NAdam(groups()), None), "Adadelta.*, got NAdam; keep that one"),
    "wrapped": (lambda: Pair(Wrapper(sgd()), None), "got Wrapper; where .* wraps one, pass the optimizer in"),
    "no optimizer": (lambda: Pair(torch.nn.Linear(1, 1), None), "must be one of torch.optim .Adadelta"),
    "fused": (lambda: Pair(fastlr.FusedSGD(groups()), None), "FusedSGD, which is fused; give it schedules"),
    "several": (lambda: paired(lambda o: [S.StepLR(o, 3)]), "of several .* make one, ChainedScheduler"),
    "no scheduler": (lambda: Pair(sgd(), 3), "scheduler must be one of torch.optim.lr_scheduler.* got 3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_say_what_to_do_and_change_nothing(what: str) -> None:
    make, message = REFUSED[what]
    pair = make()
    with pytest.raises((TypeError, ValueError), match=message):
        fastlr.fuse(*pair, updates_per_tick=1)
    if isinstance(pair.optimizer, torch.optim.SGD) and what not in ("sparse", "differentiable"):
        set_gradients(pair.optimizer, 0)
        pair.optimizer.step()  # as before


def test_a_schedule_among_torchs_numbers_is_refused() -> None:
    optimizer = torch.optim.Adam(groups())
    group = optimizer.param_groups[1]
    for option, value in {"lr": fastlr.Cosine(0.1, 0.0, 30), "betas": (fastlr.Constant(0.9), 0.99)}.items():
        number, group[option] = group[option], value
        with pytest.raises(TypeError, match=f"{option} of parameter group 1 is a schedule"):
            fastlr.fuse(optimizer)
        group[option] = number
    fastlr.fuse(optimizer)


def test_arguments_of_fuse() -> None:
    optimizer = sgd()
    scheduler = S.LambdaLR(optimizer, half_then_linear)
    with pytest.raises(ValueError, match=r"updates_per_tick must be given.* len\(loader\) where"):
        fastlr.fuse(optimizer, scheduler)
    with pytest.raises(ValueError, match="updates_per_tick must be an integer >= 1, got 0"):
        fastlr.fuse(optimizer, scheduler, updates_per_tick=0)
    with pytest.raises(ValueError, match="updates_per_tick must be an integer >= 1, got 0"):
        fastlr.fuse(sgd(), updates_per_tick=0)
    with pytest.raises(ValueError, match="horizon must be an integer >= 1, got 2"):
        fastlr.fuse(optimizer, scheduler, updates_per_tick=1, horizon=2.5)  # type: ignore[arg-type]
    Pair(optimizer, scheduler).run(0, 4)
    with pytest.raises(ValueError, match=r"horizon must be > 40, the updates.* of the whole run, got 40"):
        fastlr.fuse(optimizer, scheduler, updates_per_tick=10, horizon=40)
    fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=10, horizon=41)
    assert fused.clock().updates == 40


# -- transformers' and timm's ------------------------------------------------------------------------------


def test_transformers_schedulers() -> None:
    made = pytest.importorskip("transformers.optimization", reason="transformers is not installed")
    makes: list[Make] = [
        lambda o: made.get_cosine_schedule_with_warmup(o, 5, 40),
        lambda o: made.get_cosine_with_hard_restarts_schedule_with_warmup(o, 5, 40, 2),
        lambda o: made.get_linear_schedule_with_warmup(o, 5, 40),
        lambda o: made.get_polynomial_decay_schedule_with_warmup(o, 5, 40, lr_end=1e-4),
        lambda o: made.get_inverse_sqrt_schedule(o, 5),
        lambda o: made.get_wsd_schedule(o, 5, 8, num_training_steps=40),
        lambda o: made.get_constant_schedule_with_warmup(o, 5),
    ]
    for make in makes:
        for now in (0, 17):
            optimizer = sgd()
            check_goes_on(Pair(optimizer, make(optimizer)).run(0, now), now, 40, 1, 0, 50)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Timm's schedulers without its models, which take seconds to import."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    package = types.ModuleType("timm")
    package.__path__ = found.submodule_search_locations  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "timm", package)
    kept = set(sys.modules)
    yield importlib.import_module("timm.scheduler")
    for name in set(sys.modules) - kept:
        if name.startswith("timm."):
            del sys.modules[name]


class Timms(NamedTuple):
    """A scheduler of timm's as torch's: told where it is."""

    scheduler: Any
    updates_per_tick: int
    calls: list[int]

    def step(self) -> None:
        self.calls.append(0)
        if self.scheduler.t_in_epochs:
            self.scheduler.step(len(self.calls))
        else:
            self.scheduler.step_update(len(self.calls))


def test_timms_schedulers(timm: Any) -> None:
    warm = {"warmup_t": 4, "warmup_lr_init": 1e-3}
    makes: list[Make] = [
        lambda o: timm.CosineLRScheduler(o, 30, 1e-4, warmup_prefix=True, t_in_epochs=False, **warm),
        lambda o: timm.CosineLRScheduler(o, 12, noise_range_t=(3, 30), cycle_limit=3, cycle_decay=0.5),
        lambda o: timm.PolyLRScheduler(o, 40, **warm),
        lambda o: timm.TanhLRScheduler(o, 40, t_in_epochs=False),
        lambda o: timm.StepLRScheduler(o, 1, 0.9, **warm),
    ]
    for make in makes:
        for now in (0, 3, 17):
            a, b = groups()
            optimizer = torch.optim.SGD([a, {**b, "lr_scale": 0.5}], lr=0.1, momentum=0.9, foreach=False)
            scheduler = make(optimizer)
            ticks = 1 if not scheduler.t_in_epochs else 3
            told = Timms(scheduler, ticks, [])
            Pair(optimizer, told).run(0, now * ticks, ticks)
            went_on, told = copy.deepcopy((optimizer, told))
            fused = fastlr.fuse(optimizer, scheduler, updates_per_tick=ticks, horizon=40 * ticks)
            assert fused.clock().updates == now * ticks
            for update in range(now * ticks, 35 * ticks):
                assert rates(fused) == rates(went_on)
                Pair(went_on, told).step(update, ticks)
                Pair(fused, None).step(update)
            assert all(map(torch.equal, weights(fused), weights(went_on)))
            for call in (scheduler.step, scheduler.step_update):
                with pytest.raises(RuntimeError, match="leave the call out"):
                    call(3)


def test_timms_schedulers_that_are_refused(timm: Any) -> None:
    optimizer = sgd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
        plateau = timm.PlateauLRScheduler(optimizer, decay_rate=0.3)
    with pytest.raises(ValueError, match=r"PlateauLRScheduler follows a metric.* scale_lr\(0\.3\)"):
        fastlr.fuse(optimizer, plateau, updates_per_tick=1)
    by_update = timm.CosineLRScheduler(optimizer, 30, t_in_epochs=False)
    with pytest.raises(ValueError, match="updates_per_tick must be 1 with this CosineLRScheduler"):
        fastlr.fuse(optimizer, by_update, updates_per_tick=2, horizon=30)
    with pytest.raises(ValueError, match="horizon must be given with CosineLRScheduler"):
        fastlr.fuse(optimizer, by_update, updates_per_tick=1)
    steps = timm.StepLRScheduler(optimizer, 5, 0.5)
    Pair(optimizer, Timms(steps, 1, [])).run(0, 7)
    message = (
        r"keeps no count, and the present rate, 0\.05, is that of 5 epochs of the run, 5 to 9; say which, "
        r"scheduler\.last_epoch = \.\.\."
    )
    with pytest.raises(ValueError, match=message):
        fastlr.fuse(optimizer, steps, updates_per_tick=1, horizon=30)
    optimizer.param_groups[0]["lr"] = 0.07
    with pytest.raises(ValueError, match=r"0\.07, is that of no one of the run's epochs; fuse the optimizer"):
        fastlr.fuse(optimizer, steps, updates_per_tick=1, horizon=30)


@pytest.mark.parametrize("in_epochs", [True, False])
def test_a_scheduler_of_timms_between_two_drops_is_told_where_it_is(timm: Any, in_epochs: bool) -> None:
    ticks = 3 if in_epochs else 1
    makes: list[Make] = [
        lambda o: timm.StepLRScheduler(o, 5, 0.5, warmup_t=2, t_in_epochs=in_epochs),
        lambda o: timm.MultiStepLRScheduler(o, [6, 11, 20], 0.5, t_in_epochs=in_epochs),
    ]
    for make in makes:
        for now in (8, 9, 12, 17):
            optimizer = sgd()
            scheduler = make(optimizer)
            told = Timms(scheduler, ticks, [])
            Pair(optimizer, told).run(0, now * ticks, ticks)
            went_on, told = copy.deepcopy((optimizer, told))
            files = optimizer.state_dict(), scheduler.state_dict()
            for wrong, what in ((now + 7, "but the present one is"), (40, "none, as the horizon ends at 40")):
                scheduler.last_epoch = wrong
                with pytest.raises(ValueError, match=f"last_epoch of the .* is {wrong}, .*{what}"):
                    fastlr.fuse(optimizer, scheduler, updates_per_tick=ticks, horizon=40 * ticks)
            scheduler.last_epoch = now
            loaded = fastlr.FusedSGD(groups())
            how: Any = {"updates_per_tick": ticks, "horizon": 40 * ticks}
            loaded.load_torch(files[0], {**files[1], "last_epoch": now}, scheduler=type(scheduler), **how)
            fused = fastlr.fuse(optimizer, scheduler, **how)
            assert loaded.clock() == fused.clock() == (now * ticks, 0)
            for update in range(now * ticks, 35 * ticks):
                assert rates(fused) == rates(went_on) == rates(loaded)
                Pair(went_on, told).step(update, ticks)
                Pair(fused, None).step(update)
                Pair(loaded, None).step(update)
            assert all(map(torch.equal, weights(fused), weights(went_on)))


# -- and back ----------------------------------------------------------------------------------------------

# What comes back as a LambdaLR.
WITHOUT_COUNTERPART = {
    "cosine-of-a-fraction",
    "three-in-sequence",
    *TABULATED,
}
# What comes back as that while more than one factor changes, and then as what is left.
SIMPLIFIED = {"sequence-in-sequence", "chain-in-sequence", "chain", "chain-of-three"}


@pytest.mark.parametrize("updates_per_tick", [1, 3])
@pytest.mark.parametrize("name", [*SCHEDULERS, *TABULATED])
def test_there_and_back(name: str, updates_per_tick: int) -> None:
    make, tolerance = {**SCHEDULERS, **TABULATED}[name]
    for over, back in [(0, 0), (0, 5), (8, 17), (17, 30)][::updates_per_tick]:
        optimizer = sgd()
        pair = Pair(optimizer, make(optimizer)).run(0, over * updates_per_tick, updates_per_tick)
        went_on = Pair(*copy.deepcopy((pair.optimizer, pair.scheduler)))
        fused = fastlr.fuse(*pair, updates_per_tick=updates_per_tick, horizon=HORIZON)
        Pair(fused, None).run(over * updates_per_tick, back * updates_per_tick)
        went_on.run(over * updates_per_tick, back * updates_per_tick, updates_per_tick)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = Pair(*fused.to_torch())
        is_table = isinstance(again.scheduler, S.LambdaLR)
        assert is_table == (len(said) == 1 and "has nothing that does all" in str(said[0].message))
        if name not in SIMPLIFIED:
            assert is_table == (name in WITHOUT_COUNTERPART)
            assert is_table or type(again.scheduler) is type(went_on.scheduler)
        assert again.scheduler.last_epoch == back
        assert type(again.optimizer) is torch.optim.SGD
        peak = max(group["initial_lr"] for group in went_on.optimizer.param_groups)
        for update in range(back * updates_per_tick, END * updates_per_tick):
            peak = max(peak, *rates(went_on.optimizer))
            assert rates(again.optimizer) == again.scheduler.get_last_lr()
            for a, b in zip(again.optimizer.param_groups, went_on.optimizer.param_groups, strict=True):
                assert abs(a["lr"] - b["lr"]) <= (tolerance or 1e-15) * peak, (over, back, update)
                assert a["momentum"] == pytest.approx(b["momentum"], abs=1e-15, rel=0.0)
            went_on.step(update, updates_per_tick)
            again.step(update, updates_per_tick)
        for a, b in zip(weights(again.optimizer), weights(went_on.optimizer), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def check_back(fused: fastlr.FusedOptimizer, updates: int, tick: int = 1) -> Pair:
    """Torch's pair of an optimizer beside a copy that simply goes on."""
    went_on = copy.deepcopy(fused)
    start = fused.clock().updates
    pair = Pair(*fused.to_torch())
    for update in range(start, start + updates):
        for ours, theirs in zip(went_on.param_groups, pair.optimizer.param_groups, strict=True):
            for name in {"lr", "momentum", "weight_decay", "betas"} & theirs.keys():
                assert theirs[name] == pytest.approx(ours[name], rel=1e-12, abs=1e-15), (update, name)
        set_gradients(went_on, update)
        went_on.step()
        pair.step(update, tick)
    for ours, theirs in zip(weights(went_on), weights(pair.optimizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return pair


def run(fused: fastlr.FusedOptimizer, updates: int) -> fastlr.FusedOptimizer:
    Pair(fused, None).run(0, updates)
    return fused


BACK: dict[str, tuple[fastlr.Schedule, str]] = {
    "cosine that holds": (fastlr.Cosine(0.1, 0.01, 12), "SequentialLR"),
    "ramp": (fastlr.LinearRamp(0.02, 0.1, 12), "LinearLR"),
    "ramp from zero": (fastlr.LinearRamp(0.0, 0.1, 12), "LambdaLR"),
    "warm-up and more": (
        fastlr.LinearRamp(0.01, 0.1, 5).then(fastlr.Cosine(0.1, 0.0, 10)).then(fastlr.StepDecay(0.2, 3, 0.5)),
        "SequentialLR",
    ),
    "polynomial": (fastlr.Polynomial(0.1, 0.0, 14, 2.0).then(fastlr.Constant(0.0)), "PolynomialLR"),
    "polynomial to more": (fastlr.Polynomial(0.1, 0.01, 14, 2.0), "LambdaLR"),
    "time-based": (fastlr.TimeBased(0.1, 0.1), "LambdaLR"),
    "parabolic": (fastlr.Triangular(0.01, 0.1, 4, interpolation="parabolic"), "LambdaLR"),
    "jump": (fastlr.Triangular(0.01, 0.1, 0, 4), "LambdaLR"),
    "both bounds": (fastlr.ExpRange(0.01, 0.1, 4, gamma=0.9, decay_base=True), "LambdaLR"),
    "scaled": (0.5 * fastlr.StepDecay(0.1, 3, 0.5), "LambdaLR"),
    "constant": (fastlr.Constant(0.05), "ConstantLR"),
    "restarts": (fastlr.CosineWarmRestarts(0.1, 0.0, 4, 2), "CosineAnnealingWarmRestarts"),
    "from zero to more": (fastlr.Constant(0.0).then(fastlr.Constant(0.1), at=5), "SequentialLR"),
    "one cycle that holds": (fastlr.OneCycle(0.1, 12).then(fastlr.Constant(0.01), at=15), "LambdaLR"),
    "no rise": (fastlr.OneCycle(0.1, 40, pct_start=0.01), "LambdaLR"),
}


@pytest.mark.filterwarnings("ignore:.* ended at update:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
@pytest.mark.parametrize("name", BACK)
def test_schedules_that_were_never_torchs(name: str) -> None:
    schedule, expected = BACK[name]
    for updates in (0, 7, 17):
        pair = check_back(run(fastlr.FusedSGD(parameters(), lr=schedule), updates), 20)
        assert type(pair.scheduler).__name__ == expected
        later = fastlr.FusedSGD(parameters(), lr=0.3)
        run(later, 3).set_schedule(lr=schedule)  # its zero is here
        assert check_back(run(later, updates), 20).scheduler.last_epoch == updates + 20


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
def test_groups_that_differ_are_given_back_as_their_values() -> None:
    a, b = parameters()
    step, faster = fastlr.StepDecay(0.1, 3, 0.5), fastlr.StepDecay(0.2, 2, 0.5)
    for other in (faster, 0.25, fastlr.Constant(0.3)):
        pair = check_back(
            run(fastlr.FusedSGD([{"params": [a], "lr": step}, {"params": [b], "lr": other}]), 5), 8
        )
        assert type(pair.scheduler) is S.LambdaLR
    same = fastlr.FusedSGD([{"params": [a], "lr": step}, {"params": [b], "lr": 0.5 * 0.1}], lr=0.1)
    same.set_schedule(lr=fastlr.StepDecay(0.3, 3, 0.5), group=1, start="zero")
    assert type(check_back(run(same, 4), 8).scheduler) is S.StepLR
    same = fastlr.FusedSGD([{"params": [parameters()[0]], "lr": step}, {"params": [parameters()[1]]}], lr=0.1)
    run(same, 2).set_schedule(lr=step, group=1)
    assert type(check_back(run(same, 3), 8).scheduler) is S.LambdaLR


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
def test_other_options_that_schedules_drive_are_driven_in_torch_too() -> None:
    decay, beta2 = fastlr.Cosine(0.04, 0.4, 30), fastlr.LinearRamp(0.9, 0.99, 30)
    lr, momentum = fastlr.one_cycle(0.1, 40)
    fused = fastlr.FusedAdamW(parameters(), lr=lr, betas=(momentum, beta2), weight_decay=decay)
    pair = check_back(run(fused, 6), 20)
    assert isinstance(pair.scheduler, S.LambdaLR)
    torch.save(pair.scheduler.state_dict(), io.BytesIO())
    fused = fastlr.FusedSGD(parameters(), lr=0.1, momentum=fastlr.Triangular(0.8, 0.9, 4, inverted=True))
    check_back(run(fused, 6), 20)
    assert type(
        check_back(run(fastlr.FusedAdam(parameters(), lr=lr, betas=(momentum, 0.9)), 9), 20).scheduler
    ) is (S.OneCycleLR)


def driven(fused: fastlr.FusedOptimizer) -> list[dict[str, Any]]:
    """What drives the options of each group."""
    kinds = ("_schedule", "_start")
    return [
        {key: value for key, value in group.items() if key.endswith(kinds)} for group in fused.param_groups
    ]


OF_EPOCHS: dict[str, fastlr.Schedule] = {
    "lr": fastlr.TimeBased(0.1, 0.1, unit="epoch"),
    "weight_decay": fastlr.LinearRamp(0.1, 0.5, 20, unit="epoch"),
}
RETURNED: dict[str, Callable[[], fastlr.FusedOptimizer]] = {
    "adamw": lambda: fastlr.FusedAdamW(
        parameters(),
        lr=fastlr.Cosine(0.1, 0.0, 50) * 0.5,
        betas=(fastlr.Cosine(0.8, 0.9, 29), fastlr.LinearRamp(0.9, 0.99, 40)),
        weight_decay=fastlr.StepDecay(0.4, 6, 0.5),
    ),
    "sgd": lambda: fastlr.FusedSGD(parameters(), lr=0.1, weight_decay=fastlr.LinearRamp(0.1, 0.5, 20)),
    "rmsprop": lambda: fastlr.FusedRMSprop(parameters(), lr=0.1, alpha=fastlr.LinearRamp(0.9, 0.99, 20)),
    "adadelta": lambda: fastlr.FusedAdadelta(parameters(), lr=0.1, rho=fastlr.LinearRamp(0.8, 0.9, 20)),
    "groups": lambda: fastlr.FusedSGD(
        [
            {"params": parameters()[:1], "lr": fastlr.TimeBased(0.1, 0.1)},
            {"params": parameters()[1:], "lr": fastlr.StepDecay(0.2, 3, 0.5)},
        ]
    ),
    "epochs": lambda: fastlr.FusedAdamW(
        parameters(), **{name: each.in_updates(3) for name, each in OF_EPOCHS.items()}
    ),
}


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
@pytest.mark.parametrize("name", RETURNED)
def test_schedules_that_torch_has_no_scheduler_for_come_back_as_they_were(name: str) -> None:
    tick = 3 if name == "epochs" else 1
    for before, between in ((0, 0), (6, 0), (3, 9)):
        fused = run(RETURNED[name](), before)
        went_on = copy.deepcopy(fused)
        pair = Pair(*fused.to_torch())
        copied = Pair(*copy.deepcopy((pair.optimizer, pair.scheduler)))
        held = [{k: v for k, v in group.items() if k != "params"} for group in pair.optimizer.param_groups]
        copied.run(0, 2 * tick, tick)
        assert held == [
            {k: v for k, v in group.items() if k != "params"} for group in pair.optimizer.param_groups
        ]
        pair.run(before, before + between, tick)
        again = fastlr.fuse(*pair, updates_per_tick=tick)
        Pair(went_on, None).run(before, before + between)
        expected = driven(went_on)
        for group in expected:  # a rate that stays is one that a scheduler says
            group["lr_schedule"] = group["lr_schedule"] or fastlr.Constant(0.1)
        assert driven(again) == expected
        assert again.clock() == went_on.clock()
        assert rates(again) == rates(went_on)


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
def test_such_schedulers_are_tabulated_where_their_ticks_have_become_others() -> None:
    fused = run(fastlr.FusedAdamW(parameters(), **OF_EPOCHS), 2)
    fused.advance_epoch()
    fused.advance_epoch()
    pair = Pair(*fused.to_torch())
    assert pair.scheduler.last_epoch == 2
    with pytest.raises(ValueError, match="horizon must be given with ValuesLR"):
        fastlr.fuse(*pair, updates_per_tick=1)
    held = [{k: v for k, v in group.items() if k != "params"} for group in pair.optimizer.param_groups]
    again = fastlr.fuse(*pair, updates_per_tick=1, horizon=30)
    assert held == [
        {k: v for k, v in group.items() if k != "params"} for group in pair.optimizer.param_groups
    ]
    for update in range(2, 20):
        group = again.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == tuple(each(update) for each in OF_EPOCHS.values())
        run(again, 1)


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
def test_staircases_that_begin_at_other_updates_keep_their_steps() -> None:
    stairs = fastlr.StepDecay(0.1, 1, 0.5, unit="epoch").in_updates(3)
    for begins, tick, zero in ((5, 1, 0), (6, 3, 0), (0, 3, 0)):
        a, b = parameters()
        fused = fastlr.FusedSGD([{"params": [a], "lr": stairs}, {"params": [b], "lr": 0.1}])
        run(fused, begins).set_schedule(lr=0.7 * stairs, group=1)
        run(fused, 2)
        pair = check_back(copy.deepcopy(fused), 1 if tick > 1 else 12)
        assert pair.scheduler.last_epoch == (begins + 2 - zero) // tick + (1 if tick > 1 else 12)
    a, b = parameters()
    fused = fastlr.FusedSGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.1}])
    run(fused, 4).set_schedule(lr=stairs, group=0)
    run(fused, 3).set_schedule(lr=0.7 * stairs, group=1)
    went_on = run(fused, 3)  # a tick of both begins here, which is at neither multiple of 3
    pair = Pair(*copy.deepcopy(went_on).to_torch())
    for update in range(9):
        assert rates(pair.optimizer) == rates(went_on)
        run(went_on, 1)
        pair.step(update, 3)


@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
def test_nesterov_beside_a_momentum_that_begins_at_0_goes_both_ways() -> None:
    rise = fastlr.Triangular(0.0, 0.9, 4)
    fused = fastlr.FusedSGD(parameters(), lr=fastlr.Triangular(0.9, 1.0, 4), momentum=0.9, nesterov=True)
    fused.set_schedule(momentum=rise)
    assert fused.param_groups[0]["momentum"] == 0.0
    optimizer, scheduler = copy.deepcopy(fused).to_torch()
    assert optimizer.defaults["nesterov"]
    assert optimizer.param_groups[0]["nesterov"]
    again = fastlr.fuse(optimizer, scheduler, updates_per_tick=1)
    assert again.param_groups[0]["nesterov"]
    assert again.defaults["nesterov"]
    assert driven(again) == driven(fused)
    check_back(run(again, 3), 9)
    made = fastlr.FusedSGD(parameters(), lr=0.1, momentum=rise, nesterov=True)
    check_back(made, 9)


def test_without_schedules_there_is_no_scheduler() -> None:
    pair = check_back(run(fastlr.FusedRMSprop(parameters(), lr=0.01, momentum=0.9), 3), 5)
    assert pair.scheduler is None
    assert fastlr.fuse(pair.optimizer).clock() == (0, 0)


def test_samples_are_not_what_a_scheduler_keeps() -> None:
    fused = run(fastlr.FusedSGD(parameters(), lr=fastlr.Cosine(0.1, 0.0, 30)), 5)
    fused.advance_samples(160)
    assert fastlr.fuse(*fused.to_torch(), updates_per_tick=1).clock() == (5, 0)


def test_what_another_scheduler_has_left_in_a_file_is_nothing_to_the_one_given_back() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    Pair(optimizer, S.OneCycleLR(optimizer, 0.7, 20, base_momentum=0.5)).run(0, 4)
    lr, momentum = fastlr.one_cycle(0.3, 12)
    fused = fastlr.FusedSGD(parameters(), lr=lr, momentum=momentum)
    with pytest.warns(UserWarning, match="the file has no clock"):
        fused.load_state_dict(optimizer.state_dict())
    pair = check_back(run(fused, 3), 9)
    assert type(pair.scheduler) is S.OneCycleLR
    assert pair.optimizer.param_groups[0]["initial_lr"] == 0.3 / 25


@pytest.mark.filterwarnings("ignore:.* ended at update:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.optim.lr_scheduler has nothing:UserWarning")
def test_behind_the_end_of_a_cycle() -> None:
    """Where OneCycleLR has failed already."""
    lr, momentum = fastlr.one_cycle(0.1, 12)
    for done, kind in ((7, S.OneCycleLR), (12, S.LambdaLR), (15, S.LambdaLR)):
        fused = run(fastlr.FusedSGD(parameters(), lr=lr, momentum=momentum), done)
        assert isinstance(check_back(fused, 4).scheduler, kind)


def test_the_middle_of_an_epoch() -> None:
    per_epoch = fastlr.StepDecay(0.1, 2, 0.5, unit="epoch").in_updates(4)
    pair = check_back(run(fastlr.FusedSGD(parameters(), lr=per_epoch), 11), 20, tick=4)
    assert (type(pair.scheduler), pair.scheduler.last_epoch) == (S.StepLR, 7)


NOT_BACK: dict[str, tuple[Callable[[], fastlr.FusedOptimizer], str]] = {
    "lion": (lambda: fastlr.FusedLion(parameters()), "FusedLion has no counterpart in torch.optim"),
    "clip": (lambda: fastlr.FusedSGD(parameters(), max_grad_norm=1.0), "no max_grad_norm, got 1.0; set it"),
    "value": (lambda: fastlr.FusedAdam(parameters(), max_grad_value=1.0), "Adam has no max_grad_value"),
    "average": (lambda: fastlr.FusedSGD(parameters(), ema_decay=0.9), "no ema_decay, .*AveragedModel"),
    "master": (lambda: fastlr.FusedAdamW(parameters(), master_weights=True), "AdamW has no master_weights"),
    "cautious": (lambda: fastlr.FusedAdamW(parameters(), cautious=True), "AdamW has no cautious, got True"),
    "state": (lambda: fastlr.FusedSGD(parameters(), state_dtype=torch.float32), "no state_dtype"),
    "sgdw": (
        lambda: fastlr.FusedSGD(parameters(), weight_decay=0.1, decoupled_weight_decay=True),
        "SGD has no decoupled_weight_decay",
    ),
    "samples": (
        lambda: fastlr.FusedSGD(parameters(), lr=fastlr.Constant(0.1, unit="sample")),
        "lr schedule of parameter group 0 counts samples",
    ),
}


@pytest.mark.parametrize("what", NOT_BACK)
def test_what_torch_cannot_do_is_refused_and_changes_nothing(what: str) -> None:
    make, message = NOT_BACK[what]
    fused = make()
    with pytest.raises(ValueError, match=message):
        fused.to_torch()
    run(fused, 1)


def test_classes_that_do_something_else_are_not_given_to_torch() -> None:
    class Clipping(fastlr.FusedSGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Saving(fastlr.FusedAdamW):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict()

    class Same(fastlr.FusedCyclicSGD):
        """With other defaults, say."""

    for made, method in ((Clipping(parameters(), lr=0.1), "step"), (Saving(parameters()), "state_dict")):
        with pytest.raises(ValueError, match=rf"has a {method}\(\) of its own, .* make a fastlr\.Fused"):
            made.to_torch()
        run(made, 1)
    pair = check_back(Same(parameters(), base_lr=0.1, max_lr=0.2, step_size_up=4), 5)
    assert type(pair.optimizer) is torch.optim.SGD
    assert type(fastlr.fuse(OfNothingElse(groups(), lr=0.1))) is fastlr.FusedSGD


def test_an_adam_that_cannot_decouple_its_decay_is_not_given_one_that_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch 2.6's would keep the group's key, and not look at it."""

    class Old(torch.optim.Adam):
        def __init__(self, params: Any, lr: float = 1e-3) -> None:
            super().__init__(params, lr)

    monkeypatch.setitem(_to_torch._TORCH, "adam", Old)
    fused = fastlr.FusedAdam(parameters(), weight_decay=0.1, decoupled_weight_decay=True)
    with pytest.raises(ValueError, match=r"torch\.optim\.Old has no decoupled_weight_decay, got True"):
        fused.to_torch()
    run(fused, 1)
    assert fastlr.FusedAdamW(parameters(), weight_decay=0.1).to_torch()


def test_values_that_somebody_else_has_written_are_not_given_to_torch() -> None:
    fused = fastlr.FusedSGD(parameters(), lr=fastlr.Cosine(0.1, 0.0, 9))
    with fused.handed_over(), pytest.raises(RuntimeError, match=r"to_torch\(\) was called while the options"):
        fused.to_torch()  # which would lose the schedules
    fused.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was set to 0\.5 by something else"):
        fused.to_torch()
    fused.param_groups[0]["lr"] = 0.1
    assert check_back(fused, 5).scheduler._schedulers[0].T_max == 9


def test_what_steps_take_whatever_its_type_goes_to_torch_as_its_own_kind() -> None:
    fused = run(fastlr.FusedAdam([{"params": [p]} for p in parameters()], lr=0.1), 3)
    group, other = fused.param_groups
    group["lr"], group["betas"] = torch.tensor(0.25, dtype=torch.float64), [torch.tensor(0.5), 0.75]
    (p,) = other["params"]
    fused.state[p] = dict.fromkeys(fused.state[p])  # as if it had none
    assert list(fused.state_dict()["state"]) == [0]
    plain = torch.optim.Adam([{"params": [p]} for p in parameters()])
    plain.load_state_dict(fused.state_dict())
    went_on = run(copy.deepcopy(fused), 2)
    pair = Pair(*fused.to_torch()).run(0, 2)
    for ours, theirs in zip(weights(went_on), weights(pair.optimizer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    moved = [(group["lr"], group["betas"]) for group in pair.optimizer.param_groups]
    assert moved == [(0.25, (0.5, 0.75)), (0.1, (0.9, 0.999))]
    assert all(type(value) is float for lr, betas in moved for value in (lr, *betas))
    pair.optimizer.param_groups[0]["betas"] = [torch.tensor(0.5), 0.75]
    assert fastlr.fuse(pair.optimizer).param_groups[0]["betas"] == (0.5, 0.75)


def test_options_of_torchs_step_and_copies() -> None:
    fused = run(fastlr.FusedAdam(parameters(), lr=0.1, amsgrad=True), 3)
    state = copy.deepcopy(fused.state_dict())
    optimizer, _ = fused.to_torch(foreach=True)
    assert optimizer.param_groups[0]["foreach"] is True
    Pair(optimizer, None).run(3, 5)
    with pytest.warns(UserWarning, match=r"FusedAdam that to_torch\(\) has turned .* what was then"):
        after = fused.state_dict()["state"]
    for key, entry in state["state"].items():
        assert all(torch.equal(value, after[key][name]) for name, value in entry.items())


# -- checkpoints -------------------------------------------------------------------------------------------


def written(value: Any) -> Any:
    """Through a file that holds plain values only."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("updates_per_tick", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "cyclic-exp_range",
        "one-cycle",
        "restarts",
        "multi-step",
        "cosine",
        "warm-up-cosine",
        "lambda",
        "chain",
    ],
)
def test_files_of_torchs_optimizer_and_scheduler_are_loaded(name: str, updates_per_tick: int) -> None:
    make, _ = {**SCHEDULERS, **TABULATED}[name]
    optimizer = sgd()
    pair = Pair(optimizer, make(optimizer)).run(0, 10 * updates_per_tick, updates_per_tick)
    kind: Any = type(pair.scheduler)
    files = written(optimizer.state_dict()), pair.scheduler.state_dict()
    if name in ("warm-up-cosine", "lambda", "chain"):
        with pytest.raises(TypeError, match=f"a file of a {kind.__name__} does not say all; pass a function"):
            fastlr.FusedSGD(groups()).load_torch(*files, scheduler=kind, updates_per_tick=1)
        kind = make
    if name != "multi-step":  # whose Counter torch.load does not take
        files = files[0], written(files[1])
    loaded = fastlr.FusedSGD(groups(0.7), momentum=0.5, lr=fastlr.Constant(0.3))
    with torch.no_grad():
        for ours, theirs in zip(weights(loaded), weights(optimizer), strict=True):
            ours.copy_(theirs)
    loaded.load_torch(*files, scheduler=kind, updates_per_tick=updates_per_tick, horizon=HORIZON)
    fused = fastlr.fuse(*pair, updates_per_tick=updates_per_tick, horizon=HORIZON)
    assert loaded.clock() == fused.clock()
    for update in range(10 * updates_per_tick, 20 * updates_per_tick):
        assert rates(loaded) == rates(fused)
        for each in (loaded, fused):
            Pair(each, None).step(update)
    assert all(map(torch.equal, weights(loaded), weights(fused)))


def test_what_is_wrong_with_torchs_files_is_said_and_changes_nothing() -> None:
    optimizer = sgd()
    pair = Pair(optimizer, S.StepLR(optimizer, 3)).run(0, 5)
    files = optimizer.state_dict(), pair.scheduler.state_dict()
    loaded = fastlr.FusedSGD(groups(), lr=fastlr.Constant(0.3))
    before = loaded.state_dict()
    with pytest.raises(ValueError, match="updates_per_tick must be given with a scheduler"):
        loaded.load_torch(*files, scheduler=S.StepLR)
    with pytest.raises(TypeError, match="scheduler must be the class of the file's scheduler"):
        loaded.load_torch(*files, scheduler="StepLR", updates_per_tick=1)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"optimizer_state must be what .* a list under 'param_groups', got the keys"
    ):
        loaded.load_torch({"state": {}}, files[1], scheduler=S.StepLR, updates_per_tick=1)
    with pytest.raises(
        ValueError, match=r"must have this optimizer's parameter groups, of \[2\] .* got groups of \[1, 1\]"
    ):
        fastlr.FusedSGD(parameters()).load_torch(*files, scheduler=S.StepLR, updates_per_tick=1)
    for kind in (S.MultiStepLR, S.CyclicLR, S.ExponentialLR, S.ReduceLROnPlateau):
        with pytest.raises(ValueError, match=f"that of a {kind.__name__}, but has step_size; got the keys"):
            loaded.load_torch(*files, scheduler=kind, updates_per_tick=1)
    with pytest.raises(ValueError, match="that of a ExponentialLR, but has step_size"):
        loaded.load_torch(*files, scheduler=lambda o: S.ExponentialLR(o, 0.9), updates_per_tick=1)
    half = {"base_lrs": [0.1, 0.02], "last_epoch": 3}
    for kind, missing in ((S.StepLR, "step_size"), (S.CyclicLR, "_scale_fn_custom")):
        with pytest.raises(
            ValueError, match=f"that of a {kind.__name__}, but has no {missing}; got the keys"
        ):
            loaded.load_torch(files[0], half, scheduler=kind, updates_per_tick=1)
    with pytest.raises(TypeError, match="a function that returns a scheduler, but returned None"):
        loaded.load_torch(*files, scheduler=lambda o: None, updates_per_tick=1)
    two = sequence([S.ConstantLR, lambda o: S.ExponentialLR(o, 0.9)], [3])
    three = sequence([S.ConstantLR, lambda o: S.ExponentialLR(o, 0.9), lambda o: S.StepLR(o, 2)], [3, 6])
    with pytest.raises(ValueError, match="of a SequentialLR of 2 schedulers, got one of 3"):
        loaded.load_torch(files[0], three(sgd()).state_dict(), scheduler=two, updates_per_tick=1)
    turned = sequence([lambda o: S.StepLR(o, 2), S.ConstantLR], [3])
    with pytest.raises(ValueError, match="that of a StepLR, but has factor"):
        loaded.load_torch(files[0], two(sgd()).state_dict(), scheduler=turned, updates_per_tick=1)
    adam = torch.optim.Adam(groups()).state_dict()
    with pytest.raises(ValueError, match=r"of a torch\.optim\.SGD, but parameter group 0 has no momentum"):
        loaded.load_torch(adam, files[1], scheduler=S.StepLR, updates_per_tick=1)
    with pytest.raises(ValueError, match="FusedLion has no counterpart"):
        fastlr.FusedLion(groups()).load_torch(*files, scheduler=S.StepLR, updates_per_tick=1)
    assert loaded.state_dict() == before


def test_a_torch_optimizer_that_has_loaded_our_file_is_taken_over_again() -> None:
    ours = fastlr.FusedSGD(groups(), momentum=0.9, lr=fastlr.Constant(0.3), weight_decay=0.1)
    run(ours, 4)
    torchs = sgd()
    torchs.load_state_dict(written(ours.state_dict()))
    Pair(torchs, None).run(4, 7)
    check_rule_goes_on(Pair(torchs, S.StepLR(torchs, 3)), 0, 9, 1)


def test_the_page_about_moving_says_what_happens() -> None:
    page = Path(__file__).parent.parent / "docs" / "moving.md"
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
    names = {
        "model": torch.nn.Linear(4, 3),
        "loss_fn": torch.nn.functional.cross_entropy,
        "loader": torch.utils.data.DataLoader(data, batch_size=4),
        "torch": torch,
        "fastlr": fastlr,
    }
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:  # the last ones go on with the one before them
        exec(compile(block, page.name, "exec"), names)
