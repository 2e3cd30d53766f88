"""fastlr.GradScaler: torch.amp.GradScaler, whose check the optimizer's own norm pass takes over."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams, counted
from helpers import assert_same, parameters, set_gradients
from rule_table import Rule, assert_same_run, close_on_devices, with_rules

import fastlr

SHAPES = [(8193,), (7,), (0,), (), (33, 9)]
with_backends = pytest.mark.usefixtures("backend")
Model = list[torch.nn.Parameter]
Scaler = torch.amp.GradScaler


def scaler_of(kind: type[Scaler], scale: float = 1024.0, device: str | None = None, **options: Any) -> Any:
    device = device or torch.get_default_device().type
    made = kind(device, init_scale=scale, growth_interval=3, **options)
    made.scale(torch.zeros((), device=device))  # sets it up; the tests scale gradients, not a loss
    return made


@with_backends
def test_an_inf_of_a_closures_gradients_is_found_where_there_were_none_before() -> None:
    (p,) = parameters([(5,)])
    fused = fastlr.FusedSGD([p], lr=0.25)
    scaler = scaler_of(fastlr.GradScaler, 4.0)
    before = p.detach().clone()

    def closure(factor: float) -> torch.Tensor:
        fused.zero_grad()
        loss = (p * factor).sum()
        scaler.scale(loss).backward()
        return loss

    for factor, scale in ((2.0, 4.0), (math.inf, 2.0)):
        fused.zero_grad()
        loss = scaler.step(fused, lambda: closure(factor))  # noqa: B023
        scaler.update()
        assert isinstance(loss, torch.Tensor)
        assert scaler.get_scale() == scale
        assert_same([before - 0.5], [p])
    assert fused.last_step_skipped
    assert fused.clock().updates == 1


def set_scaled_gradients(step: int, scaler: Scaler, *models: Model) -> None:
    """Scaled, and in about a third of the steps with an inf or NaN somewhere."""
    set_gradients(step, *models)
    generator = torch.Generator("cpu").manual_seed(step)
    draw = torch.rand(3, generator=generator, device="cpu").tolist()
    value = (math.inf, -math.inf, math.nan)[int(3 * draw[0])] if draw[1] < 0.35 else None
    for model in models:
        for p in model:
            p.grad.mul_(scaler.get_scale())
        if value is not None:
            gradient = model[int(draw[2] * 2)].grad  # of those that are not empty
            gradient.view(-1)[int(draw[0] * gradient.numel())] = value
        if step % 4 == 0:
            model[1].grad = None


def run(scaler: Scaler, optimizer: torch.optim.Optimizer, *, unscale: bool = False) -> None:
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def refuse_torchs_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: object) -> None:
        raise AssertionError("torch's check was run")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", check)


CLIPS: dict[str, dict[str, Any]] = {
    "unclipped": {},
    "clipped": {"max_grad_norm": 2.0, "nonfinite": "raise"},
}


@with_backends
@with_rules
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled-before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_for_step_as_torchs(
    rule: Rule, dtype: torch.dtype, unscale: bool, clip: dict[str, Any], backend: str
) -> None:
    """With fastlr's optimizers, and, where nothing is clipped, with torch's of the same rule."""
    ours, others = (parameters(SHAPES, dtype) for _ in range(2))
    theirs = parameters(SHAPES, dtype, device="cpu")
    lr = fastlr.Triangular(rule.lr, 2 * rule.lr, 3) if clip else rule.lr
    fused, same = (rule.make(model, lr=lr, **clip, **rule.full) for model in (ours, others))
    reference = rule.make_torch(theirs, **rule.full)
    mine, torchs, on_host = scaler_of(fastlr.GradScaler), scaler_of(Scaler), scaler_of(Scaler, device="cpu")
    skipped = 0
    for step in range(12):
        set_scaled_gradients(step, mine, ours, others, theirs)
        kept = [p.grad.clone() for p in ours if p.grad is not None]
        run(mine, fused, unscale=unscale)
        run(torchs, same, unscale=unscale)
        if not unscale:
            assert_same(kept, [p.grad for p in ours if p.grad is not None])
        if not clip:
            run(on_host, reference, unscale=unscale)
            assert_same(theirs, ours, close_on_devices(rule, backend))
        assert mine.state_dict() == torchs.state_dict()
        assert fused.last_step_skipped == same.last_step_skipped
        skipped += fused.last_step_skipped
    assert 0 < skipped < 10
    assert fused.sync() == same.sync() == (12 - skipped, 0)
    assert_same_run(rule, (same, others), (fused, ours))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(dtype: torch.dtype, backend: str) -> None:
    """float16's own overflow is what a scale is lowered for."""
    if backend == "cuda" and dtype is torch.bfloat16:
        pytest.skip("torch's GradScaler takes no bfloat16 there")
    ours, others = (parameters([(300,), (5,)], dtype) for _ in range(2))
    pairs = [
        (scaler_of(fastlr.GradScaler, 65536.0), fastlr.FusedAdamW(ours, state_dtype=torch.float32)),
        (scaler_of(Scaler, 65536.0), fastlr.FusedAdamW(others, state_dtype=torch.float32)),
    ]
    for step in range(6):
        set_gradients(step, ours, others)
        for p in (*ours, *others):
            p.grad.mul_(pairs[0][0].get_scale())
        for scaler, optimizer in pairs:
            run(scaler, optimizer)
        assert pairs[0][0].state_dict() == pairs[1][0].state_dict()
    assert (pairs[0][0].get_scale() < 65536.0) == (dtype == torch.float16)
    assert_same(others, ours)


