"""The step beside PyTorch's on the device, with a copy's bandwidth in the same rounds."""

from __future__ import annotations

import itertools
import sys

import gpu_step
import torch
from models import PARAMETER_SETS

from . import report
from .device import open_device
from .environment import environment

RULES = ("sgd", "adamw")

# One tensor each: how well the work of a persistent grid is dealt out.
SINGLE = {f"{n} M in one tensor": [(n * 1_000_000,)] for n in (1, 5, 25, 100)}


def main() -> int:
    parser = report.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="per set, at least 12 rounds")
    options = parser.parse_args()
    made = report.Report(options.result)
    sets = {"tiny": [(64,)] * 5} if options.small else PARAMETER_SETS | SINGLE
    made.figures = environment(options.backend)
    made.figures["sets"] = list(sets)
    made.figures["results"] = []
    device = open_device(options.backend)
    for rule, (name, shapes) in itertools.product(RULES, sets.items()):
        made.figures["results"] += gpu_step.run(device, rule, {name: shapes}, options.seconds)
        made.save()
        if options.backend == "cuda":
            torch.cuda.empty_cache()
    told = []
    for found in made.figures["results"]:
        us = {name: times["us"] for name, times in found["times"].items()}
        eager = min(us["torch fused"], us["torch foreach"]) / us["fastlr"]
        graph = us["torch fused, graph"] / us["fastlr, graph"]
        told.append(f"{found['rule']} {found['set']} {eager:.2f} ({graph:.2f})")
    made.headline = "torch's fastest step over fastlr's (in graphs): " + ", ".join(told)
    made.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
