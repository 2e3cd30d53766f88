"""The schedules of today's recipes, beside the libraries that they come from and their papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision_without_cuda  # noqa: F401  # which transformers imports
from numpy.typing import NDArray

import fastlr

UPDATES = 100_000
PEAK = 0.37


def of_transformers(name: str, *args: Any, **options: Any) -> NDArray[np.float64]:
    """What each of so many updates uses with transformers' LambdaLR."""
    optimization = pytest.importorskip("transformers.optimization", reason="compared with transformers")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = getattr(optimization, name)(optimizer, *args, **options)
    factor = scheduler.lr_lambdas[0]
    return np.array([PEAK * factor(t) for t in range(UPDATES)])


def assert_same_values(schedule: fastlr.Schedule, expected: NDArray[np.float64], last: int = UPDATES) -> None:
    """To 1e-14 of the peak: where the other library's order of operations rounds otherwise."""
    found = schedule.values(0, UPDATES)
    np.testing.assert_allclose(found[:last], expected[:last], rtol=0.0, atol=1e-14 * PEAK)


@pytest.mark.parametrize("warmup", [0, 1, 977])
def test_cosine_with_warmup(warmup: int) -> None:
    total = UPDATES - 500
    schedule = fastlr.cosine_with_warmup(PEAK, warmup, total, cooldown_steps=500)
    expected = of_transformers("get_cosine_schedule_with_warmup", warmup, total)
    assert_same_values(schedule, expected, last=total)  # where transformers' turns up again
    assert (schedule.values(total, UPDATES) == 0.0).all()


def test_cosine_with_a_least_rate() -> None:
    total = UPDATES - 1
    expected = of_transformers("get_cosine_with_min_lr_schedule_with_warmup", 500, total, min_lr_rate=0.1)
    assert_same_values(fastlr.cosine_with_warmup(PEAK, 500, total, end_lr=0.1 * PEAK), expected)


@pytest.mark.parametrize("decay", ["1-sqrt", "linear", "cosine"])
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_warmup_stable_decay(decay: Any, least: float) -> None:
    schedule = fastlr.warmup_stable_decay(
        PEAK, 1000, 79_000, 20_000, decay=decay, start_lr=least * PEAK, end_lr=least * PEAK
    )
    expected = of_transformers(
        "get_wsd_schedule", 1000, 20_000, num_stable_steps=79_000, decay_type=decay, min_lr_ratio=least
    )
    assert_same_values(schedule, expected)
    assert schedule(100_000) == pytest.approx(least * PEAK, abs=1e-16)


@pytest.mark.parametrize(("warmup", "timescale"), [(0, None), (1, 7), (4000, None), (4000, 10_000)])
def test_inverse_sqrt(warmup: int, timescale: int | None) -> None:
    expected = of_transformers("get_inverse_sqrt_schedule", warmup, timescale)
    assert_same_values(fastlr.inverse_sqrt(PEAK, warmup, timescale), expected)


def by_formula(value: Callable[[int], float]) -> NDArray[np.float64]:
    return np.array([value(t) for t in range(UPDATES)])


@pytest.mark.parametrize("start", [0.0, 1e-7])
def test_fairseqs_inverse_sqrt(start: float) -> None:
    warmup = 4000

    def lr(n: int) -> float:
        return start + n * (PEAK - start) / warmup if n < warmup else PEAK * warmup**0.5 * n**-0.5

    assert_same_values(fastlr.inverse_sqrt(PEAK, warmup, start_lr=start), by_formula(lr))


@pytest.mark.parametrize("warmup", [1, 2, 4000])
def test_noam(warmup: int) -> None:
    expected = by_formula(lambda t: 512**-0.5 * min((t + 1) ** -0.5, (t + 1) * warmup**-1.5))
    np.testing.assert_allclose(
        fastlr.noam(512, warmup).values(0, UPDATES), expected, rtol=0.0, atol=1e-14 * expected.max()
    )
    assert fastlr.noam(512, warmup, factor=2.0)(99) == 2.0 * fastlr.noam(512, warmup)(99)


