"""Half parameters with master weights: steps as if they were float32, to the bit."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams
from helpers import LAYOUTS, assert_same, leaves, parameters, set_gradients, through_file
from pages import DOCS
from rule_table import RULES, Rule, slots, with_rules
from torch.distributed.checkpoint import state_dict as dcp

import fastlr

SHAPES = [(8193,), (7,), (0,), (), (8500,), (33, 9)]
HALVES = (torch.bfloat16, torch.float16)
KEPT = {torch.bfloat16: torch.int16, torch.float16: torch.float32}
# How docs/numerics.md puts the two halves of a master together.
(WHOLE,) = re.findall(r"`(\(\(p\.view.*?)` is the whole", (DOCS / "numerics.md").read_text("utf-8"))
with_backends = pytest.mark.usefixtures("backend")
with_halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def stored(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The parameter beside a float32 master: rounded to nearest, of bfloat16 halfway away from zero."""
    if dtype is torch.float16:
        return master.half()
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def masters(optimizer: torch.optim.Optimizer, model: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    found = []
    for p in model:
        kept = optimizer.state[p]["master"]
        assert kept.dtype is KEPT[p.dtype]
        if p.dtype is torch.bfloat16:
            kept = eval(WHOLE, {"torch": torch, "p": p.detach(), "master": kept})
        found.append(kept)
    return found


def widened(model: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().float()) for p in model]


def train_both(steps: range, ours: Any, wide: Any, *optimizers: Any, scale: float = 1.0) -> None:
    for step in steps:
        set_gradients(step, ours, scale=scale)
        for p, q in zip(ours, wide, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        for optimizer in optimizers:
            optimizer.step()


def assert_same_masters(fused: Any, ours: Any, wide_optimizer: Any, wide: Any) -> None:
    assert_same(wide, masters(fused, ours))
    assert_same([stored(q.detach(), p.dtype) for p, q in zip(ours, wide, strict=True)], ours)
    for p, q in zip(ours, wide, strict=True):
        mine, its = slots(fused, p), slots(wide_optimizer, q)
        for name in its:
            assert_same([its[name]], [mine[name]])


@with_backends
@with_rules
@with_halves
def test_as_if_the_parameters_were_float32(rule: Rule, dtype: torch.dtype, threads: int) -> None:
    ours = parameters(SHAPES, dtype)
    wide = widened(ours)
    options = {**rule.full, "max_grad_norm": 2.0, "ema_decay": 0.9}
    fused, reference = rule.make(ours, master_weights=True, **options), rule.make(wide, **options)
    for step in range(5):
        if step == 2:
            ours[-1].grad = None
        train_both(range(step, step + 1), ours, wide, fused, reference)
        assert fused.last_grad_norm == reference.last_grad_norm
    assert_same_masters(fused, ours, reference, wide)
    assert_same([reference.state[q]["ema"] for q in wide], [fused.state[p]["ema"] for p in ours])


@with_backends
@with_rules
@with_halves
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rule: Rule, dtype: torch.dtype, layout: str) -> None:
    base = torch.randn((6, 4, 5, 3), generator=torch.Generator().manual_seed(0), device="cpu")
    device = torch.get_default_device()
    ours = [LAYOUTS[layout](base.to(device, dtype, copy=True)).detach().requires_grad_()]
    wide = widened(ours)
    fused, reference = rule.make(ours, master_weights=True, **rule.full), rule.make(wide, **rule.full)
    for step in range(4):
        if step == 2:  # the master's part alone in another order
            kept = fused.state[ours[0]]["master"]
            fused.state[ours[0]]["master"] = torch.stack([kept, kept], dim=-1)[..., 0]
        train_both(range(step, step + 1), ours, wide, fused, reference)
    assert_same_masters(fused, ours, reference, wide)


@with_backends
@with_halves
def test_an_update_far_below_a_unit_in_the_last_place_is_not_lost(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.ones(600, dtype=dtype))
    fused = fastlr.FusedSGD([p], lr=2.0**-20, master_weights=True)
    for _ in range(2**10):
        p.grad = torch.full_like(p, -1.0)
        fused.step()
    (master,) = masters(fused, [p])
    assert_same([torch.full_like(master, 1.0 + 2.0**-10)], [master])


@with_backends
@with_halves
def test_whoever_writes_the_parameter_moves_the_master(dtype: torch.dtype) -> None:
    """To within half a unit in the last place of what was written."""
    model = parameters([(700,)], dtype)
    (p,) = model
    fused = fastlr.FusedSGD(model, lr=0.01, master_weights=True)
    for written in (torch.zeros_like(p), -torch.zeros_like(p), torch.full_like(p, 3.0), p.detach() * 7):
        set_gradients(0, model)
        fused.step()
        p.data.copy_(written)
        p.grad = torch.zeros_like(p)
        fused.step()
        (master,) = masters(fused, model)
        assert bool(master.isfinite().all())
        assert_same([written.abs()], [p.detach().abs()])
        unit = 2.0**-8 if dtype is torch.bfloat16 else 0.0
        bound = (written.float().abs() * unit).clamp_min(2.0**-134)
        assert bool(((master - written.float()).abs() <= bound).all())
    p.data.fill_(torch.inf)
    fused.step()
    assert bool((p == torch.inf).all())


