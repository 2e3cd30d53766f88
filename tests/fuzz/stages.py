"""What the runs of steps.py know of the options that every optimizer takes, whatever its rule.

They are drawn from numbers of their own, ``Run.stage_rng``, so that what a seed draws of its rule does not
depend on them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import fastlr
from fuzz.halves import HALVES, RESTS, joined, offsets, random_bits, rounded_by_chance, split
from fuzz.memory import (
    assert_twins,
    rounded,
)
from fuzz.rules import NO_FLAGS, NO_NUMBERS

if TYPE_CHECKING:
    from fuzz.steps import Group, Pair, Run

EMA = "ema"
MASTER = "master"
TOP_DECAY = 0.999
ALWAYS_DECOUPLED = (fastlr.FusedAdamW, fastlr.FusedLion)

# Values that no step takes.
WRONG: dict[str, list[Any]] = {
    "ema_decay": [-0.1, 1.0, *(value for value in NO_NUMBERS if value is not None)],
    "ema_warmup": NO_FLAGS,
    "ema_dtype": [torch.bfloat16, "float32"],
    "max_grad_value": [0.0, -0.1, *(value for value in NO_NUMBERS if value is not None)],
    "cautious": NO_FLAGS,
    "master_weights": NO_FLAGS,
    "stochastic_rounding": NO_FLAGS,
    "rounding_seed": [-1e-9, 2.0**32, *NO_NUMBERS],
}


# -- averages ----------------------------------------------------------------------------------------


@dataclass
class Averaging:
    """What a group is told of averages.

    Attributes:
        decay: a number, (schedule, its zero) or None.
    """

    decay: Any = None
    warmup: bool = False
    dtype: torch.dtype | None = torch.float32

    def given(self) -> dict[str, Any]:
        decay = self.decay[0] if isinstance(self.decay, tuple) else self.decay
        return {"ema_decay": decay, "ema_warmup": self.warmup, "ema_dtype": self.dtype}

    def kept_in(self, dtype: torch.dtype) -> torch.dtype:
        """The type of a parameter's average."""
        return torch.float32 if self.dtype is not None and dtype in HALVES else dtype


def averaging(run: Run) -> Averaging:
    """Of a new group."""
    rng = run.stage_rng
    decay = run.new_owner(TOP_DECAY, run.clock, rng) if rng.random() < 0.6 else None
    return Averaging(decay, decay is not None and rng.random() < 0.4, rng.choice([None, torch.float32]))


@dataclass
class Average:
    """A parameter's, as its twin is kept: reals of the type that is computed in."""

    values: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, pair: Pair, dtype: torch.dtype) -> Average:
        return cls(rounded(pair.theirs.detach(), dtype).clone(), dtype)

    def follow(self, values: torch.Tensor, decay: float) -> None:
        self.values = rounded(self.values.lerp(values, 1 - decay), self.dtype)

    def convert(self, dtype: torch.dtype) -> None:
        self.values, self.dtype = rounded(self.values, dtype), dtype


# -- bounds, cautious decay, and how halves are kept -----------------------------------------------------


@dataclass
class Staging:
    """What a group is told of the stages that have no schedule."""

    max_grad_value: float | None = None
    cautious: bool = False
    master_weights: bool = False
    stochastic_rounding: bool = False
    rounding_seed: float = 0.0

    def given(self) -> dict[str, Any]:
        return dict(vars(self))

    def has_master(self, dtype: torch.dtype) -> bool:
        return self.master_weights and dtype in HALVES

    def clip(self, gradient: torch.Tensor, inverse: float) -> torch.Tensor:
        """A gradient, as reals of what is computed in, that still carries its scale."""
        if self.max_grad_value is None:
            return gradient
        kind = np.float64 if gradient.dtype is torch.float64 else np.float32
        bound = float(kind(self.max_grad_value) / kind(inverse))
        return gradient.clamp(-bound, bound)

    def widen(self, pair: Pair) -> None:
        """Makes a parameter's twin its master, for an update."""
        if self.has_master(pair.dtype):
            pair.theirs.data = joined(pair.theirs.data, pair.rest, pair.dtype)

    def keep(self, pair: Pair, updates: int, place: int) -> torch.Tensor:
        """Makes its twin what the parameter stores after an update, and returns what averages follow.

        Args:
            updates: applied before.
            place: of the parameter among the optimizer's.
        """
        if self.has_master(pair.dtype):
            master = pair.theirs.data
            pair.theirs.data, pair.rest = split(master, pair.dtype)
            return master
        if self.stochastic_rounding and pair.dtype is torch.bfloat16:
            random = random_bits(self.rounding_seed, updates, place, offsets(pair.ours))
            pair.theirs.data = rounded_by_chance(pair.theirs.data, random)
        else:
            pair.theirs.data = rounded(pair.theirs.data, pair.dtype)
        return pair.theirs.data


