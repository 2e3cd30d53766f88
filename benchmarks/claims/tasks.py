"""What the claims train, and how they choose: by a sixth of the training set, which is held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import mean, median
from typing import Any

import torch

import fastlr
from benchmarks.claims.runner import Job, Result, Run, Setting, Statement
from fastlr import _training, data
from fastlr._statistics import Comparison, compared

MakeOptimizer = Callable[..., torch.optim.Optimizer]  # of parameters, and a weight decay
MakeModel = Callable[[data.Dataset], torch.nn.Module]

POINTS = 30  # of a curve
GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # of fixed rates for SGD with momentum
QUICK_GRID = (0.005, 0.02, 0.1)
MOMENTUM = 0.9
CYCLES = 4  # of a whole run
SWEEP = 400  # updates of the range test
MARGIN = 1.0  # points: what counts as no worse, see Comparison.no_worse()


def small_mlp(dataset: data.Dataset) -> torch.nn.Module:
    """One hidden layer."""
    features = dataset.x_train.shape[1]
    return _training.mlp(features, [32 if features < 100 else 64], dataset.classes)


def quick_convnet(dataset: data.Dataset) -> torch.nn.Module:
    """Three convolutions with pooling, and two layers: as Caffe's cifar10_quick, which Smith used."""
    layers: list[torch.nn.Module] = [torch.nn.Unflatten(1, (3, 32, 32))]
    for inputs, outputs in ((3, 32), (32, 32), (32, 64)):
        layers += [torch.nn.Conv2d(inputs, outputs, 5, padding=2), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    head = torch.nn.Linear(64 * 4 * 4, 64), torch.nn.ReLU(), torch.nn.Linear(64, dataset.classes)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), *head)


@dataclass(frozen=True)
class Task:
    """What is trained on a data set, and for how many updates. label_noise: the part of the training labels
    that is drawn anew, where clean ones are too easy to tell policies apart. weight_decay: 0 for the
    optimizer's own."""

    model: MakeModel
    batch_size: int
    updates: int
    label_noise: float = 0.0
    weight_decay: float = 0.0


TASKS = {
    "digits": Task(small_mlp, 8, 1500, label_noise=0.2),
    "fashion-mnist": Task(small_mlp, 64, 2000),
    "cifar10": Task(quick_convnet, 100, 70_000, weight_decay=0.004),  # arXiv 1506.01186, section 4.1
}


def task_of(setting: Setting) -> Task:
    return TASKS[str(setting.data)]


def caption(setting: Setting, updates: int | None = None) -> str:
    """What was trained, in a sentence; updates: None for the task's own."""
    task = task_of(setting)
    noise = f" with {task.label_noise:.0%} of the training labels drawn at random" if task.label_noise else ""
    model = (task.model.__doc__ or "").split(":")[0].rstrip(".").lower()
    decay = f"weight decay {task.weight_decay:g}, " if task.weight_decay else ""
    return (
        f"{setting.data}{noise}; {model}; batches of {task.batch_size}, {decay}"
        f"{updates or setting.updates(task.updates):,} updates, {setting.seeds} seeds. Rates are chosen on a "
        f"sixth of the training set{', whose labels are as noisy' if task.label_noise else ''}; accuracies "
        "are those of the test set."
    )


def dataset(name: str, folder: str | None, label_noise: float, seed: int, device: str) -> data.Dataset:
    """Kept, once for all seeds where they decide nothing."""
    return _dataset(name, folder, label_noise, seed if label_noise else 0, device)


@lru_cache(maxsize=16)
def _dataset(name: str, folder: str | None, label_noise: float, seed: int, device: str) -> data.Dataset:
    return data.load(name, folder, label_noise=label_noise, seed=seed).to(device)  # type: ignore[arg-type]


