"""Test accuracy of several runs against updates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlr._checks import items, vector, within
from fastlr.plotting.figure import COLORS, GREY, Array, new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def plot_accuracy(
    updates: ArrayLike,
    accuracies: Mapping[str, ArrayLike],
    path: str | os.PathLike[str] | None = None,
    *,
    target: float | None = None,
) -> Figure:
    """Draws test accuracy against updates: the mean over the runs, and a band of one standard deviation.

    Args:
        updates: at which the accuracy was measured, shape (points,).
        accuracies: name of each line and its accuracies in [0, 1], shape (runs, points).
        path: where to save the picture, in the format of the suffix; None: it is not saved.
        target: an accuracy to mark, in [0, 1].

    Raises:
        ValueError: there is nothing to draw, or not one accuracy for each of the updates.
        TypeError: an argument is of the wrong kind.
    """
    if not isinstance(accuracies, Mapping):
        raise TypeError(f"accuracies must be a dict of names and runs, got {type(accuracies).__name__}")
    updates = vector("updates", updates)
    curves = {name: _runs(name, runs, len(updates)) for name, runs in accuracies.items()}
    if not curves or not len(updates):
        raise ValueError(
            f"there must be an accuracy to draw, got {len(curves)} lines of {len(updates)} points"
        )
    target = None if target is None else within("target", target, 0.0, 1.0)
    figure, axes = new_figure(7.2, 4.4)
    means = []
    for i, (name, values) in enumerate(curves.items()):
        runs = 100 * values
        mean, color = runs.mean(0), COLORS[i % len(COLORS)]
        means.append(mean)
        axes.plot(updates, mean, color=color, label=name, linewidth=1.8)
        if len(runs) > 1:
            deviation = runs.std(0, ddof=1)
            low, high = mean - deviation, np.minimum(mean + deviation, 100)
            axes.fill_between(updates, low, high, color=color, alpha=0.13, linewidth=0)
    if target is not None:
        text = f"target {100 * target:.1f} %"
        axes.axhline(100 * target, color=GREY, linestyle="--", linewidth=1.1, label=text)
    # What tells policies apart happens at the top; the climb from chance is the same for all of them.
    finals = [mean[-1] for mean in means]
    best = max(float(mean.max()) for mean in means)
    axes.set_ylim(max(0.0, min(min(finals) - 6, best - 12)), min(100.5, best + 3))
    axes.set_xlabel("updates")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return saved(figure, path)


def _runs(name: str, runs: Any, points: int) -> Array:
    """Accuracies, shape (runs, points)."""
    rows = [vector(f"each run of {name!r}", run) for run in items(f"the runs of {name!r}", runs)]
    lengths = sorted({len(row) for row in rows})
    if lengths != [points]:
        raise ValueError(f"the runs of {name!r} must have {points} accuracies each, got runs of {lengths}")
    return np.stack(rows)
