"""The gradients' norm clipped in the step: what an update is then, to the bit, and where there is none."""

from __future__ import annotations

import copy
import math
import pickle
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams, counted
from helpers import assert_same, parameters, set_gradients
from rule_table import Rule, assert_same_run, with_rules

import fastlr
from fastlr import _core

SHAPES = [(8193,), (7,), (0,), (), (8500,), (33, 9)]
with_backends = pytest.mark.usefixtures("backend")


def norm_of(model: list[torch.nn.Parameter], scale: float = 1.0) -> float:
    """By a step without a rate that measures it; test_grad_norm.py compares that with an oracle."""
    probe = fastlr.FusedSGD(model, lr=0.0)
    probe.measure_grad_norm = True
    probe.grad_scale = torch.tensor(scale)
    probe.step()
    assert probe.last_grad_norm is not None
    return probe.last_grad_norm


def factor_of(norm: float, limit: float) -> float:
    return min(1.0, limit / (norm + 1e-6))


def multiply_gradients(model: list[torch.nn.Parameter], factor: float) -> None:
    """In the gradients' type, with the factor rounded to it once."""
    for p in model:
        if p.grad is not None:
            p.grad *= torch.tensor(factor, dtype=torch.float64).to(p.grad.real.dtype)


@with_backends
@with_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_an_update_is_that_of_clipped_gradients(rule: Rule, dtype: torch.dtype, threads: int) -> None:
    ours, theirs = (parameters(SHAPES, dtype) for _ in range(2))
    fused, reference = rule.make(ours, max_grad_norm=2.0, **rule.full), rule.make(theirs, **rule.full)
    for step in range(4):
        set_gradients(step, ours, theirs, scale=(1.0, 1e-6)[step % 2])  # above the limit, and far below
        ours[-1].grad = ours[-1].grad.t().contiguous().t()
        norm = norm_of(theirs)
        factor = factor_of(norm, 2.0)
        assert (factor < 1.0) is (step % 2 == 0)
        multiply_gradients(theirs, factor)
        before = [p.grad.clone() for p in ours]
        fused.step()
        reference.step()
        assert fused.last_grad_norm == norm
        assert_same(before, [p.grad for p in ours])  # which stay as they are
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_backends
@with_rules
def test_halves_are_clipped_in_float32(rule: Rule) -> None:
    """As float32 parameters of the same values, rounded after each update."""
    ours = parameters(SHAPES, torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in ours]
    fused = rule.make(ours, max_grad_norm=2.0, state_dtype=torch.float32, **rule.full)
    reference = rule.make(wide, max_grad_norm=2.0, **rule.full)
    for step in range(3):
        set_gradients(step, ours)
        for p, q in zip(ours, wide, strict=True):
            q.grad = p.grad.float()
        fused.step()
        reference.step()
        for q in wide:
            q.data = q.data.bfloat16().float()
        assert fused.last_grad_norm == reference.last_grad_norm
        assert_same([q.detach().bfloat16() for q in wide], ours)


@with_backends
@with_rules
def test_as_torchs_clipping_with_its_optimizer(rule: Rule) -> None:
    """Over several groups and types. torch adds norms up in float32: a few units in its last place."""
    ours, theirs = (
        parameters([(50,), (9000,)]) + parameters([(40,)], torch.float64, seed=1) for _ in range(2)
    )
    fused = rule.make([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.0}], max_grad_norm=1.0)
    reference = rule.make([{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}])
    for step in range(4):
        set_gradients(step, ours, theirs)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        fused.step()
        reference.step()
        assert fused.last_grad_norm == pytest.approx(float(norm), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@with_backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@with_rules
def test_a_norm_that_is_not_finite_skips_the_update(rule: Rule, value: float) -> None:
    lr = fastlr.LinearRamp(rule.lr, 0.0, 10)
    model, twin = (parameters([(300,), (9000,), (4,)]) for _ in range(2))
    fused = rule.make(model, lr=lr, max_grad_norm=1.0, **rule.full)
    other = rule.make(twin, lr=lr, max_grad_norm=1.0, **rule.full)
    for step in range(4):
        set_gradients(step, model, twin)
        if step < 2:
            model[2].grad = twin[2].grad = None  # begins late
        if step in (0, 2):  # also the very first
            model[1].grad[8999] = value
            fused.step()
            assert fused.last_step_skipped
            assert fused.last_grad_norm is not None
            assert not math.isfinite(fused.last_grad_norm)
        else:
            fused.step()
            other.step()
            assert not fused.last_step_skipped
    assert fused.sync() == other.sync() == (2, 0)
    assert_same_run(rule, (other, twin), (fused, model))


@with_backends
def test_a_norm_that_is_not_finite_may_raise(backend: str) -> None:
    (p,) = parameters([(300,)])
    fused = fastlr.FusedSGD([p], lr=fastlr.LinearRamp(0.1, 0.0, 10), max_grad_norm=1.0, nonfinite="raise")
    p.grad = torch.full_like(p, math.inf)
    before = p.detach().clone()
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="the gradients' norm is inf"):
            fused.step()
    else:
        fused.step()
        with pytest.raises(RuntimeError, match="the gradients' norm was inf"):
            fused.sync()
    assert_same([before], [p])
    assert fused.sync() == (0, 0)  # told once
    p.grad = torch.ones_like(p)
    fused.step()
    assert fused.sync() == (1, 0)
    fused.nonfinite = "skip"
    p.grad = torch.full_like(p, math.inf)
    fused.step()
    assert fused.sync() == (1, 0)


