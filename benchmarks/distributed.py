"""What does a step over DTensors cost, beside the same over plain tensors, and beside torch's on DTensors?

One process, whose mesh is of itself: nothing is sent, what is measured is the work around the elements.
Contenders are stepped in turn; reported are medians, and medians of the ratios to the step over plain tensors
within a round.

    python benchmarks/distributed.py [--tensors 400] [--elements 64] [--seconds 8]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastlr
from fastlr.bench.rounds import in_turn, summary, timed

MAX_NORM = 1.0


def parameters(tensors: int, elements: int, mesh: DeviceMesh | None) -> list[torch.nn.Parameter]:
    made = []
    for _ in range(tensors):
        pair = [torch.randn(elements), torch.randn(elements)]
        if mesh is not None:
            pair = [distribute_tensor(value, mesh, [Shard(0)]) for value in pair]
        p = torch.nn.Parameter(pair[0])
        p.grad = pair[1]
        made.append(p)
    return made


def contenders(make: Callable[[bool], list[torch.nn.Parameter]]) -> dict[str, Callable[[], object]]:
    """By what they are called in the table."""
    steps: dict[str, Callable[[], object]] = {}
    for clips in (False, True):
        limit, suffix = (MAX_NORM, ", clipped") if clips else (None, "")
        for sharded in (False, True):
            on = "DTensors" if sharded else "plain tensors"
            opt = fastlr.FusedAdamW(make(sharded), lr=1e-4, max_grad_norm=limit)
            steps[f"fastlr, {on}{suffix}"] = opt.step
        model = make(True)
        fused = torch.optim.AdamW(model, lr=1e-4, fused=True)

        def by_torch(fused: torch.optim.Optimizer = fused, model: list = model, clips: bool = clips) -> None:
            if clips:
                torch.nn.utils.clip_grad_norm_(model, MAX_NORM, foreach=True)
            fused.step()

        steps[f"torch's fused AdamW, DTensors{suffix}"] = by_torch
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--elements", type=int, default=64, help="of each tensor")
    parser.add_argument("--seconds", type=float, default=8.0, help="at least 12 rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1
        )
        mesh = init_device_mesh("cpu", (1,))
        make = partial(parameters, arguments.tensors, arguments.elements)
        steps = contenders(lambda sharded: make(mesh if sharded else None))
        turns = {name: partial(timed, step) for name, step in steps.items()}
        found = summary(in_turn(turns, arguments.seconds), reference="fastlr, plain tensors")
        torch.distributed.destroy_process_group()
    print(f"torch {torch.__version__}, fastlr {fastlr.__version__}; AdamW, one thread, one process;")
    print(f"{arguments.tensors} tensors of {arguments.elements}; microseconds, and times the first")
    for name, row in found.items():
        print(f"{name:38} {row['us']:12,.1f} {row['ratio']:6.2f}x")


if __name__ == "__main__":
    main()
