"""What fastlr was built with, what it runs on, and what is not in use: as one pastes it into a report."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

import fastlr
from fastlr._build import processor

__all__ = ["examined"]

# They decide how many threads, which code or which devices there are.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
)
# Extras for those who work on fastlr itself.
_DEVELOPERS = ("docs", "frameworks", "lint", "test")


def examined() -> dict[str, Any]:
    """What stands in a report, by its section, in plain numbers, strings, lists and dicts.

    Returns:
        ``fastlr``: what :func:`fastlr.build_info` says; ``torch``: its version, the CUDA or ROCm that it was
        built with, and the GPUs that it finds; ``machine``: Python, system, processor, and the environment's
        variables that count; ``packages``: the version of each optional package, None where it is missing;
        ``not_in_use``: what this machine or PyTorch could give and fastlr does without, with the reason.

    >>> report = examined()
    >>> list(report)
    ['fastlr', 'torch', 'machine', 'packages', 'not_in_use']
    """
    info = fastlr.build_info()
    del info["torch"]
    devices = _devices()
    return {
        "fastlr": info,
        "torch": {
            "version": torch.__version__,
            "built_with": _built_with(),
            "devices": devices,
        },
        "machine": {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "system": platform.platform(),
            "processor": processor(),
            "cores": _cores(),
            **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        },
        "packages": _packages(),
        "not_in_use": _not_in_use(info, devices),
    }


def table(report: dict[str, Any]) -> list[list[str]]:
    """What :func:`examined` returned as rows of text: section, name, value."""
    rows = []
    for section in ("fastlr", "torch", "machine", "packages"):
        for name, value in report[section].items():
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
            if section == "packages" and value is None:
                text = "not installed"
            shown = name if section == "packages" or name.isupper() else name.replace("_", " ")
            rows.append([section, shown, text])
    return rows


def _built_with() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "neither CUDA nor ROCm"


def _cores() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{d.name} ({d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in found]


def _packages() -> dict[str, str | None]:
    """The version of each package that an extra for users asks for, None where it is missing."""
    found: dict[str, str | None] = {}
    for line in requires("fastlr") or ():
        requirement, _, condition = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", condition)
        name = re.split(r"[\s<>=!~\[(]", requirement.strip())[0]
        if extra is None or extra[1] in _DEVELOPERS or name == "fastlr":
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return dict(sorted(found.items()))


def _not_in_use(info: dict[str, Any], devices: list[str]) -> list[str]:
    said = []
    if not info["cuda"]:
        why = f"CUDA kernels: {info['cuda_status']}"
        said.append(f"{why}; there is no GPU that PyTorch could use here" if not devices else why)
    elif not devices:
        why = "PyTorch finds no GPU" if torch.version.cuda else "this PyTorch was built without CUDA"
        said.append(f"CUDA kernels: {why} (driver's CUDA: {info['cuda_driver']})")
    if info["simd_level"] != info["simd_levels"][-1]:
        said.append(f"SIMD level {info['simd_levels'][-1]}: {info['simd_level']} was asked for")
    if info["openmp_runtime"] is None:
        said.append("threads: PyTorch loaded no OpenMP runtime that was found, so every step runs on one")
    elif info["threads"] < _cores():
        said.append(f"threads: PyTorch has {info['threads']} for {_cores()} cores; torch.set_num_threads()")
    if info["tensor_access"] == "data_ptr()":
        said.append("DLPack exchange API: PyTorch has it from 2.10 on; tensors are read one by one without")
    return said
