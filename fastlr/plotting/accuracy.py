"""Test accuracy of several runs against updates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlr._checks import items, real, vector, within
from fastlr.plotting.figure import COLORS, GREY, NARROW, Array, new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def plot_accuracy(
    updates: ArrayLike,
    accuracies: Mapping[str, ArrayLike],
    path: str | os.PathLike[str] | None = None,
    *,
    target: float | None = None,
    width: float = 7.2,
) -> Figure:
    """Draws test accuracy against updates: the mean over the runs, and a band of one standard deviation.

    The axis is stretched towards 100 %, where runs differ: as far from each other as 80 and 90 % are 90 and
    95 %, for half of the errors are gone in either case.

    Args:
        updates: at which the accuracy was measured, shape (points,).
        accuracies: name of each line and its accuracies in [0, 1], shape (runs, points).
        path: where to save the picture, in the format of the suffix; None: it is not saved.
        target: an accuracy to mark, in [0, 1].
        width: of the picture, in inches, > 0.

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
    figure, axes = new_figure(real("width", width, above=True), 4.4)
    lowest, highest = [], []
    for i, (name, values) in enumerate(curves.items()):
        runs = 100 * values
        mean, color = runs.mean(0), COLORS[i % len(COLORS)]
        deviation = runs.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(mean))
        low, high = np.maximum(mean - deviation, 0), np.minimum(mean + deviation, 100)
        axes.plot(updates, mean, color=color, label=name, linewidth=1.8)
        if len(runs) > 1:
            axes.fill_between(updates, low, high, color=color, alpha=0.13, linewidth=0)
        lowest.append(float(low.min()))
        highest.append(float(high.max()))
    if target is not None:
        text = f"target {100 * target:.1f} %"
        axes.axhline(100 * target, color=GREY, linestyle="--", linewidth=1.1, label=text)
        lowest.append(100 * target)
        highest.append(100 * target)
    axes.set_yscale("function", functions=(_stretched, _unstretched))
    bottom, top = _stretched(np.array([min(lowest), max(highest)]))
    room = 0.03 * (top - bottom) or 0.1
    axes.set_ylim(*_unstretched(np.array([bottom - room, top + room])))
    axes.set_yticks([tick for tick in _TICKS if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.locator_params(axis="x", nbins=9 if width >= NARROW else 5)
    axes.set_xlabel("updates")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return saved(figure, path)


# Some 1.4 times as many errors from each to the one below.
_TICKS = (0, 30, 50, 60, 70, 80, 85, 90, 93, 95, 96, 97, 98, 98.5, 99, 99.5, 100)


def _stretched(percent: Array) -> Array:
    """Where an accuracy stands on the axis: by the logarithm of its errors, and a few, for 100 % has none."""
    stretched: Array = -np.log(100.2 - np.minimum(percent, 100.1))
    return stretched


def _unstretched(place: Array) -> Array:
    percent: Array = 100.2 - np.exp(-np.asarray(place))
    return percent


def _runs(name: str, runs: Any, points: int) -> Array:
    """Accuracies, shape (runs, points)."""
    rows = [vector(f"each run of {name!r}", run) for run in items(f"the runs of {name!r}", runs)]
    lengths = sorted({len(row) for row in rows})
    if lengths != [points]:
        raise ValueError(f"the runs of {name!r} must have {points} accuracies each, got runs of {lengths}")
    return np.stack(rows)
