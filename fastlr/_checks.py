"""Checks of arguments, which every part of the package shares."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, SupportsFloat

import numpy as np
import torch

from fastlr import _core

ENDLESS: int = _core.ENDLESS


def describe(value: object) -> str:
    return f"{value!r} ({type(value).__name__})" if not isinstance(value, (int, float)) else repr(value)


def real(name: str, value: SupportsFloat, low: float = 0.0, *, above: bool = False) -> float:
    """A finite number >= low (or > low), as a float."""
    try:
        number = math.nan if _is_complex(value) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of many elements
        number = math.nan
    if (
        isinstance(value, (str, bytes, bool))
        or not math.isfinite(number)
        or number < low
        or (above and number == low)
    ):
        bound = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {describe(value)}")
    return number


def _is_complex(value: object) -> bool:
    """Whether a value is of a complex type, of which ``float()`` may take the real part alone."""
    if isinstance(value, torch.Tensor):
        return value.is_complex()
    return isinstance(value, (complex, np.complexfloating)) or (
        isinstance(value, np.ndarray) and np.iscomplexobj(value)
    )


def count(name: str, value: object, low: int = 1) -> int:
    """An integer >= low that a 64-bit clock can hold."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be an integer >= {low}, got {describe(value)}") from None
    if isinstance(value, bool) or not low <= number < ENDLESS:
        raise ValueError(f"{name} must be an integer >= {low}, got {describe(value)}")
    return number


def flag(name: str, value: object) -> bool:
    """True or False, also NumPy's."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {describe(value)}")
    return bool(value)


def items(name: str, value: Iterable[Any]) -> tuple[Any, ...]:
    """The items of a list, tuple or array."""
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be a sequence, got {describe(value)}") from None


def choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """One of some words, as a plain string: NumPy's could not be read from a checkpoint."""
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {describe(value)}")
    return str(value)


def function(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {describe(value)}")


def tensors(name: str, value: Iterable[Any]) -> list[torch.Tensor]:
    """At least one tensor, none of them twice."""
    if isinstance(value, (torch.Tensor, str, bytes, dict)):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(value).__name__}")
    found: list[torch.Tensor] = []
    seen: dict[int, int] = {}
    for index, tensor in enumerate(items(name, value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be tensors, got {describe(tensor)} at index {index}")
        first = seen.setdefault(id(tensor), index)
        if first != index:
            raise ValueError(f"{name} must be different tensors, got one of them at {first} and at {index}")
        found.append(tensor)
    if not found:
        raise ValueError(f"{name} must be at least one tensor, got none")
    return found


def saved_state(owner: str, value: object, keys: Iterable[str]) -> dict[str, Any]:
    """What a ``state_dict()`` returned, with all that it has to have."""
    if not isinstance(value, dict):
        raise ValueError(
            f"the state of {owner} must be the dict that state_dict() returned, got {describe(value)}"
        )
    missing = sorted(set(keys) - set(value))
    if missing:
        raise ValueError(f"the state of {owner} has {', '.join(missing)} too; got {list(value)}")
    return value