@with_backends
def test_torchs_check_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parameters([(9,)])
    fused = fastlr.FusedSGD(model, lr=0.1)
    scaler = scaler_of(fastlr.GradScaler)
    refuse_torchs_check(monkeypatch)
    set_gradients(0, model)
    run(scaler, fused)
    with pytest.raises(AssertionError, match="torch's check was run"):
        run(scaler_of(Scaler), fused)
    with pytest.raises(AssertionError, match="torch's check was run"):
        run(scaler, torch.optim.SGD(model))


@with_backends
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled-before"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_torchs_optimizers_are_stepped_as_by_torchs(
    make: Callable[..., torch.optim.Optimizer], unscale: bool
) -> None:
    ours, others = (parameters(SHAPES) for _ in range(2))
    pairs = [
        (scaler_of(fastlr.GradScaler), make(ours, lr=0.1, fused=True)),
        (scaler_of(Scaler), make(others, lr=0.1, fused=True)),
    ]
    for step in range(8):
        set_scaled_gradients(step, pairs[0][0], ours, others)
        for scaler, optimizer in pairs:
            run(scaler, optimizer, unscale=unscale)
        assert pairs[0][0].state_dict() == pairs[1][0].state_dict()
    assert_same(others, ours)


@with_backends
@pytest.mark.parametrize("first", [fastlr.GradScaler, Scaler], ids=["to-torch", "from-torch"])
def test_a_state_dict_goes_both_ways(first: type[Scaler]) -> None:
    second = Scaler if first is fastlr.GradScaler else fastlr.GradScaler
    ours, others = (parameters(SHAPES) for _ in range(2))
    fused, same = (fastlr.FusedAdamW(model, lr=0.1) for model in (ours, others))
    one, kept = scaler_of(first), scaler_of(second)
    for step in range(12):
        set_scaled_gradients(step, one, ours, others)
        if step == 5:
            loaded = scaler_of(second, 1.0)
            loaded.load_state_dict(one.state_dict())
            one = loaded
        run(one, fused)
        run(kept, same)
        assert one.state_dict() == kept.state_dict()
    assert_same(others, ours)


def test_copies_go_on() -> None:
    scaler = scaler_of(fastlr.GradScaler)
    for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert type(other) is fastlr.GradScaler
        assert other.state_dict() == scaler.state_dict()


