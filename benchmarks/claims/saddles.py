r"""Saddle plateaus: how soon a thousand starts leave them, with fixed, cyclic and falling rates and momentum.

The function has two variables, both angles, and a period of 2 pi in each:

.. math:: f(x, y) = 1 - 1/d, \qquad d = 9 - 4 \cos x - 4 \cos y

Its gradient is :math:`(4 \sin x, 4 \sin y) / d^2`, so that the places where it vanishes are known exactly: a
minimum at (0, 0), a maximum at (pi, pi) and, between them, two saddle points at (pi, 0) and (0, pi). Its
Hessian, :math:`4 \, \mathrm{diag}(\cos x, \cos y) / d^2 - 32 \, s s^T / d^3` with
:math:`s = (\sin x, \sin y)`, is 4 in every direction at the minimum and -4/81 and 4/81 at the saddle points.
What is 1/d below 1 is flat where d is large: within 1 of a saddle point the gradient is nowhere more than a
thirteenth of what it is at its steepest, and saddle points and maximum make one plateau with a hole in it.

A rate of 2/4 is the largest with which plain gradient descent comes to rest in the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import fastlr
from benchmarks.claims.runner import Job, Result, Run, Setting, Statement, Summary, Table
from benchmarks.claims.tasks import MOMENTUM, candidates, matching, with_seeds
from fastlr._statistics import Comparison, compared
from fastlr.plotting import save
from fastlr.plotting.figure import COLORS, GREY, Array

MINIMUM, MAXIMUM = (0.0, 0.0), (math.pi, math.pi)
SADDLES = ((math.pi, 0.0), (0.0, math.pi))
EDGE = -math.pi / 2  # of the period that is shown, which has all four of them inside

LIMIT = 2 / 4  # the largest stable rate at the minimum, see above
SMALL, LARGE = LIMIT / 5, 4 * LIMIT
STEP_SIZE_UP = 50
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0)  # of fixed rates, from SMALL to LARGE

STARTS, QUICK_STARTS = 1000, 200
UPDATES = 1200  # whole cycles, in a quick run too
NEAR = 1.0  # of a saddle point: what counts as a start beside it
LEFT = 4 / 9  # half the value at the saddle points: below it a run has left the plateau
PASSED = 1e-2  # the value within 0.07 of it, which a run with a large rate hits in passing
REACHED = 1e-4  # the value within 0.007 of the minimum: too near for a run to hit it in passing

BESIDE, LATE = "median beside a saddle point", "19 of 20"  # of a run's figures

POLICIES: tuple[Job, ...] = (
    *({"policy": "fixed", "lr": lr} for lr in GRID),
    *(
        {"policy": "triangular", "lr": lr, "step_size_up": step_size_up}
        for lr, step_size_up in ((1.0, 50), (2.0, 50), (5.0, 50), (2.0, 10), (2.0, 25), (2.0, 100))
    ),
    {"policy": "falling", "lr": LARGE},
    *({"policy": "momentum", "lr": lr} for lr in (0.05, 0.1, 0.2, 0.4)),
)
# Those that the rule speaks of, and their rivals: what the picture shows.
SHOWN: dict[str, Job] = {
    "fixed small rate": {"policy": "fixed", "lr": SMALL},
    "fixed large rate": {"policy": "fixed", "lr": LARGE},
    "triangular": {"policy": "triangular", "lr": LARGE, "step_size_up": STEP_SIZE_UP},
    "small rate, momentum": {"policy": "momentum", "lr": SMALL},
}


def denominator(points: torch.Tensor) -> torch.Tensor:
    """d above: 1 at the minimum, 9 at the saddle points, 17 at the maximum."""
    found: torch.Tensor = 9 - 4 * points.cos().sum(-1)
    return found


def value(points: torch.Tensor) -> torch.Tensor:
    """The function at points of shape (..., 2)."""
    return 1 - 1 / denominator(points)


def gradient(points: torch.Tensor) -> torch.Tensor:
    """Of :func:`value`, by the formula above."""
    return 4 * points.sin() / denominator(points).square()[..., None]


def starts(seed: int, count: int) -> torch.Tensor:
    """Points drawn evenly from one period, shape (count, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return EDGE + 2 * math.pi * torch.rand(count, 2, generator=generator, dtype=torch.float64)


def distance(points: torch.Tensor, place: tuple[float, float]) -> torch.Tensor:
    """How far points are from a place, or from the nearest of its repetitions."""
    gaps = points - torch.tensor(place, dtype=points.dtype)
    gaps = gaps - 2 * math.pi * (gaps / (2 * math.pi)).round()
    found: torch.Tensor = torch.linalg.vector_norm(gaps, dim=-1)
    return found


def options(job: Job, updates: int) -> dict[str, Any]:
    """A policy's options of FusedSGD."""
    lr = job["lr"]
    if job["policy"] == "triangular":
        return {"lr": fastlr.Triangular(SMALL, lr, job["step_size_up"])}
    if job["policy"] == "falling":
        return {"lr": fastlr.Polynomial(lr, SMALL, updates, power=1.0)}
    return {"lr": lr, "momentum": MOMENTUM if job["policy"] == "momentum" else 0.0}


def descent(job: Job, points: torch.Tensor, updates: int) -> Iterator[tuple[torch.Tensor, float]]:
    """Points after each update, from before the first one on, and the rate of the update to come.

    They are the same tensor each time, which the next update changes. A step of SGD treats each element by
    itself, so one parameter of n points is n runs.
    """
    parameter = torch.nn.Parameter(points.clone())
    optimizer = fastlr.FusedSGD([parameter], **options(job, updates))
    for _ in range(updates):
        yield parameter.detach(), float(optimizer.param_groups[0]["lr"])
        parameter.grad = gradient(parameter.detach())
        optimizer.step()
    yield parameter.detach(), float(optimizer.param_groups[0]["lr"])


def label(job: Job) -> str:
    lr = f"{job['lr']:g}"
    if job["policy"] == "triangular":
        return f"triangular, {SMALL:g} to {lr}, cycles of {2 * job['step_size_up']}"
    if job["policy"] == "falling":
        return f"falling, {lr} to {SMALL:g}"
    return f"fixed, {lr}" if job["policy"] == "fixed" else f"fixed, {lr}, momentum {MOMENTUM:g}"


class Saddles:
    name = "saddles"
    title = "A rising rate crosses saddle plateaus"
    paper = "Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.1"
    paper_says = (
        '"Saddle points have small gradients that slow the learning process. However, increasing the '
        'learning rate allows more rapid traversal of saddle point plateaus." It gives no figures, and '
        "refers to Dauphin et al., arXiv 1502.04390, who with arXiv 1406.2572 hold saddle points rather than "
        "poor local minima to be what makes minimising hard."
    )
    rule = (
        "It holds if a triangular rate between a small and a large one takes fewer updates (1) to leave the "
        "plateau than the small rate, and to reach the minimum (2) than the small rate, (3) than the large "
        f"rate and (4) than the best of {len(GRID)} fixed rates. Fewer: the 95 % interval, over the seeds, "
        "of the mean difference between runs from the same starts lies below zero, where a run that never "
        "gets there counts with all updates. It holds partly if some of it is so."
    )
    data = ()

    def jobs(self, setting: Setting) -> list[Job]:
        return with_seeds(setting, POLICIES)

    def run(self, setting: Setting, job: Job) -> Result:
        updates = setting.updates(UPDATES)
        points = starts(job["seed"], QUICK_STARTS if setting.quick else STARTS)
        beside = torch.minimum(*(distance(points, saddle) for saddle in SADDLES)) < NEAR
        left, passed, reached = (torch.full((len(points),), math.inf) for _ in range(3))
        last = torch.empty(0)
        for n, (at, _) in enumerate(descent(job, points, updates)):
            last = value(at)
            for first, below in ((left, LEFT), (passed, PASSED), (reached, REACHED)):
                first[(last < below) & first.isinf()] = n
        measure_at = sorted({round(n) for n in np.geomspace(10, updates, 60)})
        return Result(
            {
                "starts": len(points),
                "updates": measure_at,
                "reached": [_share(reached <= n) for n in measure_at],
                "at the end": _share(last < REACHED),
                "median": _quantile(reached, 0.5),
                LATE: _quantile(reached, 0.95),
                BESIDE: _quantile(reached[beside], 0.5),
                "median to pass": _quantile(passed, 0.5),
                "median to leave": _quantile(left, 0.5),
                "mean": float(reached.clamp(max=updates).mean()),
                "mean to leave": float(left.clamp(max=updates).mean()),
            },
            {},
        )

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        heads = (
            "left the plateau, updates",
            "reached the minimum, updates",
            "19 of 20 runs",
            "beside a saddle point",
        )
        keys = ("median to leave", "median", LATE, BESIDE)
        rows = [["rate", *heads, "reached it", "in it at the end"]]
        rows += [
            [
                label(group[0].job),
                *(_updates(_median(group, key)) for key in keys),
                _percent(median(run.figures["reached"][-1] for run in group)),
                _percent(median(_figures(group, "at the end"))),
            ]
            for group in candidates(runs)
        ]
        small, large, triangular, momentum = (matching(runs, **job) for job in SHOWN.values())
        fixed, cyclic = _fastest(runs, "fixed"), _fastest(runs, "triangular")
        leaving = compared(_figures(triangular, "mean to leave"), _figures(small, "mean to leave"))
        statements = [
            Statement(f"to leave the plateau, against the small rate: {_words(leaving)}", _fewer(leaving)),
            *(
                Statement(f"to reach the minimum, against {name}: {_words(found)}", _fewer(found))
                for name, found in (
                    ("the small rate", _between(triangular, small)),
                    ("the large rate", _between(triangular, large)),
                    (f"the best fixed rate ({fixed[0].job['lr']:g})", _between(triangular, fixed)),
                )
            ),
        ]
        beside = {
            "the small rate": small,
            "the best fixed rate": fixed,
            "the triangular rate": triangular,
            "the small rate with momentum": momentum,
        }
        notes = [
            "Updates from beside a saddle point (medians): "
            + ", ".join(f"{name} {_updates(_median(group, BESIDE))}" for name, group in beside.items())
            + f". Of all runs 19 in 20 have arrived after {_updates(_median(triangular, LATE))} with the "
            f"triangular rate, after {_updates(_median(fixed, LATE))} with the best fixed one.",
            f"Against the small rate with momentum {MOMENTUM:g}, to reach the minimum from all starts: "
            f"{_words(_between(triangular, momentum))}. The best of the triangular rates "
            f"({label(cyclic[0].job)}), chosen by hindsight as the best fixed one is, against that one: "
            f"{_words(_between(cyclic, fixed))}; at the end "
            f"{_percent(median(_figures(cyclic, 'at the end')))} of its runs are in the minimum.",
            f"No rate above {LIMIT:g} comes to rest in the minimum. At the end "
            f"{_percent(median(_figures(large, 'at the end')))} of the runs with the large one fixed are in "
            f"it, and {_percent(median(_figures(triangular, 'at the end')))} of those with the triangular "
            "one, which drives them out again when it rises: it has to be stopped at the end of a cycle. "
            f"Were a value below {PASSED:g} enough, which is hit in passing, the medians would be "
            f"{_updates(_median(large, 'median to pass'))} with the large rate, "
            f"{_updates(_median(triangular, 'median to pass'))} with the triangular one, "
            f"{_updates(_median(fixed, 'median to pass'))} with the best fixed one.",
        ]
        note = (
            f"f(x, y) = 1 - 1/(9 - 4 cos x - 4 cos y); for each of {setting.seeds} seeds "
            f"{runs[0].figures['starts']:,} starts drawn evenly from a period, {setting.updates(UPDATES):,} "
            "updates. Left the plateau: first below half the saddle points' value; reached: first below "
            f"{REACHED:g}. Medians over the starts, of which those that never get there are the slowest; "
            f"beside a saddle point: of the starts within {NEAR:g} of one. The rule speaks of the triangular "
            f"rate of {SMALL:g} to {LARGE:g} with cycles of {2 * STEP_SIZE_UP}."
        )
        return Summary([Table("Updates from random starts", rows, note)], statements, notes)

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        draw_surface(runs, path)
        animate(path.with_suffix(".gif"))


def _share(which: torch.Tensor) -> float:
    return round(float(which.double().mean()), 4)


def _quantile(updates: torch.Tensor, q: float) -> float | None:
    """The value of a start, not one between two; None where that start never got there."""
    found = float(updates.quantile(q, interpolation="higher"))
    return found if math.isfinite(found) else None


def _figures(group: Sequence[Run], key: str) -> list[float]:
    return [run.figures[key] for run in group]


def _median(group: Sequence[Run], key: str) -> float:
    return median(math.inf if run.figures[key] is None else run.figures[key] for run in group)


def _between(a: Sequence[Run], b: Sequence[Run]) -> Comparison:
    """Updates that a's runs need more than b's, over the starts of each seed, which are the same ones."""
    return compared(_figures(a, "mean"), _figures(b, "mean"))


def _fastest(runs: Sequence[Run], policy: str) -> list[Run]:
    """Of a policy's candidates the one with the fewest updates, by what it shows here."""
    return min(candidates(matching(runs, policy=policy)), key=lambda group: mean(_figures(group, "mean")))


def _fewer(found: Comparison) -> bool:
    return found.outcome == "below"


def _words(found: Comparison) -> str:
    gap = f"{found.difference:+,.1f} updates"
    if found.low is None or found.high is None:
        return gap
    return f"{gap}, 95 % interval {found.low:+,.1f} to {found.high:+,.1f}"


def _updates(n: float) -> str:
    return f"{n:,.0f}" if n < math.inf else "not reached"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# -- pictures ------------------------------------------------------------------------------------------

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
        label(_fastest(runs, "fixed")[0].job) + ", the best fixed rate": (_fastest(runs, "fixed"), "#000000"),
        label(_fastest(runs, "triangular")[0].job): (_fastest(runs, "triangular"), STYLES["triangular"][0]),
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
                there = 100 * _share(value(points) < REACHED)
                title.set_text(f"{name}, now {lr:.2f}\nafter {n} updates {there:.0f} % in the minimum")
            writer.grab_frame()


claim = Saddles()
