"""range_test_grid() tries each combination from the same start and leaves no trace."""

from __future__ import annotations

import copy
import csv

import numpy as np
import pytest
import torch
from rule_table import RULES
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import fastlr

cross_entropy = torch.nn.functional.cross_entropy
OPTIMIZERS = {
    "FusedSGD": lambda p: fastlr.FusedSGD(p, lr=0.05, momentum=0.5),
    "FusedCyclicSGD": lambda p: fastlr.FusedCyclicSGD(p, 0.01, 0.1, step_size_up=5, cycle_momentum=True),
    **{
        rule.fused.__name__: rule.make
        for rule in RULES.values()
        if {"momentum", "beta1"} & rule.drives.keys() and rule.fused is not fastlr.FusedSGD
    },
    "FusedAdamW, all driven": lambda p: fastlr.FusedAdamW(
        p,
        lr=fastlr.Triangular2(0.001, 0.01, 5),
        betas=(fastlr.Triangular(0.5, 0.9, 5), 0.99),
        weight_decay=fastlr.LinearRamp(0.1, 0.0, 20),
    ),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
    "torch Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
each_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Job:
    def __init__(self, make_optimizer):
        torch.manual_seed(0)
        x = torch.randn(256, 6)
        self.data = TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))
        self.loader = DataLoader(
            self.data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1)
        )
        self.model = torch.nn.Linear(6, 3)
        self.optimizer = make_optimizer(self.model.parameters())

    def grid(self, loader=None, **options):
        options = {"num_steps": 100, "end_lr": 1000.0, "progress": False} | options
        return fastlr.range_test_grid(
            self.model, self.optimizer, cross_entropy, loader or self.loader, **options
        )


@pytest.mark.parametrize("fused", [fastlr.FusedAdagrad, fastlr.FusedAdadelta])
def test_a_rule_without_momentum_has_none_to_try(fused):
    job = Job(fused)
    with pytest.raises(ValueError, match=f"{fused.__name__} has neither momentum nor betas to try values of"):
        job.grid(momentum=[0.9])
    decays = job.grid(weight_decay=[0.0, 0.1], num_steps=20, end_lr=0.01)
    assert [setting["weight_decay"] for setting in decays.settings] == [0.0, 0.1]
    assert job.optimizer.param_groups[0]["weight_decay"] == 0.0


@each_optimizer
def test_each_combination_is_tried_from_the_same_start(make_optimizer):
    job, seen = Job(make_optimizer), []
    before = copy.deepcopy((job.optimizer.state_dict(), job.model.state_dict(), torch.get_rng_state()))

    def loss_fn(output, target):
        group = job.optimizer.param_groups[0]
        momentum = group["momentum"] if "momentum" in group else group["betas"][0]
        seen.append((group["weight_decay"], momentum, job.model.weight.detach().clone()))
        return cross_entropy(output, target)

    grid = fastlr.range_test_grid(
        job.model,
        job.optimizer,
        loss_fn,
        job.loader,
        weight_decay=[0, 1e-3],
        momentum=[0.8, 0.95],
        num_steps=30,
        end_lr=0.01,
        progress=False,
    )
    assert [(s["weight_decay"], s["momentum"]) for s in grid.settings] == [
        (0.0, 0.8),
        (0.0, 0.95),
        (1e-3, 0.8),
        (1e-3, 0.95),
    ]
    for i, setting in enumerate(grid.settings):
        part = seen[30 * i : 30 * (i + 1)]
        assert {(w, m) for w, m, _ in part} == {(setting["weight_decay"], setting["momentum"])}
        assert torch.equal(part[0][2], seen[0][2])
        assert grid.results[i].losses[0] == grid.results[0].losses[0]  # the same first batch, too
    after = (job.optimizer.state_dict(), job.model.state_dict(), torch.get_rng_state())
    assert after[0] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(after[1].values(), before[1].values(), strict=True))
    assert torch.equal(after[2], before[2])


def test_a_setting_is_what_the_single_test_with_it_finds():
    grid = Job(OPTIMIZERS["torch SGD"]).grid(momentum=[0.0, 0.9])
    for momentum, result in zip((0.0, 0.9), grid.results, strict=True):
        single = Job(lambda p, m=momentum: torch.optim.SGD(p, lr=0.05, momentum=m))
        found = fastlr.range_test(
            single.model,
            single.optimizer,
            cross_entropy,
            single.loader,
            num_steps=100,
            end_lr=1000.0,
            progress=False,
        )
        np.testing.assert_array_equal(found.losses, result.losses)
    assert grid.results[0].max_lr > 2 * grid.results[1].max_lr  # momentum 0.9 bears lower rates


