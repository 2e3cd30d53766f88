"""Growing the batch in place of decaying the rate: plans of one noise scale, over epochs and over updates."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import fastlr
from benchmarks.claims.runner import Job, Result, Rows, Run, Setting, Statement, Summary, Table
from benchmarks.claims.tasks import (
    MARGIN,
    MOMENTUM,
    Trial,
    best,
    finals,
    matching,
    points_between,
    task_of,
    with_seeds,
)
from fastlr import _training, data
from fastlr._statistics import spread
from fastlr.plotting import save
from fastlr.plotting.figure import COLORS, GREY, new_figure


@dataclass(frozen=True)
class Growth:
    """What is trained. largest: batch of the plans that grow, near the paper's tenth of the data set."""

    batch_size: int
    largest: int
    epochs: int
    rates: tuple[float, ...]


GROWTHS = {
    "digits": Growth(4, 112, 30, (0.0005, 0.001, 0.002, 0.005, 0.01)),
    "fashion-mnist": Growth(32, 3200, 20, (0.01, 0.02, 0.05)),
    "cifar10": Growth(128, 4096, 200, (0.01, 0.05)),
}
PLANS: dict[str, dict[str, Any]] = {
    "decay": {"mode": "decay"},
    "hybrid": {"mode": "hybrid"},
    "increase": {"mode": "increase"},
    "raised rate": {"mode": "increase", "lr_scale": 5.0},
    "raised momentum": {"mode": "increase", "lr_scale": 5.0, "raised_momentum": 0.98},
}
SHORT = "decay, fewer epochs"  # as many updates as "increase" has: what is saved without growing
# Of the paper's schedule: of the epochs, where the rate falls to a fifth.
DROPS, FACTOR = (0.3, 0.6, 0.8), 0.2
# arXiv 1711.00489, section 5.2: the updates, in words and as a number, and the accuracy.
PAPER: dict[str, tuple[str, int | None, str]] = {
    "decay": ("about 80,000", 80_000, "94.3 %"),
    "hybrid": ("", None, ""),
    "increase": ("about 29,000", 29_000, "94.4 %"),
    "raised rate": ("under 6,500", 6_500, "94.5 %"),
    "raised momentum": ("under 2,500", 2_500, "93.3 %"),
}
POINTS = 20  # of a curve
PROBE = (64, 2048, 5)  # the two batch sizes that a noise scale is measured from, and how often
WEIGHT_DECAY = 5e-4
DIVERGED = 1e6  # stands for larger losses and NaN, which JSON has not


