"""What a large rate that decays learns: not the noise in the labels, and complex patterns at last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

import fastlr
from benchmarks.claims.runner import Job, Result, Rows, Run, Setting, Statement, Summary, Table
from benchmarks.claims.tasks import (
    MARGIN,
    MOMENTUM,
    best,
    candidates,
    dataset,
    finals,
    matching,
    no_worse,
    points_between,
    with_seeds,
)
from fastlr import _training, data
from fastlr._statistics import Comparison, compared, spread
from fastlr.plotting import save
from fastlr.plotting.figure import COLORS, GREY, new_figure

NOISE = 0.4  # of the training labels drawn at random
UPDATES, BATCH_SIZE, POINTS = 6000, 16, 20
HALF, THREE_QUARTERS = 9, 14  # the points after which the rate falls to a tenth
MOST = 2000  # samples with random labels: few enough to be memorised in so many updates
PAIRS, PAIRS_TO_TEST = 6000, 2000
MOST_TO_CHOOSE = 1000
RATES, DECAYED = (0.003, 0.01, 0.03, 0.1, 0.3), (0.03, 0.1, 0.3)
QUICK_RATES, QUICK_DECAYED = (0.01, 0.1), (0.1,)
WEIGHT_DECAY = 5e-4  # the usual one of networks with BatchNorm; a larger one is a rival of large rates
WEIGHT_DECAYS, QUICK_WEIGHT_DECAYS = (WEIGHT_DECAY, 3e-3, 1e-2, 3e-2), (WEIGHT_DECAY, 3e-3)
LABELS, PATTERNS = "random labels", "patterns"


class Samples(NamedTuple):
    """x and y to train with, to choose by and to test on; and which samples something is measured of.

    marked: of the training labels those that were made wrong, or of the test samples the complex ones.
    """

    x: torch.Tensor
    y: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    marked: torch.Tensor
    classes: int


@lru_cache(maxsize=4)
def random_labels(setting: Setting, seed: int) -> Samples:
    """The data set with NOISE of its training labels drawn anew, those to choose by among them: who has no
    clean labels cannot choose by them."""
    noisy, clean = (_loaded(setting, noise, seed) for noise in (NOISE, 0.0))
    x, y, x_val, y_val = noisy.held_out()
    true = clean.held_out()[1]
    count = min(len(x), MOST) // BATCH_SIZE * BATCH_SIZE  # BatchNorm wants whole batches
    return Samples(
        x[:count],
        y[:count],
        x_val[:MOST_TO_CHOOSE],
        y_val[:MOST_TO_CHOOSE],
        noisy.x_test,
        noisy.y_test,
        y[:count] != true[:count],
        noisy.classes,
    )


@lru_cache(maxsize=4)
def patterns(setting: Setting, seed: int) -> Samples:
    """Samples of two images side by side, whose classes are told by simple patterns or by complex ones: every
    other sample is an image beside an empty field, of that image's class; the rest are two images, of the sum
    of their classes modulo ten. Training, choosing and testing draw on images of their own."""
    clean = _loaded(setting, 0.0, 0)
    x, y, x_val, y_val = clean.held_out()
    generator = torch.Generator().manual_seed(seed)
    train, choose, test = (
        _pairs(images, labels, count, clean.classes, generator)
        for images, labels, count in (
            (x, y, PAIRS // BATCH_SIZE * BATCH_SIZE),
            (x_val, y_val, MOST_TO_CHOOSE),
            (clean.x_test, clean.y_test, PAIRS_TO_TEST),
        )
    )
    return Samples(*train[:2], *choose[:2], *test, clean.classes)


def _loaded(setting: Setting, label_noise: float, seed: int) -> data.Dataset:
    return dataset(str(setting.data), setting.folder, label_noise, seed, setting.device)


def _pairs(
    x: torch.Tensor, y: torch.Tensor, count: int, classes: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples, their classes, and which of them are complex."""
    left, right = torch.randint(len(x), (2, count), generator=generator).to(x.device)
    is_complex = torch.arange(count, device=x.device) % 2 == 1
    empty = torch.full_like(x[:1], float(x.min()))
    beside = torch.where(is_complex[:, None], x[right], empty)
    labels = torch.where(is_complex, (y[left] + y[right]) % classes, y[left])
    return torch.cat([x[left], beside], 1), labels, is_complex