@pytest.mark.parametrize("kind", ["loader", "function"])
def test_batch_sizes_are_tried(kind):
    job, sizes = Job(OPTIMIZERS["FusedSGD"]), []

    def loss_fn(output, target):
        sizes.append(len(target))
        return cross_entropy(output, target)

    loader = job.loader
    if kind == "function":
        loader = lambda size: DataLoader(job.data, batch_size=size)  # noqa: E731
    fastlr.range_test_grid(
        job.model,
        job.optimizer,
        loss_fn,
        loader,
        batch_size=[8, 64],
        num_steps=12,
        end_lr=0.01,
        progress=False,
    )
    assert [sizes[0], sizes[-1]] == [8, 64]
    assert set(sizes) == {8, 64}
    assert job.loader.batch_size == 16


@pytest.mark.parametrize("kind", ["loader", "sampler", "function"])
def test_a_batch_that_the_data_cannot_fill_is_refused(kind):
    job = Job(OPTIMIZERS["FusedSGD"])  # of 256 samples
    loader, samples = job.loader, 256
    if kind == "sampler":
        loader, samples = DataLoader(job.data, 16, sampler=SubsetRandomSampler(range(30))), 30
    if kind == "function":
        loader = lambda size: DataLoader(job.data, batch_size=size)  # noqa: E731
    before = copy.deepcopy(job.optimizer.state_dict())
    message = (
        f"batch_size 1000 is more than the {samples} samples of the train_loader; try sizes up to {samples}"
    )
    with pytest.raises(ValueError, match=message):
        job.grid(loader, batch_size=[8, 1000])
    assert job.optimizer.state_dict() == before


def test_a_function_that_does_not_heed_the_batch_size_is_refused():
    job = Job(OPTIMIZERS["FusedSGD"])
    with pytest.raises(ValueError, match="for batch_size 8 returned a DataLoader of batch_size 16"):
        job.grid(lambda size: DataLoader(job.data, batch_size=16), batch_size=[8])


@pytest.mark.parametrize("size", [100, 200, 256])
def test_every_update_has_as_many_samples_as_the_grid_says(size):
    job, sizes = Job(OPTIMIZERS["FusedSGD"]), set()  # of 256 samples: a last batch would have 56

    def loss_fn(output, target):
        sizes.add(len(target))
        return cross_entropy(output, target)

    options = {"num_steps": 12, "end_lr": 0.01, "progress": False}
    fastlr.range_test_grid(job.model, job.optimizer, loss_fn, job.loader, batch_size=[size], **options)
    assert sizes == {size}


@pytest.mark.parametrize("batches", ["pairs", "dicts"])
def test_a_function_gives_the_batches_of_the_size_that_the_grid_says(batches):
    job, sizes = Job(OPTIMIZERS["FusedSGD"]), set()

    def loader(size):
        made = DataLoader(job.data, size)  # of 256 samples: the last batch has 56 or 1
        return [{"x": x, "y": [y]} for x, y in made] if batches == "dicts" else made

    def step_fn(batch):
        x, y = (batch["x"], batch["y"][0]) if batches == "dicts" else batch
        sizes.add(len(y))
        return cross_entropy(job.model(x), y)

    options = {"step_fn": step_fn, "num_steps": 12, "end_lr": 0.01, "progress": False}
    for size in (100, 51):
        sizes.clear()
        fastlr.range_test_grid(job.model, job.optimizer, train_loader=loader, batch_size=[size], **options)
        assert sizes == {size}


def test_a_function_without_batches_of_the_size_is_refused():
    job = Job(OPTIMIZERS["FusedSGD"])
    batches = [(torch.randn(3, 6), torch.arange(3)), (torch.randn(2, 6), torch.arange(2))]
    message = "for batch_size 5 returned a loader without a batch of that size: .* tensors have 2, 3 rows"
    with pytest.raises(ValueError, match=message):
        job.grid(lambda size: batches, batch_size=[5])
    with pytest.raises(TypeError, match="train_loader is an iterator"):
        job.grid(lambda size: iter(batches), batch_size=[3])


def test_what_the_function_draws_is_put_back_and_the_same_for_each_size():
    job, parts = Job(OPTIMIZERS["FusedSGD"]), []

    def loader(size):
        parts.append(torch.utils.data.random_split(job.data, [200, 56])[0])
        return DataLoader(parts[-1], size, shuffle=True)

    before = torch.get_rng_state()
    job.grid(loader, batch_size=[8, 16], num_steps=4, end_lr=0.01)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(parts) == 2
    assert parts[0].indices == parts[1].indices


