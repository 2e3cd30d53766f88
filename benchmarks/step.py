"""How long is a whole optimizer step, schedule included, beside torch.optim.SGD with CyclicLR?

All contenders are stepped in turn; reported are medians, and medians of the ratios within a round. "warm"
keeps the gradients, and a turn of a small set is one step to warm the caches and three timed ones;
"fresh" re-creates the gradients before each timed step, as a training loop does.

Where the elements decide and not the tensors, the same rounds time a loop with the step's memory traffic and
no arithmetic: what no step can be faster than.

    python benchmarks/step.py [--threads 1 2] [--seconds 6] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import PARAMETER_SETS
from rounds import in_turn, summary

import fastlr
from fastlr._files import write_text
from fastlr.plotting import save

Step = Callable[[], object]
CYCLE = {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 2000, "mode": "triangular2"}
SGD = {"momentum": 0.9, "weight_decay": 5e-4}
TORCH = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}
LARGE = 5_000_000  # elements; from here on they lie in main memory
BOUND = 100_000  # elements; from here on memory bandwidth decides


def make_fastlr(parameters: list[torch.nn.Parameter]) -> Step:
    return fastlr.FusedCyclicSGD(parameters, **CYCLE, **SGD).step


def cycled(optimizer: torch.optim.Optimizer, capture: Callable[[Step], Step] | None = None) -> Step:
    """A step and its schedule's. capture: makes the optimizer's step a replay of itself."""
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, **CYCLE, cycle_momentum=False)
    update = optimizer.step if capture is None else capture(optimizer.step)

    def step() -> None:
        update()
        scheduler.step()

    return step


def make_torch(parameters: list[torch.nn.Parameter], options: dict[str, bool]) -> Step:
    return cycled(torch.optim.SGD(parameters, lr=CYCLE["base_lr"], **SGD, **options))


def make_traffic(elements: int, threads: int, folder: Path) -> Step:
    """A loop that reads three and writes two float arrays of so many elements."""
    library = folder / "bandwidth.so"
    source = Path(__file__).with_name("bandwidth.c")
    if not library.exists():
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
    touch = ctypes.CDLL(str(library)).touch
    arrays = [torch.ones(elements) for _ in range(3)]
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]

    def step(keep: list[torch.Tensor] = arrays) -> None:
        touch(*pointers, ctypes.c_int64(elements), ctypes.c_int(threads))

    return step


def renew_gradients(parameters: list[torch.nn.Parameter]) -> None:
    for p in parameters:
        fresh = torch.empty_like(p.grad).copy_(p.grad)
        p.grad = None
        p.grad = fresh


def measure(
    name: str, threads: int, gradients: str, seconds: float, folder: Path
) -> dict[str, dict[str, float]]:
    """Median microseconds of each contender, and the median of its ratio to fastlr in the same round."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = PARAMETER_SETS[name]
    elements = sum(math.prod(shape) for shape in shapes)
    models: dict[str, list[torch.nn.Parameter]] = {}
    steps: dict[str, Step] = {}
    for contender in ("fastlr", *TORCH):
        models[contender] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in models[contender]:
            p.grad = torch.randn_like(p)
        steps[contender] = (
            make_fastlr(models[contender])
            if contender == "fastlr"
            else make_torch(models[contender], TORCH[contender])
        )
    if elements >= BOUND:
        steps["traffic"] = make_traffic(elements, threads, folder)

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


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def print_row(name: str, result: dict[str, dict[str, float]]) -> None:
    cells = [f"{result['fastlr']['us']:12,.1f}"]
    cells += [f"{result[c]['us']:11,.1f} {result[c]['ratio']:6.2f}x" for c in TORCH]
    traffic = f"{result['traffic']['ratio']:9.0%}" if "traffic" in result else f"{'':9}"
    print(f"{name:20}", *cells, traffic, flush=True)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in results if r["gradients"] == "fresh" and r["threads"] == results[-1]["threads"]]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = {"fused": "#0b6e99", "foreach": "#e0a030", "for-loop": "#9a9a9a"}
    for k, contender in enumerate(TORCH):
        positions = [i + (k - 1) * 0.26 for i in range(len(rows))]
        heights = [row["times"][contender]["ratio"] for row in rows]
        bars = axes.bar(positions, heights, 0.25, label=f"torch {contender}", color=colors[contender])
        axes.bar_label(bars, [f"{h:.1f}" for h in heights], fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_xticks(range(len(rows)), [row["set"] for row in rows], fontsize=8)
    axes.set_ylabel("step time / fastlr's")
    axes.set_title(
        f"torch.optim.SGD + CyclicLR against fastlr, {rows[0]['threads']} threads, fresh gradients",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    save(figure, path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sets", nargs="+", default=list(PARAMETER_SETS), choices=list(PARAMETER_SETS))
    parser.add_argument("--seconds", type=float, default=6.0, help="per table row, at least 12 rounds")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.png")
    arguments = parser.parse_args()

    machine = {"processor": processor(), "torch": torch.__version__, "fastlr": fastlr.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in arguments.threads:
            for gradients in ("warm", "fresh"):
                print(f"\n{threads} thread(s), {gradients} gradients; microseconds, and times fastlr's")
                heads = " ".join(f"{'torch ' + c:>19}" for c in TORCH)
                print(f"{'':20} {'fastlr':>12} {heads} bandwidth")
                for name in arguments.sets:
                    times = measure(name, threads, gradients, arguments.seconds, Path(folder))
                    print_row(name, times)
                    results.append({"set": name, "threads": threads, "gradients": gradients, "times": times})
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = {**machine, "results": results}
        write_text(arguments.out / "step.json", json.dumps(report, indent=1) + "\n")
        draw(results, arguments.out / "step.png")


if __name__ == "__main__":
    main()