@with_backends
@with_rules
def test_the_scale_of_a_grad_scaler_is_no_part_of_the_norm(rule: Rule) -> None:
    ours, theirs = (parameters(SHAPES) for _ in range(2))
    fused, reference = rule.make(ours, max_grad_norm=2.0, **rule.full), rule.make(theirs, **rule.full)
    for step, found_inf in enumerate((0.0, 1.0, 0.0)):
        set_gradients(step, ours, theirs)
        multiply_gradients(ours, 8.0)
        fused.grad_scale, fused.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        fused.step()
        del fused.grad_scale, fused.found_inf
        assert fused.last_step_skipped == bool(found_inf)
        if found_inf:
            assert fused.last_grad_norm is not None
            assert math.isnan(fused.last_grad_norm)
            continue
        norm = norm_of(theirs)
        multiply_gradients(theirs, factor_of(norm, 2.0))
        reference.step()
        assert fused.last_grad_norm == norm
    assert fused.sync().updates == 2
    assert_same_run(rule, (reference, theirs), (fused, ours))


def test_a_scale_and_a_clip_are_one_factor_rounded_once() -> None:
    (p,) = parameters([(3,)])
    fused = fastlr.FusedSGD([p.detach().zero_()], lr=1.0, max_grad_norm=1.0)
    fused.param_groups[0]["params"][0].grad = torch.tensor([3.0, 0.0, 4.0]) * 3000
    fused.grad_scale = torch.tensor(3000.0)
    fused.step()
    inverse = float(np.float32(1 / 3000))
    assert fused.last_grad_norm == pytest.approx(15000.0 * inverse, rel=1e-15)
    factor = np.float32(inverse * (1.0 / (fused.last_grad_norm + 1e-6)))
    assert p.detach()[0] == -(np.float32(9000) * factor)


@with_backends
def test_without_gradients_nothing_is_clipped() -> None:
    fused = fastlr.FusedSGD(parameters([(3,)]), max_grad_norm=1.0)
    fused.step()
    assert fused.last_grad_norm == 0.0
    assert fused.sync() == (1, 0)


def test_threads_and_simd_levels_make_no_difference() -> None:
    found = []
    level = _core.build_info()["simd_level"]
    try:
        for name in _core.build_info()["simd_levels"]:
            for threads in (1, 2, 3):
                _core.set_simd_level(name)
                torch.set_num_threads(threads)
                model = parameters([(70_001,), (33,)])
                fused = fastlr.FusedAdamW(model, lr=0.1, max_grad_norm=1.0)
                set_gradients(0, model)
                fused.step()
                found.append([p.detach() for p in model])
    finally:
        _core.set_simd_level(level)
    for other in found[1:]:
        assert_same(found[0], other)


@with_backends
def test_it_can_be_changed_between_steps_and_copied() -> None:
    model = parameters([(300,)])
    fused = fastlr.FusedSGD(model, lr=0.1, max_grad_norm=1.0, nonfinite="raise")
    set_gradients(0, model)
    fused.step()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert (other.max_grad_norm, other.nonfinite) == (1.0, "raise")
        twin = other.param_groups[0]["params"]
        assert_same(model, twin)
    fused.max_grad_norm = None
    set_gradients(1, model)
    fused.step()
    assert fused.last_grad_norm is None
    fused.max_grad_norm = np.float32(0.5)  # type: ignore[assignment]
    fused.step()
    assert fused.last_grad_norm is not None
    assert "max_grad_norm" not in str(fused.state_dict().keys())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "zero": ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be finite and > 0, or None, got 0.0"),
    "negative": ({"max_grad_norm": -1}, ValueError, "got -1.0"),
    "infinite": ({"max_grad_norm": math.inf}, ValueError, "got inf"),
    "nan": ({"max_grad_norm": math.nan}, ValueError, "got nan"),
    "text": ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number or None, got '1'"),
    "flag": ({"max_grad_norm": True}, TypeError, "max_grad_norm must be a number or None, got True"),
    "nonfinite": ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of skip, raise, got 'ignore'"),
}


