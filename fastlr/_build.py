"""What was built and what is in use."""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastlr import _core


def build_info() -> dict[str, Any]:
    """What this build of fastlr contains, and what it uses on this machine.

    Returns:
        ``version``, ``torch``; ``compiler`` (its version); ``simd_level`` in use and the ``simd_levels``
        that this machine can run; ``threads``; ``openmp_runtime`` (the library that PyTorch loaded, None:
        every step runs on one thread); ``tensor_access`` (how tensors are read); ``cuda``: whether it
        contains CUDA kernels; ``cuda_status``: of which toolkit and architectures, or why not;
        ``cuda_driver``: the newest CUDA that this machine's driver supports, or "none".

    >>> import fastlr
    >>> fastlr.build_info()["tensor_access"] in ("DLPack exchange API", "data_ptr()")
    True
    """
    exchange = _core.exchange_enabled() and _core.exchange_available(torch.Tensor)
    return {
        "version": version("fastlr"),
        "torch": torch.__version__,
        **_core.build_info(),
        "threads": torch.get_num_threads(),
        "tensor_access": "DLPack exchange API" if exchange else "data_ptr()",
    }


_told: set[str] = set()


def tell_of_missing_cuda(parameters: Iterable[torch.Tensor]) -> None:
    """Warns, once, where a parameter lies on a GPU and this build has no CUDA: its first step will raise."""
    info = _core.build_info()
    if info["cuda"] or "cuda" in _told or not any(p.is_cuda for p in parameters):
        return
    _told.add("cuda")
    warnings.warn(
        "a parameter lies on a CUDA device, but this build of fastlr updates tensors on the CPU only: "
        f"{info['cuda_status']}. {_core.CUDA_REMEDY}",
        stacklevel=2,
    )


def processor() -> str:
    """The processor's name, as far as the system says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