class Trial:
    """All that a seed decides: which labels are replaced, the initial weights and the order of the batches.
    Policies of one seed differ in nothing else."""

    def __init__(
        self, setting: Setting, seed: int, *, model: MakeModel | None = None, batch_size: int | None = None
    ) -> None:
        task = task_of(setting)
        self.setting, self.seed = setting, seed
        self.dataset = dataset(str(setting.data), setting.folder, task.label_noise, seed, setting.device)
        self.x, self.y, self.x_val, self.y_val = self.dataset.held_out()
        self.make_model, self.batch_size = model or task.model, batch_size or task.batch_size
        self.decay = {"weight_decay": task.weight_decay} if task.weight_decay else {}

    def model(self) -> torch.nn.Module:
        return _training.seeded(self.seed, lambda: self.make_model(self.dataset)).to(self.setting.device)

    def batches(self) -> data.Batches:
        return data.Batches(self.x, self.y, self.batch_size, seed=self.seed)

    def range_test(self, make: MakeOptimizer, **options: Any) -> fastlr.RangeTestResult:
        """The range test on this seed's weights and batches; options: see ``find_bounds()``."""
        model, make = self.model(), partial(make, **self.decay)
        validation = data.Batches(self.x_val, self.y_val, 500)
        options = {"num_steps": self.setting.updates(SWEEP), **options}
        return _training.find_bounds(model, make(model.parameters()), self.batches(), validation, **options)

    def train(self, make: MakeOptimizer, updates: int, points: int = POINTS) -> Result:
        """Trains so long; figures: "updates" and the accuracy in "test" after each of them, so many points,
        and that in "validation" at the end."""
        model, make = self.model(), partial(make, **self.decay)
        test, seconds = _training.train(
            model,
            make(model.parameters()),
            self.batches(),
            measure_at := _training.points(updates, points),
            lambda: _training.accuracy(model, self.dataset.x_test, self.dataset.y_test),
        )
        validation = [_training.accuracy(model, self.x_val, self.y_val)]
        figures = {"updates": measure_at, "validation": validation, "test": test}
        return Result(figures, {"seconds": round(seconds, 4)})


# -- policies ------------------------------------------------------------------------------------------


def bounds_of(found: fastlr.RangeTestResult, grid: Sequence[float]) -> tuple[float, float]:
    """The bounds that a range test found; where it found none, all that the grid spans."""
    return found.bounds()[0] if found else (grid[0], grid[-1])


def cycle(policy: str, bounds: tuple[float, float], updates: int) -> fastlr.Schedule:
    """A cyclic policy whose whole run, of so many updates, has CYCLES cycles."""
    half = max(1, updates // (2 * CYCLES))
    if policy == "exp_range":
        return fastlr.ExpRange(*bounds, half, gamma=0.1 ** (1 / updates))
    return (fastlr.Triangular if policy == "triangular" else fastlr.Triangular2)(*bounds, half)


# -- choosing among runs -------------------------------------------------------------------------------


def matching(runs: Iterable[Run], **parameters: Any) -> list[Run]:
    """The runs whose jobs have these parameters."""
    return [run for run in runs if all(run.job.get(key) == value for key, value in parameters.items())]


def candidates(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but the seed, together."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(value for key, value in run.job.items() if key != "seed"), []).append(run)
    return list(groups.values())


def best(runs: Iterable[Run]) -> list[Run]:
    """Of all candidates the one whose runs end highest on the validation split, on average."""
    return max(candidates(runs), key=lambda group: mean(finals(group, "validation")))


def finals(runs: Sequence[Run], curve: str = "test") -> list[float]:
    """Each run's accuracy at its end."""
    return [run.figures[curve][-1] for run in runs]


def rates(group: Sequence[Run]) -> str:
    """The rate of a candidate; of cyclic policies the median bounds."""
    if "lr" in group[0].job:
        return f"{group[0].job['lr']:g}"
    base, top = (median(run.figures["bounds"][i] for run in group) for i in (0, 1))
    return f"{base:.2g} to {top:.2g}"


def points_between(a: Sequence[Run], b: Sequence[Run]) -> Comparison:
    """How far the test accuracies of a's runs end above b's, in points, paired by their seeds."""
    return compared([100 * value for value in finals(a)], [100 * value for value in finals(b)])


def no_worse(text: str, found: Comparison) -> Statement:
    """The statement that a policy is no worse than another, by MARGIN."""
    return Statement(f"{text}: {found.outcome}, {found.interval()}", found.no_worse(MARGIN))


def with_seeds(setting: Setting, jobs: Iterable[Job]) -> list[Job]:
    return [{**job, "seed": seed} for job in jobs for seed in range(setting.seeds)]