def train(setting: Setting, job: Job) -> Result:
    """Trains by a job; figures after so many updates each."""
    seed, part = job["seed"], job["part"]
    samples = (random_labels if part == LABELS else patterns)(setting, seed)
    hidden = [256] if part == LABELS else [256, 256]
    features = samples.x.shape[1]
    make = partial(_training.mlp, features, hidden, samples.classes, batch_norm=True)
    model = _training.seeded(seed, make).to(setting.device)
    measure_at = _training.points(setting.updates(UPDATES), POINTS)
    lr: float | fastlr.Schedule = job["lr"]
    if job["policy"] == "decayed":
        lr = fastlr.MultiStep(job["lr"], (measure_at[HALF], measure_at[THREE_QUARTERS]), 0.1)
    opt = fastlr.FusedSGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=job["weight decay"])

    def measure() -> dict[str, float]:
        accuracy, marked = partial(_training.accuracy, model), samples.marked
        found = {
            "validation": accuracy(samples.x_val, samples.y_val),
            "test": accuracy(samples.x_test, samples.y_test),
        }
        if part == LABELS:
            return {**found, "fitted": accuracy(samples.x[marked], samples.y[marked])}
        of_complex = accuracy(samples.x_test[marked], samples.y_test[marked])
        of_simple = accuracy(samples.x_test[~marked], samples.y_test[~marked])
        return {**found, "simple": of_simple, "complex": of_complex}

    batches = data.Batches(samples.x, samples.y, BATCH_SIZE, seed=seed)
    measured, seconds = _training.train(model, opt, batches, measure_at, measure)
    curves = {name: [found[name] for found in measured] for name in measured[0]}
    return Result({"updates": measure_at, **curves}, {"seconds": round(seconds, 4)})