def test_an_interruption_leaves_no_trace():
    job, calls = Job(OPTIMIZERS["FusedCyclicSGD"]), iter(range(1000))
    before = copy.deepcopy(job.optimizer.state_dict())

    def loss_fn(output, target):
        if next(calls) == 40:
            raise KeyboardInterrupt
        return cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        fastlr.range_test_grid(
            job.model, job.optimizer, loss_fn, job.loader, momentum=[0.1, 0.2], num_steps=30, progress=False
        )
    assert job.optimizer.state_dict() == before


def made_up():
    lrs = np.geomspace(1e-5, 1.0, 100)
    curve = 2.0 + np.log10(lrs / 0.03) ** 2 / 5
    results = [fastlr.RangeTestResult(lrs, c) for c in (curve, curve - 0.5, np.ones(100))]
    return fastlr.RangeTestGrid(({"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.99}), tuple(results))


def test_the_table_has_a_row_for_each_setting(tmp_path):
    grid = made_up()
    rows = grid.table()
    assert rows[0] == ["momentum", "base_lr", "max_lr", "lowest loss", "remark"]
    assert rows[1][:3] == ["0", f"{grid.results[0].base_lr:.2g}", f"{grid.results[0].max_lr:.2g}"]
    assert float(rows[2][3]) == pytest.approx(float(rows[1][3]) - 0.5)
    assert rows[3][1:3] == ["none", "none"]
    assert "improves nowhere" in rows[3][4]
    assert grid.best() == {"momentum": 0.9}
    assert all(cell in grid.summary() for row in rows for cell in row)
    grid.to_csv(tmp_path / "grid.csv")
    with open(tmp_path / "grid.csv", newline="") as file:
        assert list(csv.reader(file)) == rows


def test_the_best_setting_is_that_of_the_highest_accuracy():
    lrs = np.geomspace(1e-5, 1.0, 100)
    curve = 2.0 + np.log10(lrs / 0.03) ** 2 / 5
    results = [fastlr.RangeTestResult(lrs, curve, top * np.exp(-(curve - 2.0))) for top in (0.5, 0.9, 0.7)]
    grid = fastlr.RangeTestGrid(tuple({"weight_decay": w} for w in (1.0, 2.0, 3.0)), tuple(results))
    assert grid.best() == {"weight_decay": 2.0}
    assert grid.peaks() == pytest.approx([0.5, 0.9, 0.7], rel=0.05)
    assert grid.table()[0][3] == "best accuracy"


def test_no_answer_anywhere_is_said():
    empty = fastlr.RangeTestResult([], [])
    grid = fastlr.RangeTestGrid(({"momentum": 0.0},), (empty,))
    with pytest.raises(ValueError, match="no setting gives bounds"):
        grid.best()
    assert grid.table()[1][3] == "nan"


@pytest.mark.parametrize("with_accuracies", [False, True])
def test_all_curves_stand_in_one_picture(with_accuracies, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    grid = made_up()
    if with_accuracies:
        results = [fastlr.RangeTestResult(r.lrs, r.losses, np.linspace(0.1, 0.9, 100)) for r in grid.results]
        grid = fastlr.RangeTestGrid(grid.settings, tuple(results))
    figure = grid.plot(str(tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").stat().st_size > 5000
    assert len(figure.axes) == 1 + with_accuracies
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["momentum 0", "momentum 0.9", "momentum 0.99"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), grid.results[0].smoothed_losses)


REFUSED = {
    "nothing": (ValueError, "nothing to try", {}, "FusedSGD"),
    "negative decay": (ValueError, "weight_decay must be", {"weight_decay": [-1.0]}, "FusedSGD"),
    "momentum 1": (
        ValueError,
        r"momentum must be in \[0, 1\), got 1.0",
        {"momentum": [0.9, 1.0]},
        "FusedSGD",
    ),
    "batch size 0": (ValueError, "batch_size must be", {"batch_size": [0]}, "FusedSGD"),
    "a list": (
        TypeError,
        r"train_loader \(list\) cannot be changed",
        {"batch_size": [8], "loader": [1]},
        "FusedSGD",
    ),
    "no momentum": (ValueError, "Adagrad has neither momentum", {"momentum": [0.9]}, "Adagrad"),
}


@pytest.mark.parametrize(("error", "message", "options", "name"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_tried_is_refused(error, message, options, name):
    makers = {**OPTIMIZERS, "Adagrad": torch.optim.Adagrad}
    with pytest.raises(error, match=message):
        Job(makers[name]).grid(**options)
