"""Does the range test predict which rates train well? Its bounds, and what else people read off such a curve,
against grids of fixed rates and of CLR bounds, over models, batch sizes, with and without BatchNorm."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import fastlr
from benchmarks.claims.runner import Job, Result, Run, Setting, Statement, Summary, Table
from benchmarks.claims.tasks import (
    MARGIN,
    MOMENTUM,
    SWEEP,
    Trial,
    best,
    candidates,
    cycle,
    finals,
    matching,
    task_of,
    with_seeds,
)
from fastlr import _training, data
from fastlr._statistics import compared
from fastlr.plotting import save
from fastlr.plotting.figure import COLORS, GREY, new_figure

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # fixed ones, and the upper bounds of CLR
QUICK_RATES = (0.003, 0.03, 0.3)
BATCH_SIZES = (8, 32, 128)
PART = 0.4  # of the data set's usual updates
SEEDS = 5  # at most: there are many runs
RIGHT = 0.8  # the share of answers that must be right

# What is read off the curve; ours is the first, the others are what people take as the rate.
READINGS = ("max_lr, by accuracy", "max_lr, by loss", "steepest slope", "valley", "minimum / 10")


def network(dataset: data.Dataset, *, kind: str, batch_norm: bool) -> torch.nn.Module:
    """One of the three models."""
    features = dataset.x_train.shape[1]
    if kind != "convnet":
        hidden = [64] if kind == "one hidden layer" else [64, 64, 64]
        return _training.mlp(features, hidden, dataset.classes, batch_norm=batch_norm)
    channels = 3 if features == 3 * 32 * 32 else 1
    side = math.isqrt(features // channels)
    layers: list[torch.nn.Module] = [torch.nn.Unflatten(1, (channels, side, side))]
    for inputs, outputs in ((channels, 8), (8, 16)):
        layers += [
            torch.nn.Conv2d(inputs, outputs, 3, padding=1),
            *([torch.nn.BatchNorm2d(outputs)] if batch_norm else []),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        ]
    head = torch.nn.Linear(16 * (side // 4) ** 2, dataset.classes)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), head)


MODELS = ("one hidden layer", "three hidden layers", "convnet")


class RangeTest:
    name = "range_test"
    title = "A range test finds the bounds that training wants"
    paper = "Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3"
    paper_says = "On CIFAR-10 a single run of 8 epochs with a rising rate gives the bounds 0.001 and 0.006."
    rule = (
        f"It holds if (1) at least {RIGHT:.0%} of the range tests read by accuracy and (2) as many read by "
        "loss give bounds that are right, and (3) no other reading is right more often than the one by "
        "accuracy. Right: training with CLR up to the "
        f"rate of the grid that is nearest to the answer ends, on average over the seeds, at most {MARGIN:g} "
        "point below that with the best rate of the grid. It holds partly if some of it is so."
    )
    data = ("digits", "fashion-mnist", "cifar10")

    def jobs(self, setting: Setting) -> list[Job]:
        models = [
            {"model": model, "batch norm": norm, "batch size": size}
            for model, norm, size in itertools.product(
                MODELS, (False, True), BATCH_SIZES[1:2] if setting.quick else BATCH_SIZES
            )
        ]
        tops = QUICK_RATES if setting.quick else RATES
        policies: list[Job] = [
            {"policy": "range test"},
            *({"policy": policy, "lr": lr} for policy in ("CLR", "fixed") for lr in tops),
        ]
        setting = replace(setting, seeds=min(SEEDS, setting.seeds))
        return with_seeds(setting, [{**model, **policy} for model in models for policy in policies])

    def run(self, setting: Setting, job: Job) -> Result:
        model = partial(network, kind=job["model"], batch_norm=job["batch norm"])
        trial = Trial(setting, job["seed"], model=model, batch_size=job["batch size"])
        if job["policy"] == "range test":
            found = trial.range_test(partial(fastlr.FusedSGD, momentum=MOMENTUM), end_lr=10.0)
            by_loss = fastlr.RangeTestResult(found.lrs, found.losses, stopped=found.stopped)
            minimum = by_loss.minimum
            read = (found.max_lr, by_loss.max_lr, by_loss.steepest, by_loss.valley, minimum and minimum / 10)
            return Result({"read": dict(zip(READINGS, read, strict=True)), "reason": found.reason}, {})
        updates = setting.updates(PART * task_of(setting).updates)
        lr = job["lr"]
        schedule = lr if job["policy"] == "fixed" else cycle("triangular2", (lr / 10, lr), updates)
        return trial.train(partial(fastlr.FusedSGD, lr=schedule, momentum=MOMENTUM), updates, points=1)

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        networks = _networks(runs)
        answers = [["reading", "right", "none", "wrong", "lost", "right as a fixed rate"]]
        shares: dict[str, float] = {}
        of_networks: dict[str, list[float]] = {}
        for reading in READINGS:
            cyclic, fixed = (
                [_judged(group, policy, reading) for group in networks] for policy in ("CLR", "fixed")
            )
            lost = [points for found in cyclic for points in found if points is not None]
            counts = Counter(_answer(points) for found in cyclic for points in found)
            total = sum(counts.values())
            shares[reading] = counts["right"] / total
            of_networks[reading] = [mean(_answer(points) == "right" for points in found) for found in cyclic]
            right = [_answer(points) == "right" for found in fixed for points in found]
            answers.append(
                [
                    reading,
                    *(f"{counts[answer] / total:.0%}" for answer in ("right", "none", "wrong")),
                    f"{mean(lost):.1f} points" if lost else "",
                    f"{mean(right):.0%}",
                ]
            )
        of_each = [
            ["model", "BatchNorm", "batch", "best fixed rate", "best CLR", "max_lr, by accuracy", "right"]
        ]
        for group in networks:
            found, job = _read(group, READINGS[0]), group[0].job
            right = [_answer(points) == "right" for points in _judged(group, "CLR", READINGS[0])]
            known = [rate for rate in found if rate is not None]
            of_each.append(
                [
                    job["model"],
                    "yes" if job["batch norm"] else "no",
                    str(job["batch size"]),
                    *(_best(group, policy) for policy in ("fixed", "CLR")),
                    f"{median(known):.2g} ({min(known):.2g} to {max(known):.2g})" if known else "none",
                    f"{sum(right)} of {len(right)}",
                ]
            )
        ours, by_loss, *_ = READINGS
        rival = max(READINGS[1:], key=shares.__getitem__)
        statements = [
            Statement(f"{ours}: {shares[ours]:.0%} are right", shares[ours] >= RIGHT),
            Statement(f"{by_loss}: {shares[by_loss]:.0%} are right", shares[by_loss] >= RIGHT),
            Statement(
                f"the best of the others, {rival}: {shares[rival]:.0%} are right",
                shares[rival] <= shares[ours],
            ),
        ]
        ahead = compared(*([100 * share for share in of_networks[reading]] for reading in (ours, rival)))
        notes = [
            f"Over the networks {ours} is ahead of {rival} by {ahead.interval()}, {ahead.outcome} if not by "
            "the rule. (3) was for a while judged by the better use of each other reading, as a bound or as "
            "a fixed rate (the right-most column), by which it did not hold: two measures for one."
        ]
        grid = sorted({run.job["lr"] for run in runs if "lr" in run.job})
        setup = (
            f"{setting.data}, {len(networks)} networks (models, with and without BatchNorm, batch sizes), "
            f"{min(SEEDS, setting.seeds)} seeds. A range test has {setting.updates(SWEEP)} updates, a "
            f"training {setting.updates(PART * task_of(setting).updates):,}. The grid has {len(grid)} rates "
            f"from {grid[0]:g} to {grid[-1]:g}; its best one is chosen on a sixth of the training set, and "
            "accuracies are those of the test set. Lost: how far CLR up to the answer ends below the best, "
            "on average over all answers. The right-most column takes the answer as a fixed rate, which is "
            "right within a point of the best fixed one, a lower mark than the best CLR."
        )
        return Summary(
            [
                Table("How often each reading is right", answers, setup),
                Table(
                    "What the range test found for each network",
                    of_each,
                    "Medians over the seeds, and their range.",
                ),
            ],
            statements,
            notes,
        )

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        networks = _networks(runs)
        figure, axes = new_figure(7.6, 1.4 + 0.26 * len(networks))
        for y, group in enumerate(networks):
            accuracies = _accuracies(group, "CLR")
            top = accuracies[best(matching(group, policy="CLR"))[0].job["lr"]]
            for lr, accuracy in accuracies.items():
                good = 100 * (top - accuracy) <= MARGIN
                axes.plot(lr, y, "s", color=COLORS[2] if good else "#e5e7eb", markersize=9, alpha=0.55)
            found = [rate for rate in _read(group, READINGS[0]) if rate is not None]
            axes.plot(found, [y] * len(found), "|", color="black", markersize=9)
        labels = [
            f"{job['model']}{', BatchNorm' if job['batch norm'] else ''}, {job['batch size']}"
            for job in (group[0].job for group in networks)
        ]
        axes.set_yticks(range(len(networks)), labels, fontsize=7.5)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("upper bound of CLR (green: within a point of the best; black: found by range tests)")
        axes.xaxis.label.set_size(8.5)
        axes.tick_params(axis="y", color=GREY)
        save(figure, path)


def _networks(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each model, batch size, with or without BatchNorm."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.job[key] for key in ("model", "batch norm", "batch size")), []).append(
            run
        )
    return list(groups.values())


def _read(group: Sequence[Run], reading: str) -> list[float | None]:
    return [run.figures["read"][reading] for run in matching(group, policy="range test")]


def _accuracies(group: Sequence[Run], policy: str) -> dict[float, float]:
    """Each rate's test accuracy, mean over the seeds."""
    return {runs[0].job["lr"]: mean(finals(runs)) for runs in candidates(matching(group, policy=policy))}


def _best(group: Sequence[Run], policy: str) -> str:
    """The best rate of the grid, and its accuracy."""
    runs = best(matching(group, policy=policy))
    return f"{runs[0].job['lr']:g}: {100 * mean(finals(runs)):.1f} %"


def _judged(group: Sequence[Run], policy: str, reading: str) -> list[float | None]:
    """For each range test by how many points the rate of the grid nearest to its answer ends below the best
    one."""
    accuracies = _accuracies(group, policy)
    top = mean(finals(best(matching(group, policy=policy))))

    def lost(answer: float) -> float:
        nearest = min(accuracies, key=lambda lr: abs(math.log(lr / answer)))
        return 100 * (top - accuracies[nearest])

    return [None if answer is None else lost(answer) for answer in _read(group, reading)]


def _answer(points: float | None) -> str:
    return "none" if points is None else "right" if points <= MARGIN else "wrong"


claim = RangeTest()
