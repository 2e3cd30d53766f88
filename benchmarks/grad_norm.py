"""What does it cost to know the gradients' norm, measured in the step, or in a pass of its own beside it?

All contenders are stepped in turn; reported are medians, and medians of the ratios to the step alone within
a round.

    python benchmarks/grad_norm.py [--threads 1 2] [--seconds 4]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

import fastlr
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


if __name__ == "__main__":
    main()
