"""The main job: from a range test to a trained model, against fixed rates and step decay."""

from __future__ import annotations

import io
import math
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

import torch

import fastlr
from fastlr import _checks, _training, data, plotting
from fastlr._checks import choice, flag
from fastlr._extras import extra
from fastlr._files import writable_folder, write_text
from fastlr._progress import progress as shown_progress
from fastlr._statistics import compared, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Outcome", "Report", "run"]

# The rates that fixed training is tried with: a factor of two to 2.5 apart, over two decades.
_GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_MOMENTUM = 0.9
_DECAY, _FIXED = "step decay", "fixed"
_CYCLES = 4
_POINTS = 30  # of the accuracy curves
_NEVER = "not reached"
_PHONE = 4.2  # inches of a picture, in which its text is as large as a phone's

TABLE_NOTE = (
    "The target is what the best fixed rate has at its end, on average. Updates: the median over the runs of "
    "when the accuracy first is at the target. Final accuracy: mean and standard deviation over the runs. "
    "Seconds: training alone, mean. The best fixed rate and the best step decay were picked by the very test "
    "accuracy shown here, which favours them; the cyclic policy had one try, between the range test's bounds."
)


@dataclass(frozen=True)
class _Task:
    """What is trained on a data set. Clean digits are too easy to tell policies apart, hence the noise."""

    hidden: int
    batch_size: int
    updates: int
    label_noise: float


_TASKS = {"digits": _Task(32, 8, 1500, 0.2), "fashion-mnist": _Task(64, 64, 2000, 0.0)}


@dataclass(frozen=True)
class _Figure:
    """A picture of the page, and what it is shown as on a phone; both as data URLs."""

    title: str
    alt: str  # what is seen, for those who do not see it
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Outcome:
    """One policy, trained once for each seed.

    Attributes:
        name: of the policy.
        rates: its learning rate or rates, in words.
        accuracies: test accuracy of each seed's run after ``Report.measured_at`` updates.
        seconds: one run's training, mean over the seeds.
    """

    name: str
    rates: str
    accuracies: tuple[tuple[float, ...], ...]
    seconds: float

    @property
    def finals(self) -> list[float]:
        """Each run's accuracy at its end."""
        return [run[-1] for run in self.accuracies]


@dataclass(frozen=True)
class Report:
    """What the demo found.

    Attributes:
        found: the range test's result.
        range_test_seconds: what it took.
        measured_at: updates at which accuracies were measured.
        outcomes: the policies: the cyclic one, step decay from several rates, fixed rates.
        files: what was written.
    """

    found: fastlr.RangeTestResult
    range_test_seconds: float
    measured_at: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    files: tuple[Path, ...]

    @property
    def compared(self) -> tuple[Outcome, Outcome, Outcome]:
        """The cyclic policy, the best step decay and the best fixed rate."""
        return self.outcomes[0], _best(self.outcomes, _DECAY), _best(self.outcomes, _FIXED)

    @property
    def target(self) -> float:
        """The accuracy to reach: what the best fixed rate has at its end, on average."""
        return mean(self.compared[2].finals)

    def updates_to_target(self, outcome: Outcome) -> list[int | None]:
        """For each run the updates after which it first was at the target; None: it never was."""
        return [
            next((n for n, a in zip(self.measured_at, run, strict=True) if a >= self.target), None)
            for run in outcome.accuracies
        ]

    def updates_in_words(self, outcome: Outcome) -> str:
        """The median of all runs, those that never get there counted as the slowest."""
        updates = sorted(math.inf if n is None else n for n in self.updates_to_target(outcome))
        return f"{median(updates):,.0f}" if median(updates) < math.inf else _NEVER

    def verdict(self) -> list[str]:
        """The cyclic policy against the best fixed rate and the best step decay, in words."""
        cyclic, decay, fixed = self.compared
        updates = ", ".join(f"{o.name}: {self.updates_in_words(o)}" for o in (cyclic, fixed, decay))
        return [
            f"Final accuracy: {_comparison(cyclic, fixed)}.",
            f"Final accuracy: {_comparison(cyclic, decay)}.",
            f"Updates until the accuracy first was {100 * self.target:.1f} %: {updates}.",
        ]

    def table(self) -> list[list[str]]:
        """The policies as rows of text, under a row of headings."""
        target = f"updates to {100 * self.target:.1f} %"
        rows = [["policy", "learning rate", target, "final accuracy", "seconds"]]
        for outcome in self.outcomes:
            reached = sum(n is not None for n in self.updates_to_target(outcome))
            when = self.updates_in_words(outcome)
            if 0 < reached < len(outcome.accuracies):
                runs = f"{reached} of {len(outcome.accuracies)} runs"
                when = f"only in {runs}" if when == _NEVER else f"{when} ({runs})"
            rows.append([outcome.name, outcome.rates, when, spread(outcome.finals), f"{outcome.seconds:.2f}"])
        return rows


