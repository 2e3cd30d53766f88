"""Phase: what a plan says of a stretch with one batch size."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """A stretch of a run with one batch size.

    Attributes:
        start_sample: samples consumed before it begins.
        stop_sample: samples consumed when it ends.
        batch_size: samples of an update, over all ranks.
        lr: learning rate at its first sample.
        last_lr: at its last sample; the same unless the schedule is smooth.
        momentum: at its first sample.
        noise_scale: at its first sample; see :meth:`BatchPlan.noise_scale`.
        updates: how many it has, partial ones included.
    """

    start_sample: int
    stop_sample: int
    batch_size: int
    lr: float
    last_lr: float
    momentum: float
    noise_scale: float
    updates: int
