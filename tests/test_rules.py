"""Every update rule against torch's optimizer, to the bit, and against a float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, parameters, set_gradients, train, twins
from rule_table import (
    RULES,
    Rule,
    assert_same_run,
    close_on_devices,
    drive,
    slots,
    states,
    with_cases,
    with_rules,
)

from fastlr import _core

pytestmark = pytest.mark.usefixtures("backend")

EXACT_TYPES = [torch.float32, torch.float64]
HALF_TYPES = [torch.bfloat16, torch.float16]
with_exact_types = pytest.mark.parametrize("dtype", EXACT_TYPES, ids=str)
with_half_types = pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
with_state_dtypes = pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=["own", "float32"])

# Around SIMD widths, a staging block (512) and a chunk of CUDA's (4,096 and 8,192).
SMALL = (0, 1, 7, 8, 9, 16, 17, 33)
LARGE = (511, 513, 4095, 4096, 4097, 8191, 8192, 8193)


def misaligned(model: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The same values, each parameter one element into memory of its own."""
    moved = []
    for p in model:
        memory = torch.full((p.numel() + 1,), float("nan"), dtype=p.dtype, device=p.device)
        moved.append(torch.nn.Parameter(memory[1:].copy_(p.detach())))
    return moved


# -- bit for bit -----------------------------------------------------------------------------------


@with_cases
@with_exact_types
def test_parameters_and_state_equal_torch(
    rule: Rule, options: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    ours, theirs = twins([(n,) for n in SMALL], dtype)
    ours += misaligned(parameters([(n,) for n in SMALL], dtype, seed=1))
    theirs += parameters([(n,) for n in SMALL], dtype, seed=1, device="cpu")
    fused, reference = rule.make(ours, **options), rule.make_torch(theirs, **options)
    for step in range(31):
        set_gradients(step, ours, theirs, scale=10.0 ** (step % 5 - 2))
        reference.step()
        fused.step()
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


@with_rules
@with_exact_types
def test_large_parameters_equal_torch(rule: Rule, dtype: torch.dtype, threads: int, backend: str) -> None:
    ours, theirs = twins([(n,) for n in LARGE], dtype)
    ours += misaligned(parameters([(n,) for n in LARGE[-2:]], dtype, seed=1))
    theirs += parameters([(n,) for n in LARGE[-2:]], dtype, seed=1, device="cpu")
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    train(5, (theirs, reference.step), (ours, fused.step))
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-310, -1e-40, 3e38, 1.0]


@with_cases
@with_exact_types
def test_special_values_equal_torch(rule: Rule, options: dict[str, Any], dtype: torch.dtype) -> None:
    values = torch.tensor(SPECIAL, dtype=torch.float64, device="cpu").to(dtype)
    grid = torch.cartesian_prod(values, values)
    theirs = [torch.nn.Parameter(grid[:, 0].clone())]
    ours = [torch.nn.Parameter(theirs[0].detach().to(torch.get_default_device(), copy=True))]
    fused, reference = rule.make(ours, **options), rule.make_torch(theirs, **options)
    for _ in range(3):
        theirs[0].grad = grid[:, 1].clone()
        ours[0].grad = theirs[0].grad.to(ours[0].device, copy=True)
        fused.step()
        reference.step()
    assert_same_run(rule, (reference, theirs), (fused, ours))
    assert torch.equal(*((p.signbit() | p.isnan()).cpu() for p in (*ours, *theirs)))


def spacing(*tensors: torch.Tensor) -> torch.Tensor:
    """One unit in the last place of the largest of some numbers, element by element."""
    largest = torch.stack([t.detach().cpu().abs() for t in tensors]).amax(0)
    return torch.from_numpy(np.asarray(np.spacing(largest.numpy())))


# As each update begins from the same values, this is what a single one differs by where torch's roots are
# not rounded correctly, in units in the last place: of the largest of a parameter, what it was before, and
# what was added; of state, the same. Adadelta's acc_delta is of squares of a quotient of two roots.
MOST_ULPS = {"parameter": 2, "acc_delta": 4}  # all else is equal


