"""Every picture. Matplotlib is imported inside; no display and no pyplot state is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastlr._checks import count, describe, file_name, items, vector, within
from fastlr._files import replacing
from fastlr.schedules import OneCycleMomentum, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from fastlr.batch_growth import BatchPlan
    from fastlr.range_test import RangeTestGrid, RangeTestResult

Curve: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

__all__ = [
    "plot_accuracy",
    "plot_batch_plan",
    "plot_range_test",
    "plot_range_test_grid",
    "plot_schedules",
]

# Told apart by readers who see red and green alike (Okabe and Ito's colours, darkest first).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#6b7280"
_DOTS: dict[str, Any] = {"markersize": 4.5, "markeredgewidth": 0}


def plot_schedules(
    schedules: Mapping[str, Schedule],
    steps: int | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws schedules over their clock, one line each.

    Args:
        schedules: name of each line and its schedule; all of one unit.
        steps: clock units to draw, >= 1; None: up to where the last of them ends. A line ends with its
            schedule.
        path: where to save the picture, in the format of the suffix; None: it is not saved.

    Raises:
        ValueError: nothing to draw, units differ, or ``steps`` is None and none of them has an end.
        TypeError: an argument is of the wrong kind.
    """
    from matplotlib.ticker import MaxNLocator

    if not isinstance(schedules, Mapping):
        raise TypeError(f"schedules must be a dict of names and schedules, got {type(schedules).__name__}")
    for name, schedule in schedules.items():
        if not isinstance(schedule, Schedule):
            raise TypeError(f"{name!r} must be a fastlr schedule, got {describe(schedule)}")
    units = {schedule.unit for schedule in schedules.values()}
    if len(units) != 1:
        raise ValueError(f"schedules must be one or more of one unit, got units {sorted(units)}")
    if steps is None:
        ends = [s.duration for s in schedules.values() if s.duration is not None]
        if not ends:
            raise ValueError(f"{', '.join(schedules)} has no end: say how many steps to draw")
        steps = max(ends) + 1
    steps = count("steps", steps)

    figure, axes = _figure(7.2, 3.6)
    for i, (name, schedule) in enumerate(schedules.items()):
        values = schedule.values(0, min(steps, schedule._last + 1))
        style: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "label": name, "linewidth": 1.8}
        if len(values) <= 60:  # few enough to show that the value is constant during an update
            axes.stairs(values, baseline=None, **style)
        else:
            axes.plot(values, **style)
    axes.set_xlabel(f"{units.pop()}s")
    momentum = all(isinstance(schedule, OneCycleMomentum) for schedule in schedules.values())
    axes.set_ylabel("momentum" if momentum else "learning rate")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if len(schedules) > 1:
        figure.legend(frameon=False, loc="outside upper center", ncols=min(len(schedules), 4))
    else:
        axes.set_title(next(iter(schedules)), loc="left")
    return _saved(figure, path)


