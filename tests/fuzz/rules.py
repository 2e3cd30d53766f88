"""What the runs of steps.py know of each update rule: a new rule is one entry of RULES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from rule_table import ADAM_DECOUPLES, SGD, Lion

import fastlr

Values = dict[str, Any]  # a group's hyperparameters, by the names of their options
Draws = dict[str, Callable[[Random], Any]]


@dataclass(frozen=True)
class Rule:
    """An optimizer, what it is compared with, and what its groups may hold.

    Attributes:
        fused: the class, ``cyclic``: the one in CyclicLR's words, and ``torch``: their counterpart.
        scheduled: the hyperparameters that schedules can drive, with the largest value drawn.
        options: the others, with what draws them.
        tuples: those that stand together in a group, with their parts.
        cycled: what CyclicLR cycles against the rate.
        settled: makes drawn options agree with each other, and ``fits``: whether a step takes them together.
        wrong: values that no step takes; of a tuple, as a whole, too.
        slots: tensors of state that PyTorch's optimizer expects to be there, and which values ask for them.
        averages: those of them that may be negative.
        counts: whether PyTorch's optimizer counts a parameter's updates.
        initial: what the elements of new state are.
        eager: whether PyTorch's optimizer makes its state when it is built.
        begins_with_gradient: whether a parameter's first gradient is its first state.
    """

    fused: type[fastlr.FusedOptimizer]
    cyclic: type[fastlr.FusedOptimizer] | None
    torch: type[torch.optim.Optimizer]
    scheduled: dict[str, float]
    options: Draws
    wrong: dict[str, list[Any]]
    slots: dict[str, Callable[[Values], bool]]
    tuples: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cycled: str = "momentum"
    settled: Callable[[Values], None] = lambda values: None
    fits: Callable[[Values], bool] = lambda values: True
    averages: tuple[str, ...] = ()
    counts: bool = True
    initial: Callable[[Values], float] = lambda values: 0.0
    eager: bool = False
    begins_with_gradient: bool = False

    def in_tuples(self, values: Values) -> Values:
        """Values by their options' names as a group holds them."""
        parts = {name for names in self.tuples.values() for name in names}
        held = {name: value for name, value in values.items() if name not in parts}
        for held_as, names in self.tuples.items():
            if any(name in values for name in names):
                held[held_as] = tuple(values[name] for name in names)
        return held

    def held_as(self, name: str) -> tuple[str, int | None]:
        """Under which key a group holds an option, and at which place of a tuple."""
        for held_as, names in self.tuples.items():
            if name in names:
                return held_as, names.index(name)
        return name, None

    def held(self, group: dict[str, Any], name: str) -> Any:
        """What a group holds for an option."""
        key, place = self.held_as(name)
        return group[key] if place is None else group[key][place]

    def entry(self, group: dict[str, Any], name: str, value: Any) -> tuple[str, Any]:
        """Key and value of a group in which an option has another value."""
        key, place = self.held_as(name)
        if place is None:
            return key, value
        return key, (*group[key][:place], value, *group[key][place + 1 :])

    def live(self, values: Values) -> list[str]:
        """The tensors of state that an update with these values works on."""
        return [name for name, is_live in self.slots.items() if is_live(values)]

    def always_live(self) -> list[str]:
        """Those that every update works on."""
        return [name for name, is_live in self.slots.items() if is_live is _always]


def _always(values: Values) -> bool:
    return True


def _has_momentum(values: Values) -> bool:
    return bool(values["momentum"] != 0.0)


def _settled_sgd(values: Values) -> None:
    if values["nesterov"]:
        values["dampening"] = 0.0
        if isinstance(values["momentum"], (int, float)) and values["momentum"] == 0.0:
            values["momentum"] = 0.9


def _sometimes(probability: float) -> Callable[[Random], bool]:
    return lambda rng: rng.random() < probability


def _one_of(*values: float) -> Callable[[Random], float]:
    return lambda rng: rng.choice(values)


NO_NUMBERS = [float("nan"), float("inf"), "0.1", None, True, 1 + 2j]
NO_FLAGS = ["False", "True", "", 0, 1, None, torch.tensor(True)]
_NEGATIVE = [-1e-9, *NO_NUMBERS]
_NOT_BELOW_ONE = [-0.1, 1.0, *NO_NUMBERS]
_NOT_UP_TO_ONE = [-0.1, 1.0 + 1e-12, *NO_NUMBERS]
_NO_BETAS = [0.9, None, (), (0.9,), (0.9, 0.99, 0.999), "0.9, 0.99", {0.9: 0.99}]

_MAXIMIZE: Draws = {"maximize": _sometimes(0.2)}
_EVERY_WRONG = {"lr": _NEGATIVE, "weight_decay": _NEGATIVE, "maximize": NO_FLAGS}
_EPS = _one_of(1e-8, 1e-8, 1e-3, 0.0)

