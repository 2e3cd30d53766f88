"""What the emulated CUDA was asked for, streams of the test's choice, and graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from fastlr._runtime import Runtime

STREAM = 7  # the default stream cannot capture


class Streams(Runtime):
    """A runtime whose current stream the test chooses, and that notes what is allocated and recorded."""

    def __init__(self) -> None:
        self.current = STREAM
        self.others: dict[int, int] = {}  # by device, where they differ
        self.allocated: list[tuple[int, int]] = []
        self.recorded: list[tuple[int, int]] = []
        self.memory: list[weakref.ref[torch.Tensor]] = []

    def stream(self, device: int) -> int:  # type: ignore[override]
        return self.others.get(device, self.current)

    def new_bytes(self, device: int, size: int) -> torch.Tensor:  # type: ignore[override]
        tensor = super().new_bytes(device, size)
        self.allocated.append((tensor.data_ptr(), self.current))
        self.memory.append(weakref.ref(tensor))
        return tensor

    def record_stream(self, tensor: torch.Tensor, device: int) -> None:  # type: ignore[override]
        self.recorded.append((tensor.data_ptr(), self.current))


@contextmanager
def counted(cuda: ModuleType) -> Iterator[dict[str, Any]]:
    """What CUDA was asked for in this block."""
    cuda.reset_statistics()
    counts: dict[str, Any] = {}
    yield counts
    counts.update(cuda.statistics())


class Graph:
    """A captured function, as torch.cuda.graph captures it: launches are recorded, not run."""

    def __init__(self, cuda: ModuleType, function: Callable[[], object]) -> None:
        self._cuda = cuda
        cuda.begin_capture(STREAM)
        try:
            function()
        except BaseException:
            cuda.end_capture(STREAM)
            raise
        self._graph = cuda.end_capture(STREAM)

    def replay(self) -> None:
        self._cuda.replay(self._graph)

    def __del__(self) -> None:
        if "_graph" in self.__dict__:  # else its capture failed
            self._cuda.destroy(self._graph)
