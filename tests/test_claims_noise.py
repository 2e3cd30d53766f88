"""The two sets of the claim about noise and complex patterns, and what is made of its runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from fastlr import _training


@pytest.fixture(scope="module")
def noise(load_claims: Callable[[str], ModuleType]) -> ModuleType:
    return load_claims("noise")


@pytest.fixture(scope="module")
def setting(noise: ModuleType) -> Any:
    return importlib.import_module("benchmarks.claims.runner").Setting("digits", seeds=5, scale=0.01)


# -- the sets ----------------------------------------------------------------------------------------


def test_marked_labels_are_the_wrong_ones(noise, setting):
    samples = noise.random_labels(setting, 0)
    clean = noise._loaded(setting, 0.0, 0).held_out()[1][: len(samples.y)]
    assert len(samples.x) % noise.BATCH_SIZE == 0
    assert torch.equal(samples.marked, samples.y != clean)
    assert samples.marked.double().mean().item() == pytest.approx(0.9 * noise.NOISE, abs=0.05)


def test_what_is_chosen_by_has_random_labels_too_and_the_test_set_none(noise, setting):
    samples, clean = noise.random_labels(setting, 1), noise._loaded(setting, 0.0, 1)
    _, _, x_val, y_val = clean.held_out()
    assert torch.equal(samples.x_val, x_val)
    assert 0.25 < (samples.y_val != y_val).double().mean() < 0.47
    assert torch.equal(samples.y_test, clean.y_test)


def images(x: torch.Tensor) -> set[tuple[float, ...]]:
    return set(map(tuple, x.tolist()))


def test_patterns_are_made_as_the_docstring_has_it(noise, setting):
    samples, clean = noise.patterns(setting, 0), noise._loaded(setting, 0.0, 0)
    x, y, x_val, _ = clean.held_out()
    for made, labels, pool in (
        (samples.x, samples.y, (x, y)),
        (samples.x_test, samples.y_test, (clean.x_test, clean.y_test)),
    ):
        classes = dict(zip(map(tuple, pool[0].tolist()), pool[1].tolist(), strict=True))
        for i, (row, label) in enumerate(zip(made.tolist(), labels.tolist(), strict=True)):
            left, right = tuple(row[:64]), tuple(row[64:])
            if i % 2:
                assert label == (classes[left] + classes[right]) % 10
            else:
                assert label == classes[left]
                assert len(set(right)) == 1
    assert images(samples.x_val[:, :64]) <= images(x_val)
    assert torch.equal(samples.marked, torch.arange(len(samples.marked)) % 2 == 1)


def test_either_image_alone_tells_next_to_nothing_of_a_complex_class(noise, setting):
    samples, clean = noise.patterns(setting, 0), noise._loaded(setting, 0.0, 0)
    x, y, *_ = clean.held_out()
    classes = dict(zip(map(tuple, x.tolist()), y.tolist(), strict=True))
    found = torch.zeros(10, 10)
    for row, label in zip(samples.x[1::2, :64].tolist(), samples.y[1::2].tolist(), strict=True):
        found[classes[tuple(row)], label] += 1
    assert (found.amax(1) / found.sum(1)).max() < 0.2


def test_seeds_make_other_sets(noise, setting):
    assert not torch.equal(noise.patterns(setting, 0).x, noise.patterns(setting, 1).x)
    assert not torch.equal(noise.random_labels(setting, 0).y, noise.random_labels(setting, 1).y)


@pytest.mark.parametrize("part", ["random labels", "patterns"])
def test_policies_are_the_same_until_the_rate_falls(noise, setting, part):
    job = {"part": part, "lr": 0.03, "weight decay": 0.0, "seed": 2}
    with _training.one_thread():
        fixed, decayed = (
            noise.claim.run(setting, {**job, "policy": name}).figures for name in ("fixed", "decayed")
        )
    assert fixed["updates"] == decayed["updates"]
    differ = [a != b for a, b in zip(fixed["validation"], decayed["validation"], strict=True)]
    assert not any(differ[: noise.HALF + 1])
    assert any(differ[noise.HALF + 1 :])


# -- what is made of it ------------------------------------------------------------------------------


def summary(
    noise: ModuleType, setting: Any, curves: Callable[[dict[str, Any]], dict[str, tuple[float, float]]]
) -> Any:
    """Of made-up runs: of each curve its value until the rate falls and afterwards, which differs a little
    from seed to seed."""
    runner = importlib.import_module("benchmarks.claims.runner")
    before = noise.HALF + 1
    runs = []
    for job in noise.claim.jobs(setting):
        made = {}
        for name, (first, last) in curves(job).items():
            made[name] = [first] * before + [last + 0.001 * job["seed"]] * (noise.POINTS - before)
        runs.append(runner.Run(job, {"updates": list(range(1, noise.POINTS + 1)), **made}, {}))
    return noise.claim.summarise(setting, runs)


def as_the_paper_says(job: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Decayed from 0.1 with the usual weight decay is best."""
    decayed, large = job["policy"] == "decayed", job["lr"] == 0.1
    good = large and job["weight decay"] == 5e-4
    test = 0.9 if decayed and good else 0.8
    return {
        "validation": (0.5, test),
        "test": (0.5, test),
        "fitted": (0.05, 0.2 if decayed else 0.1 if large else 0.9),
        "simple": (0.9, 0.92 if decayed else 0.9),
        "complex": (0.5, 0.9 if decayed else 0.6),
    }