_ADAM = Rule(
    fused=fastlr.FusedAdam,
    cyclic=fastlr.FusedCyclicAdam,
    torch=torch.optim.Adam,
    scheduled={"lr": 0.3, "beta1": 0.97, "beta2": 0.999, "weight_decay": 0.1},
    options={
        "eps": _EPS,
        "amsgrad": _sometimes(0.3),
        "decoupled_weight_decay": _sometimes(0.3 if ADAM_DECOUPLES else 0.0),
        **_MAXIMIZE,
    },
    tuples={"betas": ("beta1", "beta2")},
    cycled="beta1",
    wrong={
        **_EVERY_WRONG,
        "beta1": _NOT_BELOW_ONE,
        "beta2": _NOT_BELOW_ONE,
        "betas": _NO_BETAS,
        "eps": _NEGATIVE,
        "amsgrad": NO_FLAGS,
        "decoupled_weight_decay": NO_FLAGS,
    },
    slots={
        "exp_avg": _always,
        "exp_avg_sq": _always,
        "max_exp_avg_sq": lambda values: bool(values["amsgrad"]),
    },
    averages=("exp_avg",),
)


def _without(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


RULES = {
    "sgd": Rule(
        fused=fastlr.FusedSGD,
        cyclic=fastlr.FusedCyclicSGD,
        torch=SGD,
        scheduled={"lr": 0.3, "momentum": 0.97, "weight_decay": 0.1},
        options={
            "dampening": _one_of(0.0, 0.0, 0.3, -0.5),
            "nesterov": _sometimes(0.3),
            "decoupled_weight_decay": _sometimes(0.3),
            **_MAXIMIZE,
        },
        settled=_settled_sgd,
        fits=lambda values: not values["nesterov"] or values["dampening"] == 0.0,
        wrong={
            **_EVERY_WRONG,
            "momentum": _NOT_BELOW_ONE,
            "dampening": NO_NUMBERS,
            "nesterov": NO_FLAGS,
            "decoupled_weight_decay": NO_FLAGS,
        },
        slots={"momentum_buffer": _has_momentum},
        averages=("momentum_buffer",),
        counts=False,
        begins_with_gradient=True,
    ),
    "adam": _ADAM,
    "adamw": replace(
        _ADAM,
        fused=fastlr.FusedAdamW,
        cyclic=fastlr.FusedCyclicAdamW,
        torch=torch.optim.AdamW,
        options=_without(_ADAM.options, "decoupled_weight_decay"),
    ),
    "rmsprop": Rule(
        fused=fastlr.FusedRMSprop,
        cyclic=None,
        torch=torch.optim.RMSprop,
        scheduled={"lr": 0.1, "alpha": 1.0, "momentum": 0.97, "weight_decay": 0.1},
        options={"eps": _EPS, "centered": _sometimes(0.4), **_MAXIMIZE},
        wrong={
            **_EVERY_WRONG,
            "alpha": _NOT_UP_TO_ONE,
            "momentum": _NOT_BELOW_ONE,
            "eps": _NEGATIVE,
            "centered": NO_FLAGS,
        },
        slots={
            "square_avg": _always,
            "momentum_buffer": _has_momentum,
            "grad_avg": lambda values: bool(values["centered"]),
        },
        averages=("momentum_buffer", "grad_avg"),
    ),
    "adagrad": Rule(
        fused=fastlr.FusedAdagrad,
        cyclic=None,
        torch=torch.optim.Adagrad,
        scheduled={"lr": 0.3, "weight_decay": 0.1},
        options={
            "lr_decay": _one_of(0.0, 0.0, 0.1),
            "initial_accumulator_value": _one_of(0.0, 0.0, 0.1, 2.0),
            "eps": _one_of(1e-10, 1e-10, 1e-3, 0.0),
            **_MAXIMIZE,
        },
        wrong={
            **_EVERY_WRONG,
            "lr_decay": _NEGATIVE,
            "initial_accumulator_value": _NEGATIVE,
            "eps": _NEGATIVE,
        },
        slots={"sum": _always},
        initial=lambda values: float(values["initial_accumulator_value"]),
        eager=True,
    ),
    "adadelta": Rule(
        fused=fastlr.FusedAdadelta,
        cyclic=None,
        torch=torch.optim.Adadelta,
        scheduled={"lr": 1.0, "rho": 1.0, "weight_decay": 0.1},
        options={"eps": _one_of(1e-6, 1e-6, 1e-3, 0.0), **_MAXIMIZE},
        wrong={**_EVERY_WRONG, "rho": _NOT_UP_TO_ONE, "eps": _NEGATIVE},
        slots={"square_avg": _always, "acc_delta": _always},
    ),
    "lion": Rule(
        fused=fastlr.FusedLion,
        cyclic=None,
        torch=Lion,
        scheduled={"lr": 0.1, "beta1": 0.97, "beta2": 0.999, "weight_decay": 0.1},
        options=_MAXIMIZE,
        tuples=_ADAM.tuples,
        wrong={**_EVERY_WRONG, "beta1": _NOT_BELOW_ONE, "beta2": _NOT_BELOW_ONE, "betas": _NO_BETAS},
        slots={"exp_avg": _always},
        averages=("exp_avg",),
        counts=False,
    ),
}


def rule_of(seed: int) -> Rule:
    """The rule of a seed's run; of three in a row the same, as the emulated CUDA has three orders."""
    return list(RULES.values())[seed // 3 % len(RULES)]
