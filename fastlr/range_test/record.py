"""What the sweep has measured so far: kept on the device, read in blocks, and when it says to stop."""

from __future__ import annotations

import math

import torch

from fastlr.range_test.curve import Array

# Losses are read from the device in blocks of this many updates: each read makes the host wait for it.
_BLOCK = 16

# Of the running mean of the losses that divergence is judged by: it averages over about ten updates.
_DECAY = 0.9

# A scaler begins high and halves its scale until gradients fit: that takes a few updates, not ten.
_MOST_SKIPPED = 10

_LOSS, _SKIPPED, _METRIC, _WEIGHT = range(4)


def ranks() -> int:
    """How many processes take part."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def kept_dtype(device: torch.device) -> torch.dtype:
    """What losses are kept in: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Record:
    """The points of one sweep.

    Args:
        lrs: the rate of each update.
        factor: see ``diverge_factor`` of :func:`range_test`.
        held: whether the rate stays where it is when an update is skipped, as a schedule's does.
        device: of the losses.

    Attributes:
        points: index into ``lrs``, loss and metric (NaN: not measured) of each update that was applied, as
            far as read.
        stopped: why the sweep is over; None: it is not.
        lost: how many of the metric's values were inf or NaN, as far as read.
    """

    def __init__(self, lrs: Array, factor: float, *, held: bool, device: torch.device) -> None:
        self.points: list[tuple[int, float, float]] = []
        self.stopped: str | None = None
        self.lost = 0
        self._lrs, self._factor, self._held = lrs, factor, held
        self._rows = torch.zeros((len(lrs), 4), dtype=kept_dtype(device), device=device)
        self._read = self._written = self._skipped = 0
        self._mean = 0.0
        self._first = self._lowest = math.nan

    def add(self, loss: torch.Tensor, skipped: torch.Tensor | None) -> None:
        """Takes in an update: the loss before it, averaged over the ranks, and whether it was skipped."""
        row = self._rows[self._written]
        row[_LOSS] = loss
        if skipped is not None:
            row[_SKIPPED] = skipped
        self._written += 1

    def add_metric(self, total: torch.Tensor | float, weight: float) -> None:
        """Takes in what was measured after the last update: the weighted sum, and the weights."""
        row = self._rows[self._written - 1]
        row[_METRIC] = total
        row[_WEIGHT] = weight

    def over(self) -> bool:
        """Whether the sweep is over. Looks at the device only when a block is full."""
        if self._written - self._read >= _BLOCK or self._written == len(self._lrs):
            self.read()
        return self.stopped is not None

    def read(self, *, alone: bool = False) -> None:
        """Reads what has not been read, up to the first point that is a reason to stop.

        Args:
            alone: whether the other ranks do not read now.
        """
        block = self._rows[self._read : self._written]
        if ranks() > 1 and not alone:
            rest = block[:, _SKIPPED:].contiguous()  # the losses are averaged already
            torch.distributed.all_reduce(rest)
            block = torch.cat([block[:, :_SKIPPED], rest], 1)
        for loss, skipped, metric, weight in block.tolist():
            index = len(self.points) if self._held else self._read
            self._read += 1
            self._take(index, loss, skipped > 0, metric / weight if weight > 0 else None)
            if self.stopped is not None:
                return

    def _take(self, index: int, loss: float, skipped: bool, metric: float | None) -> None:
        lr = self._lrs[index]
        if not math.isfinite(loss):
            self.stopped = f"the loss was {loss} at lr {lr:.3g}"
            return
        self._skipped = self._skipped + 1 if skipped else 0
        if skipped:
            if self._skipped == _MOST_SKIPPED:
                self.stopped = f"the GradScaler skipped {_MOST_SKIPPED} updates in a row at lr {lr:.3g}"
            return
        self.points.append((index, loss, math.nan if metric is None else metric))
        self.lost += metric is not None and not math.isfinite(metric)
        self._mean = _DECAY * self._mean + (1 - _DECAY) * loss
        smooth = self._mean / (1 - _DECAY ** len(self.points))
        if len(self.points) == 1:
            self._first = self._lowest = smooth
        self._lowest = min(self._lowest, smooth)
        # Not a multiple of the lowest loss alone, which may be zero or negative.
        size = max(abs(self._lowest), self._first - self._lowest)
        if smooth - self._lowest > (self._factor - 1) * size:
            self.stopped = f"the loss diverged at lr {lr:.3g}"
