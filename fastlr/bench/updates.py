"""The whole update as fastlr and PyTorch's best pieces make it: what a benchmark steps in turn.

The whole update is what runs after backward(): taking GradScaler's scale out, clipping the gradients, the
step, an average of the weights, and the schedule. Of PyTorch there are the step in its forms, with
clip_grad_norm_(foreach=True), torch._foreach_lerp_ (what AveragedModel with get_ema_multi_avg_fn calls) and
CyclicLR; or, under ``COMPILED``, clipping, step and average compiled together, with the rate in a tensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import fastlr
from fastlr.bench.rules import CYCLE, Rule, Step

MAX_NORM = 1.0  # far below the norm of every set: all gradients are clipped
MAX_VALUE = 1.0  # of gradients about as large
EMA_DECAY = 0.999
SCALE = 1024.0

# What an update is made of beside the step and its schedule.
CASES: dict[str, tuple[str, ...]] = {
    "step": (),
    "unscale": ("unscale",),
    "clip by value": ("value",),
    "clip": ("clip",),
    "average": ("average",),
    "clip, average": ("clip", "average"),
    "whole": ("unscale", "clip", "average"),
}
COMPILED = "torch.compile"
TORCHS_SCALER = "fastlr, torch's scaler"
CONTENDERS = ("fastlr", TORCHS_SCALER, "torch fused", "torch foreach", COMPILED)

Parameters = list[torch.nn.Parameter]


def make_scaler(kind: type[torch.amp.GradScaler], device: torch.device, scale: float) -> torch.amp.GradScaler:
    """Whose scale stays as it is."""
    scaler = kind(device.type, init_scale=scale, growth_interval=2**31 - 1)
    scaler.scale(torch.zeros((), device=device))  # sets it up
    return scaler


def make_fastlr(
    rule: Rule,
    parameters: Parameters,
    stages: Sequence[str],
    scaler_kind: type[torch.amp.GradScaler],
    scale: float = SCALE,
) -> Step:
    options: dict[str, Any] = {}
    if "clip" in stages:
        options["max_grad_norm"] = MAX_NORM
    if "value" in stages:
        options["max_grad_value"] = MAX_VALUE
    if "average" in stages:
        options["ema_decay"] = EMA_DECAY
    optimizer = rule.optimizer(parameters, **options)
    if "unscale" not in stages:
        return optimizer.step
    scaler = make_scaler(scaler_kind, parameters[0].device, scale)

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()

    return update


def make_torch(
    rule: Rule,
    parameters: Parameters,
    stages: Sequence[str],
    form: dict[str, Any],
    *,
    made: Callable[[Step], Step] | None = None,
    scale: float = SCALE,
) -> Step:
    """
    Args:
        made: compiles or captures clipping, step and average.
    """
    # A rate that is a number would be compiled anew for every value, and captured with its present one.
    device = parameters[0].device
    lr = CYCLE["base_lr"] if made is None else torch.tensor(CYCLE["base_lr"], device=device)
    optimizer = rule.theirs(parameters, lr=lr, **rule.options, **form)  # type: ignore[call-arg]
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, **CYCLE, cycle_momentum=False)
    weights: list[torch.Tensor] = [*parameters]
    averages = [p.detach().clone() for p in weights]
    kinds = ("unscale", "value", "clip", "average")
    unscales, clips_values, clips, averages_weights = (stage in stages for stage in kinds)

    def clip() -> None:
        if clips_values:
            torch.nn.utils.clip_grad_value_(parameters, MAX_VALUE, foreach=True)
        if clips:
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)

    def average() -> None:
        if averages_weights:
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1.0 - EMA_DECAY)

    def all_pieces() -> None:
        clip()
        optimizer.step()
        average()

    together = all_pieces if made is None else made(all_pieces)
    scaler = make_scaler(torch.amp.GradScaler, device, scale)

    def update() -> None:
        if not unscales:
            together()
        elif made is not None:
            scaler.unscale_(optimizer)
            if not any(found.item() for found in scaler._found_inf_per_device(optimizer).values()):
                together()
            scaler.update()
        else:
            if clips or clips_values:
                scaler.unscale_(optimizer)
                clip()
            scaler.step(optimizer)
            scaler.update()
            average()
        schedule.step()

    return update


def make_contenders(
    rule: Rule, shapes: Sequence[tuple[int, ...]], stages: Sequence[str], *, compiled: bool = True
) -> tuple[list[torch.Tensor], dict[str, Parameters], dict[str, Step]]:
    """The gradients, which all share, and each contender's parameters and update."""
    gradients = [torch.randn(shape) for shape in shapes]
    if "unscale" in stages:
        torch._foreach_mul_(gradients, SCALE)
    models: dict[str, Parameters] = {}
    updates: dict[str, Step] = {}
    start = [torch.randn(shape) for shape in shapes]
    kinds = [name for name in CONTENDERS if name != TORCHS_SCALER or "unscale" in stages]
    for name in kinds:
        form = name.removeprefix("torch ")
        if (name == "torch fused" and not rule.has_fused) or (name == COMPILED and not compiled):
            continue
        parameters = models[name] = [torch.nn.Parameter(p.clone()) for p in start]
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        if name.startswith("fastlr"):
            scaler = torch.amp.GradScaler if name == TORCHS_SCALER else fastlr.GradScaler
            updates[name] = make_fastlr(rule, parameters, stages, scaler)
        elif name == COMPILED:
            updates[name] = make_torch(rule, parameters, stages, {}, made=torch.compile)
        else:
            updates[name] = make_torch(rule, parameters, stages, rule.forms[form])
    return gradients, models, updates


def turns(
    gradients: list[torch.Tensor], updates: Mapping[str, Step], repeats: int = 1
) -> dict[str, Callable[[], float]]:
    """Each contender's turn: the seconds of its update, over gradients that are restored before it.

    Args:
        repeats: updates of a turn, which gives the median of all but the first; one: that one's.
    """
    originals = [gradient.clone() for gradient in gradients]

    def turn(update: Step) -> float:
        durations = []
        for _ in range(repeats):
            torch._foreach_copy_(gradients, originals)
            begin = time.perf_counter()
            update()
            durations.append(time.perf_counter() - begin)
        return statistics.median(durations[repeats > 1 :])

    return {name: partial(turn, update) for name, update in updates.items()}
