"""What becomes of an optimizer or a scheduler whose place another one has taken."""

from __future__ import annotations

from types import MethodType
from typing import Any, NoReturn

import torch


def refuse_steps(old: Any, what_happened: str) -> None:
    """Lets a left-over ``step()`` raise RuntimeError. Nothing else of the object changes; copies can step.

    Args:
        old: an optimizer, or a scheduler.
        what_happened: in words, and what to call instead.
    """
    name = type(old).__name__

    def step(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"step() of a {name} that {what_happened}")

    step.replaced = True  # type: ignore[attr-defined]
    if isinstance(old, torch.optim.Optimizer):
        old.step = MethodType(step, old)  # type: ignore[method-assign]  # not in its state, nor in copies
        return
    # A scheduler's state_dict is all that it holds itself, so that this has to be its class's.
    kind = type(old)
    methods = {name: step for name in ("step", "step_update") if hasattr(kind, name)}
    copied = {"__reduce__": lambda self: (object.__new__, (kind,), vars(self))}
    old.__class__ = type(kind.__name__, (kind,), {**methods, **copied, "__module__": kind.__module__})


def is_replaced(old: Any) -> bool:
    """Whether another one has taken its place."""
    return getattr(old.step, "replaced", False)
