"""A GPU, as measurements use it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Step = Callable[[], object]


class Turn(NamedTuple):
    """Seconds a step."""

    device: float  # between its beginning and its end on the device
    host: float  # until it was launched


class Gpu:
    """PyTorch's current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def time(self, step: Step, repeats: int) -> Turn:
        torch.cuda.synchronize()
        self._begin.record()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        host = time.perf_counter() - begin
        self._end.record()
        self._end.synchronize()
        milliseconds = self._begin.elapsed_time(self._end)
        return Turn(milliseconds * 1e-3 / repeats, host / repeats)

    def capture(self, step: Step) -> Step:
        # As the documentation of PyTorch's CUDA graphs has it: first on a side stream, then captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay(keep: Step = step) -> None:  # the optimizer, whose memory the graph refers to
            graph.replay()

        return replay
