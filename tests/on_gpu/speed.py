"""The step beside PyTorch's on the device, with a copy's bandwidth in the same rounds."""

from __future__ import annotations

import sys

import gpu_step
import torch
from models import PARAMETER_SETS

from . import report
from .device import open_device
from .environment import environment

# One tensor each: how well the work of a persistent grid is dealt out.
SINGLE = {f"{n} M in one tensor": [(n * 1_000_000,)] for n in (1, 5, 25, 100)}


def main() -> int:
    parser = report.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="per set, at least 12 rounds")
    options = parser.parse_args()
    made = report.Report(options.result)
    sets = {"tiny": [(64,)] * 5} if options.small else PARAMETER_SETS | SINGLE
    made.figures = environment(options.backend)
    made.figures["results"] = []
    device = open_device(options.backend)
    for name, shapes in sets.items():
        made.figures["results"] += gpu_step.run(device, {name: shapes}, options.seconds)
        made.save()
        if options.backend == "cuda":
            torch.cuda.empty_cache()
    ratios = {}
    for found in made.figures["results"]:
        times = found["times"]
        fastest = min(r["ratio"] for name, r in times.items() if name.startswith("torch"))
        ratios[found["set"]] = round(fastest, 2)
    made.headline = "times faster than torch's fastest: " + ", ".join(f"{n} {r}" for n, r in ratios.items())
    made.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
