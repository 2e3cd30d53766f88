"""What there is: GPU, driver, PyTorch, compilers, and what this fastlr was built with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from . import report


def words(*command: str) -> str:
    """What a program prints, in a line; or why nothing."""
    if shutil.which(command[0]) is None:
        return "not installed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return " ".join((done.stdout + done.stderr).split()) or f"exit status {done.returncode}"


def environment(backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "backend": backend,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "nvcc": words("nvcc", "--version"),
        "compute-sanitizer": words("compute-sanitizer", "--version"),
        "ncu": words("ncu", "--version"),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": words(
                "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv"
            ),
        }
    return found


def main() -> int:
    options = report.arguments(__doc__).parse_args()
    made = report.Report(options.result)
    made.figures = environment(options.backend)
    for name, value in made.figures.items():
        print(f"{name:20} {value}")
    if options.backend == "cuda" and not torch.cuda.is_available():
        made.headline = "PyTorch finds no CUDA device"
        made.save()
        return 1
    made.headline = f"{made.figures['gpu'] or 'no GPU'}, PyTorch {torch.__version__}"
    made.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