@with_backends
def test_several_optimizers_are_skipped_each_for_itself() -> None:
    """Of one scaler: fastlr's, torch's, and one whose gradients were unscaled before."""
    models = [parameters([(9,), (5,)], seed=k) for k in range(4)]
    optimizers: list[torch.optim.Optimizer] = [
        fastlr.FusedSGD(models[0], lr=0.1),
        fastlr.FusedAdamW(models[1], lr=0.1, max_grad_norm=1.0),
        torch.optim.SGD(models[2], lr=0.1),
        fastlr.FusedSGD(models[3], lr=0.1),
    ]
    scaler = scaler_of(fastlr.GradScaler)
    for bad in (None, 0, 1, 2, 3):
        scale = scaler.get_scale()
        before = [[p.detach().clone() for p in model] for model in models]
        for k, model in enumerate(models):
            set_gradients(k, model, scale=scale)
            if k == bad:
                model[1].grad[2] = math.nan
        scaler.unscale_(optimizers[3])
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for k, model in enumerate(models):
            moved = not torch.equal(model[0], before[k][0])
            assert moved == (k != bad)
        assert scaler.get_scale() == (scale if bad is None else scale / 2)


@with_backends
def test_disabled_it_does_nothing() -> None:
    ours, others = (parameters([(9,)]) for _ in range(2))
    fused, same = (fastlr.FusedSGD(model, lr=0.1) for model in (ours, others))
    scaler = fastlr.GradScaler(torch.get_default_device().type, enabled=False)
    set_gradients(0, ours, others)
    assert scaler.scale(ours[0]) is ours[0]
    run(scaler, fused)
    same.step()
    assert_same(others, ours)
    assert (scaler.get_scale(), scaler.state_dict(), fused.last_grad_norm) == (1.0, {}, None)
    with pytest.raises(AssertionError, match="backoff factor"):
        fastlr.GradScaler("cpu", backoff_factor=1.0)


@with_backends
def test_what_torch_refuses_is_refused() -> None:
    model = parameters([(9,)])
    fused = fastlr.FusedSGD(model, lr=0.1)
    scaler = scaler_of(fastlr.GradScaler)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(fused, closure=lambda: 0.0)
    scaler.step(fused)  # which has no gradient
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()
    scaler = scaler_of(fastlr.GradScaler)
    set_gradients(0, model)
    scaler.step(fused)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(fused)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(fused)
    with pytest.raises(AssertionError, match="_scale is None"):
        fastlr.GradScaler(torch.get_default_device().type).step(fused)


@with_backends
def test_an_inf_is_no_error_and_without_a_scaler_it_is(backend: str) -> None:
    (p,) = parameters([(300,)])
    fused = fastlr.FusedSGD([p], lr=1.0, max_grad_norm=1e6, nonfinite="raise")
    scaler = scaler_of(fastlr.GradScaler)
    p.grad = torch.full_like(p, math.inf)
    run(scaler, fused)
    assert fused.last_step_skipped
    assert (scaler.get_scale(), fused.last_grad_norm) == (512.0, math.inf)

    def step() -> None:
        fused.step()
        fused.sync()  # when a device tells of it

    with pytest.raises(RuntimeError, match="the gradients' norm"):
        step()
    before = p.detach().clone()
    p.grad = torch.full_like(p, 512.0)
    run(scaler, fused)
    assert fused.last_grad_norm == math.sqrt(300)
    assert fused.sync() == (1, 0)
    assert_same([before - 1.0], [p])


@with_backends
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_float64_beyond_squares_is_skipped(clip: float | None) -> None:
    model = parameters([(9,)], torch.float64)
    fused = fastlr.FusedSGD(model, lr=0.1, max_grad_norm=clip)
    scaler = scaler_of(fastlr.GradScaler, 1.0)
    for value, skipped in ((1e153, False), (1e155, True)):
        set_gradients(0, model)
        model[0].grad[3] = value
        run(scaler, fused)
        assert fused.last_step_skipped is skipped
        assert scaler.get_scale() == (0.5 if skipped else 1.0)


