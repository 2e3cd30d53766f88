"""The gradients' norm that a step measures on its way, against a NumPy oracle: equal to the bit on every
backend, whatever the threads, SIMD levels, layouts and addresses."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from helpers import parameters, set_gradients
from rule_table import Rule, assert_same_run, with_rules

import fastlr
from fastlr import _core

pytestmark = pytest.mark.usefixtures("backend")

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
SIZES = (0, 1, 7, 255, 256, 257, 512, 513, 8191, 8192, 8193, 2 * 8192 + 3)


def oracle(model: list[torch.nn.Parameter]) -> float:
    def floats(gradient: torch.Tensor) -> reference.Floats:
        real = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
        return np.asarray(real.detach().to("cpu", torch.float64))

    return math.sqrt(reference.squared_norm([floats(p.grad) for p in model if p.grad is not None]))


def set_short_gradients(step: int, *models: list[torch.nn.Parameter]) -> None:
    """Of float32's precision, so that their squares are exact in float64."""
    set_gradients(step, *models)
    for model in models:
        for p in model:
            short = torch.complex64 if p.is_complex() else torch.float32
            p.grad = p.grad.to(short).to(p.dtype)


def measuring(model: list[torch.nn.Parameter], **options: float) -> fastlr.FusedSGD:
    opt = fastlr.FusedSGD(model, **{"lr": 0.1, "momentum": 0.9, **options})
    opt.measure_grad_norm = True
    return opt


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_is_the_oracles_to_the_bit(dtype: torch.dtype, threads: int) -> None:
    model = parameters([(n,) for n in SIZES] + [()], dtype)
    opt = measuring(model)
    assert opt.last_grad_norm is None
    for step in range(2):
        set_short_gradients(step, model)
        opt.step()
        assert opt.last_grad_norm == oracle(model)


@with_rules
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_measuring_changes_no_bit_of_an_update(
    rule: Rule, dtype: torch.dtype, state_dtype: torch.dtype | None, threads: int
) -> None:
    # More than one thread takes, more than a chunk, and a gradient in another layout.
    ours, theirs = (parameters([(8193,), (7,), (0,), (8500,), (33, 9)], dtype) for _ in range(2))
    optimizers = [rule.make(m, state_dtype=state_dtype, **rule.full) for m in (ours, theirs)]
    optimizers[0].measure_grad_norm = True
    for step in range(3):
        set_gradients(step, ours, theirs)
        ours[-1].grad = ours[-1].grad.t().contiguous().t()
        for opt in optimizers:
            opt.step()
        if step == 0:
            assert optimizers[0].last_grad_norm == pytest.approx(oracle(theirs), rel=1e-15)
    assert_same_run(rule, (optimizers[1], theirs), (optimizers[0], ours))


def with_gradient(p: torch.nn.Parameter, gradient: torch.Tensor) -> torch.nn.Parameter:
    p.grad = gradient
    return p


LAYOUTS: dict[str, Callable[[], torch.nn.Parameter]] = {
    "misaligned": lambda: with_gradient(
        torch.nn.Parameter(torch.randn(9001)[1:]), torch.randn(9003)[3:]),
    "gradient transposed": lambda: with_gradient(
        torch.nn.Parameter(torch.randn(130, 70)), torch.randn(70, 130).t()),
    "gradient expanded": lambda: with_gradient(
        torch.nn.Parameter(torch.randn(130, 70)), torch.randn(70).expand(130, 70)),
    "parameter with gaps": lambda: with_gradient(
        torch.nn.Parameter(torch.randn(260, 70)[::2]), torch.randn(130, 70)),
    "gradient with gaps": lambda: with_gradient(
        torch.nn.Parameter(torch.randn(130, 70)), torch.randn(130, 140)[:, ::2]),
    "complex": lambda: with_gradient(
        torch.nn.Parameter(torch.randn(50, 70, dtype=torch.complex64)),
        torch.randn(70, 50, dtype=torch.complex64).t().conj()),
}  # fmt: skip


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_and_addresses_make_no_difference(
    make: Callable[[], torch.nn.Parameter], threads: int
) -> None:
    model = [make(), *parameters([(5,)])]
    model[1].grad = torch.ones_like(model[1])
    opt = measuring(model)
    opt.step()
    assert opt.last_grad_norm == oracle(model)


def test_simd_levels_make_no_difference(backend: str) -> None:
    if backend != "cpu":
        pytest.skip("the CPU's kernels have SIMD levels")
    found = set()
    level = _core.build_info()["simd_level"]
    try:
        for name in _core.build_info()["simd_levels"]:
            _core.set_simd_level(name)
            model = [p for dtype in TYPES for p in parameters([(n,) for n in SIZES], dtype)]
            opt = measuring(model)
            set_gradients(0, model)  # of full precision
            opt.step()
            found.add(opt.last_grad_norm)
    finally:
        _core.set_simd_level(level)
    assert len(found) == 1
    assert found.pop() == pytest.approx(oracle(model), rel=1e-15)


