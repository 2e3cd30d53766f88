"""What the runs of steps.py know of the options that every optimizer takes, whatever its rule.

They are drawn from numbers of their own, ``Run.stage_rng``, so that what a seed draws of its rule does not
depend on them.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers import through_file

import fastlr
from fuzz.memory import as_reals, assert_twins, laid_out, random_values, rounded, same_bits
from fuzz.rules import NO_FLAGS, NO_NUMBERS

if TYPE_CHECKING:
    from fuzz.steps import Pair, Run

EMA = "ema"
HALVES = (torch.float16, torch.bfloat16)
TOP_DECAY = 0.999

# Values that no step takes.
WRONG: dict[str, list[Any]] = {
    "ema_decay": [-0.1, 1.0, *(value for value in NO_NUMBERS if value is not None)],
    "ema_warmup": NO_FLAGS,
    "ema_dtype": [torch.bfloat16, "float32"],
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

    def follow(self, pair: Pair, decay: float) -> None:
        self.values = rounded(self.values.lerp(pair.theirs.detach(), 1 - decay), self.dtype)

    def convert(self, dtype: torch.dtype) -> None:
        self.values, self.dtype = rounded(self.values, dtype), dtype


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


# -- what people do between steps ----------------------------------------------------------------------


def enter_averages(run: Run) -> None:
    optimizer, rng = run.optimizer, run.stage_rng
    run.note("averaged_weights()")
    if all(group.averaging.decay is None for group in run.groups):
        with pytest.raises(ValueError, match="keeps no averages"), optimizer.averaged_weights():
            pass
        return
    before = [pair.ours.detach().clone() for pair in run.pairs]
    leaves = rng.choice([nullcontext(), pytest.raises(KeyError)])
    with leaves, optimizer.averaged_weights():
        values = iter(before)
        for group in run.groups:
            for pair in group.pairs:
                value = next(values)
                if pair.shares:  # which is what was copied last
                    continue
                if pair.average is None or group.averaging.decay is None:
                    assert same_bits(value, pair.ours.detach()), "it has no average"
                else:
                    expected = rounded(pair.average.values, pair.dtype)
                    assert_twins("averaged", pair.ours.detach(), expected, pair.dtype)
        if rng.random() < 0.3:
            with pytest.raises(RuntimeError, match=r"inside averaged_weights\(\)"):
                optimizer.step()
        if rng.random() < 0.3:
            run.check_slots()
        if not isinstance(leaves, nullcontext):
            raise KeyError
    for value, pair in zip(before, run.pairs, strict=True):
        assert same_bits(value, pair.ours.detach()), "it has not come back"


def operate_on_average(run: Run) -> None:
    """Moved, laid out otherwise, written, deleted."""
    averaged = [pair for pair in run.pairs if pair.average is not None]
    if not averaged:
        return
    rng = run.stage_rng
    pair = rng.choice(averaged)
    average, entry = pair.average, run.optimizer.state[pair.ours]
    assert average is not None
    kind = rng.choice(["moved", "laid out", "written", "deleted", "None", "new"])
    run.note(f"average of parameter {[p is pair for p in run.pairs].index(True)}: {kind}")
    if kind == "moved":
        entry[EMA].data = entry[EMA].data.clone()
    elif kind == "laid out":
        entry[EMA] = laid_out(rng, entry[EMA].cpu())[0]
    elif kind == "written":
        entry[EMA].zero_()
        average.values.zero_()
    elif kind == "new":
        values = random_values(rng, entry[EMA].shape, entry[EMA].dtype)
        entry[EMA] = laid_out(rng, values)[0]
        average.values.copy_(as_reals(values))
    else:
        pair.average = entry[EMA] = None
        if kind == "deleted":
            del entry[EMA]


def convert_averages(run: Run) -> None:
    """By a file, to the type that a group asks for."""
    place = run.stage_rng.randrange(len(run.groups))
    averaging = run.groups[place].averaging
    averaging.dtype = None if averaging.dtype is not None else torch.float32
    run.note(f"group {place}: ema_dtype = {averaging.dtype}, and its own file loaded")
    run.optimizer.param_groups[place]["ema_dtype"] = averaging.dtype
    run.optimizer.load_state_dict(through_file(run.optimizer.state_dict()))
    run.convert_slots()


def set_decay(run: Run) -> None:
    rng = run.stage_rng
    place, start = rng.choice([None, rng.randrange(len(run.groups))]), rng.choice(["now", "zero"])
    zero: Callable[[fastlr.Schedule], int] = run.clock if start == "now" else lambda schedule: 0
    made = Averaging(run.new_owner(TOP_DECAY, zero, rng))
    run.note(f"set_schedule({made.given()['ema_decay']}, group={place}, start={start!r}) for ema_decay")
    run.optimizer.set_schedule(ema_decay=made.given()["ema_decay"], group=place, start=start)
    for group in run.groups if place is None else [run.groups[place]]:
        group.averaging.decay = made.decay


def set_by_hand(run: Run) -> None:
    rng = run.stage_rng
    place = rng.randrange(len(run.groups))
    own, averaging = run.optimizer.param_groups[place], run.groups[place].averaging
    if not isinstance(averaging.decay, tuple):
        drawn = rng.choice([None, 0.0, 0.5, rng.uniform(0.0, TOP_DECAY)])
        kind = rng.choice([float, np.float64, np.float32, torch.tensor])
        own["ema_decay"] = averaging.decay = None if drawn is None else kind(drawn)
    if rng.random() < 0.3:
        averaging.warmup = not averaging.warmup
        own["ema_warmup"] = rng.choice([bool, np.bool_])(averaging.warmup)
    run.note(f"group {place}: {averaging.given()}")


def set_limits(run: Run) -> None:
    run.limits = Limits.drawn(run.stage_rng)
    run.note(f"{run.limits}")
    for name, value in run.limits.given().items():
        setattr(run.optimizer, name, value)


def exchange_scalers(run: Run) -> None:
    """Each loads the other's file, or is copied."""
    scalers = run.scalers
    way = run.stage_rng.choice(["files", "deepcopy", "pickle"])
    run.note(f"the GradScalers through {way}")
    if way == "files":
        files = scalers.theirs.state_dict(), scalers.ours.state_dict()
        made = fastlr.GradScaler(scalers.device), torch.amp.GradScaler("cpu")
        for scaler, file in zip(made, files, strict=True):
            scaler.load_state_dict(file)
        scalers.ours, scalers.theirs = map(scalers.ready, made)
    elif way == "deepcopy":
        scalers.ours = scalers.ready(copy.deepcopy(scalers.ours))
    else:
        scalers.ours = scalers.ready(pickle.loads(pickle.dumps(scalers.ours)))


ACTIONS: tuple[Callable[[Run], None], ...] = (
    *(enter_averages, enter_averages, operate_on_average, operate_on_average, convert_averages, set_decay),
    *(set_by_hand, set_by_hand, set_limits, exchange_scalers),
)
