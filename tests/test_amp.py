"""GradScaler: unscaling in the step, and steps that are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, parameters, set_gradients, train, twins
from rule_table import Rule, assert_same_run, close_on_devices, drive, with_rules

import fastlr

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2}


def scaler(scale: float = 1024.0, device: str | None = None) -> torch.amp.GradScaler:
    device = device or torch.get_default_device().type
    made = torch.amp.GradScaler(device, init_scale=scale, growth_interval=3)
    made.scale(torch.zeros((), device=device))  # sets it up; the tests scale gradients, not a loss
    return made


def set_scaled_gradients(step: int, scale: float, *models: list[torch.nn.Parameter]) -> None:
    set_gradients(step, *models)
    for model in models:
        for p in model:
            p.grad.mul_(scale)


@with_rules
@pytest.mark.parametrize("explicit_unscale", [False, True], ids=["scaled", "unscaled-before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1024.0, 1000.0 / 3.0])
def test_trajectory_equals_unscale_then_torch(
    rule: Rule, dtype: torch.dtype, explicit_unscale: bool, scale: float, backend: str
) -> None:
    """Skipped steps, the first one too, age no state; one parameter is of another age than the rest."""
    skips = (0, 2, 5)
    ours, theirs = twins([(9,), (513,), (7,)], dtype)
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    scalers = scaler(scale), scaler(scale, "cpu")
    for step in range(9):
        set_scaled_gradients(step, scalers[0].get_scale(), ours, theirs)
        for model in (ours, theirs):
            if step in skips:
                model[0].grad[3] = float("inf")
            if step in (0, 1, 2, 3, 6):
                model[2].grad = None
        if explicit_unscale:
            scalers[0].unscale_(fused)
        kept = [p.grad.clone() for p in ours[:2]]
        scalers[0].step(fused)
        scalers[1].step(reference)
        assert_same(kept, [p.grad for p in ours[:2]])
        for s in scalers:
            s.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert fused.last_step_skipped == (step in skips)
        assert_same(theirs, ours, close_on_devices(rule, backend))
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))
    assert fused.clock().updates == 9 - len(skips)
    if rule.counts:
        assert [int(fused.state[p]["step"]) for p in ours] == [6, 6, 3]
    assert not hasattr(fused, "grad_scale")
    assert not hasattr(fused, "found_inf")


@with_rules
@pytest.mark.parametrize("scheduled", [False, True], ids=["fixed", "scheduled"])
def test_a_skipped_step_moves_no_schedule(rule: Rule, scheduled: bool, backend: str) -> None:
    ours, theirs = twins([(9,), (5,)])
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    drives = rule.drives if scheduled else {}
    fused.set_schedule(**drives)
    found, applied = torch.zeros(()), 0
    for step in range(10):
        set_gradients(step, ours, theirs)
        if step < 4:  # a first step that is skipped, then a late gradient whose first one is
            ours[1].grad = theirs[1].grad = None
        found.fill_(float(step in (0, 1, 4, 7)))
        fused.found_inf = found
        fused.step()
        del fused.found_inf
        if not found:
            drive(reference.param_groups[0], drives, applied)
            reference.step()
            applied += 1
        assert_same(theirs, ours, close_on_devices(rule, backend))
    assert fused.sync().updates == applied == 6
    file = fused.state_dict()["state"]
    for key, entry in reference.state_dict()["state"].items():
        assert {name for name, value in entry.items() if value is not None} == set(file[key])
        assert_same(
            [value for value in entry.values() if value is not None],
            [file[key][name] for name, value in entry.items() if value is not None],
            close_on_devices(rule, backend),
        )


def test_a_skipped_step_stays_skipped_until_the_next() -> None:
    model = parameters([(5,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)
    set_gradients(0, model)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    optimizer.set_schedule(lr=fastlr.Cosine(0.1, 0.0, 10))
    optimizer.advance_samples(3)
    assert optimizer.last_step_skipped
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not optimizer.last_step_skipped


def test_a_skipped_step_moves_nothing(backend: str) -> None:
    model = parameters([(9,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.5), momentum=0.9)
    train(2, (model, optimizer.step))
    before = [model[0].detach().clone(), optimizer.state[model[0]]["momentum_buffer"].clone()]
    version = model[0]._version
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.found_inf
    assert optimizer.last_step_skipped
    assert_same(before, [model[0].detach(), optimizer.state[model[0]]["momentum_buffer"]])
    assert optimizer.clock() == (2, 0)
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert model[0]._version == version or backend != "cpu"  # only a device knows that nothing moved
    optimizer.step()
    assert not optimizer.last_step_skipped


FOUND = {
    "int-0": (0, False),
    "float-0": (0.0, False),
    "tensor-0": (torch.zeros(()), False),
    "tensor-1": (torch.ones(1), True),
    "two": (torch.tensor(2.0), True),
    "half": (torch.tensor(0.5, dtype=torch.float64), True),
    "nan": (torch.tensor(float("nan")), True),
}


@pytest.mark.parametrize(("found_inf", "skipped"), FOUND.values(), ids=FOUND.keys())
def test_found_inf_of_any_kind(found_inf: Any, skipped: bool) -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)
    set_gradients(0, model)
    optimizer.found_inf = found_inf
    optimizer.step()
    assert optimizer.last_step_skipped == skipped
    assert optimizer.clock().updates == (not skipped)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e-42])
def test_an_impossible_scale_is_an_error(scale: float) -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model)
    set_gradients(0, model)
    optimizer.grad_scale = torch.tensor(scale)
    before = model[0].detach().clone()

    def step() -> None:
        optimizer.step()
        optimizer.sync()  # when a device tells of it

    with pytest.raises(ValueError, match="grad_scale must be finite and > 0"):
        step()
    assert optimizer.sync().updates == 0
    assert_same([before], [model[0].detach()])


def test_clipping_after_unscale(backend: str) -> None:
    ours, theirs = twins([(9,), (5,)])
    fused = fastlr.FusedSGD(ours, lr=0.1, **OPTIONS)
    reference = torch.optim.SGD(theirs, lr=0.1, foreach=False, **OPTIONS)
    ours_scaler = scaler()
    for step in range(3):
        set_gradients(step, ours, theirs)
        for p in ours:
            p.grad.mul_(ours_scaler.get_scale())
        ours_scaler.unscale_(fused)
        for model in (ours, theirs):
            torch.nn.utils.clip_grad_norm_(model, 0.5)
        ours_scaler.step(fused)
        ours_scaler.update()
        reference.step()
    assert_same(theirs, ours, close=backend == "cuda")  # whose norm has other last bits


def test_a_step_that_raises_leaves_nothing_behind_for_the_next() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = fastlr.FusedSGD([p], lr=1.0)
    made = scaler()
    p.grad = torch.full((3,), 1024.0)
    optimizer.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match="weight_decay"):
        made.step(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    made.step(optimizer)
    assert_same([-torch.ones(3)], [p.data])
