"""The whole update in one step, beside PyTorch's pieces called one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, parameters, set_gradients, twins
from rule_table import Rule, assert_same_run, close_on_devices, with_rules

import fastlr

SHAPES = [(8193,), (7,), (0,), (), (8500,), (33, 9)]
DECAY = fastlr.LinearRamp(0.5, 0.999, 6)
SCALE = 256.0
with_backends = pytest.mark.usefixtures("backend")


def set_up(scaler: torch.amp.GradScaler) -> Any:
    scaler.scale(torch.zeros((), device=scaler._device))
    return scaler


def pieces(
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    model: list[torch.nn.Parameter],
    averages: list[torch.Tensor],
    limit: float,
    update: int,
) -> float:
    """Unscaled, clipped by value and by norm, stepped and averaged."""
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_value_(model, 1.5)
    norm = torch.nn.utils.clip_grad_norm_(model, limit)
    scaler.step(optimizer)
    scaler.update()
    decay = min(DECAY(update), (1 + update) / (10 + update))
    for average, p in zip(averages, model, strict=True):
        average.lerp_(p.detach(), 1 - decay)
    return float(norm)


@with_backends
@with_rules
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, fastlr.GradScaler], ids=["torchs-scaler", "ours"])
@pytest.mark.parametrize("limit", [1e6, 1.0], ids=["far-norm", "clipped-norm"])
def test_all_at_once_is_one_after_the_other(
    rule: Rule, limit: float, kind: Any, threads: int, backend: str
) -> None:
    """To the bit, but where the norm clips: PyTorch adds that up in float32."""
    ours, theirs = twins(SHAPES)
    options = {"max_grad_value": 1.5, "max_grad_norm": limit, "ema_decay": DECAY, "ema_warmup": True}
    fused = rule.make(ours, **options, **rule.full)
    reference = rule.make_torch(theirs, **rule.full)
    averages = [p.detach().clone() for p in theirs]
    device = torch.get_default_device().type
    scaler = set_up(kind(device, init_scale=SCALE))
    other = set_up(torch.amp.GradScaler("cpu", init_scale=SCALE))
    for update in range(5):
        set_gradients(update, ours, theirs, scale=SCALE)
        norm = pieces(reference, other, theirs, averages, limit, update)
        scaler.step(fused)
        scaler.update()
        assert fused.last_grad_norm == pytest.approx(norm, rel=1e-6)
    found = [fused.state[p].pop("ema") for p in ours]
    if limit == 1e6:
        close = close_on_devices(rule, backend)
        assert_same_run(rule, (reference, theirs), (fused, ours), close)
        assert_same(averages, found, close)
    else:
        for expected, actual in zip((*theirs, *averages), (*ours, *found), strict=True):
            torch.testing.assert_close(actual.detach().cpu(), expected.detach(), rtol=2e-5, atol=2e-6)


@with_backends
@with_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_with_masters_are_float32_beside_the_pieces(
    rule: Rule, dtype: torch.dtype, backend: str
) -> None:
    """The same on float32 copies, whose gradients are the half ones."""
    ours = parameters(SHAPES, dtype)
    theirs = [torch.nn.Parameter(p.detach().cpu().float()) for p in ours]
    options = {"max_grad_value": 1.5, "max_grad_norm": 1e6, "ema_decay": DECAY, "ema_warmup": True}
    fused = rule.make(ours, master_weights=True, **options, **rule.full)
    reference = rule.make_torch(theirs, **rule.full)
    averages = [p.detach().clone() for p in theirs]
    scaler = set_up(fastlr.GradScaler(torch.get_default_device().type, init_scale=SCALE))
    other = set_up(torch.amp.GradScaler("cpu", init_scale=SCALE))
    for update in range(5):
        set_gradients(update, ours, scale=SCALE)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.cpu().float()
        pieces(reference, other, theirs, averages, 1e6, update)
        scaler.step(fused)
        scaler.update()
    close = close_on_devices(rule, backend)
    assert_same(averages, [fused.state[p]["ema"] for p in ours], close)
    for p, q in zip(ours, theirs, strict=True):
        difference = (p.detach().cpu().float() - q.detach()).abs()
        half_a_unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
        assert bool((difference <= q.detach().abs() * half_a_unit + 2.0**-25).all())
