"""Step and whole update beside PyTorch's on the device, with a copy's bandwidth in the same rounds."""

from __future__ import annotations

import itertools
import sys

import gpu_step
import torch

from fastlr.bench.models import PARAMETER_SETS

from . import report
from .device import open_device
from .environment import environment

RULES = ("sgd", "adamw")

# One tensor each: how well the work of a persistent grid is dealt out.
SINGLE = {f"{n} M in one tensor": [(n * 1_000_000,)] for n in (1, 5, 25, 100)}
ALL_SETS = PARAMETER_SETS | SINGLE
# What each case is measured on: each stage alone, where it is bytes that count.
LARGEST = "100 M in one tensor"
LARGE = ("ResNet-50", "GPT-2 small")
SETS = {
    "step": list(ALL_SETS),
    "clip by value": [LARGEST],
    "clip": [LARGEST],
    "average": [LARGEST],
    "clip, average": ["MLP, 6 tensors", "161 tensors of 64", "1,000 tensors of 64", *LARGE],
    "whole": ["161 tensors of 64", *LARGE],
}


def main() -> int:
    parser = report.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per set, at least 12 rounds")
    options = parser.parse_args()
    made = report.Report(options.result)
    shapes = {"tiny": [(64,)] * 5} if options.small else ALL_SETS
    cases = [(case, name) for case, names in SETS.items() for name in (shapes if options.small else names)]
    made.figures = environment(options.backend)
    made.figures["cases"] = cases
    made.figures["results"] = []
    device = open_device(options.backend)
    for (case, name), rule in itertools.product(cases, RULES):
        made.figures["results"] += gpu_step.run(device, rule, case, {name: shapes[name]}, options.seconds)
        made.save()
        if options.backend == "cuda":
            torch.cuda.empty_cache()
    told = []
    for found in made.figures["results"]:
        us = {name: times["us"] for name, times in found["times"].items()}
        told.append(f"{found['rule']} {found['case']} {found['set']}")
        told[-1] += f" {min(us['torch fused'], us['torch foreach']) / us['fastlr']:.2f}"
        if "fastlr, graph" in us:
            told[-1] += f" ({us['torch fused, graph'] / us['fastlr, graph']:.2f})"
    made.headline = "torch's fastest step over fastlr's (in graphs): " + ", ".join(told)
    made.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
