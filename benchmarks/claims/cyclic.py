"""CLR, its bounds from the range test alone, against fixed rates and the classic decays at their best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import fastlr
from benchmarks.claims.runner import Job, Result, Run, Setting, Statement, Summary, Table
from benchmarks.claims.tasks import (
    CYCLES,
    GRID,
    MARGIN,
    MOMENTUM,
    QUICK_GRID,
    SWEEP,
    Trial,
    best,
    bounds_of,
    caption,
    cycle,
    finals,
    matching,
    no_worse,
    points_between,
    rates,
    task_of,
    with_seeds,
)
from fastlr import plotting
from fastlr._statistics import spread

DECAYS = ("time-based", "exponential", "step", "polynomial", "cosine", "one-cycle")
CLR = ("triangular", "triangular2", "exp_range")
BUDGETS = (0.25, 0.5, 1.0)


def schedules(policy: str, lr: float, updates: int) -> dict[str, Any]:
    """Rate and momentum of a policy with one rate to choose, for a run of so many updates."""
    if policy == "one-cycle":
        lr_cycle, momentum = fastlr.one_cycle(lr, updates)
        return {"lr": lr_cycle, "momentum": momentum}
    policies: dict[str, fastlr.Schedule] = {
        "fixed": fastlr.Constant(lr),
        "time-based": fastlr.TimeBased(lr, decay=9 / updates),  # ends at a tenth
        "exponential": fastlr.Exponential(lr, gamma=0.01 ** (1 / updates)),  # ends at a hundredth
        "step": fastlr.StepDecay(lr, every=math.ceil(updates / 3), gamma=0.1),
        "polynomial": fastlr.Polynomial(lr, 0.0, updates, power=2.0),
        "cosine": fastlr.Cosine(lr, 0.0, updates),
    }
    return {"lr": policies[policy], "momentum": MOMENTUM}


class Cyclic:
    name = "cyclic"
    title = "Cyclic rates need no tuning and fewer updates"
    paper = "Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, table 1"
    paper_says = (
        "CIFAR-10, accuracy and iterations: fixed 81.4 % in 70,000; triangular2 81.4 % in 25,000; "
        "decay 78.5 % in 25,000; exp 79.1 % in 70,000; exp_range 82.2 % in 42,000."
    )
    rule = (
        "It holds if triangular2, tried once, ends no worse than the best fixed rate (1) with all updates "
        "and (2) with a quarter of them, (3) no worse than the best of the decays with all updates, and (4) "
        "gets to what the best fixed rate ends with in fewer updates, by the median over the seeds. No "
        f"worse: the 95 % interval of the paired differences lies above -{MARGIN:g} point. It holds partly "
        "if some of it is so."
    )
    data = ("digits", "fashion-mnist", "cifar10")

    def jobs(self, setting: Setting) -> list[Job]:
        grid = QUICK_GRID if setting.quick else GRID
        return with_seeds(
            setting,
            [
                *({"policy": policy, "budget": budget} for policy in CLR for budget in BUDGETS),
                *(
                    {"policy": policy, "budget": budget, "lr": lr}
                    for policy in ("fixed", *DECAYS)
                    for budget in BUDGETS
                    for lr in grid
                ),
            ],
        )

    def run(self, setting: Setting, job: Job) -> Result:
        trial = Trial(setting, job["seed"])
        whole = setting.updates(task_of(setting).updates)
        updates = round(job["budget"] * whole)
        if job["policy"] not in CLR:
            chosen = schedules(job["policy"], job["lr"], updates)
            return trial.train(partial(fastlr.FusedSGD, **chosen), updates)
        found = trial.range_test(partial(fastlr.FusedSGD, momentum=MOMENTUM))
        bounds = bounds_of(found, GRID)
        lr = cycle(job["policy"], bounds, whole)  # a smaller budget is fewer cycles of the same length
        result = trial.train(partial(fastlr.FusedSGD, lr=lr, momentum=MOMENTUM), updates)
        return Result({**result.figures, "bounds": bounds, "reason": found.reason}, result.measured)

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        chosen = {budget: _chosen(runs, budget) for budget in BUDGETS}
        fixed, clr = chosen[1.0]["fixed"], chosen[1.0]["triangular2"]
        target = mean(finals(fixed))
        rows = [
            [
                "policy",
                "rate",
                *(f"{budget:.0%} of the updates" for budget in BUDGETS),
                f"updates to {100 * target:.1f} %",
                "triangular2 against it",
            ]
        ]
        for policy, group in chosen[1.0].items():
            against = "" if policy == "triangular2" else points_between(clr, group).interval()
            rows.append(
                [
                    policy,
                    rates(group),
                    *(spread(finals(chosen[budget][policy])) for budget in BUDGETS),
                    _words(_updates_to(group, target)),
                    against,
                ]
            )
        decay = best(run for policy in DECAYS for run in chosen[1.0][policy])
        comparisons = {
            "with all updates, against the best fixed rate": points_between(clr, fixed),
            "with a quarter of them, against the best fixed rate": points_between(
                chosen[0.25]["triangular2"], chosen[0.25]["fixed"]
            ),
            f"with all updates, against the best decay ({decay[0].job['policy']})": points_between(
                clr, decay
            ),
        }
        reached, needed = _updates_to(clr, target), _updates_to(fixed, target)
        statements = [
            *(no_worse(f"triangular2 {name}", found) for name, found in comparisons.items()),
            Statement(
                f"updates to {100 * target:.1f} %: triangular2 {_words(reached)}, the best fixed rate "
                f"{_words(needed)}",
                reached < needed,
            ),
        ]
        note = (
            f"{caption(setting)} Fixed rates and decays have the best of {len(_grid(runs))} rates from "
            f"{min(_grid(runs)):g} to {max(_grid(runs)):g} at each budget, the cyclic policies the bounds of "
            f"a range test of {setting.updates(SWEEP)} updates, which are not counted, and {CYCLES} "
            "cycles in all the updates. Decays end at a tenth of their rate (time-based), at a hundredth "
            f"(exponential; step, in three steps) or at 0. The momentum is {MOMENTUM:g}, one-cycle's goes "
            "from 0.95 to 0.85 and back. Mean and standard deviation. Updates: the median over the seeds of "
            "when the test accuracy first is what the best fixed rate ends with, on average."
        )
        return Summary([Table("Accuracy at an equal budget", rows, note)], statements)

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        chosen = _chosen(runs, 1.0)
        shown = {name: chosen[name] for name in ("triangular2", "fixed", "step", "cosine", "one-cycle")}
        plotting.plot_accuracy(
            chosen["fixed"][0].figures["updates"],
            {
                f"{name}, {rates(group)}": [run.figures["test"] for run in group]
                for name, group in shown.items()
            },
            path,
            target=mean(finals(chosen["fixed"])),
        )


def _chosen(runs: Sequence[Run], budget: float) -> dict[str, list[Run]]:
    """Each policy's runs at a budget: those with the best rate, by the validation split."""
    return {policy: best(matching(runs, policy=policy, budget=budget)) for policy in (*CLR, "fixed", *DECAYS)}


def _grid(runs: Sequence[Run]) -> set[float]:
    return {run.job["lr"] for run in runs if "lr" in run.job}


def _updates_to(group: Sequence[Run], target: float) -> float:
    """The median over the runs of the updates after which the test accuracy first is at the target."""
    return median(
        next(
            (n for n, a in zip(run.figures["updates"], run.figures["test"], strict=True) if a >= target),
            math.inf,
        )
        for run in group
    )


def _words(updates: float) -> str:
    return f"{updates:,.0f}" if updates < math.inf else "not reached"


claim = Cyclic()
