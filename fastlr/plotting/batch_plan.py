"""A batch plan: batch size, learning rate and noise scale over the epochs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastlr.plotting.figure import COLORS, new_figure, require, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PhaseStretch(Protocol):
    """A stretch of a plan with one batch size."""

    @property
    def start_sample(self) -> int: ...
    @property
    def stop_sample(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


class PlanCurve(Protocol):
    """What a picture of a plan shows."""

    @property
    def phases(self) -> Sequence[PhaseStretch]: ...
    @property
    def batch_sizes(self) -> Sequence[int]: ...
    @property
    def mode(self) -> str: ...
    @property
    def scaling(self) -> str: ...
    @property
    def dataset_size(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def total_samples(self) -> int: ...
    @property
    def total_updates(self) -> int: ...
    def phase_at(self, sample: int) -> PhaseStretch: ...
    def clock_at(self, sample: int) -> int: ...
    def lr(self, clock: int) -> float:
        """The learning rate at a clock, which ``clock_at`` says for a sample of the run."""

    def noise_scale(self, sample: int) -> float: ...


def plot_batch_plan(plan: PlanCurve, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws a plan: batch size, learning rate and noise scale, one above the other, over the epochs.

    Args:
        plan: the plan.
        path: where to save the picture, in the format of the suffix; None: it is not saved.
    """
    require("plan", plan, "phases", "a BatchPlan")
    figure, batches, rates, scales = new_figure(7.2, 5.4, rows=3)
    total, size = plan.total_samples, plan.dataset_size
    # Each phase is drawn from its first sample to its last, so that its ends are where the plan has them.
    at = np.concatenate(
        [
            np.unique(
                np.append(np.linspace(p.start_sample, p.stop_sample - 1, points).astype(int), p.start_sample)
            )
            for p in plan.phases
            for points in [max(2, round(800 * (p.stop_sample - p.start_sample) / total))]
        ]
    )
    samples, epochs = at.tolist(), at / size
    batch = np.array([plan.phase_at(sample).batch_size for sample in samples])
    lr = np.array([plan.lr(plan.clock_at(sample)) for sample in samples])
    batches.plot(epochs, batch, color=COLORS[0], linewidth=1.8)
    rates.plot(epochs, lr, color=COLORS[1], linewidth=1.8)
    noise = [plan.noise_scale(sample) for sample in samples]
    scales.plot(epochs, noise, color=COLORS[2], linewidth=1.8)
    kind = plan.mode if plan.scaling == "linear" else f"{plan.mode}, {plan.scaling} scaling"
    batches.set_title(f"Batch plan ({kind}): {plan.total_updates:,} updates", loc="left")
    batches.set_ylabel("batch size")
    rates.set_ylabel("learning rate")
    scales.set_ylabel("noise scale")
    if batch.max() > 4 * batch.min():
        batches.set_yscale("log", base=2)
    if len(set(plan.batch_sizes)) <= 5:
        batches.set_yticks(sorted(set(plan.batch_sizes)))
    batches.yaxis.set_major_formatter("{x:,.0f}")
    rates.set_ylim(bottom=0, top=1.08 * float(lr.max()) or 1.0)
    scales.set_yscale("log", nonpositive="mask")
    scales.set_xlabel("epochs")
    scales.set_xlim(0, plan.epochs)
    return saved(figure, path)
