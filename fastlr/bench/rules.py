"""The update rules that benchmarks compare: fastlr's class, torch's, and the forms that torch's has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastlr

Step = Callable[[], object]
CYCLE: dict[str, Any] = {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 2000, "mode": "triangular2"}
FORMS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}


@dataclass(frozen=True)
class Rule:
    """One of the RULES.

    Attributes:
        ours, theirs: the classes.
        options: of both.
        slots: tensors of state as large as the parameter, that a step with these options has.
        has_fused: whether torch has this rule fused.
        captured: how torch's steps in a CUDA graph, with its rate in a tensor; None: not at all.
    """

    ours: type[fastlr.FusedOptimizer]
    theirs: type[torch.optim.Optimizer]
    slots: int
    options: dict[str, Any] = field(default_factory=dict)
    has_fused: bool = True
    captured: dict[str, Any] | None = None

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        return {name: form for name, form in FORMS.items() if name != "fused" or self.has_fused}

    @property
    def bytes_per_element(self) -> int:
        """That a step moves, of float32: all but the gradient is read and written."""
        return 4 * (3 + 2 * self.slots)

    def optimizer(self, parameters: list[torch.nn.Parameter], **options: Any) -> fastlr.FusedOptimizer:
        lr = fastlr.Triangular2(CYCLE["base_lr"], CYCLE["max_lr"], CYCLE["step_size_up"])
        return self.ours(parameters, lr=lr, **self.options, **options)  # type: ignore[call-arg]

    def make_fastlr(self, parameters: list[torch.nn.Parameter]) -> Step:
        return self.optimizer(parameters).step

    def make_torch(self, parameters: list[torch.nn.Parameter], form: dict[str, Any]) -> Step:
        return cycled(self.theirs(parameters, lr=CYCLE["base_lr"], **self.options, **form))  # type: ignore[call-arg]


RULES = {
    "sgd": Rule(
        fastlr.FusedSGD,
        torch.optim.SGD,
        1,
        {"momentum": 0.9, "weight_decay": 5e-4},
        captured={"fused": True},
    ),
    "adam": Rule(fastlr.FusedAdam, torch.optim.Adam, 2, captured={"fused": True, "capturable": True}),
    "adamw": Rule(
        fastlr.FusedAdamW,
        torch.optim.AdamW,
        2,
        {"weight_decay": 0.05},
        captured={"fused": True, "capturable": True},
    ),
    "rmsprop": Rule(
        fastlr.FusedRMSprop,
        torch.optim.RMSprop,
        1,
        has_fused=False,
        captured={"foreach": True, "capturable": True},
    ),
    "adagrad": Rule(fastlr.FusedAdagrad, torch.optim.Adagrad, 1),
    "adadelta": Rule(
        fastlr.FusedAdadelta,
        torch.optim.Adadelta,
        2,
        has_fused=False,
        captured={"foreach": True, "capturable": True},
    ),
}


def cycled(optimizer: torch.optim.Optimizer) -> Step:
    """A step and its schedule's."""
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, **CYCLE, cycle_momentum=False)

    def step() -> None:
        optimizer.step()
        scheduler.step()

    return step