@with_rules
@with_exact_types
def test_an_update_is_within_two_ulp_of_torchs_with_roots_of_its_own(rule: Rule, dtype: torch.dtype) -> None:
    # Without momentum, which may cancel an update and leave its error.
    options = {"lr": rule.lr, **rule.full} | ({"momentum": 0.0} if "momentum" in rule.full else {})
    ours, theirs = twins([(4099,)], dtype)
    fused, reference = rule.make(ours, **options), rule.torch(theirs, foreach=False, **options)
    before: dict[str, torch.Tensor] = {"parameter": theirs[0].detach().clone()}
    for step in range(8):
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        found = {"parameter": ours[0].detach(), **fused.state.get(ours[0], {})}
        after = {"parameter": theirs[0].detach(), **reference.state.get(theirs[0], {})}
        for name, wanted in after.items():
            if wanted is None:
                continue
            old = before.get(name, torch.zeros_like(wanted))
            ulps = (found[name].cpu() - wanted).abs() / spacing(old, wanted, wanted - old)
            assert ulps.max() <= MOST_ULPS.get(name, 0), name
            found[name].copy_(wanted)
            before[name] = wanted.clone()


# -- against the oracle ----------------------------------------------------------------------------

# What 30 updates may differ by, relative to the larger of 1 and the parameter.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 5e-14}


@with_cases
@with_exact_types
def test_parameters_and_state_follow_the_oracle(
    rule: Rule, options: dict[str, Any], dtype: torch.dtype
) -> None:
    (p,) = parameters([(67,)], dtype)
    optimizer = rule.make([p], **options)
    expected, state = p.detach().cpu().double().numpy().copy(), {}
    for step in range(30):
        set_gradients(step, [p])
        gradient = p.grad.cpu().double().numpy()
        optimizer.step()
        expected = rule.oracle(expected, gradient, state, step + 1, **{"lr": rule.lr, **options})
    # Of state only what the oracle has; torch's optimizers call it the same.
    found = {"parameter": p.detach()} | {name: optimizer.state[p][name] for name in state}
    for name, wanted in {"parameter": expected, **state}.items():
        error = np.abs(found[name].cpu().double().numpy() - wanted) / np.maximum(1.0, np.abs(wanted))
        assert error.max() <= TOLERANCES[dtype], name


# -- half types and complex ones -------------------------------------------------------------------