@with_backends
@pytest.mark.parametrize("scale", [0.0, 1e-42])
def test_a_scale_without_an_inverse_is_an_error_where_nothing_was_found(scale: float) -> None:
    """As with torch's: a run whose loss has become NaN lowers its scale until there is no more to lower."""
    model = parameters([(3,)])
    fused = fastlr.FusedSGD(model, lr=0.1)
    before = model[0].detach().clone()
    for kind in (fastlr.GradScaler, Scaler):
        scaler = scaler_of(kind, scale)
        model[0].grad = torch.full_like(model[0], math.nan)
        run(scaler, fused)
        assert fused.last_step_skipped
        assert fused.sync() == (0, 0)
        model[0].grad = torch.zeros_like(model[0])
        with pytest.raises(ValueError, match="grad_scale must be finite and > 0"):
            step_and_sync(scaler, fused)
        assert_same([before], [model[0].detach()])


def step_and_sync(scaler: Scaler, optimizer: fastlr.FusedOptimizer) -> None:
    scaler.step(optimizer)
    optimizer.sync()  # when a device tells of it


@with_backends
def test_a_step_that_raises_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    fused = fastlr.FusedSGD([p], lr=1.0)
    scaler = scaler_of(fastlr.GradScaler)
    p.grad = torch.full_like(p, 1024.0)
    fused.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match="weight_decay"):
        scaler.step(fused)
    assert "_seeks_inf_for" not in fused.__dict__
    fused.param_groups[0]["weight_decay"] = 0.0
    run(scaler, fused)
    assert "_seeks_inf_for" not in fused.__dict__
    assert_same([-torch.ones(3)], [p])


@with_backends
def test_a_step_without_a_scaler_seeks_nothing() -> None:
    model = parameters([(3,)])
    fused = fastlr.FusedSGD(model, lr=0.1)
    scaler = scaler_of(fastlr.GradScaler)
    set_gradients(0, model)
    run(scaler, fused)
    assert fused.last_grad_norm is not None
    model[0].grad[0] = math.inf
    fused.step()
    assert (fused.last_grad_norm, fused.last_step_skipped) == (None, False)
    assert not model[0].isfinite().all()


# -- devices -------------------------------------------------------------------------------------


@pytest.fixture
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_on_a_device_it_is_two_launches_that_nothing_waits_for(
    cuda: ModuleType, clip: dict[str, Any]
) -> None:
    model = parameters([(33,), (7, 5), (20000,), (), (0,)])
    fused = fastlr.FusedAdamW(model, **clip)
    scaler = scaler_of(fastlr.GradScaler)
    for step in range(2):
        set_gradients(step, model)
        run(scaler, fused)
    set_gradients(2, model)
    with counted(cuda) as counts:
        run(scaler, fused)
    assert (counts["launches"], counts["copies"], counts["stream_synchronizations"]) == (2, 0, 0)


