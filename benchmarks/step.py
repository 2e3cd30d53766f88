"""How long is a whole optimizer step, schedule included, beside torch.optim's of the same rule with CyclicLR?

All contenders are stepped in turn; reported are medians, and medians of the ratios within a round. "warm"
keeps the gradients, and a turn of a small set is one step to warm the caches and three timed ones;
"fresh" re-creates the gradients before each timed step, as a training loop does.

Where the elements decide and not the tensors, the same rounds time a loop with the step's memory traffic and
no arithmetic: what no step can be faster than.

    python benchmarks/step.py [--rules sgd adamw ...] [--threads 1 2] [--seconds 3] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastlr
from fastlr._build import processor
from fastlr._files import write_text
from fastlr.bench.models import PARAMETER_SETS
from fastlr.bench.rounds import in_turn, summary
from fastlr.bench.rules import FORMS, RULES, Rule, Step
from fastlr.plotting import save

LARGE = 5_000_000  # elements; from here on they lie in main memory
BOUND = 100_000  # elements; from here on memory bandwidth decides


def load_bandwidth(folder: Path) -> ctypes.CDLL:
    """bandwidth.c, compiled into the folder once."""
    library = folder / "bandwidth.so"
    source = Path(__file__).with_name("bandwidth.c")
    if not library.exists():
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def make_traffic(elements: int, slots: int, threads: int, folder: Path, *, norm_first: bool = False) -> Step:
    """A loop that moves so many float arrays as a step does.

    Args:
        norm_first: after a loop that reads the gradients alone.
    """
    native = load_bandwidth(folder)
    arrays = [torch.ones(elements) for _ in range(2 + slots)]
    p, g, *state = (ctypes.c_void_p(array.data_ptr()) for array in arrays)
    pointers = (ctypes.c_void_p * slots)(*state)

    def step(keep: list[torch.Tensor] = arrays) -> None:
        if norm_first:
            native.read_all(g, ctypes.c_int64(elements), ctypes.c_int(threads))
        native.touch(p, g, pointers, ctypes.c_int(slots), ctypes.c_int64(elements), ctypes.c_int(threads))

    return step


def renew_gradients(parameters: list[torch.nn.Parameter]) -> None:
    for p in parameters:
        fresh = torch.empty_like(p.grad).copy_(p.grad)
        p.grad = None
        p.grad = fresh


def measure(
    rule: Rule, name: str, threads: int, gradients: str, seconds: float, folder: Path
) -> dict[str, dict[str, float]]:
    """Median microseconds of each contender, and the median of its ratio to fastlr in the same round."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = PARAMETER_SETS[name]
    elements = sum(math.prod(shape) for shape in shapes)
    models: dict[str, list[torch.nn.Parameter]] = {}
    steps: dict[str, Step] = {}
    for contender in ("fastlr", *rule.forms):
        models[contender] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in models[contender]:
            p.grad = torch.randn_like(p)
        steps[contender] = (
            rule.make_fastlr(models[contender])
            if contender == "fastlr"
            else rule.make_torch(models[contender], rule.forms[contender])
        )
    if elements >= BOUND:
        steps["traffic"] = make_traffic(elements, rule.slots, threads, folder)

    repeats = 4 if gradients == "warm" and elements < LARGE else 1

    def turn(contender: str) -> float:
        if gradients == "fresh":
            renew_gradients(models.get(contender, []))
        durations = []
        for _ in range(repeats):
            begin = time.perf_counter()
            steps[contender]()
            durations.append(time.perf_counter() - begin)
        return statistics.median(durations[repeats > 1 :])

    return summary(in_turn({contender: partial(turn, contender) for contender in steps}, seconds))


def print_row(name: str, result: dict[str, dict[str, float]]) -> None:
    cells = [f"{result['fastlr']['us']:12,.1f}"]
    cells += [
        f"{result[c]['us']:11,.1f} {result[c]['ratio']:6.2f}x" if c in result else f"{'none':>19}"
        for c in FORMS
    ]
    traffic = f"{result['traffic']['ratio']:9.0%}" if "traffic" in result else f"{'':9}"
    print(f"{name:20}", *cells, traffic, flush=True)


def draw_forms(results: list[dict[str, Any]], path: Path) -> None:
    """SGD beside each form of torch's."""
    rows = [r for r in results if r["rule"] == "sgd"]
    bars = {f"torch {form}": [row["times"][form]["ratio"] for row in rows] for form in FORMS}
    title = f"torch.optim.SGD + CyclicLR against fastlr, {rows[0]['threads']} threads, fresh gradients"
    draw_bars([row["set"] for row in rows], bars, title, path)


def draw_rules(results: list[dict[str, Any]], path: Path) -> None:
    """Every rule beside the best form of torch's."""
    rules = list(dict.fromkeys(r["rule"] for r in results))
    sets = list(dict.fromkeys(r["set"] for r in results))
    best = {
        (r["rule"], r["set"]): min(t["ratio"] for form, t in r["times"].items() if form in FORMS)
        for r in results
    }
    bars = {rule: [best[rule, name] for name in sets] for rule in rules}
    threads = results[0]["threads"]
    title = f"torch.optim's best form + CyclicLR against fastlr, {threads} threads, fresh gradients"
    draw_bars(sets, bars, title, path)


def draw_bars(sets: list[str], bars: dict[str, list[float]], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(bars)
    for k, (label, heights) in enumerate(bars.items()):
        positions = [i + (k - (len(bars) - 1) / 2) * width for i in range(len(sets))]
        drawn = axes.bar(positions, heights, 0.95 * width, label=label)
        axes.bar_label(drawn, [f"{h:.1f}" for h in heights], fontsize=6)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xticks(range(len(sets)), sets, fontsize=8)
    axes.set_ylabel("step time / fastlr's")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    save(figure, path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sets", nargs="+", default=list(PARAMETER_SETS), choices=list(PARAMETER_SETS))
    parser.add_argument("--seconds", type=float, default=3.0, help="per table row, at least 12 rounds")
    parser.add_argument("--out", type=Path, help="folder for step.json and its pictures")
    arguments = parser.parse_args()

    machine = {"processor": processor(), "torch": torch.__version__, "fastlr": fastlr.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = itertools.product(arguments.rules, arguments.threads, ("warm", "fresh"))
        for rule, threads, gradients in kinds:
            print(f"\n{rule}, {threads} thread(s), {gradients} gradients; microseconds, and times fastlr's")
            heads = " ".join(f"{'torch ' + c:>19}" for c in FORMS)
            print(f"{'':20} {'fastlr':>12} {heads} bandwidth")
            for name in arguments.sets:
                times = measure(RULES[rule], name, threads, gradients, arguments.seconds, Path(folder))
                print_row(name, times)
                results.append(
                    {"rule": rule, "set": name, "threads": threads, "gradients": gradients, "times": times}
                )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = {**machine, "results": results}
        write_text(arguments.out / "step.json", json.dumps(report, indent=1) + "\n")
        drawn = [r for r in results if r["gradients"] == "fresh" and r["threads"] == arguments.threads[-1]]
        if "sgd" in arguments.rules:
            draw_forms(drawn, arguments.out / "step.png")
        draw_rules(drawn, arguments.out / "step_rules.png")


if __name__ == "__main__":
    main()