def run(
    name: data.Name = "digits",
    data_path: str | Path | None = None,
    *,
    out: str | Path = "report",
    seeds: int = 5,
    updates: int | None = None,
    progress: bool = True,
) -> Report:
    """Finds bounds by a range test, trains with each policy, and writes pictures and a page.

    Args:
        name: data set, see :func:`fastlr.data.load`.
        data_path: folder of its files, see there.
        out: folder to write to; made where it is missing.
        seeds: runs of each policy, >= 1. A seed decides the labels that are replaced, the initial weights
            and the order of the batches, so that policies differ in nothing else.
        updates: of each run, >= 40; None: 1,500 for digits, 2,000 for Fashion-MNIST.
        progress: show how far it is: as bars in a terminal, elsewhere as lines.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the range test gives no bounds.
        ModuleNotFoundError: a package of ``fastlr[demo]`` is missing.
    """
    choice("name", name, _TASKS)
    task = _TASKS[name]
    updates = _checks.count("updates", task.updates if updates is None else updates, 40)
    seeds, progress = _checks.count("seeds", seeds), flag("progress", progress)
    with extra("demo"):  # missed before the training, not after it
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # type: ignore[import-untyped]  # noqa: F401
    folder = writable_folder("out", out)
    with _training.one_thread(), shown_progress(progress) as stage:
        sets = [data.load(name, data_path, label_noise=task.label_noise, seed=seed) for seed in range(seeds)]
        advance = stage("range test", 1)
        begin = time.perf_counter()
        found = _find_bounds(sets[0], task)
        range_test_seconds = time.perf_counter() - begin
        advance()
        if found.base_lr is None or found.max_lr is None:
            raise RuntimeError(f"the range test gives no bounds: {found.reason}")
        policies = _policies(found.base_lr, found.max_lr, updates)
        measured_at = _training.points(updates, _POINTS)
        outcomes = []
        for policy in policies:
            advance = stage(policy.name, seeds)
            runs = []
            for seed, dataset in enumerate(sets):
                runs.append(_train(dataset, task, policy, seed, measured_at))
                advance()
            accuracies, seconds = zip(*runs, strict=True)
            outcomes.append(Outcome(policy.name, policy.rates, accuracies, mean(seconds)))

    names = ("range_test.png", "schedules.png", "accuracy.png", "index.html")
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / file for file in names)
    report = Report(found, range_test_seconds, measured_at, tuple(outcomes), files)
    write_text(report.files[-1], _page(report, _draw(report, policies), name, task))
    return report


def _best(outcomes: Iterable[Outcome], kind: str) -> Outcome:
    """The policy of a kind that ends highest, on average."""
    return max((o for o in outcomes if o.name.startswith(kind)), key=lambda outcome: mean(outcome.finals))


# -- training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Policy:
    name: str
    rates: str
    schedule: fastlr.Schedule
    optimizer: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


def _policies(base_lr: float, max_lr: float, updates: int) -> list[_Policy]:
    """The cyclic policy, step decay from max_lr and the grid's rates below it, and all the grid's rates."""

    def follows(schedule: fastlr.Schedule) -> Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]:
        return lambda parameters: fastlr.FusedSGD(parameters, lr=schedule, momentum=_MOMENTUM)

    half = updates // (2 * _CYCLES)
    cyclic = _Policy(
        "triangular2",
        f"{base_lr:.2g} to {max_lr:.2g}, half-cycle {half}",
        fastlr.Triangular2(base_lr, max_lr, half),
        lambda parameters: fastlr.FusedCyclicSGD(
            parameters, base_lr, max_lr, step_size_up=half, mode="triangular2", momentum=_MOMENTUM
        ),
    )
    third = math.ceil(updates / 3)
    starts = [*(lr for lr in _GRID if base_lr <= lr < max_lr), max_lr]
    decays = [fastlr.StepDecay(lr, every=third, gamma=0.1) for lr in starts]
    constants = [fastlr.Constant(lr) for lr in _GRID]
    return [
        cyclic,
        *(_Policy(f"{_DECAY} {s.start:.2g}", f"a tenth every {third}", s, follows(s)) for s in decays),
        *(_Policy(f"{_FIXED} {s.value:g}", "constant", s, follows(s)) for s in constants),
    ]


def _model(dataset: data.Dataset, task: _Task, seed: int) -> torch.nn.Module:
    features = dataset.x_train.shape[1]
    return _training.seeded(seed, lambda: _training.mlp(features, [task.hidden], dataset.classes))


def _find_bounds(dataset: data.Dataset, task: _Task) -> fastlr.RangeTestResult:
    """A range test that validates on a sixth of the training set: the test set has no part in it."""
    x, y, x_val, y_val = dataset.held_out()
    model = _model(dataset, task, seed=0)
    return _training.find_bounds(
        model,
        fastlr.FusedSGD(model.parameters(), momentum=_MOMENTUM),
        data.Batches(x, y, task.batch_size, seed=0),
        data.Batches(x_val, y_val, 500),
    )


