"""Checks of arguments, which every part of the package shares."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, SupportsFloat

import numpy as np
import torch

from fastlr import _core

ENDLESS: int = _core.ENDLESS


def describe(value: object) -> str:
    if not isinstance(value, (int, float)):
        return f"{value!r} ({type(value).__name__})"
    try:
        return repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        return f"an integer of {int(value).bit_length()} bits"


def _is_numeric(value: object) -> bool:
    """Whether ``float()`` would take a value for what it is, and no flag or text, or a complex number's real
    part; also where it stands in an array or a tensor."""
    if isinstance(value, (bool, str, bytes, bytearray, memoryview, complex)):
        return False
    dtype = getattr(value, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype is not torch.bool and not dtype.is_complex
    return getattr(dtype, "kind", "f") not in "bcSUOmM"


def real(name: str, value: SupportsFloat, low: float = 0.0, *, above: bool = False) -> float:
    """A finite number >= low (or > low), as a float."""
    try:
        number = float(value) if _is_numeric(value) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of many elements
        number = math.nan
    if not math.isfinite(number) or number < low or (above and number == low):
        bound = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {describe(value)}")
    return number


def number(name: str, value: object, expected: str = "a number", remedy: str = "") -> float:
    """A real number, also NumPy's, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be {expected}, got {describe(value)}{remedy}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {describe(value)}, beyond any float") from None


def count(name: str, value: object, low: int = 1) -> int:
    """An integer >= low that a 64-bit clock can hold."""
    wrong = f"{name} must be an integer >= {low}, got {describe(value)}"
    if not _is_numeric(value):
        raise ValueError(wrong)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(wrong) from None
    if not low <= number < ENDLESS:
        raise ValueError(wrong + (", beyond a 64-bit clock" if number >= ENDLESS else ""))
    return number


def index(name: str, value: object, size: int) -> int:
    """A place in a list of ``size`` items, counted from the front."""
    try:
        place = operator.index(value) if _is_numeric(value) else -1  # type: ignore[arg-type]
    except TypeError:
        place = -1
    if not 0 <= place < size:
        raise ValueError(f"{name} must be in 0 .. {size - 1}, got {describe(value)}")
    return place


def flag(name: str, value: object) -> bool:
    """True or False, also NumPy's."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {describe(value)}")
    return bool(value)


def within(name: str, value: SupportsFloat, low: float, high: float) -> float:
    """A number in [low, high], as a float."""
    try:
        number = real(name, value, low)
    except ValueError:
        number = math.inf
    if number > high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {describe(value)}")
    return number


def items(name: str, value: Iterable[Any]) -> tuple[Any, ...]:
    """The items of a list, tuple or array, in order."""
    try:
        if isinstance(value, (Mapping, AbstractSet, str, bytes)):  # of keys, of no order, of characters
            raise TypeError
        return tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be a sequence, got {describe(value)}") from None


def choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """One of some words, as a plain string."""
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {describe(value)}")
    return str(value)


def plain(value: Any) -> Any:
    """A value with NumPy's numbers, strings and arrays as Python's, which a checkpoint can hold."""
    if isinstance(value, (np.generic, np.ndarray)):
        return float(value) if isinstance(value, np.longdouble) else value.tolist()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def texts(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """Strings; one alone would be taken for its letters."""
    if isinstance(value, str):
        raise TypeError(
            f"{name} must be a sequence of strings, got {value!r}; for one of them pass [{value!r}]"
        )
    strings = items(name, value)
    for string in strings:
        text(f"each of {name}", string)
    return strings


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {describe(value)}")
    return value


def is_sequence(value: object) -> bool:
    """Whether it is a list, a tuple or what stands for one, as in a hydra configuration; no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def vector(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Real numbers in one dimension, as an array of its own; from lists, arrays and tensors."""
    if is_sequence(values):
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        if any(isinstance(value, bool) for value in values):
            raise TypeError(f"{name} must hold real numbers, got bool")
    elif hasattr(values, "tolist") and not isinstance(values, np.ndarray):
        values = values.tolist()  # of a tensor of any type, on any device
    try:
        array = np.asarray(values)
        if array.dtype == object:
            strange = [v for v in array.flat if isinstance(v, bool) or not isinstance(v, numbers.Real)]
            if strange:
                raise TypeError(f"{name} must hold real numbers, got {describe(strange[0])}")
            array = array.astype(np.float64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} must hold real numbers in one dimension: {error}") from error
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    return array.astype(np.float64)


def file_name(name: str, value: object) -> str:
    """The path of a file."""
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if isinstance(path, str):
            if not path:
                raise ValueError(f"{name} must name a file, got ''")
            return path
    raise TypeError(f"{name} must be a string or a pathlib.Path, got {describe(value)}")


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
