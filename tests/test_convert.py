"""Moving from torch's optimizer and scheduler to a fused one in the middle of a run, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

import fastlr

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


S = torch_schedulers
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
    "polynomial": (lambda o: S.PolynomialLR(o, 30, 1.7), 1e-12),
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
    peak = max(rates(fused))
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
    for now in POSITIONS:
        optimizer = sgd()
        pair = Pair(optimizer, make(optimizer)).run(0, now * updates_per_tick, updates_per_tick)
        check_goes_on(pair, now, END, updates_per_tick, tolerance)


@pytest.mark.parametrize("updates_per_tick", [1, 3])
@pytest.mark.parametrize("scheduler", TABULATED)
def test_tabulated_schedulers_go_on_from_everywhere(scheduler: str, updates_per_tick: int) -> None:
    make, tolerance = TABULATED[scheduler]
    for now in POSITIONS:
        optimizer = sgd()
        pair = Pair(optimizer, make(optimizer)).run(0, now * updates_per_tick, updates_per_tick)
        check_goes_on(pair, now, END, updates_per_tick, tolerance, HORIZON)
