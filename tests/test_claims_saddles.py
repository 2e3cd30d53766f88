"""The function of the claim about saddle plateaus, its runs, and what is made of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def saddles(load_claims: Callable[[str], ModuleType]) -> ModuleType:
    return load_claims("saddles")


@pytest.fixture(scope="module")
def setting(saddles: ModuleType):
    runner = importlib.import_module("benchmarks.claims.runner")
    return runner.Setting(None, seeds=2, scale=0.1, quick=True)


def point(place: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(place, dtype=torch.float64)


def hessian(saddles: ModuleType, at: torch.Tensor) -> torch.Tensor:
    # Not torch.func.hessian: its forward mode comes through torch.jit, which warns of its end.
    return torch.func.jacrev(torch.func.jacrev(saddles.value))(at)


def curvatures(saddles: ModuleType, place: tuple[float, float]) -> list[float]:
    """The Hessian's eigenvalues, lowest first."""
    return torch.linalg.eigvalsh(hessian(saddles, point(place))).tolist()


# -- the function ----------------------------------------------------------------------------------------


def test_gradient_is_that_of_the_value(saddles):
    points = saddles.starts(3, 50)
    slopes = torch.func.vmap(torch.func.grad(saddles.value))(points)
    torch.testing.assert_close(saddles.gradient(points), slopes, rtol=1e-12, atol=1e-14)


def test_hessian_is_as_the_docstring_has_it(saddles):
    for at in saddles.starts(4, 20):
        d, s = saddles.denominator(at), at.sin()
        formula = 4 * torch.diag(at.cos()) / d**2 - 32 * torch.outer(s, s) / d**3
        torch.testing.assert_close(hessian(saddles, at), formula, rtol=1e-12, atol=1e-14)


def test_both_saddle_points_are_ones(saddles):
    for saddle in saddles.SADDLES:
        assert saddles.gradient(point(saddle)).abs().max() < 1e-16
        assert saddles.value(point(saddle)).item() == pytest.approx(8 / 9)
        assert curvatures(saddles, saddle) == pytest.approx([-4 / 81, 4 / 81])


def test_minimum_and_maximum_are_ones(saddles):
    for place, height in ((saddles.MINIMUM, 0.0), (saddles.MAXIMUM, 16 / 17)):
        assert saddles.gradient(point(place)).abs().max() < 1e-16
        assert saddles.value(point(place)).item() == pytest.approx(height)
    assert curvatures(saddles, saddles.MINIMUM) == pytest.approx([4, 4])
    assert curvatures(saddles, saddles.MAXIMUM) == pytest.approx([-4 / 289, -4 / 289])
    assert pytest.approx(2 / 4) == saddles.LIMIT


