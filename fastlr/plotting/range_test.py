"""Range tests: the curves, and what was read from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastlr._checks import real
from fastlr.plotting.figure import COLORS, GREY, NARROW, Array, add_legend, new_figure, require, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS: dict[str, Any] = {"markersize": 4.5, "markeredgewidth": 0}


class SweptCurve(Protocol):
    """What a picture of a range test shows; ``fastlr.RangeTestResult`` says what each of them is."""

    @property
    def lrs(self) -> Array: ...
    @property
    def losses(self) -> Array: ...
    @property
    def accuracies(self) -> Array | None: ...
    @property
    def smoothed_losses(self) -> Array: ...
    @property
    def smoothed_accuracies(self) -> Array | None: ...
    @property
    def measured(self) -> np.ndarray[Any, np.dtype[np.bool_]]: ...
    @property
    def sweep(self) -> str: ...
    @property
    def metric_name(self) -> str: ...
    @property
    def base_lr(self) -> float | None: ...
    @property
    def max_lr(self) -> float | None: ...
    @property
    def steepest(self) -> float | None: ...
    @property
    def valley(self) -> float | None: ...
    @property
    def minimum(self) -> float | None: ...
    @property
    def intervals(self) -> Mapping[str, tuple[float, float]]: ...
    @property
    def repeats(self) -> Sequence[SweptCurve]: ...
    @property
    def stopped(self) -> str | None: ...
    @property
    def reason(self) -> str | None: ...


class SweptCurves(Protocol):
    """What a picture of several range tests shows."""

    @property
    def results(self) -> Sequence[SweptCurve]: ...
    def names(self) -> Sequence[str]:
        """What each of them is called."""

    def peaks(self) -> Sequence[float]:
        """The best that each of them reached."""


def plot_range_test(
    result: SweptCurve, path: str | os.PathLike[str] | None = None, *, width: float = 8.6
) -> Figure:
    """Draws a range test: what was measured, the smooth curve, and what was read from it.

    The loss stands above, the accuracy (where it was measured) below; the range between the bounds is
    shaded. With repeats the smooth curve is that of their median, in a band from the lowest to the highest of
    theirs.

    Args:
        result: the range test's.
        path: where to save the picture, in the format of the suffix; None: it is not saved.
        width: of the picture, in inches, > 0; from below 6 on its legends stand above the axes.
    """
    require("result", result, "smoothed_losses", "a RangeTestResult")
    with_accuracies = result.accuracies is not None
    width = real("width", width, above=True)
    height = (2.7 if width >= NARROW else 3.3) * (1 + with_accuracies) + 0.9 * (not with_accuracies)
    figure, *panels = new_figure(width, height, rows=2 if with_accuracies else 1)
    losses = panels[0]
    figure.suptitle("Learning-rate range test", x=0.01, ha="left")
    losses.set_ylabel("training loss")
    dots = f"median of {len(result.repeats)} repeats" if result.repeats else "each update"
    losses.plot(result.lrs, result.losses, ".", color=COLORS[0], alpha=0.35, label=dots, **DOTS)
    losses.plot(result.lrs, result.smoothed_losses, color=COLORS[0], label="smoothed", linewidth=2)
    _band(losses, result.lrs, [(r.lrs, r.smoothed_losses) for r in result.repeats], COLORS[0])
    _limit_to_start(losses, result.losses, result.smoothed_losses)
    for name, marker in (("valley", "D"), ("minimum", "o")):
        _mark(losses, result, name, marker, result.smoothed_losses)
    if result.accuracies is None or result.smoothed_accuracies is None:
        _mark(losses, result, "steepest", "v", result.smoothed_losses)
    else:
        percent = result.metric_name == "accuracy"
        scale, where, axes = 100 if percent else 1, result.measured, panels[1]
        axes.set_ylabel("validation accuracy (%)" if percent else f"validation {result.metric_name}")
        style: dict[str, Any] = {"color": COLORS[1], "alpha": 0.5, "label": "measured", **DOTS}
        axes.plot(result.lrs[where], scale * result.accuracies[where], "o", **style)
        smooth = scale * result.smoothed_accuracies
        axes.plot(result.lrs, smooth, color=COLORS[1], linewidth=2, label="smoothed")
        curves = [
            (r.lrs, scale * r.smoothed_accuracies)
            for r in result.repeats
            if r.smoothed_accuracies is not None
        ]
        _band(axes, result.lrs, curves, COLORS[1])
        _mark(axes, result, "steepest", "v", smooth)
    for axes in panels:
        if result.sweep == "exponential":
            axes.set_xscale("log")
        if result.base_lr is not None and result.max_lr is not None:
            text = f"base_lr: {result.base_lr:.2g}\nmax_lr: {result.max_lr:.2g}"
            if "max_lr" in result.intervals:
                text += " [{:.2g}, {:.2g}]".format(*result.intervals["max_lr"])
            axes.axvspan(result.base_lr, result.max_lr, color=COLORS[2], alpha=0.13, linewidth=0, zorder=0)
            axes.axvline(result.base_lr, color=COLORS[2], linewidth=1.2)
            axes.axvline(result.max_lr, color=COLORS[2], linewidth=1.2, label=text)
        axes.margins(x=0.01)
        add_legend(axes, width)
    panels[-1].set_xlabel(_rate_label(result))
    notes = [note for note in (result.stopped, result.reason) if note]
    figure.text(0.01, -0.01, "; ".join(notes), fontsize=9, color=GREY, va="top", wrap=True)
    return saved(figure, path)


def plot_range_test_grid(grid: SweptCurves, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws the smooth curves of several range tests over each other, each with a dot at its max_lr.

    The loss stands above, the accuracy (where it was measured) below.

    Args:
        grid: the range tests and their settings.
        path: where to save the picture, in the format of the suffix; None: it is not saved.
    """
    require("grid", grid, "peaks", "a RangeTestGrid")
    first = grid.results[0]
    with_accuracies = first.accuracies is not None
    figure, *panels = new_figure(9.4, 6.2 if with_accuracies else 4.2, rows=2 if with_accuracies else 1)
    panels[0].set_title("Learning-rate range tests", loc="left")
    percent = first.metric_name == "accuracy"
    panels[0].set_ylabel("training loss, smoothed")
    if with_accuracies:
        name = "accuracy (%)" if percent else first.metric_name
        panels[1].set_ylabel(f"validation {name}, smoothed")
    for i, (name, result) in enumerate(zip(grid.names(), grid.results, strict=True)):
        smooth = [result.smoothed_losses]
        if result.smoothed_accuracies is not None:
            smooth.append((100 if percent else 1) * result.smoothed_accuracies)
        dashes = ("-", "--", ":", "-.")[i // len(COLORS) % 4]  # where there are more curves than colours
        style = {"color": COLORS[i % len(COLORS)], "linestyle": dashes, "linewidth": 1.6}
        max_lr = "none" if result.max_lr is None else f"{result.max_lr:.2g}"
        for axes, values in zip(panels, smooth, strict=True):
            axes.plot(result.lrs, values, label=f"{name}: max_lr {max_lr}", **style)
            if result.max_lr is not None:
                at = np.interp(result.max_lr, result.lrs, values)
                axes.plot(result.max_lr, at, "o", color=style["color"], markersize=6, zorder=4)
    if first.sweep == "exponential":
        panels[0].set_xscale("log")
    panels[-1].set_xlabel(_rate_label(first))
    add_legend(panels[0], figure.get_figwidth())
    return saved(figure, path)


def _rate_label(result: SweptCurve) -> str:
    scale = " (log scale)" if result.sweep == "exponential" else ""
    return f"learning rate{scale}, raised during the sweep"


def _mark(axes: Axes, result: SweptCurve, name: str, marker: str, curve: Array) -> None:
    """Marks a rate by its name on a smooth curve, where there is that rate."""
    rate = getattr(result, name)
    if rate is not None:
        level = np.interp(rate, result.lrs, curve)
        axes.plot(rate, level, marker, color="black", markersize=6, label=f"{name}: {rate:.2g}", zorder=4)


def _band(axes: Axes, lrs: Array, curves: Sequence[tuple[Array, Array]], color: str) -> None:
    """From the lowest to the highest of the curves, where two or more of them are."""
    if len(curves) < 2:
        return
    rows = np.array([np.interp(lrs, x, y, left=np.nan, right=np.nan) for x, y in curves if len(x)])
    there = (~np.isnan(rows)).sum(0) >= 2
    low, high = np.nanmin(rows[:, there], 0), np.nanmax(rows[:, there], 0)
    axes.fill_between(lrs[there], low, high, color=color, alpha=0.2, linewidth=0, label="repeats")


def _limit_to_start(axes: Axes, losses: Array, smooth: Array) -> None:
    """Leaves out of sight how far the loss rose after training broke down, but not the smooth line."""
    if len(losses) == 0:
        return
    low, start = float(losses.min()), float(np.median(losses[: max(3, len(losses) // 10)]))
    room = (start - low) or abs(start) or 1.0
    # A line that ends some hundred times as high would hide all the rest.
    line = min(float(np.nanmax(smooth, initial=low)), start + 3 * room)
    high = max(line, min(float(losses.max()), start + 0.7 * room))
    axes.set_ylim(low - 0.06 * room, high + 0.06 * room)