def test_a_gradient_that_is_the_parameter_is_read_before_it_changes() -> None:
    (p,) = parameters([(20_000,)])
    p.grad = p.detach()
    expected = oracle([p])
    opt = measuring([p])
    opt.step()
    assert opt.last_grad_norm == expected
    assert opt.last_grad_norm != oracle([p])


def test_of_groups_and_types_together() -> None:
    model = [p for dtype in TYPES for p in parameters([(300,), (9000,)], dtype)]
    frozen = torch.nn.Parameter(torch.ones(3))
    opt = measuring([{"params": model[::2]}, {"params": [frozen, *model[1::2]], "lr": 0.0, "momentum": 0.0}])
    set_short_gradients(0, model)
    opt.step()
    assert opt.last_grad_norm == oracle([*model[::2], *model[1::2]])  # in the order of the optimizer


def test_squares_are_added_in_float64() -> None:
    model = parameters([(70_000,), (3,)])
    model[0].grad = torch.full((70_000,), 1e-30)
    model[1].grad = torch.full((3,), 1e30)
    opt = measuring(model)
    opt.step()
    assert opt.last_grad_norm == pytest.approx(math.sqrt(3) * 1e30, rel=1e-6)
    model[1].grad = None
    opt.step()
    assert opt.last_grad_norm == pytest.approx(math.sqrt(70_000) * 1e-30, rel=1e-6)


def test_without_gradients_it_is_zero() -> None:
    opt = measuring(parameters([(3,)]))
    opt.step()
    assert opt.last_grad_norm == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    (p,) = parameters([(300,)])
    p.grad = torch.ones_like(p)
    p.grad[299] = value
    opt = measuring([p])
    opt.step()
    assert opt.last_grad_norm is not None
    assert not math.isfinite(opt.last_grad_norm)


def test_it_is_off_unless_switched_on() -> None:
    model = parameters([(3,)])
    opt = fastlr.FusedSGD(model, lr=0.1)
    set_gradients(0, model)
    opt.step()
    assert not opt.measure_grad_norm
    assert opt.last_grad_norm is None
    opt.measure_grad_norm = True
    opt.step()
    assert opt.last_grad_norm is not None
    opt.measure_grad_norm = False
    opt.step()
    assert opt.last_grad_norm is None
    with pytest.raises(ValueError, match="measure_grad_norm must be True or False, got 1"):
        opt.measure_grad_norm = 1  # type: ignore[assignment]


def test_scaled_gradients_and_skipped_steps() -> None:
    (p,) = parameters([(300,)])
    opt = measuring([p])
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1000.0)
    scaler.scale(torch.zeros(()))
    inverse = float(np.float32(1 / 1000.0))
    for factor in (1.0, math.inf, 2.0):
        p.grad = torch.full((300,), 1000.0)
        p.grad[7] *= factor
        scaled = oracle([p])
        scaler.step(opt)
        assert opt.last_grad_norm is not None
        if factor == math.inf:
            assert math.isnan(opt.last_grad_norm)
            assert opt.last_step_skipped
        else:
            assert opt.last_grad_norm == pytest.approx(scaled * inverse, rel=1e-15)
        scaler._per_optimizer_states.clear()  # so that the scale stays
    scaler.unscale_(opt)
    unscaled = oracle([p])
    scaler.step(opt)
    assert opt.last_grad_norm == unscaled


def test_it_stays_what_it_is_until_the_next_step() -> None:
    model = parameters([(300,), (7,)])
    opt = measuring(model[:1])
    set_short_gradients(0, model)
    opt.step()
    norm = oracle(model[:1])
    opt.set_schedule(lr=fastlr.Cosine(0.1, 0.0, 10))
    opt.advance_samples(7)
    opt.state_dict()
    opt.add_param_group({"params": model[1:]})
    opt.zero_grad()
    assert opt.last_grad_norm == norm
    opt.load_state_dict(opt.state_dict())
    assert opt.last_grad_norm == norm
    set_short_gradients(1, model)
    opt.step()
    assert opt.last_grad_norm == oracle(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_measure_too(copied: Callable[[fastlr.FusedSGD], fastlr.FusedSGD]) -> None:
    model = parameters([(300,)])
    opt = measuring(model)
    set_short_gradients(0, model)
    opt.step()
    other = copied(opt)
    assert other.measure_grad_norm
    assert other.last_grad_norm is None  # it has made no step
    twin = other.param_groups[0]["params"]
    set_short_gradients(1, model, twin)
    opt.step()
    other.step()
    assert other.last_grad_norm == opt.last_grad_norm == oracle(model)
    assert "_measures_grad_norm" not in opt.state_dict()
