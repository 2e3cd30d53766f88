"""The plans of the claim about growing batches, what is measured along the way, and what is made of it."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from fastlr import _training


@pytest.fixture(scope="module")
def growth(load_claims: Callable[[str], ModuleType]) -> ModuleType:
    return load_claims("batch_growth")


@pytest.fixture(scope="module")
def runner(load_claims: Callable[[str], ModuleType]) -> ModuleType:
    return load_claims("runner")


@pytest.fixture(scope="module")
def setting(runner: ModuleType) -> Any:
    return runner.Setting("digits", seeds=5)


# -- plans -------------------------------------------------------------------------------------------


def test_plans_of_one_setting_have_one_noise_scale(growth, setting):
    decay = growth.make_plan(setting, "decay", 0.01, 1123)
    for name in growth.PLANS:
        plan = growth.make_plan(setting, name, 0.01, 1123)
        assert plan.total_samples == decay.total_samples
        for epoch in range(plan.epochs):
            sample = 1123 * epoch + 500
            assert plan.noise_scale(sample) == pytest.approx(decay.noise_scale(sample)), name


def test_sizes_are_in_the_papers_proportions(growth, setting):
    """Batches of 128, 640, 3200 and 5120 of 50,000 samples have to 2,306 of 78,126 updates; here by the
    same factors."""
    sizes = {name: growth.make_plan(setting, name, 0.01, 1123).batch_sizes for name in growth.PLANS}
    assert sizes == {
        "decay": (4, 4, 4, 4),
        "hybrid": (4, 20, 20, 20),
        "increase": (4, 20, 100, 112),
        "raised rate": (20, 100, 112, 112),
        "raised momentum": (100, 112, 112, 112),
    }


def test_the_short_decay_has_about_as_many_updates_as_growing(growth, setting):
    short, grown = (growth.make_plan(setting, name, 0.01, 1123) for name in (growth.SHORT, "increase"))
    assert set(short.batch_sizes) == {4}
    assert short.total_updates == pytest.approx(grown.total_updates, rel=0.05)


@pytest.mark.parametrize(
    ("data", "samples"), [("digits", 1123), ("fashion-mnist", 50_000), ("cifar10", 41_667)]
)
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.02])
def test_every_data_set_and_scale_has_plans(growth, runner, data, samples, scale):
    setting = runner.Setting(data, scale=scale)
    for lr in growth.GROWTHS[data].rates:
        updates = [growth.make_plan(setting, name, lr, samples).total_updates for name in growth.PLANS]
        assert updates == sorted(updates, reverse=True)


# -- what is measured --------------------------------------------------------------------------------


def test_gradient_noise_is_that_of_the_samples_gradients(growth):
    """Against the covariance of every sample's gradient, where the large batch is the whole data set."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 5, generator=generator) + 1.0
    y = torch.randint(3, (640,), generator=generator)
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    before = [parameter.clone() for parameter in model.parameters()]
    gradient, noise = growth.gradient_noise(model, growth.InMemory(x, y), seed=0)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())

    def gradients(x, y):
        found = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), model.parameters())
        return torch.cat([part.flatten() for part in found])

    each = torch.stack([gradients(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    assert noise == pytest.approx(each.var(0).sum().item(), rel=0.5)
    assert gradient == pytest.approx(gradients(x, y).square().sum().item(), rel=0.1)


def test_a_run_says_where_its_plan_stood(growth, runner):
    setting = runner.Setting("digits", scale=0.02)
    with _training.one_thread():
        figures = growth.claim.run(setting, {"plan": "increase", "lr": 0.005, "seed": 0}).figures
    plan = growth.make_plan(setting, "increase", 0.005, figures["samples"])
    assert figures["updates"][-1] == plan.total_updates
    assert figures["epochs"] == (1, 2, 3, 4, 5)
    assert figures["batch"] == [4, 4, 20, 100, 112]
    assert figures["batches"] == [4, 20, 100, 112]
    assert all(math.isfinite(value) for curve in ("gradient", "noise") for value in figures[curve])


def test_plans_start_from_the_same_weights_and_take_the_same_samples(growth, runner):
    setting = runner.Setting("digits", scale=0.02)
    job = {"lr": 0.005, "seed": 3}
    with _training.one_thread():
        decay, hybrid = (
            growth.claim.run(setting, {**job, "plan": name}).figures for name in ("decay", "hybrid")
        )
    assert decay["train loss"][:2] == hybrid["train loss"][:2]  # before the first drop
    assert decay["train loss"][-1] != hybrid["train loss"][-1]


def test_a_run_that_diverges_has_figures(growth, runner):
    setting = runner.Setting("digits", scale=0.02)
    with _training.one_thread():
        figures = growth.claim.run(setting, {"plan": "decay", "lr": 1e4, "seed": 0}).figures
    assert figures["train loss"][-1] == growth.DIVERGED
    assert figures["gradient"][-1] == figures["noise"][-1] == 0.0
    json.dumps(figures, allow_nan=False)


# -- what is made of it ------------------------------------------------------------------------------


def summary(
    growth: ModuleType, setting: Any, accuracy: Callable[[dict[str, Any]], float], **figures: Any
) -> Any:
    """Of made-up runs, each of an accuracy that differs a little from seed to seed."""
    runner = importlib.import_module("benchmarks.claims.runner")
    updates = {name: 1000 - 150 * i for i, name in enumerate((*growth.PLANS, growth.SHORT))}
    runs = []
    for job in growth.claim.jobs(setting):
        final = accuracy(job) + 0.001 * job["seed"]
        curves = {
            "epochs": [1, 2],
            "updates": [10, updates[job["plan"]]],
            "batch": [4, 20],
            "batches": [4, 20],
            "rates": [0.1, 0.02],
            "momentum": 0.9,
            "samples": 1000,
            "test": [final, final],
            "train loss": [1.0, 0.5],
            "gradient": [1.0, 0.0],
            "noise": [50.0, 50.0],
            "validation": [final],
        }
        runs.append(runner.Run(job, {**curves, **figures}, {"seconds": 1.0}))
    return growth.claim.summarise(setting, runs)


@pytest.mark.parametrize("worse", [None, "increase", "hybrid", "raised rate", "raised momentum"])
def test_each_plan_has_its_statement(growth, setting, worse):
    found = summary(growth, setting, lambda job: 0.8 if job["plan"] == worse else 0.9)
    told = [statement.holds for statement in found.statements]
    names = ("increase", "hybrid", "curves", "raised rate", "raised momentum")
    wrong = {worse, "curves"} if worse in ("increase", "hybrid") else {worse}
    assert told == [name not in wrong for name in names]
    assert found.verdict == ("holds partly" if worse else "holds")


def test_as_many_updates_are_no_saving(growth, setting):
    found = summary(growth, setting, lambda job: 0.9, updates=[10, 1000])
    assert [statement.holds for statement in found.statements] == [False, False, True, False, False]


def test_the_initial_rate_is_the_best_for_decaying(growth, setting):
    """Whatever the others would like."""

    def accuracy(job):
        return 0.9 if (job["plan"] == "decay") == (job["lr"] == 0.002) else 0.5

    found = summary(growth, setting, accuracy)
    assert found.verdict == "does not hold here"
    assert "0.002, is the best" in found.tables[0].note


def test_a_noise_scale_beyond_the_data_set_is_not_given_a_number(growth, setting):
    rows = summary(growth, setting, lambda job: 0.9).tables[2].rows
    assert rows[1] == ["decay", "50 (4)", "50 (4)", "over 1,000 (20)", "over 1,000 (20)"]


def test_times_stand_apart(growth, setting):
    tables = summary(growth, setting, lambda job: 0.9).tables
    assert [table.title for table in tables if table.measured] == ["Wall-clock time"]


def test_the_largest_gap_counts_whatever_its_sign(growth, runner):
    runs = [
        [runner.Run({"seed": seed}, {"test": curve}, {}) for seed, curve in enumerate(curves)]
        for curves in ([[0.5, 0.9], [0.7, 0.9]], [[0.5, 0.91], [0.5, 0.91]])
    ]
    assert growth._farthest(*runs) == pytest.approx(10)
    assert growth._farthest(*reversed(runs)) == pytest.approx(10)


def test_quick_jobs_are_some_of_all(growth, setting):
    jobs = growth.claim.jobs(replace(setting, quick=True))
    assert {tuple(job.items()) for job in jobs} < {tuple(job.items()) for job in growth.claim.jobs(setting)}
