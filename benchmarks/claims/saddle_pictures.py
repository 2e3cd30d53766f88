"""What saddles.py draws: the surface with trajectories, when runs have arrived, and an animation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.claims.runner import Run
from benchmarks.claims.saddles import (
    EDGE,
    MAXIMUM,
    MINIMUM,
    REACHED,
    SADDLES,
    SHOWN,
    STEP_SIZE_UP,
    denominator,
    descent,
    fastest,
    label,
    share,
    starts,
    value,
)
from benchmarks.claims.tasks import matching
from fastlr.plotting import save
from fastlr.plotting.figure import COLORS, GREY, Array

TICKS = (0.0, math.pi / 2, math.pi), ("0", "π/2", "π")
LEVELS = (1.0, 1.2, 1.6, 2.2, 3.0, 4.2, 5.8, 7.4, 9.0, 11.0, 13.0, 15.0, 17.0)  # of d; 9: the saddle points'
STYLES = {name: (COLORS[i], "osD^"[i]) for i, name in enumerate(SHOWN)}
# Where the picture's trajectories begin, mirror images of one place beside a saddle point: the function has
# these symmetries, so that nothing but the policy tells the runs apart, and their lines do not overlap.
BEGIN = {
    "fixed small rate": (math.pi - 0.3, -0.7),
    "fixed large rate": (0.7, math.pi - 0.3),
    "triangular": (-0.7, math.pi - 0.3),
    "small rate, momentum": (math.pi - 0.3, 0.7),
}


def _heights(count: int) -> tuple[Array, Array, Array, Array]:
    """x, y and the function over the period that is shown, and log d, which tells heights on the plateau."""
    axis = torch.linspace(EDGE, EDGE + 2 * math.pi, count, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    points = torch.stack((x, y), -1)
    return x.numpy(), y.numpy(), value(points).numpy(), denominator(points).log().numpy()


def _wrapped(points: torch.Tensor) -> torch.Tensor:
    return EDGE + (points - EDGE).remainder(2 * math.pi)


def _trajectory(name: str, updates: int) -> torch.Tensor:
    """One run's points, until it arrives, with a gap (NaN) wherever it leaves the period that is shown."""
    begin = torch.tensor([BEGIN[name]], dtype=torch.float64)
    states = torch.cat([at.clone() for at, _ in descent(SHOWN[name], begin, updates)])
    arrived = (value(states) < REACHED).nonzero().flatten().tolist()
    states = states[: arrived[0] + 1] if arrived else states
    periods = ((states - EDGE) / (2 * math.pi)).floor()
    leaves = (periods[1:] != periods[:-1]).any(-1).nonzero().flatten() + 1
    gap = states.new_full((1, 2), math.nan)
    bounds = pairwise([0, *leaves.tolist(), len(states)])
    return torch.cat([part for a, b in bounds for part in (_wrapped(states[a:b]), gap)])


def _map(axes: Any) -> None:
    """The function from above, the darker the lower; a line at the height of the saddle points."""
    x, y, _, log_d = _heights(121)
    axes.contourf(x, y, log_d, np.log(LEVELS), cmap="Greys_r", vmin=-2.2, vmax=2.9)
    axes.contour(x, y, log_d, [math.log(9)], colors=GREY, linewidths=0.9)
    axes.set_xlim(EDGE, EDGE + 2 * math.pi)
    axes.set_ylim(EDGE, EDGE + 2 * math.pi)
    axes.set_aspect("equal")
    axes.set_xticks(*TICKS)
    axes.set_yticks(*TICKS)
    axes.spines[:].set_color(GREY)
    axes.tick_params(color=GREY)