def test_nothing_else_is_at_rest(saddles):
    """On a grid that misses the four places, the gradient vanishes nowhere but toward them."""
    axis = torch.linspace(saddles.EDGE, saddles.EDGE + 2 * math.pi, 202, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    places = (saddles.MINIMUM, saddles.MAXIMUM, *saddles.SADDLES)
    far = torch.stack([saddles.distance(points, place) for place in places]).amin(0) > 0.5
    assert saddles.gradient(points)[far].norm(dim=-1).min() > 0.005


def test_plateaus_are_large_and_flat(saddles):
    axis = torch.linspace(saddles.EDGE, saddles.EDGE + 2 * math.pi, 301, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    steepness = saddles.gradient(points).norm(dim=-1)
    for saddle in saddles.SADDLES:
        around = saddles.distance(points, saddle) <= 1
        assert around.double().mean() > 0.07  # of all there is, each
        assert steepness[around].max() < steepness.max() / 13


# -- its runs --------------------------------------------------------------------------------------------


def test_starts_lie_in_the_period_and_differ_by_seed(saddles):
    drawn = saddles.starts(0, 1000)
    assert drawn.min() >= saddles.EDGE
    assert drawn.max() < saddles.EDGE + 2 * math.pi
    assert torch.equal(drawn, saddles.starts(0, 1000))
    assert not torch.equal(drawn, saddles.starts(1, 1000))


def test_distance_is_to_the_nearest_repetition(saddles):
    places = [[0.5, 0.0], [2 * math.pi, -2 * math.pi], [2 * math.pi - 3, 4.0]]
    points = torch.tensor(places, dtype=torch.float64)
    expected = [0.5, 0.0, math.hypot(3, 2 * math.pi - 4)]
    assert saddles.distance(points, (0.0, 0.0)).tolist() == pytest.approx(expected, abs=1e-12)


def test_descent_is_gradient_descent(saddles):
    job = {"policy": "triangular", "lr": 2.0, "step_size_up": 5}
    expected = saddles.starts(5, 40).numpy()
    seen, used = [], []
    for points, lr in saddles.descent(job, torch.from_numpy(expected.copy()), 12):
        seen.append(points.numpy().copy())
        used.append(lr)
    assert used[:12] == pytest.approx([*np.linspace(0.1, 2, 6), *np.linspace(2, 0.1, 6)[1:], 0.48])
    for lr, found in zip(used, seen, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
        d = 9 - 4 * np.cos(expected).sum(1, keepdims=True)
        expected = expected - lr * 4 * np.sin(expected) / d**2


def test_momentum_keeps_its_velocity(saddles):
    begin = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    states = [points.clone() for points, _ in saddles.descent({"policy": "momentum", "lr": 0.1}, begin, 2)]
    slopes = [saddles.gradient(points) for points in states]
    torch.testing.assert_close(states[2], states[1] - 0.1 * (0.9 * slopes[0] + slopes[1]))


def test_run_counts_the_updates(saddles, setting):
    figures = saddles.claim.run(setting, {"policy": "fixed", "lr": 0.25, "seed": 0}).figures
    points = saddles.starts(0, saddles.QUICK_STARTS).numpy()
    reached = np.full(len(points), np.inf)
    for n in range(setting.updates(saddles.UPDATES) + 1):
        d = 9 - 4 * np.cos(points).sum(1, keepdims=True)
        reached[(1 - 1 / d[:, 0] < saddles.REACHED) & np.isinf(reached)] = n
        points = points - 0.25 * 4 * np.sin(points) / d**2
    assert figures["starts"] == len(points)
    assert figures["median"] == np.sort(reached)[len(points) // 2]
    shares = [round(float(np.mean(reached <= n)), 4) for n in figures["updates"]]
    assert figures["reached"] == shares
    assert figures["at the end"] == shares[-1]
    assert figures["mean"] == pytest.approx(np.minimum(reached, setting.updates(saddles.UPDATES)).mean())


def test_runs_that_never_arrive_are_the_slowest(saddles, setting):
    figures = saddles.claim.run(setting, {"policy": "fixed", "lr": 1.0, "seed": 0}).figures
    assert figures["median"] is None
    assert figures["median to leave"] < 30
    assert figures["mean"] > 0.9 * setting.updates(saddles.UPDATES)


# -- what is made of them --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(saddles, setting):
    runner = importlib.import_module("benchmarks.claims.runner")
    jobs = saddles.claim.jobs(setting)
    return [runner.Run(job, *saddles.claim.run(setting, job)) for job in jobs]


def with_means(saddles, runs, means: dict[str, tuple[float, float]]):
    """The runs, where those that the rule speaks of have these means to leave and to reach instead."""
    changed = []
    for run in runs:
        name = next((n for n, job in saddles.SHOWN.items() if job.items() <= run.job.items()), "others")
        leave, reach = (n + 0.1 * run.job["seed"] for n in means.get(name, means["others"]))
        changed.append(run._replace(figures={**run.figures, "mean to leave": leave, "mean": reach}))
    return changed


@pytest.mark.parametrize(
    ("triangular", "others", "verdict"),
    [
        ((5, 20), (9, 90), "holds"),
        ((5, 95), (9, 90), "holds partly"),
        ((9, 90), (9, 90), "does not hold here"),
    ],
)
def test_verdict_follows_the_rule(saddles, setting, runs, triangular, others, verdict):
    changed = with_means(saddles, runs, {"triangular": triangular, "others": others})
    assert saddles.claim.summarise(setting, changed).verdict == verdict


def test_summary_names_every_policy_once(saddles, setting, runs):
    summary = saddles.claim.summarise(setting, runs)
    rows = summary.tables[0].rows
    assert len({row[0] for row in rows[1:]}) == len(rows) - 1 == len(saddles.POLICIES)
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(summary.statements) == 4


def test_pictures_are_drawn(saddles, runs, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pictures = importlib.import_module("benchmarks.claims.saddle_pictures")
    pictures.draw_surface(runs, tmp_path / "saddles.png")
    pictures.animate(tmp_path / "saddles.gif", count=20, updates=8, every=4)
    with image.open(tmp_path / "saddles.gif") as animation:
        assert animation.n_frames == 3
    assert (tmp_path / "saddles.png").stat().st_size > 20_000