@with_backends
@with_halves
def test_special_numbers(dtype: torch.dtype) -> None:
    largest = torch.finfo(torch.float32).max
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, -largest, 2.0**-149, 1.0 + 2.0**-8]
    p = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    q = torch.nn.Parameter(torch.zeros(len(values)))
    fused, reference = fastlr.FusedSGD([p], lr=1.0, master_weights=True), fastlr.FusedSGD([q], lr=1.0)
    for target in (values, [1.0] * len(values)):
        p.grad = (p.detach().float() - torch.tensor(target)).to(dtype)
        q.grad = p.grad.float()
        fused.step()
        reference.step()
        (master,) = masters(fused, [p])
        same = (master == q) | (master.isnan() & q.isnan())
        assert bool(same.all())


@with_backends
@with_rules
@with_halves
def test_a_resume_in_the_middle_changes_nothing(rule: Rule, dtype: torch.dtype) -> None:
    ours = parameters(SHAPES, dtype)
    wide = widened(ours)
    fused = rule.make(ours, master_weights=True, ema_decay=0.5, **rule.full)
    reference = rule.make(wide, ema_decay=0.5, **rule.full)
    train_both(range(3), ours, wide, fused, reference)
    file = fused.state_dict()
    assert torch.dtype not in leaves(file)
    model = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    loaded = rule.make(model)
    loaded.load_state_dict(through_file(file))
    train_both(range(3, 6), model, wide, loaded, reference)
    assert_same_masters(loaded, model, reference, wide)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert_same_masters(other, other.param_groups[0]["params"], reference, wide)


