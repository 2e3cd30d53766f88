"""Gradients clipped element by element in the step, and weight decay that spares what the rule lets grow."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams
from helpers import assert_same, parameters, set_gradients, through_file, twins
from rule_table import RULES, Rule, assert_same_run, close_on_devices, with_rules

import fastlr
from fastlr.optim._groups import STAGE_DEFAULTS

SHAPES = [(8193,), (7,), (0,), (), (8500,), (33, 9)]
DECOUPLED = {
    "SGD": {"momentum": 0.9, "weight_decay": 2.0, "decoupled_weight_decay": True},
    "Adam": {"weight_decay": 2.0, "decoupled_weight_decay": True, "amsgrad": True},
    "AdamW": {"weight_decay": 2.0},
    "Lion": {"weight_decay": 2.0},
}
with_backends = pytest.mark.usefixtures("backend")


def clip(model: list[torch.nn.Parameter], bound: float) -> None:
    for p in model:
        if p.grad is not None:
            real = torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad
            real.clamp_(-bound, bound)


@with_backends
@with_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_torchs_clipping_with_its_step(rule: Rule, dtype: torch.dtype, threads: int, backend: str) -> None:
    ours, theirs = twins(SHAPES, dtype)
    fused = rule.make(ours, max_grad_value=0.5, **rule.full)
    reference = rule.make_torch(theirs, **rule.full)
    for step in range(4):
        set_gradients(step, ours, theirs)
        ours[-1].grad = ours[-1].grad.t().contiguous().t()
        before = [p.grad.clone() for p in ours]
        torch.nn.utils.clip_grad_value_(theirs, 0.5)
        fused.step()
        reference.step()
        assert_same(before, [p.grad for p in ours])  # which stay as they are
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


@with_backends
@with_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_an_update_is_that_of_clipped_gradients(rule: Rule, dtype: torch.dtype) -> None:
    ours, theirs = (parameters(SHAPES, dtype) for _ in range(2))
    fused, reference = rule.make(ours, max_grad_value=0.5, **rule.full), rule.make(theirs, **rule.full)
    for step in range(3):
        set_gradients(step, ours, theirs)
        clip(theirs, 0.5)
        fused.step()
        reference.step()
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_backends
@with_rules
@pytest.mark.parametrize("scale", [1.0, 1024.0, 3.0])
def test_before_the_norm_and_after_the_scale(rule: Rule, scale: float, threads: int) -> None:
    """The norm, measured or clipped, is that of clipped elements; and only one of two groups clips them."""
    ours, theirs = (parameters(SHAPES) for _ in range(2))

    def groups(model: list[torch.nn.Parameter], bound: float | None) -> list[dict[str, Any]]:
        return [{"params": model[:4], "max_grad_value": bound}, {"params": model[4:]}]

    fused = rule.make(groups(ours, 0.5), max_grad_norm=2.0, **rule.full)
    reference = rule.make(groups(theirs, None), max_grad_norm=2.0, **rule.full)
    for step in range(4):
        set_gradients(step, ours, theirs)
        clip(theirs[:4], 0.5)
        for p in (*ours, *theirs):
            p.grad *= scale
        if step == 2:
            fused.max_grad_norm = reference.max_grad_norm = None
            fused.measure_grad_norm = reference.measure_grad_norm = True
        for optimizer in (fused, reference):
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
        if scale == 3.0:  # which rounds what is clipped before it is multiplied, and after
            assert fused.last_grad_norm == pytest.approx(reference.last_grad_norm, rel=1e-6)
        else:
            assert fused.last_grad_norm == reference.last_grad_norm
    if scale != 3.0:
        assert_same_run(rule, (reference, theirs), (fused, ours))


@with_backends
@with_rules
def test_infinities_are_clipped_and_nan_stays(rule: Rule) -> None:
    """As with ``clip_grad_value_``."""
    ours, theirs = (parameters([(9000,)]) for _ in range(2))
    fused = rule.make(ours, max_grad_value=0.5, max_grad_norm=1e6)
    reference = rule.make(theirs, max_grad_norm=1e6)
    for value in (math.inf, -math.inf, math.nan):
        set_gradients(0, ours, theirs)
        ours[0].grad[8999] = value
        theirs[0].grad[8999] = value
        clip(theirs, 0.5)
        fused.step()
        reference.step()
        assert fused.last_step_skipped == reference.last_step_skipped == math.isnan(value)
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_backends
@with_rules
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, fastlr.GradScaler], ids=["torch", "fastlr"])
def test_a_scaler_finds_what_is_not_finite_before_it_is_clipped(rule: Rule, kind: Any) -> None:
    ours, theirs = (parameters([(300,), (9000,)]) for _ in range(2))
    fused, reference = (
        rule.make(ours, max_grad_value=0.5, max_grad_norm=3.0),
        rule.make(theirs, max_grad_norm=3.0),
    )
    device = torch.get_default_device().type
    scaler, other = kind(device, init_scale=64.0), torch.amp.GradScaler(device, init_scale=64.0)
    for step in range(5):
        set_gradients(step, ours, theirs)
        clip(theirs, 0.5)
        for p in (*ours, *theirs):
            p.grad *= float(scaler.get_scale() if p in set(ours) else other.get_scale())
        if step in (0, 3):
            ours[1].grad[8999] = theirs[1].grad[8999] = (math.inf, 0, 0, math.nan)[step]
        scaler.scale(torch.zeros(()))  # sets it up
        other.scale(torch.zeros(()))
        for scales, optimizer in ((scaler, fused), (other, reference)):
            scales.step(optimizer)
            scales.update()
        assert fused.last_step_skipped == reference.last_step_skipped == (step in (0, 3))
    assert scaler.get_scale() == other.get_scale() == 16.0
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_backends
def test_it_can_be_changed_between_steps_and_is_saved() -> None:
    ours, theirs = (parameters([(300,)]) for _ in range(2))
    fused, plain = fastlr.FusedSGD(ours, lr=0.1), fastlr.FusedSGD(theirs, lr=0.1)
    for step, bound in enumerate((None, 0.5, 0.25, None)):
        fused.param_groups[0]["max_grad_value"] = bound
        set_gradients(step, ours, theirs)
        if bound is not None:
            clip(theirs, bound)
        fused.step()
        plain.step()
        assert_same(theirs, ours)
        file = through_file(fused.state_dict())
        assert file["param_groups"][0]["max_grad_value"] == bound
        plain_copy = fastlr.FusedSGD(parameters([(300,)]), lr=0.1)
        plain_copy.load_state_dict(file)
        assert plain_copy.param_groups[0]["max_grad_value"] == bound


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "zero": ({"max_grad_value": 0.0}, ValueError, "max_grad_value .*must be finite and > 0, got 0.0"),
    "negative": ({"max_grad_value": -1}, ValueError, "got -1.0"),
    "infinite": ({"max_grad_value": math.inf}, ValueError, "got inf"),
    "nan": ({"max_grad_value": math.nan}, ValueError, "got nan"),
    "text": ({"max_grad_value": "1"}, TypeError, "must be a number or None, got '1'"),
    "schedule": ({"max_grad_value": fastlr.Constant(1.0)}, TypeError, "must be a number or None"),
    "number": ({"cautious": 1}, ValueError, "cautious .*must be True or False"),
}


@with_rules
@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(rule: Rule, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule.make(parameters([(3,)]), **given)


@with_backends
def test_a_bound_beyond_the_type_is_refused() -> None:
    model = parameters([(3,)])
    fused = fastlr.FusedSGD(model, max_grad_value=1e39)
    set_gradients(0, model)
    with pytest.raises(ValueError, match=r"max_grad_value=1e\+39 of parameter group 0 leads beyond"):
        fused.step()
    fastlr.FusedSGD(parameters([(3,)], torch.float64), max_grad_value=1e39).step()


# -- cautious weight decay -----------------------------------------------------------------------


@with_backends
@pytest.mark.parametrize("name", DECOUPLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_spares_what_grows(name: str, dtype: torch.dtype, threads: int) -> None:
    """Beside the same without weight decay, whose update is what p moves by."""
    rule, lr = RULES[name], 0.125
    ours, theirs = (parameters(SHAPES, dtype) for _ in range(2))
    fused = rule.make(ours, cautious=True, **{**DECOUPLED[name], "lr": lr})
    plain = rule.make(theirs, **{**DECOUPLED[name], "lr": lr, "weight_decay": 0.0})
    zeros = [torch.zeros_like(p).requires_grad_() for p in theirs]
    moves = rule.make(zeros, **{**DECOUPLED[name], "lr": lr, "weight_decay": 0.0})
    spared = shrunk = 0
    for step in range(4):
        set_gradients(step, ours, theirs, zeros)
        for z in zeros:
            z.data.zero_()
        moves.step()
        for p, z in zip(theirs, zeros, strict=True):
            grows = p.data.sign() * z.data.sign() > 0
            spared, shrunk = spared + int(grows.sum()), shrunk + int((~grows).sum())
            p.data.mul_(torch.where(grows, 1.0, 1.0 - lr * 2.0))
        fused.step()
        plain.step()
        assert_same(theirs, ours)
    assert min(spared, shrunk) > 1000


@with_backends
@pytest.mark.parametrize("name", sorted(RULES.keys() - DECOUPLED.keys() | {"SGD", "Adam"}))
def test_coupled_decay_cannot_be_cautious(name: str) -> None:
    message = "cautious.* must be False where weight decay is added to the gradient"
    with pytest.raises(ValueError, match=message):
        RULES[name].make(parameters([(3,)]), cautious=True)


# -- devices -------------------------------------------------------------------------------------


@pytest.fixture
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "max_grad_value": ({}, {"max_grad_value": 0.5}),
    "no max_grad_value": ({"max_grad_value": 0.5}, {"max_grad_value": None}),
    "cautious": ({}, {"cautious": True}),
    "stochastic_rounding": ({}, {"stochastic_rounding": True}),
    "master_weights": ({"master_weights": True}, {"master_weights": False}),
}


def test_every_stage_is_among_those_that_a_graph_keeps() -> None:
    """But for what a slot tells of, and what a device follows."""
    followed = {"ema_decay", "ema_warmup", "ema_dtype", "rounding_seed"}
    assert {name for _, after in STAGES.values() for name in after} == STAGE_DEFAULTS.keys() - followed


@pytest.mark.parametrize(("before", "after"), STAGES.values(), ids=STAGES.keys())
def test_a_graph_keeps_the_stages_that_it_has_captured(
    cuda: ModuleType, before: dict[str, Any], after: dict[str, Any]
) -> None:
    model = parameters([(3,)], torch.bfloat16)
    fused = fastlr.FusedAdamW(model, lr=0.1, state_dtype=torch.float32, **before)
    set_gradients(0, model)
    fused.step()
    Graph(cuda, fused.step)
    fused.param_groups[0].update(after)
    with pytest.raises(
        RuntimeError, match=f"captured the step of parameter group 0 with.*{next(iter(after))}"
    ):
        fused.step()


def test_a_graph_follows_another_bound(cuda: ModuleType) -> None:
    ours, theirs = (parameters([(9000,), (4, 3)]) for _ in range(2))
    fused, other = (fastlr.FusedSGD(m, lr=0.1, max_grad_value=0.5) for m in (ours, theirs))
    for optimizer, model in ((fused, ours), (other, theirs)):
        set_gradients(0, model)
        optimizer.max_grad_norm = 2.0
        optimizer.step()
    graph = Graph(cuda, fused.step)
    for step, bound in enumerate((0.5, 0.25, 1.0)):
        for optimizer in (fused, other):
            optimizer.param_groups[0]["max_grad_value"] = bound
            optimizer.set_schedule(lr=0.1)  # hands what is in the groups to the devices
        set_gradients(step, theirs)
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad.copy_(its.grad)
        graph.replay()
        other.step()
        assert fused.last_grad_norm == other.last_grad_norm
    assert_same(theirs, ours)


def test_several_devices_are_clipped_together(cuda: ModuleType) -> None:
    cuda.set_device_count(2)
    cuda.route_host_to_cuda(2)
    ours, theirs = (parameters([(9,), (5,), (9000,)]) for _ in range(2))
    fused = fastlr.FusedAdamW([{"params": [p]} for p in ours], max_grad_norm=1.0, max_grad_value=0.5)
    reference = fastlr.FusedAdamW([{"params": [p]} for p in theirs], max_grad_norm=1.0)
    for step in range(3):
        set_gradients(step, ours, theirs)
        clip(theirs, 0.5)
        for optimizer in (fused, reference):
            optimizer.step()
        assert fused.last_grad_norm == reference.last_grad_norm
    assert_same(theirs, ours)
