"""How long is the whole update, beside PyTorch's best pieces for it?

The whole update is what runs after backward(): taking GradScaler's scale out, clipping the gradients' norm,
the step, an average of the weights, and the schedule. fastlr does it in step(). Of PyTorch there are

- "torch fused" and "torch foreach": GradScaler, clip_grad_norm_(foreach=True), the step in either form,
  torch._foreach_lerp_ (what AveragedModel with get_ema_multi_avg_fn calls), CyclicLR;
- "torch.compile": clipping, step and average compiled together, with the rate in a tensor. GradScaler's
  unscale_ and the schedule cannot be compiled and run beside it. In the cases of --compile only, and for
  sets of MOST_COMPILED tensors at most, as compiling takes the longer the more there are.

Each part alone is measured, too, always with the schedule. With a scaler, fastlr's is stepped by
fastlr.GradScaler ("fastlr") and by torch's. All contenders are stepped in turn over the same gradients, which
are restored before each timed update, as torch's pieces write them; reported are medians, and medians of the
ratios within a round. Where the elements decide and not the tensors, the same rounds time a loop with
fastlr's memory traffic and no arithmetic: what no update can be faster than.

    python benchmarks/pipeline.py [--rules sgd adamw ...] [--cases whole ...] [--threads 2] [--seconds 3]
        [--compile whole] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step import BOUND, LARGE, draw_bars, make_traffic

import fastlr
from fastlr._build import processor
from fastlr._files import write_text
from fastlr.bench.models import PARAMETER_SETS
from fastlr.bench.rounds import in_turn, summary
from fastlr.bench.rules import RULES, Rule
from fastlr.bench.updates import CASES, CONTENDERS, make_contenders, turns

MOST_COMPILED = 200  # tensors


def measure(
    rule: Rule,
    name: str,
    stages: Sequence[str],
    threads: int,
    seconds: float,
    folder: Path,
    *,
    compiled: bool,
) -> dict[str, dict[str, float]]:
    """Median microseconds of each contender, and the median of its ratio to fastlr in the same round."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch._dynamo.reset()
    shapes = PARAMETER_SETS[name]
    elements = sum(math.prod(shape) for shape in shapes)
    compiled = compiled and len(shapes) <= MOST_COMPILED
    gradients, _, updates = make_contenders(rule, shapes, stages, compiled=compiled)
    if elements >= BOUND:
        slots = rule.slots + ("average" in stages)
        norm_first = "unscale" in stages or "clip" in stages
        updates["limit"] = make_traffic(elements, slots, threads, folder, norm_first=norm_first)
    measured = turns(gradients, updates, repeats=4 if elements < LARGE else 1)
    for _ in range(3):  # the compiler looks at an update without state, then at one with it
        for warm_up in measured.values():
            warm_up()
    return summary(in_turn(measured, seconds))


def print_row(name: str, times: dict[str, dict[str, float]]) -> None:
    cells = [f"{times['fastlr']['us']:12,.1f}"]
    for contender in CONTENDERS[1:]:
        found = times.get(contender)
        cells.append(f"{found['us']:14,.1f} {found['ratio']:6.2f}x" if found else f"{'none':>22}")
    limit = f"{times['limit']['ratio']:9.0%}" if "limit" in times else ""
    print(f"{name:20}", *cells, limit, flush=True)


def best_of_torch(times: dict[str, dict[str, float]]) -> float:
    return min(found["ratio"] for name, found in times.items() if name.startswith("torch"))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The largest case that was measured, of every rule, beside the best that torch has."""
    case = max((r["case"] for r in results), key=list(CASES).index)
    drawn = [r for r in results if r["case"] == case and r["threads"] == results[-1]["threads"]]
    sets = list(dict.fromkeys(r["set"] for r in drawn))
    bars = {
        rule: [best_of_torch(r["times"]) for r in drawn if r["rule"] == rule]
        for rule in dict.fromkeys(r["rule"] for r in drawn)
    }
    stages = ", ".join((*CASES[case], "step and schedule"))
    title = f"torch's best pieces against fastlr: {stages}; {drawn[0]['threads']} threads"
    draw_bars(sets, bars, title, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sets", nargs="+", default=list(PARAMETER_SETS), choices=list(PARAMETER_SETS))
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--seconds", type=float, default=3.0, help="per table row, at least 12 rounds")
    parser.add_argument(
        "--compile",
        nargs="*",
        default=["clip, average", "whole"],
        choices=list(CASES),
        help="cases that torch.compile takes part in",
    )
    parser.add_argument("--out", type=Path, help="folder for pipeline.json and pipeline.png")
    arguments = parser.parse_args()
    torch._logging.set_logs(dynamo=logging.ERROR)  # type: ignore[attr-defined]

    machine = {"processor": processor(), "torch": torch.__version__, "fastlr": fastlr.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rule, threads, case in itertools.product(arguments.rules, arguments.threads, arguments.cases):
            print(f"\n{rule}, {case}, {threads} thread(s); microseconds, and times fastlr's")
            heads = " ".join(f"{name:>22}" for name in CONTENDERS[1:])
            print(f"{'':20} {'fastlr':>12} {heads}     limit")
            for name in arguments.sets:
                compiled = case in arguments.compile
                times = measure(
                    RULES[rule],
                    name,
                    CASES[case],
                    threads,
                    arguments.seconds,
                    Path(folder),
                    compiled=compiled,
                )
                print_row(name, times)
                results.append({"rule": rule, "case": case, "set": name, "threads": threads, "times": times})
    if arguments.out and results:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = {**machine, "results": results}
        write_text(arguments.out / "pipeline.json", json.dumps(report, indent=1) + "\n")
        draw(results, arguments.out / "pipeline.png")


if __name__ == "__main__":
    main()
