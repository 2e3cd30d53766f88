"""CLR with and against adaptive methods: each rule at its best fixed rate, and with triangular2 inside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastlr
from benchmarks.claims.runner import Job, Result, Run, Setting, Summary, Table
from benchmarks.claims.tasks import (
    MARGIN,
    MOMENTUM,
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
from fastlr._statistics import spread
from fastlr.bench.models import PARAMETER_SETS
from fastlr.bench.rounds import in_turn, summary
from fastlr.plotting import save
from fastlr.plotting.figure import COLORS, GREY, new_figure


@dataclass(frozen=True)
class Rule:
    """A rule and its options. lr: the lowest rate of its grid; the range test begins at a hundredth of it."""

    kind: Any
    lr: float
    options: dict[str, Any] = field(default_factory=dict)


RULES = {
    "Nesterov": Rule(fastlr.FusedSGD, 1e-3, {"momentum": MOMENTUM, "nesterov": True}),
    "Adagrad": Rule(fastlr.FusedAdagrad, 1e-3),
    "Adadelta": Rule(fastlr.FusedAdadelta, 5e-2),
    "RMSprop": Rule(fastlr.FusedRMSprop, 1e-4),
    "Adam": Rule(fastlr.FusedAdam, 1e-4),
    "AdamW": Rule(fastlr.FusedAdamW, 1e-4),
}
FACTORS = (1, 2, 5, 10, 20, 50, 100, 200)  # of the lowest rate: the grid
QUICK_FACTORS = (5, 20, 100)
SPAN = 1e5  # of the range test
BUDGETS = (0.5, 1.0)
SETS = ("MLP, 6 tensors", "161 tensors of 64", "ResNet-18")  # of parameters, whose steps are timed


class Adaptive:
    name = "adaptive"
    title = "Cyclic rates go with adaptive methods"
    paper = "Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 4.1.3"
    paper_says = (
        "CIFAR-10, 70,000 iterations at a fixed rate and 25,000 with CLR: Nesterov 82.1 % and 81.3 %, ADAM "
        "81.4 % and 79.8 %, RMSprop 75.2 % and 72.8 %, AdaGrad 74.6 % and 76.0 %, AdaDelta 67.3 % and 67.3 %."
    )
    rule = (
        "It holds if for each of the six rules triangular2, tried once with the range test's bounds and "
        "half the updates, ends no worse than the best fixed rate with all of them. No worse: the 95 % "
        f"interval of the paired differences lies above -{MARGIN:g} point. It holds partly if it is so for "
        "some of the rules."
    )
    data = ("digits", "fashion-mnist", "cifar10")

    def jobs(self, setting: Setting) -> list[Job]:
        factors = QUICK_FACTORS if setting.quick else FACTORS
        policies: list[Job] = []
        for name, rule in RULES.items():
            policies += [{"rule": name, "policy": "triangular2", "budget": budget} for budget in BUDGETS]
            policies += [{"rule": name, "policy": "fixed", "budget": 1.0, "lr": k * rule.lr} for k in factors]
        sets = SETS[:1] if setting.quick else SETS
        return [
            *with_seeds(setting, policies),
            *({"rule": name, "step over": parameters} for name in RULES for parameters in sets),
        ]

    def run(self, setting: Setting, job: Job) -> Result:
        rule = RULES[job["rule"]]
        if "step over" in job:
            return _cost(rule, job["step over"], 0.2 if setting.quick else 1.5)
        trial = Trial(setting, job["seed"])
        whole = setting.updates(task_of(setting).updates)
        if job["policy"] == "fixed":
            return trial.train(partial(rule.kind, lr=job["lr"], **rule.options), whole)
        found = trial.range_test(
            partial(rule.kind, lr=rule.lr, **rule.options),
            start_lr=rule.lr / 100,
            end_lr=rule.lr / 100 * SPAN,
        )
        bounds = bounds_of(found, [factor * rule.lr for factor in FACTORS])
        lr = cycle("triangular2", bounds, whole)  # half the updates are half of the cycles
        result = trial.train(partial(rule.kind, lr=lr, **rule.options), round(job["budget"] * whole))
        return Result({**result.figures, "bounds": bounds, "reason": found.reason}, result.measured)

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        rows = [
            [
                "rule",
                "fixed rate",
                "its accuracy",
                "triangular2",
                "half the updates",
                "all",
                "half against fixed",
            ]
        ]
        statements = []
        factors = QUICK_FACTORS if setting.quick else FACTORS
        for name in RULES:
            fixed, half, whole = _chosen(runs, name)
            found = points_between(half, fixed)
            rows.append(
                [
                    name,
                    rates(fixed),
                    spread(finals(fixed)),
                    rates(whole),
                    spread(finals(half)),
                    spread(finals(whole)),
                    found.interval(),
                ]
            )
            statements.append(
                no_worse(f"{name}, half the updates with triangular2 against all at a fixed rate", found)
            )
        note = (
            f"{caption(setting)} The fixed rates are the best of "
            f"{len(factors)}, which are {', '.join(f'{factor:g}' for factor in factors)} times "
            f"{', '.join(f'{rule.lr:g} ({name})' for name, rule in RULES.items())}; the bounds are the "
            f"medians of those that a range test of {setting.updates(SWEEP)} updates, which are not counted, "
            "found for each seed."
            + (
                f" Weight decay: {task_of(setting).weight_decay:g}."
                if task_of(setting).weight_decay
                else " AdamW decays weights by its usual 0.01, the others do not."
            )
        )
        timed = [run for run in runs if "step over" in run.job]
        costs = [
            [
                "rule",
                "parameters",
                "step, fixed rate",
                "step, triangular2",
                "ratio",
                "state, bytes a parameter",
            ]
        ]
        costs += [
            [
                run.job["rule"],
                run.job["step over"],
                *(f"{run.measured[policy]['us']:,.1f} µs" for policy in ("fixed", "triangular2")),
                f"{run.measured['triangular2']['ratio']:.3f}",
                f"{run.figures['state bytes']:.1f}",
            ]
            for run in timed
        ]
        ratio = median(run.measured["triangular2"]["ratio"] for run in timed)
        cost = Table(
            "What a cycle costs a step",
            costs,
            "Medians on one thread of the CPU, both stepped in turn, beside other trainings; triangular2 "
            f"takes {ratio:.2f} of the time of a fixed rate, by the median. What a schedule keeps is a few "
            "numbers a group.",
            measured=True,
        )
        return Summary([Table("Accuracy of each rule", rows, note), cost], statements)

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        figure, axes = new_figure(7.2, 4.0)
        labels = ("fixed, all updates", "triangular2, half the updates", "triangular2, all updates")
        chosen = [_chosen(runs, name) for name in RULES]
        for i, label in enumerate(labels):
            positions = [k + 0.25 * (i - 1) for k in range(len(RULES))]
            for position, groups in zip(positions, chosen, strict=True):
                values = [100 * value for value in finals(groups[i])]
                axes.plot([position] * len(values), values, ".", color=COLORS[i], alpha=0.4, markersize=4)
            means = [100 * sum(finals(groups[i])) / len(groups[i]) for groups in chosen]
            axes.plot(positions, means, "_", color=COLORS[i], markersize=14, markeredgewidth=2.5, label=label)
        axes.set_xticks(range(len(RULES)), RULES)
        axes.set_ylabel("test accuracy (%)")
        axes.tick_params(axis="x", color=GREY)
        axes.legend(frameon=False, fontsize=8.5)
        save(figure, path)


def _chosen(runs: Sequence[Run], rule: str) -> tuple[list[Run], list[Run], list[Run]]:
    """A rule's runs at the best fixed rate, and with triangular2 for half of the updates and all."""
    half, whole = (matching(runs, rule=rule, policy="triangular2", budget=budget) for budget in BUDGETS)
    return best(matching(runs, rule=rule, policy="fixed")), half, whole


def _cost(rule: Rule, name: str, seconds: float) -> Result:
    """What steps take at a fixed rate and with a cycle, in turn; and what state they keep."""
    lr = fastlr.Triangular2(rule.lr, 10 * rule.lr, 2000)
    optimizers = {
        policy: _optimizer(rule, name, rate) for policy, rate in (("fixed", rule.lr), ("triangular2", lr))
    }

    def timed(policy: str) -> float:
        begin = time.perf_counter()
        optimizers[policy].step()
        return time.perf_counter() - begin

    times = in_turn({policy: partial(timed, policy) for policy in optimizers}, seconds)
    elements = sum(p.numel() for group in optimizers["fixed"].param_groups for p in group["params"])
    state = [value for held in optimizers["fixed"].state.values() for value in held.values()]
    held = sum(value.numel() * value.element_size() for value in state if isinstance(value, torch.Tensor))
    return Result({"state bytes": held / elements}, summary(times, "fixed"))


def _optimizer(rule: Rule, name: str, lr: Any) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in PARAMETER_SETS[name]]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer: torch.optim.Optimizer = rule.kind(parameters, lr=lr, **rule.options)
    return optimizer


claim = Adaptive()