@with_backends
def test_through_distributed_checkpoints() -> None:
    def made() -> tuple[torch.nn.Module, fastlr.FusedAdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
        return model, fastlr.FusedAdamW(model.parameters(), lr=0.1, master_weights=True)

    model, fused = made()
    wide = widened(list(model.parameters()))
    reference = fastlr.FusedAdamW(wide, lr=0.1)
    train_both(range(2), list(model.parameters()), wide, fused, reference)
    weights, state = dcp.get_state_dict(model, fused)
    other, loaded = made()
    dcp.set_state_dict(other, loaded, model_state_dict=weights, optim_state_dict=state)
    train_both(range(2, 4), list(other.parameters()), wide, loaded, reference)
    assert_same_masters(loaded, list(other.parameters()), reference, wide)


@with_backends
@with_rules
def test_wide_parameters_stay_as_they_are(rule: Rule) -> None:
    ours, theirs = (parameters([(300,)]) + parameters([(40,)], torch.float64) for _ in range(2))
    fused, plain = rule.make(ours, master_weights=True, **rule.full), rule.make(theirs, **rule.full)
    for step in range(2):
        set_gradients(step, ours, theirs)
        fused.step()
        plain.step()
    assert_same(theirs, ours)
    assert all("master" not in fused.state[p] for p in ours)
    assert {v.dtype for v in slots(fused, ours[1]).values()} == {torch.float64}


@with_backends
def test_state_begins_from_the_parameter_where_a_file_has_no_master() -> None:
    """As a file of torch's, or of an optimizer without master weights."""
    ours = parameters([(500,)], torch.bfloat16)
    plain = fastlr.FusedAdamW(ours, lr=0.1)
    set_gradients(0, ours)
    plain.step()
    file = plain.state_dict()
    fused = fastlr.FusedAdamW(ours, lr=0.1, master_weights=True)
    del file["param_groups"][0]["master_weights"]
    fused.load_state_dict(file)
    assert {v.dtype for v in slots(fused, ours[0]).values()} == {torch.float32}
    wide = widened(ours)
    set_gradients(1, ours)
    fused.step()
    (master,) = masters(fused, ours)
    assert bool(((master - wide[0]).abs() < 0.3).all())


@with_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_file_of_another_types_parameters_is_refused(dtype: torch.dtype) -> None:
    ours = parameters([(5,)], torch.bfloat16)
    fused = fastlr.FusedAdamW(ours, lr=0.1, master_weights=True)
    set_gradients(0, ours)
    fused.step()
    other = fastlr.FusedAdamW(parameters([(5,)], dtype), lr=0.1, master_weights=True)
    with pytest.raises(
        ValueError, match=rf"master 0 has torch\.int16, and not what is kept beside {dtype}: "
    ):
        other.load_state_dict(fused.state_dict())
    assert not other.state


@with_backends
@with_halves
def test_a_master_that_torch_has_rounded_is_refused(dtype: torch.dtype) -> None:
    ours = parameters([(5,)], dtype)
    fused = fastlr.FusedAdamW(ours, lr=0.1, master_weights=True)
    set_gradients(0, ours)
    fused.step()
    kept = str(fused.state_dict())
    torchs = torch.optim.AdamW(ours, lr=0.1)
    torchs.load_state_dict(fused.state_dict())
    with pytest.raises(
        ValueError, match="or an optimizer of torch's has loaded it, which rounds it; take it"
    ):
        fused.load_state_dict(torchs.state_dict())
    assert str(fused.state_dict()) == kept


@with_backends
@with_halves
def test_a_model_that_is_no_half_any_more_goes_on_without(dtype: torch.dtype) -> None:
    model = torch.nn.Linear(3, 2, dtype=dtype)
    fused = fastlr.FusedSGD(model.parameters(), lr=0.1, momentum=0.9, master_weights=True)
    set_gradients(0, list(model.parameters()))
    fused.step()
    model.float()
    set_gradients(1, list(model.parameters()))
    fused.step()
    file = through_file(fused.state_dict())
    assert all("master" not in entry for entry in file["state"].values())
    fused.load_state_dict(file)


@with_backends
def test_complex_halves() -> None:
    p = torch.nn.Parameter(torch.view_as_complex(torch.ones(5, 2, dtype=torch.float16)))
    fused = fastlr.FusedSGD([p], lr=2.0**-12, momentum=0.5, master_weights=True)
    for _ in range(2):
        p.grad = torch.view_as_complex(torch.full((5, 2), -1.0, dtype=torch.float16))
        fused.step()
        fused.load_state_dict(copy.deepcopy(fused.state_dict()))
    master = torch.view_as_real(fused.state[p]["master"])
    assert_same([torch.full((5, 2), 1.0 + 2.5 * 2.0**-12)], [master])
    with pytest.raises(ValueError, match="has complex32"):
        fastlr.FusedSGD([p], stochastic_rounding=True)


@with_backends
def test_what_is_refused() -> None:
    model = parameters([(5,)], torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"stochastic_rounding .*must be False with master_weights=True.* got True"
    ):
        fastlr.FusedSGD(model, master_weights=True, stochastic_rounding=True)
    fused = fastlr.FusedSGD(model, momentum=0.9, master_weights=True)
    set_gradients(0, model)
    fused.step()
    fused.state[model[0]]["master"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"the master of parameter 0 .* has float32; .* takes int16"):
        fused.step()
    fused.state[model[0]]["master"] = torch.zeros(5, dtype=torch.int16)
    fused.state[model[0]]["momentum_buffer"] = torch.zeros(5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="takes float32 with master_weights=True"):
        fused.step()


@with_backends
def test_averaged_weights_come_and_go() -> None:
    for dtype in HALVES:
        ours = parameters([(500,)], dtype)
        wide = widened(ours)
        fused = fastlr.FusedAdamW(ours, lr=0.1, master_weights=True, ema_decay=0.5)
        reference = fastlr.FusedAdamW(wide, lr=0.1, ema_decay=0.5)
        train_both(range(2), ours, wide, fused, reference)
        with fused.averaged_weights():
            assert_same([reference.state[wide[0]]["ema"].to(dtype)], ours)
        train_both(range(2, 4), ours, wide, fused, reference)
        assert_same_masters(fused, ours, reference, wide)


# -- devices -------------------------------------------------------------------------------------


@pytest.fixture
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


@with_halves
@pytest.mark.parametrize("rule", [RULES["SGD"], RULES["AdamW"]], ids=["SGD", "AdamW"])
def test_a_graph_keeps_masters(cuda: ModuleType, rule: Rule, dtype: torch.dtype) -> None:
    ours = parameters([(9000,), (5,)], dtype)
    wide = widened(ours)
    fused, reference = rule.make(ours, master_weights=True), rule.make(wide)
    train_both(range(1), ours, wide, fused, reference)
    graph = Graph(cuda, fused.step)
    for _ in range(3):
        for p, q in zip(ours, wide, strict=True):
            q.grad = torch.randn(p.shape).to(dtype).float()
            p.grad.copy_(q.grad)
        graph.replay()
        reference.step()
    assert_same_masters(fused, ours, reference, wide)


def test_masters_of_more_than_16_bits_are_refused() -> None:
    """Files of distributed runs hold them as int32."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.3)
    opt = fastlr.FusedAdamW([p], master_weights=True)
    opt.step()
    saved = opt.state_dict()
    kept = saved["state"][0]["master"].clone()
    saved["state"][0]["master"] = kept.int()
    opt.load_state_dict(saved)
    assert torch.equal(opt.state[p]["master"], kept)
    for bad in (2**15, -(2**15) - 1):
        saved["state"][0]["master"] = torch.full((4,), bad, dtype=torch.int32)
        with pytest.raises(
            ValueError, match=rf"must hold 16 bits of each element, got numbers from {bad} to {bad}"
        ):
            opt.load_state_dict(saved)
    assert torch.equal(opt.state[p]["master"], kept)