class Noise:
    name = "noise"
    title = "A large rate keeps noise from being memorised, and decaying it learns complex patterns"
    paper = (
        "You, Long, Wang and Jordan, How Does Learning Rate Decay Help Modern Neural Networks?, arXiv "
        "1908.01878"
    )
    paper_says = (
        "A large rate at first keeps the network from memorising noisy data, and decaying it improves the "
        "learning of complex patterns."
    )
    rule = (
        "It holds if, with the rate that is best for decaying, (1) keeping it fits less of the random labels "
        "than a tenth of it throughout, (2) so does decaying it, which (3) ends above that small rate in "
        "test accuracy and, its weight decay chosen as theirs is, no worse than (4) stopping early and (5) a "
        "fixed rate; and if (6) decaying adds more to keeping the rate on complex patterns than on simple "
        "ones, and (7) on the complex ones ends above the small rate. Less, more, above: the 95 % interval "
        f"of the paired differences lies on that side of zero; no worse: above -{MARGIN:g} point. It holds "
        "partly if some of it is so."
    )
    data = ("digits", "fashion-mnist", "cifar10")

    def jobs(self, setting: Setting) -> list[Job]:
        rates, decayed, weight_decays = (
            (QUICK_RATES, QUICK_DECAYED, QUICK_WEIGHT_DECAYS)
            if setting.quick
            else (RATES, DECAYED, WEIGHT_DECAYS)
        )
        of_parts = [(LABELS, weight_decay) for weight_decay in weight_decays] + [(PATTERNS, WEIGHT_DECAY)]
        return with_seeds(
            setting,
            [
                {"part": part, "policy": policy, "lr": lr, "weight decay": weight_decay}
                for part, weight_decay in of_parts
                for policy, lrs in (("fixed", rates), ("decayed", decayed))
                for lr in lrs
            ],
        )

    def run(self, setting: Setting, job: Job) -> Result:
        return train(setting, job)

    def summarise(self, setting: Setting, runs: Sequence[Run]) -> Summary:
        labels, of_patterns = _labels(runs), _patterns(runs)
        decayed, large, small = (labels[name] for name in ("decayed", "large", "small"))
        large_less, decayed_less = (_compared(group, small, "fitted") for group in (large, decayed))
        above = points_between(decayed, small)
        learned, kept = of_patterns["decayed"], of_patterns["large"]
        added = {kind: _added(learned, kept, kind) for kind in ("complex", "simple")}
        more = compared(added["complex"], added["simple"])
        own = labels["decayed, weight decay"]
        early, at_own = _against_stopped(own, runs), points_between(own, labels["weight decay"])
        statements = [
            Statement(
                f"random labels fitted, {_rate(large)} throughout against {_rate(small)}: "
                f"{large_less.outcome}, {large_less.interval()}",
                large_less.outcome == "below",
            ),
            Statement(
                f"random labels fitted, {_rate(decayed)} decayed against {_rate(small)} throughout: "
                f"{decayed_less.outcome}, {decayed_less.interval()}",
                decayed_less.outcome == "below",
            ),
            Statement(
                f"test accuracy, {_rate(decayed)} decayed against {_rate(small)} throughout: "
                f"{above.outcome}, {above.interval()}",
                above.outcome == "above",
            ),
            no_worse("test accuracy, each with a chosen weight decay, decayed against stopped early", early),
            no_worse("test accuracy, each with a chosen weight decay, decayed against a fixed rate", at_own),
            Statement(
                f"what decaying adds to keeping the rate: {mean(added['complex']):.1f} points on complex "
                f"patterns, {mean(added['simple']):.1f} on simple ones; {more.outcome}, {more.interval()}",
                more.outcome == "above",
            ),
        ]
        found = _compared(learned, of_patterns["small"], "complex")
        statements.append(
            Statement(
                f"complex patterns, {_rate(learned)} decayed against {_rate(of_patterns['small'])} "
                f"throughout: {found.outcome}, {found.interval()}",
                found.outcome == "above",
            )
        )
        left = {kind: _errors(learned, kind) / _errors(kept, kind) for kind in added}
        others = sorted({run.job["lr"] for run in matching(runs, part=LABELS, policy="decayed")})
        notes = [
            f"(1) to (3) depend on the weight decay, {WEIGHT_DECAY:g}, which was settled after figures had "
            "been seen (the second table has the others), and on the rate: "
            + "; ".join(_at_rate(runs, lr) for lr in others if f"{lr:g}" != _rate(decayed))
            + ". The validation split may hardly tell the rates apart.",
            "(4) and (5) at first set a decayed rate with that weight decay beside rivals that choose "
            "theirs, and did not hold by 19 and 17 points; they now choose alike. (6) at first took for what "
            "decaying adds all that a run gains from half-way on. It counts points; of the errors that "
            f"keeping the rate leaves, decaying leaves {left['simple']:.0%} on simple patterns and "
            f"{left['complex']:.0%} on complex ones.",
        ]
        return Summary(
            [
                Table("Random labels", _label_rows(labels, runs), _label_note(setting, runs)),
                Table(
                    "Random labels by weight decay",
                    _weight_decay_rows(runs),
                    "Fitted, and in brackets the test accuracy, each with the rates of the table above.",
                ),
                Table("Simple and complex patterns", _pattern_rows(of_patterns), _pattern_note(setting)),
            ],
            statements,
            notes,
        )

    def draw(self, setting: Setting, runs: Sequence[Run], path: Path) -> None:
        figure, fitted, simple, accuracy, complex_ = new_figure(10.0, 6.4, rows=2, columns=2)
        labels, of_patterns = _labels(runs), _patterns(runs)
        panels = (
            (fitted, "fitted", labels, "random labels fitted (%)"),
            (accuracy, "test", labels, "test accuracy (%)"),
            (simple, "simple", of_patterns, "accuracy on simple patterns (%)"),
            (complex_, "complex", of_patterns, "accuracy on complex patterns (%)"),
        )
        for axes, curve, groups, title in panels:
            axes.set_ylabel(title)
            for color, (name, group) in zip(COLORS, groups.items(), strict=False):
                values = 100 * torch.tensor([run.figures[curve] for run in group], dtype=torch.float64)
                steps, middle = group[0].figures["updates"], values.mean(0)
                style = "--" if "weight decay" in name else "-"  # they may lie on other lines
                axes.plot(steps, middle, style, color=color, label=_name(name, group), linewidth=1.8)
                if len(values) > 1:
                    deviation = values.std(0)
                    low, high = middle - deviation, middle + deviation
                    axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
            for point in (HALF, THREE_QUARTERS):
                axes.axvline(steps[point], color=GREY, linestyle=":", linewidth=1.0)
        stopped, at = _stopped(runs)
        accuracy.axhline(
            100 * mean(_at(stopped, at)), color=GREY, linestyle="--", linewidth=1.2, label="stopped early"
        )
        accuracy.legend(frameon=False, fontsize=8)
        complex_.legend(frameon=False, fontsize=8, loc="lower right")
        for axes in (accuracy, complex_):
            axes.set_xlabel("updates")
            axes.xaxis.set_major_formatter("{x:,.0f}")
        for axes, groups, title in (
            (fitted, labels, "Labels partly random"),
            (simple, of_patterns, "Simple and complex patterns"),
        ):
            weight_decay = groups["decayed"][0].job["weight decay"]
            axes.set_title(f"{title}, weight decay {weight_decay:g}", fontsize=10.5)
        save(figure, path)


