"""How long is an optimizer's step on a GPU, schedule included, beside torch.optim's and apex's, and how long
the whole update (see pipeline.py for what its cases are made of)?

Each turn is a number of steps between two CUDA events. Where a step's launches take longer than its
kernels, that is the time of the host; both are reported, so that it shows. "graph": a step captured once
and replayed; torch then needs its learning rate in a tensor, which CyclicLR fills between replays. With a
scaler there is none: whether to step is then the host's decision.

For the large sets the same rounds time a copy from device to device that moves as many bytes as the update.

    python benchmarks/gpu_step.py [--rules sgd adamw ...] [--cases step ...] [--sets NAME ...] [--seconds 6]
                                  [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from gpu import Gpu, Turn
from step import LARGE

import fastlr
from fastlr._files import write_text
from fastlr.bench.models import PARAMETER_SETS, Shape
from fastlr.bench.rounds import in_turn, summary
from fastlr.bench.rules import CYCLE, RULES, Rule, Step, cycled
from fastlr.bench.updates import CASES, TORCHS_SCALER, make_fastlr, make_torch

COPY = "copy"
# All contenders share the gradients, which torch's pieces write. With this scale they stay as they are, once
# clipped: numbers that end at zero would take other ways through divisions and roots.
SCALE = 1.0


class Device(Protocol):
    """What a measurement asks of the device; tests have one without a GPU."""

    device: torch.device

    def time(self, step: Step, repeats: int) -> Turn: ...

    def capture(self, step: Step) -> Step:
        """Steps a few times, and returns what replays a step."""
        ...


# -- contenders ----------------------------------------------------------------------------------


def find_apex() -> type[torch.optim.Optimizer] | None:
    """Its SGD; None where apex or its CUDA extension is missing."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedSGD
    except ImportError:
        return None
    return FusedSGD


def make_copy(device: torch.device, moved: int) -> Step:
    """Moves so many bytes: half of them read, half written."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)

    return step


def bytes_per_element(rule: Rule, stages: Sequence[str]) -> int:
    """That an update moves, of float32: an average is read and written, for a norm the gradient is read."""
    first = "clip" in stages or "unscale" in stages
    return rule.bytes_per_element + 8 * ("average" in stages) + 4 * first


def make_contenders(
    device: Device, rule: Rule, shapes: list[Shape], stages: Sequence[str] = ()
) -> dict[str, Step]:
    gradients = [torch.randn(shape, device=device.device) for shape in shapes]

    def model() -> list[torch.nn.Parameter]:
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device.device)) for shape in shapes]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        return parameters

    def ours(scaler: type[torch.amp.GradScaler] = fastlr.GradScaler) -> Step:
        return make_fastlr(rule, model(), stages, scaler, SCALE)

    steps = {"fastlr": ours()}
    if "unscale" in stages:
        steps[TORCHS_SCALER] = ours(torch.amp.GradScaler)
    else:
        steps["fastlr, graph"] = device.capture(ours())
    for form in ("fused", "foreach"):
        if form in rule.forms:
            steps[f"torch {form}"] = make_torch(rule, model(), stages, rule.forms[form], scale=SCALE)
    if rule.captured is not None and "unscale" not in stages:
        name = f"torch {next(iter(rule.captured))}, graph"
        steps[name] = make_torch(rule, model(), stages, rule.captured, made=device.capture)
    if rule is RULES["sgd"] and not stages and (apex := find_apex()) is not None:
        steps["apex"] = cycled(apex(model(), lr=CYCLE["base_lr"], **rule.options))
    elements = sum(math.prod(shape) for shape in shapes)
    if elements >= LARGE:
        steps[COPY] = make_copy(device.device, bytes_per_element(rule, stages) * elements)
    return steps


# -- measuring -----------------------------------------------------------------------------------


def measure(
    device: Device,
    rule: Rule,
    shapes: list[Shape],
    stages: Sequence[str],
    seconds: float,
    fewest: int = 12,
) -> dict[str, dict[str, float]]:
    """Of each contender: median microseconds, those of the host, the median ratio to fastlr within a round,
    and gigabytes a second."""
    steps = make_contenders(device, rule, shapes, stages)
    elements = sum(math.prod(shape) for shape in shapes)
    # So many that the first step's launch, which the device waits for, does not count.
    repeats = 20 if elements < 10 * LARGE else 10
    turns: dict[str, Callable[[], Turn]] = {
        name: partial(device.time, step, repeats) for name, step in steps.items()
    }
    measured = in_turn(turns, seconds, fewest)
    results = summary({name: [turn.device for turn in found] for name, found in measured.items()})
    of_host = summary({name: [turn.host for turn in found] for name, found in measured.items()})
    for name, result in results.items():
        result["host_us"] = of_host[name]["us"]
        result["gb_per_s"] = bytes_per_element(rule, stages) * elements / (result["us"] * 1e3)
    return results


def print_set(name: str, shapes: list[Shape], results: dict[str, dict[str, float]]) -> None:
    elements = sum(math.prod(shape) for shape in shapes)
    print(f"\n{name}: {len(shapes):,} tensors, {elements:,} elements")
    print(f"  {'':22} {'us a step':>11} {'of the host':>11} {'fastlr x':>9} {'GB/s':>9}")
    for contender, r in results.items():
        row = f"{r['us']:11,.1f} {r['host_us']:11,.1f} {r['ratio']:8.2f}x {r['gb_per_s']:9,.1f}"
        print(f"  {contender:22} {row}", flush=True)
    if COPY in results:
        print(f"  fastlr has {results[COPY]['ratio']:.0%} of the copy's bandwidth")


def run(
    device: Device,
    name_of_rule: str,
    case: str,
    sets: dict[str, list[Shape]],
    seconds: float,
    fewest: int = 12,
) -> list[dict[str, Any]]:
    """Measures and prints each set; one that does not fit into the device's memory is left out."""
    found: list[dict[str, Any]] = []
    for name, shapes in sets.items():
        try:
            results = measure(device, RULES[name_of_rule], shapes, CASES[case], seconds, fewest)
        except torch.OutOfMemoryError:
            print(f"\n{name}: does not fit into the device's memory")
            continue
        finally:
            gc.collect()  # optimizers and schedulers refer to each other
        print_set(f"{name_of_rule}, {case}, {name}", shapes, results)
        found.append({"rule": name_of_rule, "case": case, "set": name, "times": results})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rules", nargs="+", default=["sgd", "adamw"], choices=list(RULES))
    parser.add_argument("--cases", nargs="+", default=["step", "clip, average", "whole"], choices=list(CASES))
    parser.add_argument("--sets", nargs="+", default=list(PARAMETER_SETS), choices=list(PARAMETER_SETS))
    parser.add_argument("--seconds", type=float, default=6.0, help="per set, at least 12 rounds")
    parser.add_argument("--out", type=Path, help="folder for gpu_step.json")
    arguments = parser.parse_args()

    if not torch.cuda.is_available():
        print("PyTorch finds no GPU here, so no GPU number is reported.")
        return
    info = fastlr.build_info()
    if not info["cuda"]:
        sys.exit(f"This fastlr has no CUDA kernels: {info['cuda_status']}")
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "fastlr": fastlr.__version__,
        "fastlr_cuda": info["cuda_status"],
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    sets = {name: PARAMETER_SETS[name] for name in arguments.sets}
    results = [
        result
        for rule, case in itertools.product(arguments.rules, arguments.cases)
        for result in run(Gpu(), rule, case, sets, arguments.seconds)
    ]
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = {**machine, "results": results}
        write_text(arguments.out / "gpu_step.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
