"""PyTorch's square roots, rounded correctly.

Where PyTorch takes them from MKL (builds for x86, tensors of more than a few dozen elements), 0.7 % of them
are one unit in the last place off. With NumPy's in their place, which are IEEE's, PyTorch's plain loops can
be compared to the bit.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CorrectRoots(TorchDispatchMode):
    """Within it, ``sqrt`` and ``sqrt_`` of tensors on the CPU are rounded correctly."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.sqrt.default:
            return root(args[0])
        if function is torch.ops.aten.sqrt_.default:
            return args[0].copy_(root(args[0]))
        return function(*args, **(kwargs or {}))


def root(x: torch.Tensor) -> torch.Tensor:
    with np.errstate(invalid="ignore"):  # of a negative number, which is NaN
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))


def with_correct_roots(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, whose steps take correctly rounded roots from now on."""
    step = optimizer.step

    def stepping(_: Any, *arguments: Any, **keywords: Any) -> Any:
        with CorrectRoots():
            return step(*arguments, **keywords)

    optimizer.step = MethodType(stepping, optimizer)  # type: ignore[method-assign]
    return optimizer
