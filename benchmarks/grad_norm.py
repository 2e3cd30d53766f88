"""What does it cost to know the gradients' norm, measured in the step, or in a pass of its own beside it?

All contenders are stepped in turn; reported are medians, and medians of the ratios to the step alone within
a round.

Then the pass that clipping makes over large sets, alone, beside a loop that reads the same memory and does
nothing: "again" right after the same, "after a copy" when the gradients have just been written, and page
tables are in no near cache.

    python benchmarks/grad_norm.py [--threads 1 2] [--seconds 4]
"""

from __future__ import annotations

import argparse
import ctypes
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from step import LARGE, load_bandwidth

import fastlr
from fastlr import _core
from fastlr._runtime import Runtime
from fastlr.batch_growth.noise_scale import squared_norm
from fastlr.bench.models import PARAMETER_SETS
from fastlr.bench.rounds import in_turn, summary, timed

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def contenders(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The step alone, measured, and beside PyTorch's norm, each with parameters of its own."""

    def make(measured: bool) -> tuple[list[torch.Tensor], fastlr.FusedSGD]:
        parameters = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = fastlr.FusedSGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4)
        optimizer.measure_grad_norm = measured
        return [p.grad for p in parameters if p.grad is not None], optimizer

    (_, alone), (_, measured), (gradients, beside) = make(False), make(True), make(False)

    def with_torch() -> float:
        norm = float(torch.nn.utils.get_total_norm(gradients))
        beside.step()
        return norm

    def in_step() -> float | None:
        measured.step()
        return measured.last_grad_norm

    return {"step": alone.step, "measured": in_step, "torch": with_torch}


def passes(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, native: ctypes.CDLL
) -> tuple[int, dict[str, dict[str, Callable[[], float]]]]:
    """The bytes of gradients, and by what comes before them the turns of the norm's pass and of reading."""
    sizes = [math.prod(shape) for shape in shapes]
    memory = torch.randn(sum(sizes) + sum(sizes) % 2).to(dtype)  # whole words
    gradients = [g.view(shape) for g, shape in zip(memory[: sum(sizes)].split(sizes), shapes, strict=True)]
    size, original, tables = memory.nbytes, memory.clone(), _core.SquaredNorm(Runtime)

    def norm() -> None:
        squared_norm(gradients, tables)

    def read() -> None:
        words, threads = ctypes.c_int64(size // 4), ctypes.c_int(torch.get_num_threads())
        native.read_all(ctypes.c_void_p(memory.data_ptr()), words, threads)

    def after(before: Callable[[], object], work: Callable[[], object]) -> float:
        before()
        return timed(work)

    works = {"norm": norm, "read": read}
    return size, {
        "again": {name: partial(after, work, work) for name, work in works.items()},
        "after a copy": {
            name: partial(after, partial(memory.copy_, original), work) for name, work in works.items()
        },
    }


def print_passes(name: str, dtype: torch.dtype, seconds: float, native: ctypes.CDLL) -> None:
    size, turns = passes(PARAMETER_SETS[name], dtype, native)
    cells = []
    for each in turns.values():
        found = summary(in_turn(each, seconds), reference="norm")
        rates = [size / found[work]["us"] / 1e3 for work in ("norm", "read")]
        cells.append(f"{rates[0]:9.1f} of {rates[1]:5.1f} GB/s {found['read']['ratio']:6.0%}")
    print(f"{name + ', ' + str(dtype).removeprefix('torch.'):30}", *cells, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sets", nargs="+", default=list(PARAMETER_SETS), choices=list(PARAMETER_SETS))
    parser.add_argument("--seconds", type=float, default=4.0, help="per table row, at least 12 rounds")
    arguments = parser.parse_args()

    print(f"torch {torch.__version__}, fastlr {fastlr.__version__}")
    for threads in arguments.threads:
        print(f"\n{threads} thread(s); microseconds, and times the step alone")
        print(f"{'':30} {'step':>12} {'measured in it':>19} {'and get_total_norm':>19}")
        for name in arguments.sets:
            for type_name, dtype in TYPES.items():
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                steps = contenders(PARAMETER_SETS[name], dtype)
                turns = {contender: partial(timed, step) for contender, step in steps.items()}
                found = summary(in_turn(turns, arguments.seconds), reference="step")
                cells = [f"{found[c]['us']:11,.1f} {found[c]['ratio']:6.2f}x" for c in ("measured", "torch")]
                print(f"{name + ', ' + type_name:30} {found['step']['us']:12,.1f}", *cells, flush=True)

    large = [name for name in arguments.sets if sum(map(math.prod, PARAMETER_SETS[name])) >= LARGE]
    with tempfile.TemporaryDirectory() as folder:
        native = load_bandwidth(Path(folder))
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            print(f"\n{threads} thread(s); the norm's pass, of what reading alone takes")
            print(f"{'':30} {'again':>31} {'after a copy':>31}")
            for name in large:
                for dtype in TYPES.values():
                    print_passes(name, dtype, arguments.seconds, native)


if __name__ == "__main__":
    main()