class InMemory(torch.utils.data.Dataset[Any]):
    """A data set whose samples are taken many at a time."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], self.y[indices]


def taken(batch: Any) -> Any:
    """In place of collating: the batch is one already."""
    return batch


def make_plan(setting: Setting, name: str, lr: float, samples: int) -> fastlr.BatchPlan:
    growth = GROWTHS[str(setting.data)]
    epochs = max(5, round(setting.scale * growth.epochs))
    if name == SHORT:
        full, grown = (make_plan(setting, other, lr, samples) for other in ("decay", "increase"))
        epochs = max(5, round(epochs * grown.total_updates / full.total_updates))
    options = PLANS["decay" if name == SHORT else name]
    cap = growth.largest if options["mode"] == "increase" else None
    drops = tuple(round(part * epochs) for part in DROPS)
    return fastlr.BatchPlan.from_schedule(
        fastlr.MultiStep(lr, drops, FACTOR, unit="epoch"),
        batch_size=growth.batch_size,
        dataset_size=samples,
        epochs=epochs,
        momentum=MOMENTUM,
        max_batch_size=cap,
        **options,
    )


def gradient_noise(model: torch.nn.Module, samples: InMemory, seed: int) -> tuple[float, float]:
    """Squared gradient and noise at these weights, which stay as they are; their quotient is the noise
    scale."""
    small, large, observations = PROBE
    large = min(large, len(samples) // small * small)
    epochs = -(-observations * large // len(samples))
    plan = fastlr.BatchPlan.from_phases([(0, large)], dataset_size=len(samples), epochs=epochs, lr=0.0)
    loader = fastlr.GrowingLoader(samples, plan, small, seed=seed, seed_samples=False, collate_fn=taken)
    found = fastlr.GradientNoiseScale(model.parameters())
    for batch in islice(loader, observations * large // small):
        x, y = batch.data
        (torch.nn.functional.cross_entropy(model(x), y) * batch.weight).backward()  # type: ignore[no-untyped-call]
        found.observe(batch)
        if batch.ends_update:
            model.zero_grad()
    known = math.isfinite(found.squared_gradient)  # a run that diverged has none
    return (found.squared_gradient, found.noise) if known else (0.0, 0.0)


def loss(model: torch.nn.Module, samples: InMemory) -> float:
    with torch.no_grad():
        sums = [
            float(torch.nn.functional.cross_entropy(model(x), y, reduction="sum"))
            for x, y in data.Batches(samples.x, samples.y, 10_000)
        ]
    value = sum(sums) / len(samples)
    return value if value < DIVERGED else DIVERGED


def train(trial: Trial, plan: fastlr.BatchPlan) -> Result:
    """Trains by a plan; figures after some of the epochs, and measured the seconds of the updates alone."""
    model, samples = trial.model(), InMemory(trial.x, trial.y)
    opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum, weight_decay=WEIGHT_DECAY)
    loader = fastlr.GrowingLoader(samples, plan, seed=trial.seed, seed_samples=False, collate_fn=taken)
    measure_at = _training.points(plan.epochs, POINTS)
    curves: dict[str, list[Any]] = {
        name: [] for name in ("updates", "batch", "test", "train loss", "gradient", "noise")
    }
    seconds, finish = 0.0, _training.waiting_for(model)
    for epoch in loader.bind(opt).epochs():
        finish()
        begin = time.perf_counter()
        for batch in epoch:
            x, y = batch.data
            (torch.nn.functional.cross_entropy(model(x), y) * batch.weight).backward()  # type: ignore[no-untyped-call]
            opt.step()  # a batch is one micro-batch here
            opt.zero_grad()
        finish()
        seconds += time.perf_counter() - begin
        if epoch.index + 1 in measure_at:
            clock = opt.clock()
            curves["updates"].append(clock.updates)
            curves["batch"].append(plan.phase_at(clock.samples - 1).batch_size)
            curves["test"].append(_training.accuracy(model, trial.dataset.x_test, trial.dataset.y_test))
            curves["train loss"].append(loss(model, samples))
            gradient, noise = gradient_noise(model, samples, trial.seed)
            curves["gradient"].append(gradient)
            curves["noise"].append(noise)
    figures = {
        "batches": list(dict.fromkeys(plan.batch_sizes)),
        "rates": [phase.lr for phase in plan.phases],
        "momentum": plan.momentum(0),
        "samples": len(samples),
        "epochs": measure_at,
        **curves,
        "validation": [_training.accuracy(model, trial.x_val, trial.y_val)],
    }
    return Result(figures, {"seconds": round(seconds, 4)})


class BatchGrowth:
    name = "batch_growth"
    title = "Growing the batch replaces decaying the rate"
    paper = (
        "Smith, Kindermans, Ying and Le, Don't Decay the Learning Rate, Increase the Batch Size, arXiv "
        "1711.00489"
    )
    paper_says = (
        "A wide ResNet 16-4 on CIFAR-10 gets to equivalent test accuracies after as many epochs: in about "
        "80,000 updates where the rate decays, about 29,000 where the batch grows instead, under 6,500 from "
        "five times the rate, under 2,500 with a momentum of 0.98 as well, which tends to cost a little "
        "accuracy."
    )
    rule = (
        "It holds if, with the initial rate that is best for decaying, (1) increase and (2) hybrid end no "
        "worse than decay, (3) their mean test accuracy is within a point of its after each epoch that was "
        "measured, and (4) a raised rate and (5) a raised momentum end no worse as well; each in fewer "
        f"updates. No worse: the 95 % interval of the paired differences lies above -{MARGIN:g} point. It "
        "holds partly if some of it is so."
    )
    data = ("digits", "fashion-mnist", "cifar10")

    def jobs(self, setting: Setting) -> list[Job]:
        rates = GROWTHS[str(setting.data)].rates
        return with_seeds(
            setting,
            [
                {"plan": name, "lr": lr}
                for name in (*PLANS, SHORT)
                for lr in (rates[-2:] if setting.quick else rates)
            ],
        )

    def run(self, setting: Setting, job: Job) -> Result:
        trial = Trial(setting, job["seed"])
        return train(trial, make_plan(setting, job["plan"], job["lr"], len(trial.x)))

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        chosen, lr = _chosen(runs)
        decay, samples = chosen["decay"], chosen["decay"][0].figures["samples"]
        small, large, _ = PROBE
        updates = {name: group[0].figures["updates"][-1] for name, group in chosen.items()}

        statements = [_no_worse(name, chosen, updates) for name in ("increase", "hybrid")]
        apart = {name: _farthest(chosen[name], decay) for name in ("increase", "hybrid")}
        statements.append(
            Statement(
                "farthest from decay's test curve after the same epochs: "
                + ", ".join(f"{name} {points:.1f} points" for name, points in apart.items()),
                all(points <= MARGIN for points in apart.values()),
            )
        )
        statements += [_no_worse(name, chosen, updates) for name in ("raised rate", "raised momentum")]
        at_its_best = best(matching(runs, plan=SHORT))
        notes = [
            f"Without growing, a decay over {chosen[SHORT][0].figures['epochs'][-1]} epochs, which are "
            f"{updates[SHORT]:,} updates, against the whole one: {_words(chosen[SHORT], decay)}; at its own "
            f"best rate, {at_its_best[0].job['lr']:g}: {_words(at_its_best, decay)}."
        ]
        return Summary(
            [
                Table("Plans of one noise scale", _plans(chosen), _caption(setting, chosen, lr)),
                _beside_the_paper(chosen, updates),
                Table(
                    "Gradient noise scale along the way, in samples",
                    _noise(chosen),
                    "What fastlr.GradientNoiseScale finds at the weights after so much of the run, over all "
                    f"seeds, from batches of {small:,} and {min(large, samples // small * small):,}; in "
                    "brackets the plan's batch. Over: the noise hides the gradient of the whole data set.",
                ),
                Table(
                    "Each plan by its initial rate",
                    _by_rate(runs),
                    "The start of decay, hybrid and increase; the raised plans begin with five times that.",
                ),
                _times(chosen),
            ],
            statements,
            notes,
        )

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        chosen, _ = _chosen(runs)
        figure, *panels = new_figure(10.0, 8.4, rows=3, columns=2)
        names = ("test accuracy (%)", "training loss", "gradient noise scale (samples)")
        samples = chosen["decay"][0].figures["samples"]
        lowest, highest = [], []
        for color, (name, group) in zip(COLORS, chosen.items(), strict=False):
            curves = (
                100 * _mean_curve(group, "test"),
                _mean_curve(group, "train loss"),
                torch.tensor(_scales(group)).clamp(max=samples),
            )
            lowest.append(float(curves[0][len(curves[0]) // 4 :].min()))
            highest.append(float(curves[0].max()))
            if len(group) > 1:
                deviation = 100 * _curves(group, "test").std(0)
                for axes, x in zip(panels, ("epochs", "updates"), strict=False):
                    band = curves[0] - deviation, curves[0] + deviation
                    axes.fill_between(group[0].figures[x], *band, color=color, alpha=0.09, linewidth=0)
            for row, curve in enumerate(curves):
                for axes, x in zip(panels[2 * row : 2 * row + 2], ("epochs", "updates"), strict=True):
                    axes.plot(
                        group[0].figures[x],
                        curve,
                        color=color,
                        label=f"{name}: {group[0].figures['updates'][-1]:,} updates",
                        linestyle="--" if name == SHORT else "-",
                        linewidth=1.6,
                        marker=".",
                        markersize=4,
                    )
        for row, name in enumerate(names):
            panels[2 * row].set_ylabel(name)
            panels[2 * row + 1].sharey(panels[2 * row])
        panels[0].set_ylim(min(lowest) - 1, max(highest) + 1)
        panels[4].set_yscale("log")
        panels[4].set_ylim(top=1.8 * samples)
        for axes in panels[4:]:
            axes.axhline(samples, color=GREY, linestyle=":", linewidth=1.1)
        panels[4].text(
            0.02,
            samples,
            "the whole data set, or more",
            transform=panels[4].get_yaxis_transform(),
            va="bottom",
            color=GREY,
            fontsize=8.5,
        )
        panels[4].xaxis.get_major_locator().set_params(integer=True)
        panels[4].set_xlabel("epochs")
        panels[5].set_xscale("log")
        panels[5].set_xlabel("updates (log scale)")
        figure.legend(
            *panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3
        )
        save(figure, path)


def _chosen(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], float]:
    """Each plan's runs at the initial rate that is best for decaying by the validation split, and that."""
    lr = best(matching(runs, plan="decay"))[0].job["lr"]
    return {name: matching(runs, plan=name, lr=lr) for name in (*PLANS, SHORT)}, lr


