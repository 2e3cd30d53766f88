"""The arithmetic of FusedSGD against torch.optim.SGD(foreach=False), to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SIZES, assert_same, parameters, set_gradients, train, twins
from reference import sgd_nesterov

import fastlr

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = {
    "plain": {},
    "weight_decay": {"weight_decay": 5e-4},
    "momentum": {"momentum": 0.9},
    "momentum+weight_decay": {"momentum": 0.9, "weight_decay": 5e-4},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov+weight_decay": {"momentum": 0.95, "nesterov": True, "weight_decay": 1e-2},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 1e-3},
    "maximize-plain": {"maximize": True},
    "all": {"momentum": 0.7, "dampening": -0.5, "weight_decay": 0.1, "maximize": True},
}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())

MODES = {
    "triangular": {"mode": "triangular"},
    "triangular2": {"mode": "triangular2"},
    "exp_range": {"mode": "exp_range", "gamma": 0.9995},
}
with_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
with_exact_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
with_half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def torch_sgd(model: list[torch.nn.Parameter], lr: float, options: dict[str, Any]) -> torch.optim.SGD:
    return torch.optim.SGD(model, lr=lr, foreach=False, **options)


def buffers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [entry["momentum_buffer"] for entry in optimizer.state.values()]


@with_modes
@with_exact_types
def test_thousand_steps_equal_torch_with_cyclic_lr(
    mode: dict[str, Any], dtype: torch.dtype, threads: int, backend: str
) -> None:
    cycle = {"base_lr": 1e-3, "max_lr": 6e-3, "step_size_up": 130, "step_size_down": 70, **mode}
    ours, theirs = twins([(33,), (7, 5), (17000,), ()], dtype)
    fused = fastlr.FusedCyclicSGD(ours, **cycle, momentum=0.9, weight_decay=5e-4)
    reference = torch_sgd(theirs, 1e-3, {"momentum": 0.9, "weight_decay": 5e-4})
    scheduler = torch.optim.lr_scheduler.CyclicLR(reference, **cycle, cycle_momentum=False)

    def reference_step() -> None:
        reference.step()
        scheduler.step()

    train(1000, (theirs, reference_step), (ours, fused.step))
    assert fused.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    close = backend == "cuda" and mode["mode"] == "exp_range"
    assert_same(theirs, ours, close)
    assert_same(buffers(reference), buffers(fused), close)


@with_modes
def test_cycled_momentum_equals_torch(mode: dict[str, Any], backend: str) -> None:
    cycle = {"base_lr": 1e-3, "max_lr": 6e-3, "step_size_up": 30, **mode, "cycle_momentum": True}
    ours, theirs = twins([(33,), (7, 5)])
    fused = fastlr.FusedCyclicSGD(ours, **cycle, nesterov=True)
    reference = torch_sgd(theirs, 1e-3, {"momentum": 0.9, "nesterov": True})
    scheduler = torch.optim.lr_scheduler.CyclicLR(reference, **cycle)

    def reference_step() -> None:
        reference.step()
        scheduler.step()

    train(200, (theirs, reference_step), (ours, fused.step))
    assert fused.param_groups[0]["momentum"] == reference.param_groups[0]["momentum"]
    assert_same(theirs, ours, close=backend == "cuda" and mode["mode"] == "exp_range")


@with_options
@with_exact_types
def test_every_size_equals_torch(options: dict[str, Any], dtype: torch.dtype, threads: int) -> None:
    ours, theirs = twins([(n,) for n in (*range(70), *SIZES)], dtype)
    fused, reference = fastlr.FusedSGD(ours, lr=0.1, **options), torch_sgd(theirs, 0.1, options)
    train(5, (theirs, reference.step), (ours, fused.step))
    assert_same(theirs, ours)


@with_options
@with_exact_types
def test_special_values_equal_torch(options: dict[str, Any], dtype: torch.dtype) -> None:
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-310, -1e-40, 3e38, 1.0]
    values = torch.tensor(special, dtype=torch.float64).to(dtype)
    grid = torch.cartesian_prod(values, values)
    ours, theirs = torch.nn.Parameter(grid[:, 0].clone()), torch.nn.Parameter(grid[:, 0].cpu().clone())
    fused, reference = fastlr.FusedSGD([ours], lr=0.1, **options), torch_sgd([theirs], 0.1, options)
    for _ in range(3):
        ours.grad, theirs.grad = grid[:, 1].clone(), grid[:, 1].cpu().clone()
        fused.step()
        reference.step()
    assert_same([theirs], [ours])
    assert torch.equal(theirs.signbit() | theirs.isnan(), (ours.signbit() | ours.isnan()).cpu())


@with_options
@with_half_types
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=["own-momentum", "float32-momentum"])
def test_halves_equal_float32_rounded_once(
    options: dict[str, Any], dtype: torch.dtype, momentum_dtype: torch.dtype | None, threads: int
) -> None:
    shapes = [(n,) for n in SIZES]
    ours = parameters(shapes, dtype)
    fused = fastlr.FusedSGD(ours, lr=0.1, momentum_dtype=momentum_dtype, **options)
    # The oracle: each step in float32 by torch, then one rounding of parameter and momentum.
    theirs = [torch.nn.Parameter(p.detach().cpu().float()) for p in ours]
    reference = torch_sgd(theirs, 0.1, options)
    for step in range(5):
        set_gradients(step, ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.cpu().float()
        fused.step()
        reference.step()
        for q in theirs:
            q.data = q.data.to(dtype).float()
        if momentum_dtype is None:
            for buffer in buffers(reference) if options.get("momentum") else []:
                buffer.copy_(buffer.to(dtype))
        assert_same([q.data.to(dtype) for q in theirs], ours)


@with_half_types
def test_half_conversions_are_exact_for_every_bit_pattern(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    p = torch.nn.Parameter(torch.zeros_like(every))
    p.grad = every
    optimizer = fastlr.FusedSGD([p], lr=0.0, momentum=0.9, momentum_dtype=torch.float32)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert_same([every.float()], [optimizer.state[p]["momentum_buffer"]])
    expected = torch.where(every.float() == 0, torch.zeros_like(every), -every)
    assert_same([expected], [p.data])


@with_options
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_pairs_of_reals(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours = parameters([(5,), (3, 4), (16385,), (), (0,)], dtype)
    pairs = [torch.nn.Parameter(torch.view_as_real(p.detach().cpu().clone())) for p in ours]
    fused, reference = fastlr.FusedSGD(ours, lr=0.1, **options), torch_sgd(pairs, 0.1, options)
    for step in range(5):
        set_gradients(step, ours)
        for p, q in zip(ours, pairs, strict=True):
            q.grad = torch.view_as_real(p.grad.cpu().clone())
        fused.step()
        reference.step()
    assert_same(pairs, [torch.view_as_real(p.detach()) for p in ours])


def test_float64_parameters_may_keep_momentum_in_float32() -> None:
    ours = parameters([(100,)], torch.float64)
    fused = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9, momentum_dtype=torch.float32)
    p, m = ours[0].detach().cpu().clone(), None
    for step in range(5):
        set_gradients(step, ours)
        g = ours[0].grad.cpu()
        fused.step()
        computed = g if m is None else torch.add(m.double() * 0.9, g)
        p.add_(computed, alpha=-0.1)
        m = computed.float()
        assert_same([p], [ours[0].data])
        assert_same([m], buffers(fused))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_result_does_not_depend_on_threads_or_flushed_denormals(dtype: torch.dtype) -> None:
    def run(threads: int, flush: bool) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        model = parameters([(40003,), (129,)], dtype)
        optimizer = fastlr.FusedSGD(model, lr=1e-3, momentum=0.9, weight_decay=1e-3)
        tiny = float(torch.finfo(dtype).tiny)  # everything around the smallest normal number
        for p in model:
            p.data.mul_(tiny)
        for step in range(4):
            set_gradients(step, model, scale=tiny)
            torch.set_flush_denormal(flush)
            optimizer.step()
            torch.set_flush_denormal(False)
        return [p.data for p in model] + buffers(optimizer)

    expected = run(1, False)
    assert any(((b != 0) & (b.abs() < torch.finfo(dtype).tiny)).any() for b in expected)
    for threads in (1, 2, 3):
        for flush in (False, True):
            assert_same(expected, run(threads, flush))


def test_flush_denormal_setting_of_the_caller_survives_a_step() -> None:
    model = parameters([(100,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)
    set_gradients(0, model)
    assert torch.set_flush_denormal(True)
    optimizer.step()
    assert (torch.tensor([1e-40], device="cpu") * 1.0).item() == 0.0


def test_float64_equals_exact_arithmetic_with_one_rounding_each() -> None:
    schedule = fastlr.Triangular2(0.01, 0.3, 3)
    (p,) = parameters([(50,)], torch.float64)
    optimizer = fastlr.FusedSGD([p], lr=schedule, momentum=0.9, weight_decay=0.01, nesterov=True)
    state: list[tuple[float, float | None]] = [(x, None) for x in p.tolist()]
    for step in range(20):
        set_gradients(step, [p])
        state = [
            sgd_nesterov(x, g, m, schedule(step), 0.9, 0.01)
            for (x, m), g in zip(state, p.grad.tolist(), strict=True)
        ]
        optimizer.step()
        assert p.tolist() == [x for x, _ in state]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_of_zero_leaves_the_buffer_untouched(momentum: float) -> None:
    ours, theirs = twins([(9,)])
    fused, reference = fastlr.FusedSGD(ours, momentum=0.9), torch_sgd(theirs, 1e-3, {"momentum": 0.9})
    train(2, (theirs, reference.step), (ours, fused.step))
    before = fused.state[ours[0]]["momentum_buffer"].clone()
    fused.param_groups[0]["momentum"] = reference.param_groups[0]["momentum"] = momentum
    train(2, (theirs, reference.step), (ours, fused.step), start=2)
    assert_same(theirs, ours)
    assert torch.equal(before, fused.state[ours[0]]["momentum_buffer"]) == (momentum == 0.0)


def test_empty_and_scalar_parameters_get_state_like_torch() -> None:
    ours, theirs = twins([(), (0,), (3, 0, 2)])
    fused, reference = fastlr.FusedSGD(ours, momentum=0.9), torch_sgd(theirs, 1e-3, {"momentum": 0.9})
    train(2, (theirs, reference.step), (ours, fused.step))
    assert [b.shape for b in buffers(fused)] == [b.shape for b in buffers(reference)]
    assert_same(theirs, ours)


@pytest.mark.parametrize("left", [{}, {"momentum_buffer": None}], ids=["deleted", "None"])
def test_without_its_buffer_a_parameter_begins_anew(left: dict[str, Any]) -> None:
    """Also where a count of its updates stands beside the buffer, as on CUDA devices."""
    options = {"momentum": 0.9, "dampening": 0.4}
    ours, theirs = twins([(33,), (7,)])
    fused, reference = fastlr.FusedSGD(ours, lr=0.1, **options), torch_sgd(theirs, 0.1, options)
    train(3, (ours, fused.step), (theirs, reference.step))
    for state in (fused.state[ours[0]], reference.state[theirs[0]]):
        del state["momentum_buffer"]
        state.update(left)
    train(3, (ours, fused.step), (theirs, reference.step), start=3)
    assert_same(theirs, ours)
