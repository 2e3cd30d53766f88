"""DeepSpeed: what it does with an optimizer besides its updates is not taken for updates."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastlr.optim import Clock, FusedOptimizer


def initialize(*args: Any, **options: Any) -> Any:
    """``deepspeed.initialize(...)`` for a fastlr optimizer, whose clock then counts DeepSpeed's updates.

    Without ZeRO, DeepSpeed makes a step with zero gradients while it is set up for bfloat16 or float16; here
    that changes neither weights nor clock. ZeRO stage 3 steps each of its sub-groups by itself, of which
    every parameter group has one or more; here they make one update together, all with the same rate.

    Args:
        args, options: those of ``deepspeed.initialize``. ``optimizer`` is a fastlr optimizer, already made.

    Returns:
        What ``deepspeed.initialize`` returns.

    Raises:
        TypeError: the optimizer is none of fastlr's.
        ValueError: the optimizer is to clip a norm of which each process would see a part, under ZeRO.
    """
    import deepspeed

    bound = inspect.signature(deepspeed.initialize).bind(*args, **options)
    optimizer = bound.arguments.get("optimizer")
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"optimizer must be a fastlr optimizer, got {type(optimizer).__name__}; for others call "
            "deepspeed.initialize"
        )
    clock = optimizer.sync()
    made = deepspeed.initialize(*bound.args, **bound.kwargs)
    engine = made[0]
    if optimizer.sync() != clock:  # by the step on copies in float32, which decay moved
        optimizer.state.clear()
        optimizer.set_clock(**clock._asdict())
        engine.optimizer.refresh_fp32_params()
    stage = engine.zero_optimization_stage()
    if stage and optimizer.max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm must be None under ZeRO, got {optimizer.max_grad_norm!r} at stage {stage}: a "
            'process sees a part of the gradients; set "gradient_clipping" in DeepSpeed\'s configuration'
        )
    if stage == 3:
        engine.optimizer.step = _one_update(optimizer, engine.optimizer.step)
    return made


def _one_update(optimizer: FusedOptimizer, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of DeepSpeed's that steps the optimizer several times, all at the clock of the first."""

    @functools.wraps(step)
    def stepped(*args: Any, **options: Any) -> Any:
        clocks: list[Clock] = []

        def go_back(*_: Any) -> None:
            clocks.append(optimizer.sync())
            if len(clocks) > 1:
                optimizer.set_clock(**clocks[0]._asdict())

        hook = optimizer.register_step_pre_hook(go_back)
        try:
            result = step(*args, **options)
        finally:
            hook.remove()
        if len(clocks) > 1:  # whichever moved it furthest: what one skipped another may have applied
            clocks.append(optimizer.sync())
            furthest = type(clocks[0])(*map(max, zip(*clocks, strict=True)))
            optimizer.set_clock(**furthest._asdict())
        return result

    return stepped
