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
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import fastlr
from benchmarks.claims.runner import Job, Result, Run, Setting, Statement, Summary, Table
from benchmarks.claims.tasks import MOMENTUM, candidates, matching, with_seeds
from fastlr._statistics import Comparison, compared

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
PASSED = 1e-2  # the value within 0.07 of it
REACHED = 1e-4  # the value within 0.007 of the minimum

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
                "reached": [share(reached <= n) for n in measure_at],
                "at the end": share(last < REACHED),
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
        fixed, cyclic = fastest(runs, "fixed"), fastest(runs, "triangular")
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
            "(1) to (3) set the triangular rate beside its own bounds, of which the lower is slow and the "
            "upper never comes to rest: only (4) is open.",
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
            "The large rate and short cycles reach it in passing, which counts. Were a value below "
            f"{PASSED:g} enough, the medians would be "
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
        return Summary([Table("Updates from random starts", rows, note)], statements, notes, animated=True)

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        from benchmarks.claims import saddle_pictures  # which draws what stands here

        saddle_pictures.draw_surface(runs, path)
        saddle_pictures.animate(path.with_suffix(".gif"))


def share(which: torch.Tensor) -> float:
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


def fastest(runs: Sequence[Run], policy: str) -> list[Run]:
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


claim = Saddles()