def staging(run: Run, group: Group) -> Staging:
    """Of a new group."""
    rng = run.stage_rng
    made = Staging(drawn_bound(rng), decouples(run, group) and rng.random() < 0.5)
    made.master_weights, made.stochastic_rounding = rng.choice(keepings(group))
    made.rounding_seed = drawn_seed(rng)
    return made


def drawn_bound(rng: Random) -> float | None:
    return rng.choice([*[None] * 6, 1e-40, 1e-3, 0.5, rng.uniform(0.01, 3.0), 1e6])


def drawn_seed(rng: Random) -> float:
    return rng.choice([0.0, 1.0, 7.5, float(rng.randrange(2**32))])


def keepings(group: Group) -> list[tuple[bool, bool]]:
    """What may stand as master_weights and stochastic_rounding in a group."""
    by_chance = [] if any(pair.dtype is torch.float16 for pair in group.pairs) else [(False, True)] * 2
    return [(False, False), (True, False), *by_chance]


def decouples(run: Run, group: Group) -> bool:
    """Whether the rule's weight decay shrinks parameters, and may be cautious."""
    return run.rule.fused in ALWAYS_DECOUPLED or bool(group.options.get("decoupled_weight_decay", False))


def decay_cautiously(run: Run, group: Group, pair: Pair) -> None:
    """Of a twin with its gradient: shrinks what the rule, which then has no decay, moves towards zero."""
    values = run.values(group)
    zeros = torch.nn.Parameter(torch.zeros_like(pair.theirs))
    moves = run.like_reference([{**values, "weight_decay": 0.0, "params": [zeros]}])
    moves.state[zeros] = copy.deepcopy(run.reference.state.get(pair.theirs, {}))
    zeros.grad = pair.theirs.grad
    moves.step()
    p, way = pair.theirs.data, zeros.data
    is_opposed = ((way > 0) & (p > 0)) | ((way < 0) & (p < 0))
    p.copy_(torch.where(is_opposed, p, p * (1 - values["lr"] * values["weight_decay"])))


def check_master(number: int, pair: Pair, found: torch.Tensor | None) -> None:
    assert (found is None) == (pair.rest is None), f"master of parameter {number}"
    if found is not None and pair.rest is not None:
        assert_twins(f"master of parameter {number}", found, pair.rest, RESTS[pair.dtype])


# -- the norm ----------------------------------------------------------------------------------------


@dataclass
class Limits:
    """What an optimizer is told of the gradients' norm."""

    max_grad_norm: float | None
    nonfinite: str

    @classmethod
    def drawn(cls, rng: Random) -> Limits:
        limit = rng.choice([None, None, None, 1e-3, 1.0, rng.uniform(0.1, 30.0), 1e6])
        return cls(limit, rng.choice(["skip", "skip", "raise"]))

    def given(self) -> dict[str, Any]:
        return {"max_grad_norm": self.max_grad_norm, "nonfinite": self.nonfinite}

    def clip(self, norm: float) -> float:
        """What gradients of that norm are multiplied with."""
        return 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (norm + 1e-6))


def spoil(rng: Random, gradient: torch.Tensor) -> None:
    if gradient.numel():
        place = rng.randrange(gradient.numel())
        gradient.view(-1)[place] = rng.choice([math.inf, -math.inf, math.nan])


# -- GradScaler --------------------------------------------------------------------------------------


class Probe(torch.optim.Optimizer):
    """Tells whether it was stepped."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        super().__init__(parameters, {})

    def step(self, closure: None = None) -> bool:  # type: ignore[override]
        return True


class Scalers:
    """fastlr's GradScaler, and torch's, which sees the same gradients."""

    def __init__(self, rng: Random) -> None:
        self.options = {
            "init_scale": rng.choice([1.0, 1024.0, 65536.0, 3000.0]),
            "growth_factor": rng.choice([2.0, 2.0, 1.5]),
            "backoff_factor": rng.choice([0.5, 0.5, 0.3]),
            "growth_interval": rng.choice([1, 2, 3]),
        }
        self.device = torch.get_default_device().type
        self.ours: Any = self.ready(fastlr.GradScaler(self.device, **self.options))
        self.theirs: Any = self.ready(torch.amp.GradScaler("cpu", **self.options))

    @staticmethod
    def ready(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
        """Which a scaler is when it has scaled something."""
        scaler.scale(torch.zeros((), device=scaler._device))
        return scaler

    def torchs_applies(self, gradients: list[torch.Tensor]) -> bool:
        """Whether torch's has an optimizer with those gradients make an update."""
        probe = Probe(gradients)
        self.theirs.unscale_(probe)
        applied = self.theirs.step(probe) is True
        self.theirs.update()
        return applied
