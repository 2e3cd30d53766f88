"""The main job: from a range test to a trained model, against fixed rates and step decay."""

from __future__ import annotations

import html
import math
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

import fastlr
from fastlr import _checks, _training, data, plotting
from fastlr._checks import choice, file_name, flag
from fastlr._files import write_text
from fastlr._progress import progress as shown_progress
from fastlr._statistics import compared, spread

__all__ = ["Outcome", "Report", "run"]

# The rates that fixed training is tried with: a factor of two to 2.5 apart, over two decades.
_GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_MOMENTUM = 0.9
_DECAY, _FIXED = "step decay", "fixed"
_CYCLES = 4
_POINTS = 30  # of the accuracy curves

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

    def _typical_updates(self, outcome: Outcome) -> str:
        """The median of all runs, those that never get there counted as the slowest."""
        updates = sorted(math.inf if n is None else n for n in self.updates_to_target(outcome))
        return f"{median(updates):,.0f}" if median(updates) < math.inf else "not reached"

    def verdict(self) -> list[str]:
        """The cyclic policy against the best fixed rate and the best step decay, in words."""
        cyclic, decay, fixed = self.compared
        updates = ", ".join(f"{o.name}: {self._typical_updates(o)}" for o in (cyclic, fixed, decay))
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
            when = self._typical_updates(outcome)
            if 0 < reached < len(outcome.accuracies):
                runs = f"{reached} of {len(outcome.accuracies)} runs"
                when = f"only in {runs}" if when == "not reached" else f"{when} ({runs})"
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
    folder = Path(file_name("out", out))
    folder.mkdir(parents=True, exist_ok=True)
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
    files = tuple(folder / file for file in names)
    report = Report(found, range_test_seconds, measured_at, tuple(outcomes), files)
    shown = [outcome.name for outcome in report.compared]
    range_picture, schedule_picture, accuracy_picture, page = report.files
    found.plot(range_picture)
    plotting.plot_schedules(
        {p.name: p.schedule for p in policies if p.name in shown}, updates, schedule_picture
    )
    plotting.plot_accuracy(
        measured_at,
        {o.name: o.accuracies for o in outcomes if o.name in shown},
        accuracy_picture,
        target=report.target,
    )
    write_text(page, _page(report, name, task, updates, seeds))
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


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastlr demo: {name}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1f2937; }}
body {{ max-width: 56rem; margin: 2.5rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0.2rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.lead {{ color: #6b7280; margin-top: 0; }}
.verdict {{ border-left: 4px solid #0072b2; background: #f3f8fc; padding: 0.7rem 1rem; }}
.verdict p {{ margin: 0.2rem 0; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 0.35rem 0.6rem; border-bottom: 1px solid #e5e7eb; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
th {{ border-bottom: 2px solid #9ca3af; font-weight: 600; }}
tr.cyclic td {{ font-weight: 600; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #4b5563; font-size: 0.92rem; }}
</style>
</head>
<body>
<h1>fastlr demo: {name}</h1>
<p class="lead">{lead}</p>
<div class="verdict">{verdict}</div>
<h2>What each policy reached</h2>
{table}
<p>{table_note}</p>
{figures}
<h2>Setting</h2>
<p>{setting}</p>
</body>
</html>
"""


def _page(report: Report, name: str, task: _Task, updates: int, seeds: int) -> str:
    """The report as one page that needs no other file."""
    headings, *rows = report.table()
    cells = [
        "<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in headings) + "</tr>",
        *(
            f"<tr{' class=cyclic' if i == 0 else ''}>"
            + "".join(f"<td>{html.escape(text)}</td>" for text in row)
            + "</tr>"
            for i, row in enumerate(rows)
        ),
    ]
    found, runs = report.found, f"{seeds} run{'s' if seeds > 1 else ''}"
    captions = {
        "The range test": "The rate rises with every update. max_lr is where the validation accuracy stops "
        "improving, base_lr a tenth of it; triangular2 cycles in the shaded range.",
        "The schedules": "What the optimizer's step evaluates; no scheduler object is involved.",
        "Accuracy against updates": f"Mean over {runs}; the bands are one standard deviation wide to either "
        "side. The best fixed rate and the best step decay are shown. The picture leaves out the climb from "
        "chance.",
    }
    figures = [
        f'<h2>{title}</h2>\n<figure><img alt="{title}" src="data:image/png;base64,'
        f'{b64encode(path.read_bytes()).decode()}">\n<figcaption>{caption}</figcaption></figure>'
        for (title, caption), path in zip(captions.items(), report.files[:3], strict=True)
    ]
    noise = (
        f", with {task.label_noise:.0%} of the training labels drawn anew at random"
        if task.label_noise
        else ""
    )
    return _PAGE.format(
        name=html.escape(name),
        lead=f"From a range test to a trained model: {len(report.outcomes)} policies, {runs} of each.",
        verdict="".join(f"<p>{html.escape(sentence)}</p>" for sentence in report.verdict()),
        table="<table>\n" + "\n".join(cells) + "\n</table>",
        table_note=html.escape(TABLE_NOTE),
        figures="\n".join(figures),
        setting=html.escape(
            f"{name}{noise}; a network with one hidden layer of {task.hidden} units, batches of "
            f"{task.batch_size}, {updates:,} updates, momentum {_MOMENTUM}. The range test took "
            f"{len(found.lrs)} updates and {report.range_test_seconds:.1f} s, and validated on a sixth of "
            f"the training set. fastlr {fastlr.__version__}, PyTorch {torch.__version__}, one thread."
        ),
    )