def draw_surface(runs: Sequence[Run], path: Path) -> None:
    """The surface and its map with a trajectory of each policy, and how many runs have arrived by when."""
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(10.4, 8.6), dpi=120, layout="constrained", facecolor="white")
    halves = figure.add_gridspec(2, 1, height_ratios=(1.5, 1))
    top, bottom = (figure.add_subfigure(halves[row]) for row in range(2))
    grid = top.add_gridspec(1, 2, width_ratios=(1.25, 1))
    surface = top.add_subplot(grid[0], projection="3d", computed_zorder=False)
    _draw_relief(surface)
    plan = top.add_subplot(grid[1])
    _map(plan)
    updates = 2 * STEP_SIZE_UP
    for name, (color, marker) in STYLES.items():
        points = _trajectory(name, updates)
        line: dict[str, Any] = {"color": color, "linewidth": 0.8 if name == "fixed large rate" else 1.3}
        surface.plot(*points.T.numpy(), value(points).numpy() + 0.01, **line, zorder=3)
        plan.plot(*points.T.numpy(), **line, marker=marker, markersize=3.4, markeredgewidth=0, zorder=3)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for name, place, marker in (
        ("minimum", MINIMUM, "*"),
        *(("saddle point", saddle, "X") for saddle in SADDLES),
        ("maximum", MAXIMUM, "P"),
    ):
        shape: dict[str, Any] = {
            "marker": marker,
            "color": "white",
            "markersize": 10,
            "markeredgecolor": "black",
        }
        plan.plot(*([c] for c in place), **shape, linestyle="", zorder=5)
        height = float(value(torch.tensor(place)))
        surface.plot(*([c] for c in (*place, height + 0.02)), **shape, linestyle="", zorder=5)
        look: dict[str, Any] = {"fontsize": 9, "path_effects": halo, "zorder": 6}
        plan.annotate(name, place, (9, 6), textcoords="offset points", **look)
    plan.set_xlabel("x")
    plan.set_ylabel("y")
    surface.set_title("f(x, y) = 1 \u2212 1 / (9 \u2212 4 cos x \u2212 4 cos y)", fontsize=11)
    plan.set_title(f"One cycle, {updates} updates, from mirrored starts", fontsize=11)
    _draw_shares(bottom.add_subplot(), runs)
    save(figure, path)


def _draw_relief(axes: Any) -> None:
    from matplotlib import colormaps

    x, y, height, log_d = _heights(81)
    shades = colormaps["Greys_r"]((log_d + 2.2) / 5.1)  # as those of the map
    axes.plot_surface(x, y, height, facecolors=shades, rcount=81, ccount=81, linewidth=0, shade=False)
    for level in LEVELS[1:-1]:
        width = 1.1 if level == 9 else 0.5
        axes.contour(x, y, height, [1 - 1 / level], colors=GREY, linewidths=width, zorder=2)
    axes.view_init(elev=48, azim=-135)
    axes.set_box_aspect((1, 1, 0.5), zoom=1.15)
    axes.set_xticks(*TICKS)
    axes.set_yticks(*TICKS)
    axes.set_zlim(0, 1)
    axes.set_zticks((0.0, 0.5, 1.0))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_visible(False)
    axes.grid(False)
    axes.set_xlabel("x")
    axes.set_ylabel("y")


def _draw_shares(axes: Any, runs: Sequence[Run]) -> None:
    rivals = {
        label(fastest(runs, "fixed")[0].job) + ", the best fixed rate": (fastest(runs, "fixed"), "#000000"),
        label(fastest(runs, "triangular")[0].job): (fastest(runs, "triangular"), STYLES["triangular"][0]),
    }
    for name, (color, marker) in STYLES.items():
        group = matching(runs, **SHOWN[name])
        shape = {"marker": marker, "markersize": 4, "markevery": 3}
        _draw_share(axes, group, label=label(SHOWN[name]), color=color, linewidth=1.8, **shape)
    for text, (group, color) in rivals.items():
        _draw_share(axes, group, label=text, color=color, linewidth=1.5, linestyle="--")
    axes.set_xscale("log")
    ticks = [n for n in (10, 20, 50, 100, 200, 500, 1000) if n <= runs[0].figures["updates"][-1]]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e7eb", linewidth=0.7)
    axes.set_xlabel("updates")
    axes.set_ylabel("have reached the minimum (%)")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_share(axes: Any, group: Sequence[Run], **look: Any) -> None:
    shares = 100 * np.array([run.figures["reached"] for run in group]).mean(0)
    axes.plot(group[0].figures["updates"], shares, **look)


def animate(path: Path, *, count: int = 300, updates: int = 200, every: int = 4) -> None:
    """The runs of one seed as dots that move over the map, a panel for each policy."""
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.9), dpi=80, layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    runs = [descent(job, starts(0, count), updates) for job in SHOWN.values()]
    dots, titles = [], []
    for axes, name in zip(panels, SHOWN, strict=True):
        _map(axes)
        axes.spines[:].set(color=STYLES[name][0], linewidth=2)  # which brings it into a frame's few colours
        (shown,) = axes.plot([], [], ".", color=STYLES[name][0], markersize=5, markeredgewidth=0)
        dots.append(shown)
        titles.append(axes.set_title(f"{name}\nafter", fontsize=9.5))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each frame
    writer = PillowWriter(fps=8)
    with writer.saving(figure, str(path), figure.dpi):
        for n, states in enumerate(zip(*runs, strict=True)):
            if n % every:
                continue
            for name, shown, title, (points, lr) in zip(SHOWN, dots, titles, states, strict=True):
                shown.set_data(*_wrapped(points).T.numpy())
                there = 100 * share(value(points) < REACHED)
                title.set_text(f"{name}, now {lr:.2f}\nafter {n} updates {there:.1f} % in the minimum")
            writer.grab_frame()