def plot_range_test(result: RangeTestResult, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws a range test: what was measured, the smooth curve, and what was read from it.

    The loss stands above, the accuracy (where it was measured) below; the range between the bounds is
    shaded. With repeats the smooth curve is that of their median, in a band from the lowest to the highest of
    theirs.

    Args:
        result: the range test's.
        path: where to save the picture, in the format of the suffix; None: it is not saved.
    """
    _require("result", result, "smoothed_losses", "a RangeTestResult")
    with_accuracies = result.accuracies is not None
    figure, *panels = _figure(8.6, 5.4 if with_accuracies else 3.6, rows=2 if with_accuracies else 1)
    losses = panels[0]
    losses.set_title("Learning-rate range test", loc="left")
    losses.set_ylabel("training loss")
    dots = f"median of {len(result.repeats)} repeats" if result.repeats else "each update"
    losses.plot(result.lrs, result.losses, ".", color=_COLORS[0], alpha=0.35, label=dots, **_DOTS)
    losses.plot(result.lrs, result.smoothed_losses, color=_COLORS[0], label="smoothed", linewidth=2)
    _band(losses, result.lrs, [(r.lrs, r.smoothed_losses) for r in result.repeats], _COLORS[0])
    _limit_to_start(losses, result.losses)
    for name, marker in (("valley", "D"), ("minimum", "o")):
        _mark(losses, result, name, marker, result.smoothed_losses)
    if result.accuracies is None or result.smoothed_accuracies is None:
        _mark(losses, result, "steepest", "v", result.smoothed_losses)
    else:
        percent = result.metric_name == "accuracy"
        scale, where, axes = 100 if percent else 1, result.measured, panels[1]
        axes.set_ylabel("validation accuracy (%)" if percent else f"validation {result.metric_name}")
        style: dict[str, Any] = {"color": _COLORS[1], "alpha": 0.5, "label": "measured", **_DOTS}
        axes.plot(result.lrs[where], scale * result.accuracies[where], "o", **style)
        smooth = scale * result.smoothed_accuracies
        axes.plot(result.lrs, smooth, color=_COLORS[1], linewidth=2, label="smoothed")
        curves = [
            (r.lrs, scale * r.smoothed_accuracies)
            for r in result.repeats
            if r.smoothed_accuracies is not None
        ]
        _band(axes, result.lrs, curves, _COLORS[1])
        _mark(axes, result, "steepest", "v", smooth)
    for axes in panels:
        if result.sweep == "exponential":
            axes.set_xscale("log")
        if result.base_lr is not None and result.max_lr is not None:
            text = f"base_lr: {result.base_lr:.2g}\nmax_lr: {result.max_lr:.2g}"
            if "max_lr" in result.intervals:
                text += " [{:.2g}, {:.2g}]".format(*result.intervals["max_lr"])
            axes.axvspan(result.base_lr, result.max_lr, color=_COLORS[2], alpha=0.13, linewidth=0, zorder=0)
            axes.axvline(result.base_lr, color=_COLORS[2], linewidth=1.2)
            axes.axvline(result.max_lr, color=_COLORS[2], linewidth=1.2, label=text)
        if len(result.lrs) > 1:
            axes.set_xlim(result.lrs[0], result.lrs[-1])
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.02))
    panels[-1].set_xlabel(_rate_label(result))
    notes = [note for note in (result.stopped, result.reason) if note]
    figure.text(0.01, -0.01, "; ".join(notes), fontsize=9, color=_GREY, va="top", wrap=True)
    return _saved(figure, path)


def plot_range_test_grid(grid: RangeTestGrid, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws the smooth curves of several range tests over each other, each with a dot at its max_lr.

    The loss stands above, the accuracy (where it was measured) below.

    Args:
        grid: the range tests and their settings.
        path: where to save the picture, in the format of the suffix; None: it is not saved.
    """
    _require("grid", grid, "peaks", "a RangeTestGrid")
    first = grid.results[0]
    with_accuracies = first.accuracies is not None
    figure, *panels = _figure(9.4, 6.2 if with_accuracies else 4.2, rows=2 if with_accuracies else 1)
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
        dashes = ("-", "--", ":", "-.")[i // len(_COLORS) % 4]  # where there are more curves than colours
        style = {"color": _COLORS[i % len(_COLORS)], "linestyle": dashes, "linewidth": 1.6}
        max_lr = "none" if result.max_lr is None else f"{result.max_lr:.2g}"
        for axes, values in zip(panels, smooth, strict=True):
            axes.plot(result.lrs, values, label=f"{name}: max_lr {max_lr}", **style)
            if result.max_lr is not None:
                at = np.interp(result.max_lr, result.lrs, values)
                axes.plot(result.max_lr, at, "o", color=style["color"], markersize=6, zorder=4)
    if first.sweep == "exponential":
        panels[0].set_xscale("log")
    panels[-1].set_xlabel(_rate_label(first))
    panels[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return _saved(figure, path)


def _require(name: str, value: object, attribute: str, kind: str) -> None:
    if not hasattr(value, attribute):
        raise TypeError(f"{name} must be {kind}, got {describe(value)}")


def _rate_label(result: RangeTestResult) -> str:
    scale = " (log scale)" if result.sweep == "exponential" else ""
    return f"learning rate{scale}, raised during the sweep"


def _mark(axes: Axes, result: RangeTestResult, name: str, marker: str, curve: Curve) -> None:
    """Marks a rate by its name on a smooth curve, where there is that rate."""
    rate = getattr(result, name)
    if rate is not None:
        level = np.interp(rate, result.lrs, curve)
        axes.plot(rate, level, marker, color="black", markersize=6, label=f"{name}: {rate:.2g}", zorder=4)


def _band(axes: Axes, lrs: Curve, curves: Sequence[tuple[Curve, Curve]], color: str) -> None:
    """From the lowest to the highest of the curves, where two or more of them are."""
    if len(curves) < 2:
        return
    rows = np.array([np.interp(lrs, x, y, left=np.nan, right=np.nan) for x, y in curves if len(x)])
    there = (~np.isnan(rows)).sum(0) >= 2
    low, high = np.nanmin(rows[:, there], 0), np.nanmax(rows[:, there], 0)
    axes.fill_between(lrs[there], low, high, color=color, alpha=0.2, linewidth=0, label="repeats")


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
    figure, axes = _figure(7.2, 4.4)
    means = []
    for i, (name, values) in enumerate(curves.items()):
        runs = 100 * values
        mean, color = runs.mean(0), _COLORS[i % len(_COLORS)]
        means.append(mean)
        axes.plot(updates, mean, color=color, label=name, linewidth=1.8)
        if len(runs) > 1:
            deviation = runs.std(0, ddof=1)
            low, high = mean - deviation, np.minimum(mean + deviation, 100)
            axes.fill_between(updates, low, high, color=color, alpha=0.13, linewidth=0)
    if target is not None:
        text = f"target {100 * target:.1f} %"
        axes.axhline(100 * target, color=_GREY, linestyle="--", linewidth=1.1, label=text)
    # What tells policies apart happens at the top; the climb from chance is the same for all of them.
    finals = [mean[-1] for mean in means]
    best = max(float(mean.max()) for mean in means)
    axes.set_ylim(max(0.0, min(min(finals) - 6, best - 12)), min(100.5, best + 3))
    axes.set_xlabel("updates")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return _saved(figure, path)


def _runs(name: str, runs: Any, points: int) -> Curve:
    """Accuracies, shape (runs, points)."""
    rows = [vector(f"each run of {name!r}", run) for run in items(f"the runs of {name!r}", runs)]
    lengths = sorted({len(row) for row in rows})
    if lengths != [points]:
        raise ValueError(f"the runs of {name!r} must have {points} accuracies each, got runs of {lengths}")
    return np.stack(rows)


def plot_batch_plan(plan: BatchPlan, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws a plan: batch size, learning rate and noise scale, one above the other, over the epochs.

    Args:
        plan: the plan.
        path: where to save the picture, in the format of the suffix; None: it is not saved.
    """
    _require("plan", plan, "phases", "a BatchPlan")
    figure, batches, rates, scales = _figure(7.2, 5.4, rows=3)
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
    lr = np.array([plan.lr(sample) for sample in samples])
    batches.plot(epochs, batch, color=_COLORS[0], linewidth=1.8)
    rates.plot(epochs, lr, color=_COLORS[1], linewidth=1.8)
    noise = [plan.noise_scale(sample) for sample in samples]
    scales.plot(epochs, noise, color=_COLORS[2], linewidth=1.8)
    batches.set_title(f"Batch plan ({plan.mode}): {plan.total_updates:,} updates", loc="left")
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
    return _saved(figure, path)


def _limit_to_start(axes: Axes, losses: Curve) -> None:
    """Leaves out of sight how far the loss rose after training broke down."""
    if len(losses) == 0:
        return
    low, start = float(losses.min()), float(np.median(losses[: max(3, len(losses) // 10)]))
    room = (start - low) or abs(start) or 1.0
    axes.set_ylim(low - 0.06 * room, min(float(losses.max()), start + 0.7 * room) + 0.06 * room)


def _figure(width: float, height: float, rows: int = 1) -> tuple[Any, ...]:
    """A figure and its axes, one above the other over a shared x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GREY)
        axes.grid(True, color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(color=_GREY)
    return (figure, *panels)


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        save(figure, path, bbox_inches="tight")
    return figure


def save(figure: Figure, path: str | os.PathLike[str], **options: Any) -> None:
    """Saves a picture in the format of the suffix, whole or not at all.

    Args:
        figure: what to save.
        path: of the file; without a suffix it gets that of matplotlib's usual format, as from ``savefig()``.
        options: of ``savefig()``.
    """
    from matplotlib import rcParams

    name = file_name("path", path)
    suffix = os.path.splitext(name)[1]
    if suffix in ("", "."):
        name, suffix = f"{name.rstrip('.')}.{rcParams['savefig.format']}", rcParams["savefig.format"]
    with replacing(name, "wb") as file:
        figure.savefig(file, format=suffix.lstrip(".").lower(), **options)