@pytest.mark.parametrize(("warmup", "hold", "decay"), [(8000, 32_000, 40_000), (0, 0, 500), (10, 0, 1)])
def test_tri_stage(warmup: int, hold: int, decay: int) -> None:
    rate = -math.log(0.05) / decay

    def lr(n: int) -> float:
        if n < warmup:
            return 0.01 * PEAK + (PEAK - 0.01 * PEAK) * n / warmup
        if n < warmup + hold:
            return PEAK
        if n < warmup + hold + decay:
            return PEAK * math.exp(-rate * (n - warmup - hold))
        return PEAK * 0.05

    schedule = fastlr.tri_stage(PEAK, warmup, hold, decay, final_lr_scale=0.05)
    np.testing.assert_allclose(schedule.values(0, UPDATES), by_formula(lr), rtol=0.0, atol=1e-12 * PEAK)


def test_with_warmup_keeps_the_schedules_zero_and_unit() -> None:
    after = fastlr.StepDecay(1.0, every=10, gamma=0.5, unit="token")
    schedule = fastlr.with_warmup(after, 100, start_lr=0.5)
    assert schedule.unit == "token"
    assert schedule.values(0, 200)[[0, 50, 100, 109, 110]].tolist() == [0.5, 0.75, 1.0, 1.0, 0.5]
    assert fastlr.with_warmup(after, 0) is after


RECIPES: dict[Callable[..., fastlr.Schedule], dict[str, Any]] = {
    fastlr.cosine_with_warmup: {"max_lr": 0.1, "warmup_steps": 10, "total_steps": 100},
    fastlr.warmup_stable_decay: {"max_lr": 0.1, "warmup_steps": 10, "stable_steps": 50, "decay_steps": 20},
    fastlr.inverse_sqrt: {"max_lr": 0.1, "warmup_steps": 10},
    fastlr.noam: {"model_size": 64, "warmup_steps": 10},
    fastlr.tri_stage: {"max_lr": 0.1, "warmup_steps": 10, "hold_steps": 10, "decay_steps": 10},
}
each_recipe = pytest.mark.parametrize(
    ("recipe", "arguments"), RECIPES.items(), ids=[recipe.__name__ for recipe in RECIPES]
)


@each_recipe
def test_a_recipe_drives_a_step_and_goes_through_a_file(recipe: Any, arguments: dict[str, Any]) -> None:
    schedule = recipe(**arguments)
    assert fastlr.Schedule.from_dict(schedule.to_dict()) == schedule
    assert recipe(**arguments, unit="sample").unit == "sample"
    p = torch.zeros(1, requires_grad=True)
    opt = fastlr.FusedSGD([p], lr=schedule)
    for t in range(30):
        assert opt.param_groups[0]["lr"] == schedule(t)
        opt.step()


@each_recipe
def test_bad_arguments_are_named(recipe: Any, arguments: dict[str, Any]) -> None:
    for name in arguments:
        for bad in (-1, math.nan, "many", None):
            with pytest.raises((ValueError, TypeError)):
                recipe(**{**arguments, name: bad})
    for name in set(arguments) - {"max_lr"}:
        with pytest.raises(ValueError, match=rf"^{name} must be .*got -1"):
            recipe(**{**arguments, name: -1})


def test_what_recipes_refuse() -> None:
    with pytest.raises(ValueError, match="total_steps must be > warmup_steps, which is 10, got 10"):
        fastlr.cosine_with_warmup(0.1, 10, 10)
    with pytest.raises(ValueError, match=r"decay must be one of linear, cosine, 1-sqrt, got 'fast'"):
        fastlr.warmup_stable_decay(0.1, 10, 50, 20, decay="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="final_lr_scale must be"):
        fastlr.tri_stage(0.1, 1, 1, 1, final_lr_scale=0.0)
    with pytest.raises(TypeError, match="after must be a schedule, got"):
        fastlr.with_warmup(0.1, 10)  # type: ignore[arg-type]