def _words(a: Sequence[Run], b: Sequence[Run]) -> str:
    found = points_between(a, b)
    return f"{found.outcome}, {found.interval(2)}"


def _no_worse(name: str, chosen: dict[str, list[Run]], updates: dict[str, int]) -> Statement:
    return Statement(
        f"{name} in {updates[name]:,} updates against decay in {updates['decay']:,}: "
        f"{_words(chosen[name], chosen['decay'])}",
        points_between(chosen[name], chosen["decay"]).no_worse(MARGIN) and updates[name] < updates["decay"],
    )


def _curves(group: Sequence[Run], curve: str) -> torch.Tensor:
    return torch.tensor([run.figures[curve] for run in group], dtype=torch.float64)


def _mean_curve(group: Sequence[Run], curve: str) -> torch.Tensor:
    return _curves(group, curve).mean(0)


def _farthest(a: Sequence[Run], b: Sequence[Run]) -> float:
    """The largest distance of the mean test curves after the same epochs, in points."""
    return float(100 * (_mean_curve(a, "test") - _mean_curve(b, "test")).abs().max())


def _scales(group: Sequence[Run]) -> list[float]:
    """The noise scale at each point of the runs; inf: the noise hides the gradient."""
    gradients, noises = (_mean_curve(group, curve).tolist() for curve in ("gradient", "noise"))
    return [
        noise / gradient if gradient > 0 else math.inf
        for gradient, noise in zip(gradients, noises, strict=True)
    ]