@with_rules
@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(rule: Rule, given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = parameters([(3,)])
    with pytest.raises(error, match=message):
        rule.make(model, **given)
    fused = rule.make(model)
    ((name, value),) = given.items()
    with pytest.raises(error, match=message):
        setattr(fused, name, value)


@with_rules
def test_no_group_has_a_limit_of_its_own(rule: Rule) -> None:
    model = parameters([(3,), (4,)])
    message = "max_grad_norm of parameter group 0 is 1.0, but it is one of all groups"
    with pytest.raises(ValueError, match=message):
        rule.make([{"params": model, "max_grad_norm": 1.0}])
    fused = rule.make(model[:1])
    with pytest.raises(ValueError, match="nonfinite of parameter group 1 is 'skip'"):
        fused.add_param_group({"params": model[1:], "nonfinite": "skip"})


# -- devices -------------------------------------------------------------------------------------


@pytest.fixture
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


def test_on_a_device_it_is_two_launches_that_nothing_waits_for(cuda: ModuleType) -> None:
    model = parameters([(33,), (7, 5), (20000,), (), (0,)])
    fused = fastlr.FusedAdamW(model, max_grad_norm=1.0)
    for step in range(2):
        set_gradients(step, model)
        fused.step()
    set_gradients(2, model)
    with counted(cuda) as counts:
        fused.step()
    assert (counts["launches"], counts["copies"], counts["stream_synchronizations"]) == (2, 0, 0)


@with_rules
@pytest.mark.parametrize("limit", [0, 2], ids=["", "several launches"])
def test_a_graph_clips_on_every_replay(cuda: ModuleType, rule: Rule, limit: int) -> None:
    cuda.limit_launch_capacity(limit)
    lr = fastlr.Triangular(rule.lr, 2 * rule.lr, 3)
    ours, theirs = (parameters([(9,), (9000,), (4, 3), (5,)]) for _ in range(2))
    fused, other = (rule.make(m, lr=lr, max_grad_norm=1.0, **rule.full) for m in (ours, theirs))
    for step in range(2):
        set_gradients(step, ours, theirs)
        fused.step()
        other.step()
    set_gradients(2, ours)
    with counted(cuda) as counts:
        graph = Graph(cuda, fused.step)
    assert counts["copies"] == counts["loads_in_capture"] == counts["stream_synchronizations"] == 0
    for step in range(2, 8):
        set_gradients(step, theirs, scale=10.0 ** (step - 5))
        if step == 4:
            theirs[1].grad[7] = math.nan
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad.copy_(its.grad)
        graph.replay()
        other.step()
        assert fused.last_grad_norm == pytest.approx(other.last_grad_norm, rel=0, abs=0, nan_ok=True)
        assert fused.last_step_skipped == other.last_step_skipped == (step == 4)
    assert fused.sync() == other.sync() == (7, 0)
    assert_same_run(rule, (other, theirs), (fused, ours))


def test_several_devices_are_clipped_together(cuda: ModuleType) -> None:
    cuda.set_device_count(2)
    cuda.route_host_to_cuda(2)
    ours, theirs = (parameters([(9,), (5,), (9000,)]) for _ in range(2))
    fused = fastlr.FusedAdamW([{"params": [p]} for p in ours], max_grad_norm=1.0)
    reference = fastlr.FusedAdamW([{"params": [p]} for p in theirs])
    for step in range(6):
        set_gradients(step, ours, theirs)
        if step == 3:
            ours[2].grad[0] = math.inf
        fused.step()
        if step == 3:
            assert fused.last_step_skipped
            assert fused.last_grad_norm == math.inf
            continue
        total = math.fsum(float(p.grad.double().square().sum()) for p in theirs)
        assert fused.last_grad_norm == pytest.approx(math.sqrt(total), rel=1e-14)
        multiply_gradients(theirs, factor_of(fused.last_grad_norm, 1.0))
        reference.step()
    assert fused.sync() == reference.sync() == (5, 0)
    assert_same(theirs, ours)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture"):
        Graph(cuda, fused.step)


def test_host_and_device_are_clipped_together(cuda: ModuleType) -> None:
    """The first group moves between the two; what is where makes no difference."""
    ours, theirs = (parameters([(9,), (5,)]) for _ in range(2))
    fused = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9, max_grad_norm=1.0)
    reference = fastlr.FusedSGD(theirs, lr=0.1, momentum=0.9)
    for step in range(6):
        cuda.route_host_to_cuda(1 - step % 2)
        set_gradients(step, ours, theirs)
        fused.step()
        assert fused.last_grad_norm is not None
        multiply_gradients(theirs, factor_of(fused.last_grad_norm, 1.0))
        reference.step()
    assert_same(theirs, ours)
    assert fused.sync() == (6, 0)
