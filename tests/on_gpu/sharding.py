"""DTensors on the device: several processes that share it, and reductions that a CUDA graph has captured."""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sharded
import torch
import torch.distributed as dist
from cuda_on_cpu import build
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastlr
from fastlr import _distributed

from . import report
from .device import Device, open_device

REPLAYS = 30


@contextlib.contextmanager
def one_process(device: Device, folder: Path) -> Iterator[DeviceMesh]:
    """Which adds up with itself, so that every reduction is launched."""

    def share_of(tensor: Any) -> _distributed.Share | None:
        cut = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
        return _distributed.Share(tensor.device_mesh, tuple(cut)) if cut else None

    kind = device.device.type
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=meeting, rank=0, world_size=1)
    found = _distributed.share_of
    _distributed.share_of = share_of
    try:
        yield init_device_mesh(kind, (1, 1), mesh_dim_names=("dp", "tp"))
    finally:
        _distributed.share_of = found
        dist.destroy_process_group()


def check_graph(device: Device, folder: Path) -> None:
    """A captured step with its norm, whose reductions are replayed with it."""
    options: dict[str, Any] = {"lr": sharded.COSINE, "max_grad_norm": 0.5, "ema_decay": 0.9}
    with one_process(device, folder) as mesh:
        reductions = []
        add_up = _distributed.add_up
        _distributed.add_up = lambda shares, sums: (reductions.append(len(shares)), add_up(shares, sums))
        try:
            model = sharded.Model(torch.float32, mesh)
            optimizer = fastlr.FusedAdamW(model.named_parameters(), **options)
            model.take_gradients(20)
            replay = device.capture(optimizer.step)
            for _ in range(REPLAYS):
                replay()
        finally:
            _distributed.add_up = add_up
        assert set(reductions) == {3}, reductions
        with device.on_cpu():
            twin = sharded.Model(torch.float32)
            reference = fastlr.FusedAdamW(twin.named_parameters(), **options)
        twin.take_gradients(20)
        for _ in range(3 + REPLAYS):
            reference.step()
        assert optimizer.sync().updates == 3 + REPLAYS
        expected, found = sharded.ending(twin, reference), sharded.ending(model, optimizer)
        case = sharded.Case("AdamW", options, close=True)
        sharded.assert_same_ending(case, expected, found)
        del replay, optimizer


def main() -> int:
    options = report.arguments(__doc__).parse_args()
    made = report.Report(options.result)
    device = open_device(options.backend)
    library = [] if device.name == "cuda" else [build.build_extension(build.CACHE)]
    with tempfile.TemporaryDirectory() as folder:
        for world in (2,) if options.small else (2, 4):
            brought: list[dict[str, Any]] = []
            made.check(
                f"{world} processes run",
                lambda world=world, to=brought: to.extend(
                    sharded.run(Path(folder), world, "on-cuda", *library)
                ),
            )
            for rank, results in enumerate(brought):
                made.check(f"process {rank} of {world}", functools.partial(check_process, device, results))
        made.check("reductions in a CUDA graph", lambda: check_graph(device, Path(folder)))
    return made.finish()


def check_process(device: Device, results: dict[str, Any]) -> None:
    assert results["on_cuda"] is None, results["on_cuda"]
    assert set(results["runs on cuda"]) == set(sharded.ON_CUDA)
    with device.on_cpu():
        for name, found in results["runs on cuda"].items():
            sharded.assert_same_ending(sharded.CASES[name], sharded.run_alone(sharded.CASES[name]), found)


if __name__ == "__main__":
    sys.exit(main())