def _train(
    dataset: data.Dataset, task: _Task, policy: _Policy, seed: int, measure_at: tuple[int, ...]
) -> tuple[tuple[float, ...], float]:
    """Test accuracies after the given updates, and the seconds that the updates took."""
    model = _model(dataset, task, seed)
    accuracies, seconds = _training.train(
        model,
        policy.optimizer(model.parameters()),
        data.Batches(dataset.x_train, dataset.y_train, task.batch_size, seed=seed),
        measure_at,
        lambda: _training.accuracy(model, dataset.x_test, dataset.y_test),
    )
    return tuple(accuracies), seconds


# -- what is shown -------------------------------------------------------------------------------------


def _comparison(a: Outcome, b: Outcome) -> str:
    """Whether a ended above b. Runs of one seed differ in the policy only, so they are compared in pairs."""
    found = compared([100 * value for value in a.finals], [100 * value for value in b.finals])
    if found.outcome == "one run":
        return (
            f"{a.name} ended {found.interval()} from {b.name}; one run of each cannot tell this from chance"
        )
    if found.outcome == "a tie":
        return f"a tie of {a.name} and {b.name} ({found.interval()})"
    return f"{a.name} ended {found.outcome} {b.name} ({found.interval()})"


def _draw(report: Report, policies: list[_Policy]) -> list[_Figure]:
    """Saves the pictures, and keeps each once more as wide as a phone."""
    shown = [outcome.name for outcome in report.compared]
    schedules = {p.name: p.schedule for p in policies if p.name in shown}
    accuracies = {o.name: o.accuracies for o in report.outcomes if o.name in shown}
    runs = len(report.outcomes[0].accuracies)
    bands = f"Mean over {runs} runs; the bands are one standard deviation wide to either side. "
    drawn: list[tuple[str, str, str, Callable[..., Figure]]] = [
        (
            "The range test",
            "Training loss and validation accuracy against the learning rate, from "
            f"{report.found.lrs[0]:.2g} to {report.found.lrs[-1]:.2g}; from {report.found.base_lr:.2g} to "
            f"{report.found.max_lr:.2g} it is shaded.",
            "The rate rises with every update. max_lr is where the validation accuracy stops improving, "
            "base_lr a tenth of it; triangular2 cycles in the shaded range.",
            partial(plotting.plot_range_test, report.found),
        ),
        (
            "The schedules",
            f"The learning rate of {', '.join(schedules)} over {report.measured_at[-1]:,} updates.",
            "What the optimizer's step evaluates; no scheduler object is involved.",
            partial(plotting.plot_schedules, schedules, report.measured_at[-1]),
        ),
        (
            "Accuracy against updates",
            f"Test accuracy of {', '.join(accuracies)} over {report.measured_at[-1]:,} updates; a line is at "
            f"the target, {100 * report.target:.1f} %.",
            f"{bands if runs > 1 else ''}The best fixed rate and the best step decay are shown. The axis is "
            "stretched towards 100 %, where policies differ.",
            partial(plotting.plot_accuracy, report.measured_at, accuracies, target=report.target),
        ),
    ]
    figures = []
    for (title, alt, caption, draw), path in zip(drawn, report.files, strict=False):
        draw(path=path)
        narrow = io.BytesIO()
        draw(width=_PHONE).savefig(narrow, format="png", bbox_inches="tight")
        figures.append(
            _Figure(title, alt, caption, _data_url(path.read_bytes()), _data_url(narrow.getvalue()))
        )
    return figures


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _page(report: Report, figures: list[_Figure], name: str, task: _Task) -> str:
    """The report as one page that needs no other file."""
    import jinja2

    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("fastlr"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    headings, *rows = report.table()
    seeds, updates = len(report.outcomes[0].accuracies), report.measured_at[-1]
    noise = f", with {100 * task.label_noise:.0f} % of the training labels drawn anew at random"
    return pages.get_template("demo.html").render(
        report=report,
        name=name,
        runs=f"{seeds} run{'s' if seeds > 1 else ''}",
        tiles=[_tile(report, outcome) for outcome in report.compared],
        headings=headings,
        rows=rows,
        table_note=TABLE_NOTE,
        figures=figures,
        setting=f"{name}{noise if task.label_noise else ''}; a network with one hidden layer of "
        f"{task.hidden} units, batches of {task.batch_size}, {updates:,} updates, momentum {_MOMENTUM}. The "
        f"range test took {len(report.found.lrs)} updates and {report.range_test_seconds:.1f} s, and "
        "validated on a sixth of the training set. "
        f"fastlr {fastlr.__version__}, PyTorch {torch.__version__}, one thread.",
    )


def _tile(report: Report, outcome: Outcome) -> dict[str, str]:
    """What a policy reached, and when, as shown at the head of the page."""
    when = report.updates_in_words(outcome)
    when = when if when == _NEVER else f"after {when} updates"
    return {
        "name": outcome.name,
        "accuracy": spread(outcome.finals),
        "note": f"{100 * report.target:.1f} % {when}",
    }
