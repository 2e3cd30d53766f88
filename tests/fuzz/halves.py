"""How half parameters are kept between updates: what master weights and stochastic rounding make of float32
results, in NumPy and by the words of docs/numerics.md.

A half parameter's twin is float32: between updates it is what the parameter stores, and the master is put
together before an update. So whoever writes the parameter has written the master too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fuzz.memory import rounded, same_bits

HALVES = (torch.float16, torch.bfloat16)
# What is kept beside a parameter, so that the two are its master.
RESTS = {torch.bfloat16: torch.int16, torch.float16: torch.float32}

_NAN = 0x7FC00000
_INFINITY = 0x7F80  # as a bfloat16


def _bits(values: torch.Tensor) -> Any:
    """Of float32 numbers, as wide integers."""
    return np.asarray(values.numpy().view(np.uint32)).astype(np.int64)


def _numbers(bits: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(bits).astype(np.uint32).view(np.float32))


# -- masters -----------------------------------------------------------------------------------------


def joined(stored: torch.Tensor, rest: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The master of what a parameter stores, which begins as that."""
    if rest is None:
        return stored.clone()
    if dtype is torch.float16:
        is_its = rest.half().view(torch.int16) == stored.half().view(torch.int16)
        return torch.where(is_its, rest, stored)
    upper, lower = _bits(stored) >> 16, np.asarray(rest.numpy()).astype(np.int64)
    magnitude = upper & 0x7FFF
    is_older = ((magnitude == 0) & (lower < 0)) | ((magnitude >= _INFINITY) & (lower > 0))
    return _numbers((upper << 16) + np.where(is_older, 0, lower))


def split(master: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the parameter stores, and what is kept beside it."""
    if dtype is torch.float16:
        return rounded(master, dtype), master.clone()
    bits = np.where(np.isnan(master.numpy()), _NAN, _bits(master))
    lower = torch.from_numpy(np.asarray(bits & 0xFFFF).astype(np.uint16).view(np.int16))
    stored = _numbers(bits + 0x8000 >> 16 << 16)
    assert same_bits(joined(stored, lower, dtype), master), "the two are the master"
    return stored, lower


# -- stochastic rounding -------------------------------------------------------------------------------


def _hashed(x: int) -> int:
    """splitmix64's end."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    return x ^ x >> 31


def _all_hashed(x: Any) -> Any:
    """lowbias32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> np.uint32(shift)) * np.uint32(factor)
    return x ^ x >> np.uint32(16)


def offsets(parameter: torch.Tensor) -> Any:
    """Where each element lies in its parameter's memory, in elements from the first."""
    found = np.zeros((1,) * parameter.dim(), np.uint64)
    for dim, (n, stride) in enumerate(zip(parameter.shape, parameter.stride(), strict=True)):
        shape = [n if other == dim else 1 for other in range(parameter.dim())]
        found = found + np.arange(n, dtype=np.uint64).reshape(shape) * np.uint64(stride)
    return found


def random_bits(seed: float, updates: int, place: int, elements: Any) -> Any:
    """16 bits for each element of the parameter at this place, at the update after so many."""
    of_group = _hashed((_hashed(int(np.float64(seed).view(np.uint64))) + updates) % 2**64)
    key = _hashed((of_group + place) % 2**64)
    low, high = (np.asarray(part).astype(np.uint32) for part in (elements % 2**32, elements >> np.uint64(32)))
    with np.errstate(over="ignore"):
        inner = _all_hashed(low + np.uint32(key % 2**32))
        hashed = _all_hashed(inner + np.uint32(key >> 32) + high * np.uint32(0x9E3779B9))
    return hashed >> np.uint32(16)


def rounded_by_chance(values: torch.Tensor, random: Any) -> torch.Tensor:
    """To bfloat16 and back."""
    bits = np.where(np.isnan(values.numpy()), _NAN, _bits(values) + random.astype(np.int64))
    return _numbers(bits >> 16 << 16)
