"""Rates multiplied from now on: by scale_lr(), and by a group's lr_scale."""

from __future__ import annotations

import copy
import importlib
import io
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams
from helpers import assert_same, set_gradients, train, twins

import fastlr

ROOT = Path(__file__).parent.parent
COSINE = fastlr.Cosine(0.5, 0.0, 40)
with_backends = pytest.mark.usefixtures("backend")


def weight() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.full((5,), 0.5)
    return p


def rates(opt: torch.optim.Optimizer) -> list[Any]:
    return [group["lr"] for group in opt.param_groups]


# -- scale_lr --------------------------------------------------------------------------------------


@with_backends
@pytest.mark.parametrize("unit", ["update", "epoch"])
def test_a_schedule_goes_on_where_it_is(unit: Any) -> None:
    ours, theirs = twins([(9,), (4,)])
    lr = fastlr.Exponential(0.5, 0.75, unit=unit)
    opt = fastlr.FusedAdamW([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.125}], lr=0.25)
    numbers = fastlr.FusedAdamW([{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.125}], lr=0.25)
    train(2, (ours, opt.step), (theirs, numbers.step))
    opt.set_schedule(lr, group=0)  # from here on
    factors = [1.0, 1.0]
    for step in range(9):
        factor, group = {2: (0.5, None), 4: (0.25, 0), 5: (3.0, 1), 7: (0.5, None)}.get(step, (1.0, None))
        opt.scale_lr(factor, group)
        for place in range(2) if group is None else (group,):
            factors[place] *= factor
        numbers.set_schedule(lr=lr(step) * factors[0], group=0)
        numbers.set_schedule(lr=0.125 * factors[1], group=1)
        assert rates(opt) == rates(numbers)
        train(1, (ours, opt.step), (theirs, numbers.step), start=2 + step)
        if unit == "epoch":
            opt.advance_epoch()
        if step == 5:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            opt = fastlr.FusedAdamW([{"params": [p]} for p in ours], lr=1.0)
            opt.load_state_dict(torch.load(file, weights_only=True))
    assert_same(theirs, ours)
    assert opt.param_groups[0]["lr_schedule"] == lr * factors[0]  # one factor, of all calls
    assert opt.param_groups[0]["lr_schedule"].schedule == lr


def test_cyclic_optimizers_are_scaled() -> None:
    opt = fastlr.FusedCyclicSGD([weight()], 0.1, 0.5, 4, mode="triangular2", momentum=0.5)
    opt.step()
    before = opt.param_groups[0]["lr_schedule"]
    opt.scale_lr(0.5)
    assert rates(opt) == [0.5 * before(1)]
    copied = copy.deepcopy(opt)
    opt.step()
    copied.step()
    assert rates(opt) == rates(copied) == [0.5 * before(2)]