# -- choosing ------------------------------------------------------------------------------------------


def _labels(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The policies' runs on random labels with the usual weight decay, the rate that decays chosen by the
    validation split; and those whose weight decay is chosen with the rate, decayed and fixed."""
    found = _related(matching(runs, part=LABELS, **{"weight decay": WEIGHT_DECAY}))
    chosen = (best(matching(runs, part=LABELS, policy=policy)) for policy in ("decayed", "fixed"))
    return {**found, **dict(zip(("decayed, weight decay", "weight decay"), chosen, strict=True))}


def _patterns(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return _related(matching(runs, part=PATTERNS))


def _related(runs: Sequence[Run]) -> dict[str, list[Run]]:
    decayed = best(matching(runs, policy="decayed"))
    return _with(runs, decayed[0].job["lr"], decayed[0].job["weight decay"])


def _with(runs: Sequence[Run], lr: float, weight_decay: float) -> dict[str, list[Run]]:
    """The runs of a rate that decays, of that rate, and of a tenth of it, or what is nearest to that."""
    decayed = matching(runs, policy="decayed", lr=lr, **{"weight decay": weight_decay})
    fixed = matching(runs, policy="fixed", **{"weight decay": weight_decay})
    tenth = min({run.job["lr"] for run in fixed}, key=lambda rate: abs(rate - lr / 10))
    return {"decayed": decayed, "large": matching(fixed, lr=lr), "small": matching(fixed, lr=tenth)}


def _stopped(runs: Sequence[Run]) -> tuple[list[Run], list[int]]:
    """Early stopping: each run is taken at its best point by the validation split, and of the fixed rates and
    weight decays the one whose runs are best there."""

    def points(group: Sequence[Run]) -> list[int]:
        curves = [run.figures["validation"] for run in group]
        return [curve.index(max(curve)) for curve in curves]

    groups = candidates(matching(runs, part=LABELS, policy="fixed"))
    group = max(groups, key=lambda group: mean(_at(group, points(group), "validation")))
    return group, points(group)


def _at(group: Sequence[Run], points: Sequence[int], curve: str = "test") -> list[float]:
    return [run.figures[curve][point] for run, point in zip(group, points, strict=True)]


# -- comparing -----------------------------------------------------------------------------------------


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _compared(a: Sequence[Run], b: Sequence[Run], curve: str) -> Comparison:
    return compared(_percent(finals(a, curve)), _percent(finals(b, curve)))


def _added(decayed: Sequence[Run], kept: Sequence[Run], kind: str) -> list[float]:
    """By how many points each run with a decaying rate ends above the one that keeps it."""
    return [100 * (a - b) for a, b in zip(finals(decayed, kind), finals(kept, kind), strict=True)]


def _errors(group: Sequence[Run], kind: str) -> float:
    return 1 - mean(finals(group, kind))


def _at_rate(runs: Sequence[Run], lr: float) -> str:
    """The comparisons (1) to (3) with another rate that decays."""
    found = _with(matching(runs, part=LABELS), lr, WEIGHT_DECAY)
    fitted = (_compared(found[name], found["small"], "fitted") for name in ("large", "decayed"))
    told = [*fitted, points_between(found["decayed"], found["small"])]
    return f"with {lr:g} they are " + ", ".join(f"{c.outcome} ({c.difference:+.1f})" for c in told)


def _against_stopped(decayed: Sequence[Run], runs: Sequence[Run]) -> Comparison:
    return compared(_percent(finals(decayed)), _percent(_at(*_stopped(runs))))


# -- words ---------------------------------------------------------------------------------------------


def _rate(group: Sequence[Run]) -> str:
    return f"{group[0].job['lr']:g}"


def _name(name: str, group: Sequence[Run]) -> str:
    rate, weight_decay = _rate(group), group[0].job["weight decay"]
    return {
        "decayed": f"{rate}, decayed",
        "large": f"{rate} throughout",
        "small": f"{rate} throughout",
        "decayed, weight decay": f"{rate}, decayed, weight decay {weight_decay:g}",
        "weight decay": f"{rate} throughout, weight decay {weight_decay:g}",
    }[name]


def _label_rows(labels: dict[str, list[Run]], runs: Sequence[Run]) -> Rows:
    rows = [["policy", "rate", "weight decay", "random labels fitted", "test accuracy", "decayed against it"]]
    stopped, at = _stopped(runs)
    names = {  # and which decayed runs are set against them
        "decayed": ("large, then decayed", ""),
        "large": ("large throughout", "decayed"),
        "small": ("small throughout", "decayed"),
        "decayed, weight decay": ("decayed, chosen with its weight decay", ""),
        "weight decay": ("fixed, chosen with its weight decay", "decayed, weight decay"),
    }
    for name, (words, beside) in names.items():
        group = labels[name]
        against = points_between(labels[beside], group).interval() if beside else ""
        rows.append(_label_row(words, group, finals(group, "fitted"), finals(group), against))
    against = _against_stopped(labels["decayed, weight decay"], runs).interval()
    steps = [run.figures["updates"][point] for run, point in zip(stopped, at, strict=True)]
    words = f"stopped early, after {mean(steps):,.0f} updates"
    rows.append(_label_row(words, stopped, _at(stopped, at, "fitted"), _at(stopped, at), against))
    return rows


def _weight_decay_rows(runs: Sequence[Run]) -> Rows:
    lr = _labels(runs)["decayed"][0].job["lr"]
    runs = matching(runs, part=LABELS)
    rows = [["weight decay", "large, then decayed", "large throughout", "small throughout"]]
    for weight_decay in sorted({run.job["weight decay"] for run in runs}):
        groups = _with(runs, lr, weight_decay).values()
        cells = [f"{spread(finals(group, 'fitted'))} ({spread(finals(group))})" for group in groups]
        rows.append([f"{weight_decay:g}", *cells])
    return rows


def _label_row(
    words: str, group: Sequence[Run], fitted: Sequence[float], test: Sequence[float], against: str
) -> list[str]:
    return [words, _rate(group), f"{group[0].job['weight decay']:g}", spread(fitted), spread(test), against]


def _label_note(setting: Setting, runs: Sequence[Run]) -> str:
    count = "all its samples;" if setting.data == "digits" else f"{MOST:,} of the samples;"
    grid = candidates(matching(runs, part=LABELS))
    rates = sorted({group[0].job["lr"] for group in grid})
    weight_decays = sorted({group[0].job["weight decay"] for group in grid})
    return (
        f"{setting.data}, {NOISE:.0%} of the labels drawn anew from all classes, those of the validation "
        f"split too; {count} one hidden layer of 256 with BatchNorm, momentum {MOMENTUM:g}, batches of "
        f"{BATCH_SIZE}, {setting.updates(UPDATES):,} updates, {setting.seeds} seeds. Decaying: to a tenth "
        f"after a half and after three quarters. Rates of {', '.join(f'{rate:g}' for rate in rates)} and "
        f"weight decays of {', '.join(f'{value:g}' for value in weight_decays)} are chosen on the validation "
        f"split, the latter for the last three rows only: the others have {WEIGHT_DECAY:g}; the time to stop "
        "early is chosen likewise. The last two are set against the decayed one whose weight decay is "
        "chosen. Fitted: the part of the wrong labels that the network gives "
        "back for the samples that have them, at the end. Mean and standard deviation."
    )


def _pattern_rows(of_patterns: dict[str, list[Run]]) -> Rows:
    rows = [["policy", "rate", "simple, half-way", "at the end", "complex, half-way", "at the end"]]
    words = {"decayed": "large, then decayed", "large": "large throughout", "small": "small throughout"}
    for name, group in of_patterns.items():
        cells = [
            spread(values)
            for kind in ("simple", "complex")
            for values in (_at(group, [HALF] * len(group), kind), finals(group, kind))
        ]
        rows.append([words[name], _rate(group), *cells])
    return rows


def _pattern_note(setting: Setting) -> str:
    return (
        f"A set made of {setting.data}, after the paper's idea and not its own: {PAIRS:,} samples of two "
        "fields side by side. In every other one the left field holds an image, the right one is empty, and "
        "the class is the image's: a simple pattern. In the rest both hold an image, and the class is the "
        "sum of the two classes modulo ten: a complex one, of which either image alone says next to nothing. "
        "Images recur in many samples; those of the validation split and of the test set are others. Two "
        f"hidden layers of 256 with BatchNorm, weight decay {WEIGHT_DECAY:g}, {setting.updates(UPDATES):,} "
        "updates, the rest as above. Half-way is right before the first decay."
    )


claim = Noise()