@with_rules
@pytest.mark.parametrize("limit", [0, 2], ids=["", "several launches"])
def test_a_graph_finds_an_inf_on_every_replay(cuda: ModuleType, rule: Rule, limit: int) -> None:
    """Of the graph, the optimizer's launches are captured; what torch does around them is done by hand."""
    cuda.limit_launch_capacity(limit)
    lr = fastlr.Triangular(rule.lr, 2 * rule.lr, 3)
    ours, theirs = (parameters([(9,), (9000,), (4, 3), (5,)]) for _ in range(2))
    fused, other = (rule.make(m, lr=lr, **rule.full) for m in (ours, theirs))
    scaler, torchs = scaler_of(fastlr.GradScaler), scaler_of(Scaler)
    for step in range(2):
        set_gradients(step, ours, theirs)
        run(scaler, fused)
        run(torchs, other)
    set_gradients(2, ours)
    scale = torch.tensor(1024.0)  # which the graph reads anew on each replay
    found = torch.zeros(())

    def captured() -> None:
        fused.grad_scale, fused._seeks_inf_for = scale, found
        fused.step()
        del fused.grad_scale

    with counted(cuda) as counts:
        graph = Graph(cuda, captured)
    assert counts["copies"] == counts["loads_in_capture"] == counts["stream_synchronizations"] == 0
    for step in range(2, 9):
        set_scaled_gradients(step, torchs, theirs)
        for mine, its in zip(ours, theirs, strict=True):
            its.grad = torch.zeros_like(its) if its.grad is None else its.grad
            mine.grad.copy_(its.grad)
        scale.fill_(torchs.get_scale())
        found.zero_()
        graph.replay()
        run(torchs, other)
        assert fused.last_step_skipped == other.last_step_skipped == bool(found)
    assert fused.sync() == other.sync()
    assert 2 < fused.clock().updates < 9
    assert_same_run(rule, (other, theirs), (fused, ours))


@pytest.mark.parametrize("bad", [None, 0, 2])
def test_several_devices_skip_together(cuda: ModuleType, bad: int | None) -> None:
    cuda.set_device_count(2)
    cuda.route_host_to_cuda(2)
    ours, others = (parameters([(9,), (5,), (9000,)]) for _ in range(2))
    fused, same = (fastlr.FusedAdamW([{"params": [p]} for p in model]) for model in (ours, others))
    scaler, torchs = scaler_of(fastlr.GradScaler), scaler_of(Scaler)
    for step in range(3):
        set_gradients(step, ours, others, scale=scaler.get_scale())
        if step == 1 and bad is not None:
            ours[bad].grad[0] = others[bad].grad[0] = math.inf
        run(scaler, fused)
        run(torchs, same)
        assert fused.last_step_skipped == same.last_step_skipped == (step == 1 and bad is not None)
        assert scaler.state_dict() == torchs.state_dict()
    assert fused.sync() == same.sync()
    assert_same(others, ours)


def test_a_group_that_moves_between_host_and_device(cuda: ModuleType) -> None:
    ours, others = (parameters([(9,), (5,)]) for _ in range(2))
    fused, same = (fastlr.FusedSGD(model, lr=0.1, momentum=0.9) for model in (ours, others))
    scaler, torchs = scaler_of(fastlr.GradScaler), scaler_of(Scaler)
    for step in range(8):
        cuda.route_host_to_cuda(step // 2 % 2)
        set_gradients(step, ours, others, scale=scaler.get_scale())
        if step % 3 == 0:
            ours[1].grad[0] = others[1].grad[0] = math.nan
        run(scaler, fused)
        run(torchs, same)
        assert scaler.state_dict() == torchs.state_dict()
    assert fused.sync() == same.sync() == (5, 0)
    assert_same(others, ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
def test_a_cuda_graph_replays_step_and_update() -> None:
    torch.set_default_device("cuda")
    try:
        ours, others = (parameters(SHAPES) for _ in range(2))
        fused, same = (
            fastlr.FusedAdamW(model, lr=fastlr.Triangular(0.1, 0.2, 3)) for model in (ours, others)
        )
        scaler, torchs = scaler_of(fastlr.GradScaler), scaler_of(Scaler)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in range(2):
                set_gradients(step, ours, others, scale=1024.0)
                run(scaler, fused)
                run(torchs, same)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(scaler, fused)
        for step in range(2, 12):
            set_scaled_gradients(step, torchs, others)
            for mine, its in zip(ours, others, strict=True):
                its.grad = torch.zeros_like(its) if its.grad is None else its.grad
                mine.grad.copy_(its.grad)
            graph.replay()
            run(torchs, same)
            assert scaler.get_scale() == torchs.get_scale()
        assert fused.sync() == same.sync()
        assert_same(others, ours)
    finally:
        torch.set_default_device(None)