def test_what_it_refuses() -> None:
    opt = fastlr.FusedSGD([weight()], lr=COSINE)
    for factor in (-0.5, float("nan"), float("inf"), "0.5", None, True):
        with pytest.raises(ValueError, match=r"^factor must be a finite number >= 0, got "):
            opt.scale_lr(factor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^group must be in 0 .. 0, got 1"):
        opt.scale_lr(0.5, 1)
    with opt.handed_over(), pytest.raises(RuntimeError, match=r"scale_lr\(\) was called while the options"):
        opt.scale_lr(0.5)
    opt.param_groups[0]["lr"] = 0.125
    with pytest.raises(RuntimeError, match="a schedule owns it"):
        opt.scale_lr(0.5)
    for value in ("fast", [0.5]):
        opt = fastlr.FusedSGD([weight()], lr=0.5)
        opt.param_groups[0]["lr"] = value
        with pytest.raises((TypeError, ValueError), match=r"^lr of parameter group 0 must be a number, got "):
            opt.scale_lr(0.5)
    opt = fastlr.FusedSGD([weight()], lr=0.5)
    opt.param_groups[0]["lr"] = torch.tensor(0.25)
    opt.scale_lr(0.5)
    assert rates(opt) == [0.125]
    opt.set_schedule(lr=1e308)
    with pytest.raises(ValueError, match="lr of parameter group 0 must be finite"):
        opt.scale_lr(10.0)
    assert rates(opt) == [1e308]


def test_that_a_schedule_has_ended_is_said_once() -> None:
    opt = fastlr.FusedSGD([weight()], lr=fastlr.Tabulated([0.5, 0.25]))
    opt.step()
    opt.step()
    with pytest.warns(UserWarning, match="Tabulated ended at update 1"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.scale_lr(0.5)
        opt.step()
    assert rates(opt) == [0.125]


def test_a_captured_graph_follows_it(on_emulated_cuda: ModuleType, streams: Streams) -> None:
    ours, theirs = twins([(9,), (4,)])
    opt = fastlr.FusedSGD([{"params": ours[:1]}, {"params": ours[1:], "lr": 0.125}], lr=COSINE)
    numbers = fastlr.FusedSGD([{"params": [p]} for p in theirs], lr=0.125)
    numbers.set_schedule(lr=COSINE(0), group=0)
    train(1, (ours, opt.step), (theirs, numbers.step))
    set_gradients(1, ours, theirs)
    graph = Graph(on_emulated_cuda, opt.step)
    for step in range(1, 8):
        factor = 0.25 if step >= 4 else 1.0
        if step == 4:
            opt.scale_lr(0.25)
        numbers.set_schedule(lr=factor * COSINE(step), group=0)
        numbers.set_schedule(lr=factor * 0.125, group=1)
        graph.replay()
        numbers.step()
    opt.sync()
    assert_same(theirs, ours)
    assert rates(opt) == [0.25 * COSINE(8), 0.25 * 0.125]


# -- the example -----------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("reduce_on_plateau")


@pytest.mark.parametrize("seed", range(8))
def test_plateau_is_torchs(example: Any, seed: int) -> None:
    """On losses that fall, stay, rise and break, down to where torch's ``eps`` ends it."""
    generator = np.random.default_rng(seed)
    falling = 0.1 + 3.0 * np.exp(-np.arange(60) / 9.0) + 0.02 * generator.standard_normal(60)
    losses = np.concatenate(
        [falling, np.full(150, falling.min()), falling.min() * (1 - 1e-4 * np.arange(20))]
    )
    losses[generator.integers(0, len(losses), 3)] = (np.nan, np.inf, 1.0)
    starts = [0.1, 3e-3]
    groups = [torch.nn.Parameter(torch.zeros(1)) for _ in starts]
    sgd = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(groups, starts, strict=True)])
    opt = fastlr.FusedSGD([{"params": [p], "lr": lr} for p, lr in zip(groups, starts, strict=True)])
    driven = fastlr.FusedSGD(
        [{"params": [p], "lr": fastlr.Constant(lr)} for p, lr in zip(groups, starts, strict=True)]
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)
    ours, beside = example.Plateau(), example.Plateau()
    for loss in losses:
        scheduler.step(float(loss))
        ours.step(opt, float(loss))
        beside.step(driven, float(loss))
        assert rates(opt) == rates(sgd)
        np.testing.assert_allclose(rates(driven), rates(sgd), rtol=1e-14)
    assert rates(sgd)[0] < 1e-4  # it was reduced several times