@with_cases
@with_half_types
@with_state_dtypes
def test_halves_equal_float32_rounded_once(
    rule: Rule,
    options: dict[str, Any],
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    backend: str,
) -> None:
    shapes = [(n,) for n in (*SMALL, 67)]
    ours = parameters(shapes, dtype)
    fused = rule.make(ours, state_dtype=state_dtype, **options)
    theirs = [torch.nn.Parameter(p.detach().cpu().float()) for p in ours]
    if "initial_accumulator_value" in options:  # is stored, and so rounded, before the first update
        initial = torch.tensor(options["initial_accumulator_value"], dtype=state_dtype or dtype)
        options = {**options, "initial_accumulator_value": float(initial)}
    reference = rule.make_torch(theirs, **options)
    for step in range(6):
        set_gradients(step, ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.cpu().float()
        fused.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            q.data = q.data.to(dtype).float()
            for name, value in slots(reference, q).items() if q in reference.state else ():
                if value is not None:
                    value.copy_(value.to(state_dtype or dtype))
                    assert_same([value.to(state_dtype or dtype)], [fused.state[p][name]])
        assert_same([q.data.to(dtype) for q in theirs], ours)


@with_rules
@with_half_types
def test_every_element_of_a_half_moves(rule: Rule, dtype: torch.dtype) -> None:
    model = parameters([(n,) for n in (*SMALL, 67, 8193)], dtype)
    before = [p.detach().clone() for p in model]
    optimizer = rule.make(model, **{"lr": 100 * rule.lr})
    for p in model:
        p.grad = torch.where(p.detach() > 0, 1.0, -1.0).to(dtype)
    optimizer.step()
    assert all(bool((p != b).all()) for p, b in zip(model, before, strict=True))


@with_rules
def test_float64_parameters_may_keep_their_state_in_float32(rule: Rule) -> None:
    ours, theirs = twins([(67,)], torch.float64)
    fused, reference = (
        rule.make(ours, state_dtype=torch.float32, **rule.full),
        rule.make_torch(theirs, **rule.full),
    )
    for step in range(5):
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        for value in slots(reference, theirs[0]).values():
            value.copy_(value.float())
        assert_same(theirs, ours)
        for name, value in slots(reference, theirs[0]).items():
            assert_same([value.float()], [fused.state[ours[0]][name]])


@with_rules
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_is_pairs_of_reals(rule: Rule, full: bool, dtype: torch.dtype, backend: str) -> None:
    options = rule.full if full else {}
    ours = parameters([(5,), (3, 4), (), (0,)], dtype)
    pairs = [torch.nn.Parameter(torch.view_as_real(p.detach().cpu().clone())) for p in ours]
    fused, reference = rule.make(ours, **options), rule.make_torch(pairs, **options)
    for step in range(8):
        set_gradients(step, ours)
        for p, q in zip(ours, pairs, strict=True):
            q.grad = torch.view_as_real(p.grad.cpu().clone())
        fused.step()
        reference.step()
    close = close_on_devices(rule, backend)
    assert_same(pairs, [torch.view_as_real(p.detach()) for p in ours], close)
    for p, q in zip(ours, pairs, strict=True):
        for name, value in slots(reference, q).items():
            if value is not None:
                assert_same([value], [torch.view_as_real(fused.state[p][name])], close)


# -- ages: each parameter counts its own updates ---------------------------------------------------

# The steps at which a parameter has no gradient.
MISSING: dict[str, tuple[int, ...]] = {
    "always-there": (),
    "late": (0, 1, 2),
    "gone": tuple(range(4, 14)),
    "returning": (3, 4, 8),
    "once": tuple(i for i in range(14) if i != 5),
    "never": tuple(range(14)),
}


@with_rules
@with_exact_types
@pytest.mark.parametrize("scheduled", [False, True], ids=["fixed", "scheduled"])
def test_parameters_of_several_ages_equal_torch(
    rule: Rule, dtype: torch.dtype, scheduled: bool, backend: str
) -> None:
    """Also where betas change: bias correction takes the present ones, ``1 - beta ** step``."""
    ours, theirs = twins([(9,)] * len(MISSING), dtype)
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    if scheduled:
        fused.set_schedule(**rule.drives)
    for step in range(14):
        set_gradients(step, ours, theirs)
        for model in (ours, theirs):
            for p, missing in zip(model, MISSING.values(), strict=True):
                if step in missing:
                    p.grad = None
        if scheduled:
            drive(reference.param_groups[0], rule.drives, step)
        fused.step()
        reference.step()
        assert_same(theirs, ours, close_on_devices(rule, backend))
    assert (ours[-1] in fused.state) is False
    if rule.counts:
        ages = [int(fused.state[p]["step"]) for p in ours[:-1]]
        assert ages == [14 - len(missing) for missing in MISSING.values()][:-1]


# The corrections of betas near 1 go on for as long as a float32 counts.
AGES = (0, 1, 99, 999, 1000, 1001, 4321, 100_000, 2**24 - 2)
SLOW = {
    "Adam": {"betas": (0.999, 0.99999), "amsgrad": True},
    "AdamW": {"betas": (0.999, 0.99999)},
    "Adagrad": {"lr_decay": 1e-3},
}


@pytest.mark.parametrize(("name", "options"), SLOW.items(), ids=SLOW)
@with_exact_types
def test_old_state_equals_torch(name: str, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    rule = RULES[name]
    ours, theirs = twins([(9,)] * len(AGES), dtype)
    fused, reference = rule.make(ours, **options), rule.make_torch(theirs, **options)
    train(1, (theirs, reference.step), (ours, fused.step))
    for optimizer, model in ((fused, ours), (reference, theirs)):
        for p, age in zip(model, AGES, strict=True):
            optimizer.state[p]["step"].fill_(float(age))
    train(2, (theirs, reference.step), (ours, fused.step), start=1)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))
    assert [int(fused.state[p]["step"]) for p in ours] == [age + 2 for age in AGES]


