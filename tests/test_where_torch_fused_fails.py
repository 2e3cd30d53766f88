"""What torch.optim.SGD(fused=True) gets wrong on the CPU in PyTorch 2.13, one test each."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, parameters, set_gradients, train, twins

import fastlr

MOMENTUM = {"lr": 0.1, "momentum": 0.9}


def reference(model: list[torch.nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(model, foreach=False, **MOMENTUM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_element_of_a_half_parameter_changes(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    p.grad = torch.ones(1000, dtype=dtype)
    fastlr.FusedSGD([p], lr=0.5).step()
    assert p.eq(0.5).all()


def test_overflow_on_the_first_scaled_step_leaves_no_garbage() -> None:
    ours, theirs = twins([(100,)])
    fused = fastlr.FusedSGD(ours, **MOMENTUM)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))  # sets it up
    set_gradients(0, ours)
    ours[0].grad[7] = float("inf")
    scaler.step(fused)
    scaler.update()
    assert not fused.state
    plain = reference(theirs)
    for step in range(1, 4):
        set_gradients(step, ours, theirs)
        ours[0].grad.mul_(scaler.get_scale())
        scaler.step(fused)
        scaler.update()
        plain.step()
    assert_same(theirs, ours)


def test_found_inf_of_two_devices_summed_is_skipped() -> None:
    model = parameters([(10,)])
    before = model[0].detach().clone()
    optimizer = fastlr.FusedSGD(model, **MOMENTUM)
    set_gradients(0, model)
    optimizer.found_inf = torch.tensor(2.0)
    optimizer.step()
    assert_same([before], [model[0].detach()])


def test_a_gradient_that_comes_late() -> None:
    ours, theirs = twins([(10,), (10,)])
    fused, plain = fastlr.FusedSGD(ours, **MOMENTUM), reference(theirs)
    for step in range(4):
        set_gradients(step, ours, theirs)
        if step < 2:
            ours[1].grad = theirs[1].grad = None
        fused.step()
        plain.step()
    assert_same(theirs, ours)


def test_strided_view_and_channels_last_with_a_contiguous_gradient() -> None:
    base = torch.linspace(-1, 1, 40)
    strided = torch.nn.Parameter(base[::2])
    images = torch.randn(2, 3, 4, 5)
    last = torch.nn.Parameter(images.clone().contiguous(memory_format=torch.channels_last))
    ours = [strided, last]
    theirs = [torch.nn.Parameter(strided.detach().clone()), torch.nn.Parameter(images.clone())]
    gaps = base[1::2].clone()
    fused, plain = fastlr.FusedSGD(ours, **MOMENTUM), reference(theirs)
    train(3, (theirs, plain.step), (ours, fused.step))
    assert all(p.grad.is_contiguous() for p in ours)
    assert_same(theirs, ours)
    assert_same([gaps], [base[1::2]])


def test_the_gradient_is_left_as_it_was_under_nesterov() -> None:
    model = parameters([(100,)])
    optimizer = fastlr.FusedSGD(model, nesterov=True, weight_decay=0.1, maximize=True, **MOMENTUM)
    for step in range(3):
        set_gradients(step, model)
        kept = model[0].grad.clone()
        optimizer.step()
        assert_same([kept], [model[0].grad])


def test_the_version_moves_so_that_a_stale_backward_raises() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    fastlr.FusedSGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