def test_the_example_runs(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    shown = re.findall(r"lr ([\d.]+)", capsys.readouterr().out)
    assert float(shown[-1]) < float(shown[0])
    assert len((ROOT / "examples" / "reduce_on_plateau.py").read_text().splitlines()) < 60


# -- lr_scale --------------------------------------------------------------------------------------


def layers(**last: Any) -> list[dict[str, Any]]:
    """Groups as recipes with a decay by layer make them."""
    return [
        {"params": [weight()], "lr_scale": 0.25},
        {"params": [weight()], "lr_scale": 1.0},
        {"params": [weight()]},
        {"params": [weight()], "lr_scale": 0.5, **last},
    ]


def test_the_schedule_of_all_groups_is_scaled() -> None:
    own = fastlr.Constant(0.75)
    opt = fastlr.FusedAdamW(layers(lr=own), lr=COSINE)
    schedules = [group["lr_schedule"] for group in opt.param_groups]
    assert schedules == [COSINE * 0.25, COSINE, COSINE, own]  # one of its own is what it says
    opt.step()
    assert rates(opt) == [0.25 * COSINE(1), COSINE(1), COSINE(1), 0.75]

    again = fastlr.FusedAdamW(layers(), lr=0.1)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))  # counted once
    moved = fastlr.FusedAdamW(opt.param_groups)  # as another optimizer's groups
    for other in (again, copy.deepcopy(opt), moved):
        assert [group["lr_schedule"] for group in other.param_groups] == schedules
    opt.add_param_group({"params": [weight()], "lr_scale": 0.125})
    assert opt.param_groups[4]["lr_schedule"] == COSINE * 0.125

    new = fastlr.LinearRamp(1.0, 0.0, 100)
    opt.set_schedule(new, start="zero")
    assert rates(opt) == [factor * new(1) for factor in (0.25, 1.0, 1.0, 0.5, 0.125)]
    opt.set_schedule(new, group=0)  # for it alone
    assert opt.param_groups[0]["lr_schedule"] == new
    opt.set_schedule(0.5)  # numbers, as timm, BEiT and MAE have them, are scaled by who writes them
    assert rates(opt) == [0.5] * 5
    assert [group.get("lr_scale") for group in opt.param_groups] == [0.25, 1.0, None, 0.5, 0.125]


def test_numbers_are_what_a_group_says() -> None:
    opt = fastlr.FusedAdamW(layers(lr=0.5), lr=0.1)
    assert rates(opt) == [0.1, 0.1, 0.1, 0.5]


def test_cycles_are_scaled_unless_a_group_has_bounds_of_its_own() -> None:
    opt = fastlr.FusedCyclicSGD(layers(base_lr=0.25, max_lr=0.5), 0.1, 0.3, 4)
    cycle = fastlr.Triangular(0.1, 0.3, 4)
    schedules = [group["lr_schedule"] for group in opt.param_groups]
    assert schedules == [cycle * 0.25, cycle, cycle, fastlr.Triangular(0.25, 0.5, 4)]
    bounds = [0.1, 0.2, 0.3, 0.4]
    opt = fastlr.FusedCyclicSGD(layers(), bounds, [0.5] * 4, 4)
    assert rates(opt) == bounds


@pytest.mark.parametrize("scale", [-1.0, float("nan"), "0.5", None, [0.5]])
def test_a_scale_out_of_range_is_refused(scale: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^lr_scale of parameter group 0 must be a finite number >= 0, got "
    ):
        fastlr.FusedSGD([{"params": [weight()], "lr_scale": scale}], lr=COSINE)
    opt = fastlr.FusedSGD([{"params": [weight()], "lr_scale": scale}], lr=0.1)  # which nobody scales
    with pytest.raises(ValueError, match=r"^lr_scale of parameter group 0 must be"):
        opt.set_schedule(COSINE)
    assert rates(opt) == [0.1]


def test_a_loop_that_writes_scaled_rates_itself_counts_once() -> None:
    """As MAE's and BEiT's do, with our schedules."""
    opt = fastlr.FusedAdamW(layers(), lr=0.1)
    for group in opt.param_groups:
        group["lr"] = COSINE * group.get("lr_scale", 1.0)
    opt.step()
    assert rates(opt) == [0.25 * COSINE(1), COSINE(1), COSINE(1), 0.5 * COSINE(1)]