# -- state that is no number -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@with_exact_types
def test_what_is_no_number_in_the_largest_squares_stays_as_in_torch(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    """In the largest so far, in the average, in both: torch's maximum is a NaN where one of them is."""
    rule = RULES[name]
    ours, theirs = twins([(9,)], dtype)
    fused, reference = (rule.make(ours, amsgrad=True), rule.make_torch(theirs, amsgrad=True))
    train(1, (theirs, reference.step), (ours, fused.step))
    nan, inf = float("nan"), float("inf")
    for optimizer, p in ((fused, ours[0]), (reference, theirs[0])):
        for slot, values in (
            ("max_exp_avg_sq", (nan, 0.5, nan, inf, 0.5, nan)),
            ("exp_avg_sq", (0.5, nan, nan, 0.5, inf, inf)),
        ):
            for place, value in enumerate(values):
                optimizer.state[p][slot][place] = value
    train(2, (theirs, reference.step), (ours, fused.step), start=1)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))
    largest = fused.state[ours[0]]["max_exp_avg_sq"]
    assert largest.isnan().nonzero().flatten().tolist() == [0, 1, 2, 5]


# -- what a result does not depend on --------------------------------------------------------------


def trained(
    rule: Rule, dtype: torch.dtype, *, threads: int = 2, scale: float = 1.0, flush: bool = False
) -> list[torch.Tensor]:
    """Parameters and state after some updates of more elements than one thread takes."""
    torch.set_num_threads(threads)
    model = parameters([(16500,), (129,), (0,), (8, 5)], dtype)
    for p in model:
        p.data.mul_(scale)
    optimizer = rule.make(model, **rule.full)
    for step in range(3):
        set_gradients(step, model, scale=scale)
        model[3].grad = model[3].grad.t().contiguous().t()
        torch.set_flush_denormal(flush)
        optimizer.step()
        torch.set_flush_denormal(False)
    return [p.detach() for p in model] + states(optimizer, model)


with_all_types = pytest.mark.parametrize("dtype", [*EXACT_TYPES, *HALF_TYPES], ids=str)


@with_rules
@with_all_types
def test_results_do_not_depend_on_threads_or_flushed_denormals(
    rule: Rule, dtype: torch.dtype, backend: str
) -> None:
    if backend != "cpu":
        pytest.skip("the CPU's kernels have threads and flush denormals")
    assert_same(trained(rule, dtype, threads=1), trained(rule, dtype, threads=3))
    tiny = float(torch.finfo(dtype).tiny)  # everything around the smallest normal number
    expected = trained(rule, dtype, threads=1, scale=tiny)
    for threads in (1, 2):
        assert_same(expected, trained(rule, dtype, threads=threads, scale=tiny, flush=True))


@with_rules
@with_all_types
def test_results_do_not_depend_on_simd_levels_or_the_exchange(
    rule: Rule, dtype: torch.dtype, backend: str
) -> None:
    if backend != "cpu":
        pytest.skip("the CPU's kernels have SIMD levels")
    expected = trained(rule, dtype)
    level, levels = _core.build_info()["simd_level"], _core.build_info()["simd_levels"]
    try:
        for name in levels:
            _core.set_simd_level(name)
            assert_same(expected, trained(rule, dtype))
        _core.set_exchange_enabled(False)
        assert_same(expected, trained(rule, dtype))
    finally:
        _core.set_exchange_enabled(True)
        _core.set_simd_level(level)
