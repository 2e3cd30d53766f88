"""Super-convergence: one cycle at a large rate against step decay, at a fraction of the updates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import fastlr
from benchmarks.claims.runner import Job, Result, Run, Setting, Statement, Summary, Table
from benchmarks.claims.tasks import (
    GRID,
    MARGIN,
    MOMENTUM,
    QUICK_GRID,
    Trial,
    best,
    caption,
    finals,
    matching,
    no_worse,
    points_between,
    rates,
    task_of,
    with_seeds,
)
from fastlr._statistics import spread
from fastlr.plotting import save
from fastlr.plotting.figure import COLORS, new_figure

BUDGETS = (0.125, 0.25, 0.5, 1.0)
EIGHTH = BUDGETS[0]  # the paper's: 10,000 iterations in place of 80,000
POLICIES = ("one-cycle", "step decay")
# Of all updates, in those of the data set's usual run.
LENGTH = {"digits": 4.0, "fashion-mnist": 4.0, "cifar10": 80_000 / 70_000}


def all_updates(setting: Setting) -> int:
    return setting.updates(LENGTH[str(setting.data)] * task_of(setting).updates)


def options(policy: str, lr: float, updates: int) -> dict[str, Any]:
    """Rate and momentum of a policy: one-cycle's, or a tenth of the rate after half and three quarters."""
    if policy == "one-cycle":
        cycle, momentum = fastlr.one_cycle(lr, updates)
        return {"lr": cycle, "momentum": momentum}
    drops = (updates // 2, updates * 3 // 4)
    return {"lr": fastlr.MultiStep(lr, drops, 0.1), "momentum": MOMENTUM}


class SuperConvergence:
    name = "super_convergence"
    title = "One cycle at a large rate replaces most of the updates"
    paper = "Smith and Topin, Super-Convergence, arXiv 1708.07120, figure 1a"
    paper_says = (
        "ResNet-56 on CIFAR-10: 92.4 % after 10,000 iterations of one cycle with rates up to 3, 91.2 % "
        "after 80,000 with a piecewise constant rate."
    )
    rule = (
        "It holds if one-cycle with an eighth of the updates (1) ends no worse than step decay with all of "
        "them and (2) ends above step decay with as few, and (3) its best rate is higher than step decay's "
        "with as few. "
        f"No worse, above: the 95 % interval of the paired differences lies above -{MARGIN:g} point, above "
        "zero. It holds partly if some of it is so."
    )
    data = ("digits", "fashion-mnist", "cifar10")

    def jobs(self, setting: Setting) -> list[Job]:
        return with_seeds(
            setting,
            [
                {"policy": policy, "budget": budget, "lr": lr}
                for policy in POLICIES
                for budget in BUDGETS
                for lr in (QUICK_GRID if setting.quick else (*GRID, 0.5))
            ],
        )

    def run(self, setting: Setting, job: Job) -> Result:
        updates = round(job["budget"] * all_updates(setting))
        chosen = options(job["policy"], job["lr"], updates)
        return Trial(setting, job["seed"]).train(partial(fastlr.FusedSGD, **chosen), updates)

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        chosen = _chosen(runs)
        rows = [
            ["updates", *(text for policy in POLICIES for text in (policy, "its rate")), "one-cycle against"]
        ]
        for budget in BUDGETS:
            groups = [chosen[policy, budget] for policy in POLICIES]
            cells = [text for group in groups for text in (spread(finals(group)), rates(group))]
            rows.append(
                [f"{groups[0][0].figures['updates'][-1]:,}", *cells, points_between(*groups).interval()]
            )
        cycle, all_steps = chosen["one-cycle", EIGHTH], chosen["step decay", 1.0]
        few = chosen["step decay", EIGHTH]
        same = points_between(cycle, few)
        statements = [
            no_worse(
                "one-cycle with an eighth against step decay with all", points_between(cycle, all_steps)
            ),
            Statement(
                f"one-cycle against step decay, both with an eighth: {same.outcome}, {same.interval()}",
                same.outcome == "above",
            ),
            Statement(
                f"one-cycle's best rate is {rates(cycle)}, step decay's {rates(few)}, both with an eighth",
                cycle[0].job["lr"] > few[0].job["lr"],
            ),
        ]
        grid = sorted({run.job["lr"] for run in runs})
        note = (
            f"{caption(setting, all_updates(setting))} Both have the best of {len(grid)} rates from "
            f"{grid[0]:g} to {grid[-1]:g} for each number of updates. Step decay falls to a tenth after a "
            "half and after three quarters."
        )
        alone = points_between(few, all_steps)
        told = "; it needs no more of them, so that (1) says little here" if alone.no_worse(MARGIN) else ""
        notes = [
            f"Step decay with an eighth of the updates against step decay with all: {alone.interval()}"
            f"{told}. Its best rate with all is {rates(all_steps)}, beside which (3) once put one-cycle's."
        ]
        return Summary([Table("Accuracy by the number of updates", rows, note)], statements, notes)

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        figure, axes = new_figure(7.2, 4.0)
        chosen = _chosen(runs)
        for color, policy in zip(COLORS, POLICIES, strict=False):
            groups = [chosen[policy, budget] for budget in BUDGETS]
            values = [[100 * value for value in finals(group)] for group in groups]
            updates = [group[0].figures["updates"][-1] for group in groups]
            deviations = [stdev(value) if len(value) > 1 else 0.0 for value in values]
            means = [mean(value) for value in values]
            axes.errorbar(updates, means, deviations, color=color, marker="o", capsize=3, label=policy)
        axes.set_xscale("log")
        axes.set_xticks(updates, [f"{n:,}" for n in updates])
        axes.minorticks_off()
        axes.set_xlabel("updates")
        axes.set_ylabel("test accuracy (%)")
        axes.legend(frameon=False, fontsize=8.5)
        save(figure, path)


def _chosen(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """The runs with the best rate of each policy for each number of updates, by the validation split."""
    return {
        (policy, budget): best(matching(runs, policy=policy, budget=budget))
        for policy in POLICIES
        for budget in BUDGETS
    }


claim = SuperConvergence()
