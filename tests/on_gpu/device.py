"""The device that the stages work on: a GPU, or CUDA as emulated on the host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from cuda_on_cpu import build, recording
from gpu import Gpu, Step, Turn

from fastlr import _core
from fastlr.optim import _base


class Cuda(Gpu):
    """PyTorch's current CUDA device."""

    name = "cuda"

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield
        torch.cuda.current_stream().wait_stream(side)

    def on_cpu(self) -> AbstractContextManager[None]:
        """Optimizers that are built meanwhile work on the CPU, if their parameters lie there."""
        return contextlib.nullcontext()


class Emulated:
    """Stands in for a GPU: optimizers hand tensors in host memory to the emulated launcher. There are no
    events: the device's time is the host's."""

    name = "cuda-on-cpu"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.cuda = build.load_extension(build.build_extension(build.CACHE))
        self.cuda.set_seed(0)
        self.cuda.route_host_to_cuda(1)
        self._streams = recording.Streams()
        self._on_cpu = (_core.Plan, _core.SquaredNorm, _base.Runtime)
        self._emulated: tuple[Any, ...] = (
            self.cuda.Plan,
            self.cuda.SquaredNorm,
            lambda: self._streams,
        )
        self._use(self._emulated)

    @staticmethod
    def _use(parts: tuple[Any, ...]) -> None:
        _core.Plan, _core.SquaredNorm, _base.Runtime = parts  # type: ignore[misc]

    @contextlib.contextmanager
    def on_cpu(self) -> Iterator[None]:
        self._use(self._on_cpu)
        try:
            yield
        finally:
            self._use(self._emulated)

    def time(self, step: Step, repeats: int) -> Turn:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        seconds = (time.perf_counter() - begin) / repeats
        return Turn(device=seconds, host=seconds)

    def capture(self, step: Step) -> Step:
        for _ in range(3):
            step()
        return recording.Graph(self.cuda, step).replay

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        before = self._streams.current
        self._streams.current = before + 1
        yield
        self._streams.current = before


Device = Cuda | Emulated


def open_device(backend: str) -> Device:
    return Cuda() if backend == "cuda" else Emulated()