def test_as_the_paper_says_it_holds(noise, setting):
    found = summary(noise, setting, as_the_paper_says)
    assert found.verdict == "holds"
    assert "0.1 throughout against 0.01: below" in found.statements[0].text
    assert found.tables[0].rows[1][1:3] == ["0.1", "0.0005"]
    assert [row[0] for row in found.tables[1].rows[1:]] == ["0.0005", "0.003", "0.01", "0.03"]
    assert [cell[:4] for cell in found.tables[1].rows[3][1:]] == ["20.2", "10.2", "90.2"]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, tuple[float, float]]], list[int]]] = {
    "large fits it": (lambda job: {"fitted": (0.1, 0.95)} if job["policy"] == "fixed" else {}, [0]),
    "decayed fits it": (lambda job: {"fitted": (0.1, 0.95)} if job["policy"] == "decayed" else {}, [1]),
    "stopping early is better": (
        lambda job: {"validation": (0.85, 0.1), "test": (0.95, 0.1)} if job["policy"] == "fixed" else {},
        [3],
    ),
    "a fixed rate is better": (
        lambda job: (
            {"validation": (0.1, 0.85), "test": (0.1, 0.95)}
            if job["policy"] == "fixed" and job["weight decay"] == 0.03
            else {}
        ),
        [3, 4],
    ),
    "chosen with its weight decay it is better": (
        lambda job: (
            {"validation": (0.1, 0.95), "test": (0.1, 0.9)}
            if job["policy"] == "decayed" and job["weight decay"] == 0.03
            else {"validation": (0.1, 0.94), "test": (0.1, 0.9)}
            if job["policy"] == "fixed" and job["weight decay"] == 0.01
            else {}
        ),
        [],
    ),
    "simple ones gain as well": (
        lambda job: {"simple": (0.5, 0.5)} if job["policy"] == "fixed" else {},
        [5],
    ),
    "keeping the rate is better": (
        lambda job: {"complex": (0.5, 0.95)} if job["policy"] == "fixed" and job["lr"] == 0.1 else {},
        [5],
    ),
    "the small rate is better": (
        lambda job: {"complex": (0.5, 0.95)} if job["policy"] == "fixed" and job["lr"] == 0.01 else {},
        [6],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_statement_is_told_by_its_figures(noise, setting, change):
    changed, wrong = CHANGES[change]
    found = summary(noise, setting, lambda job: {**as_the_paper_says(job), **changed(job)})
    assert [i for i, statement in enumerate(found.statements) if not statement.holds] == wrong


def test_ties_are_neither_less_nor_above(noise, setting):
    names = ("validation", "test", "fitted", "simple", "complex")
    found = summary(noise, setting, lambda job: dict.fromkeys(names, (0.5, 0.5)))
    assert [statement.holds for statement in found.statements] == [i in (3, 4) for i in range(7)]
    assert sum("a tie" in statement.text for statement in found.statements) == 7


def test_stopping_early_takes_each_run_at_its_own_best(noise, setting):
    runner = importlib.import_module("benchmarks.claims.runner")

    def run_of(lr, seed, validation, test):
        job = {"part": noise.LABELS, "policy": "fixed", "lr": lr, "seed": seed}
        return runner.Run(job, {"validation": validation, "test": test}, {})

    runs = [
        run_of(0.1, 0, [0.3, 0.8, 0.1], [0.1, 0.2, 0.9]),
        run_of(0.1, 1, [0.9, 0.8, 0.1], [0.4, 0.2, 0.9]),
        run_of(0.2, 0, [0.7, 0.7, 0.7], [0.9, 0.9, 0.9]),
        run_of(0.2, 1, [0.7, 0.7, 0.7], [0.9, 0.9, 0.9]),
    ]
    group, points = noise._stopped(runs)
    assert [run.job["lr"] for run in group] == [0.1, 0.1]
    assert points == [1, 0]
    assert noise._at(group, points) == [0.2, 0.4]