def _plans(chosen: dict[str, list[Run]]) -> Rows:
    rows = [
        ["plan", "batches", "rates", "momentum", "updates", "training loss", "test accuracy", "against decay"]
    ]
    for name, group in chosen.items():
        figures = group[0].figures
        rows.append(
            [
                name,
                ", ".join(f"{size:,}" for size in figures["batches"]),
                ", ".join(dict.fromkeys(f"{rate:.2g}" for rate in figures["rates"])),
                f"{figures['momentum']:g}",
                f"{figures['updates'][-1]:,}",
                f"{mean(finals(group, 'train loss')):.3f}",
                spread(finals(group), 2),
                "" if name == "decay" else points_between(group, chosen["decay"]).interval(2),
            ]
        )
    return rows


def _caption(setting: Setting, chosen: dict[str, list[Run]], lr: float) -> str:
    task, epochs = task_of(setting), chosen["decay"][0].figures["epochs"][-1]
    noise = f" with {task.label_noise:.0%} of the training labels drawn at random" if task.label_noise else ""
    rates = GROWTHS[str(setting.data)].rates
    return (
        f"{setting.data}{noise}; {(task.model.__doc__ or '').split(':')[0].rstrip('.').lower()}; {epochs} "
        f"epochs, {setting.seeds} seeds, weight decay {WEIGHT_DECAY:g}. The rate falls to a fifth after 30, "
        "60 and 80 % of them. Its start, "
        f"{lr:g}, is the best of {min(rates):g} to {max(rates):g} for decaying, on a sixth of the training "
        "set; the other plans take it over. Accuracies are those of the test set: mean, standard deviation."
    )


def _beside_the_paper(chosen: dict[str, list[Run]], updates: dict[str, int]) -> Table:
    rows = [
        ["plan", "updates, paper", "of decay's", "updates, here", "of decay's", "accuracy, paper", "here"]
    ]
    of_decay = PAPER["decay"][1]
    for name, (words, number, accuracy) in PAPER.items():
        found = points_between(chosen[name], chosen["decay"])
        rows.append(
            [
                name,
                words,
                f"{number / of_decay:.0%}" if number and of_decay else "",
                f"{updates[name]:,}",
                f"{updates[name] / updates['decay']:.0%}",
                accuracy,
                "" if name == "decay" else f"{found.outcome}, {found.difference:+.2f} points",
            ]
        )
    note = "Paper: arXiv 1711.00489, section 5.2, a wide ResNet 16-4 on CIFAR-10."
    return Table("Beside the paper", rows, note)


def _noise(chosen: dict[str, list[Run]]) -> Rows:
    parts = (0.25, 0.5, 0.75, 1.0)
    rows = [["plan", *(f"after about {part:.0%} of the epochs" for part in parts)]]
    for name, group in chosen.items():
        figures, scales = group[0].figures, _scales(group)
        cells = []
        for part in parts:
            i = max(0, round(part * len(scales)) - 1)
            scale = f"{scales[i]:,.0f}" if scales[i] < figures["samples"] else f"over {figures['samples']:,}"
            cells.append(f"{scale} ({figures['batch'][i]:,})")
        rows.append([name, *cells])
    return rows


def _by_rate(runs: Sequence[Run]) -> Rows:
    rates = sorted({run.job["lr"] for run in runs})
    rows = [["plan", *(f"{lr:g}" for lr in rates)]]
    return rows + [
        [name, *(spread(finals(matching(runs, plan=name, lr=lr)), 2) for lr in rates)]
        for name in (*PLANS, SHORT)
    ]


def _times(chosen: dict[str, list[Run]]) -> Table:
    rows = [["plan", "seconds", "of decay's"]]
    seconds = {name: mean(run.measured["seconds"] for run in group) for name, group in chosen.items()}
    for name, value in seconds.items():
        rows.append([name, f"{value:.2f}", f"{value / seconds['decay']:.0%}"])
    note = "Of the updates alone, on average over the seeds; other trainings ran beside them."
    return Table("Wall-clock time", rows, note, measured=True)


claim = BatchGrowth()
