"""Averages of the parameters, kept by the step: what they are, to the bit, and how they are put to use."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams, counted
from helpers import LAYOUTS, assert_same, leaves, parameters, set_gradients, through_file, train, twins
from rule_table import Rule, assert_same_run, close_on_devices, with_rules
from torch.distributed.checkpoint import state_dict as dcp

import fastlr
from fastlr import _core
from fastlr._runtime import Runtime

SHAPES = [(8193,), (7,), (0,), (), (16500,), (33, 9)]
HALVES = (torch.bfloat16, torch.float16)
with_backends = pytest.mark.usefixtures("backend")


class Follower:
    """The averages of some parameters as torch has them: clones, then ``lerp_``."""

    def __init__(self, model: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> None:
        self.model = model
        widen = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
        self.averages = [p.detach().to("cpu", dtype or widen.get(p.dtype, p.dtype), copy=True) for p in model]

    def follow(self, decay: float) -> None:
        for average, p in zip(self.averages, self.model, strict=True):
            end = p.detach().to("cpu", average.dtype)
            if average.is_complex():  # pairs of reals
                average, end = torch.view_as_real(average), torch.view_as_real(end)
            average.lerp_(end, 1 - decay)


def warm(decay: float, t: int) -> float:
    return min(decay, (1 + t) / (10 + t))


def averages_of(optimizer: fastlr.FusedOptimizer, model: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [optimizer.state[p]["ema"] for p in model]


def without_averages(optimizer: fastlr.FusedOptimizer) -> fastlr.FusedOptimizer:
    """For a comparison of the rest of the state."""
    for entry in optimizer.state.values():
        entry.pop("ema", None)
    return optimizer


# -- what they are -------------------------------------------------------------------------------


@with_backends
@with_rules
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.999], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_torchs_step_and_lerp(
    rule: Rule, dtype: torch.dtype, decay: float, threads: int, backend: str
) -> None:
    ours, theirs = twins(SHAPES, dtype)
    fused = rule.make(ours, ema_decay=decay, **rule.full)
    reference = rule.make_torch(theirs, **rule.full)
    follower = Follower(theirs)
    for step in range(3):
        set_gradients(step, ours, theirs)
        ours[-1].grad = ours[-1].grad.t().contiguous().t()
        fused.step()
        reference.step()
        follower.follow(decay)
        close = close_on_devices(rule, backend)
        assert_same(follower.averages, averages_of(fused, ours), close)
    assert_same_run(rule, (reference, theirs), (without_averages(fused), ours), close)


@with_backends
@with_rules
@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("ema_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64, torch.complex64], ids=str)
def test_types(
    rule: Rule, dtype: torch.dtype, ema_dtype: torch.dtype | None, state_dtype: torch.dtype | None
) -> None:
    """Averages follow the parameters as they are stored, and nothing else of an update changes by them."""
    ours, theirs = (parameters(SHAPES, dtype) for _ in range(2))
    options = {**rule.full, "state_dtype": state_dtype}
    fused = rule.make(ours, ema_decay=0.7, ema_dtype=ema_dtype, **options)
    plain = rule.make(theirs, **options)
    follower = Follower(theirs, None if ema_dtype else dtype)
    for step in range(3):
        set_gradients(step, ours, theirs)
        fused.step()
        plain.step()
        follower.follow(0.7)
    expected = torch.float32 if ema_dtype and dtype in HALVES else dtype
    assert {average.dtype for average in averages_of(fused, ours)} == {expected}
    assert_same(follower.averages, averages_of(fused, ours))
    assert_same_run(rule, (plain, theirs), (without_averages(fused), ours))


@with_backends
@with_rules
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(rule: Rule, dtype: torch.dtype, layout: str) -> None:
    base = torch.randn((6, 4, 5, 3), generator=torch.Generator().manual_seed(0), device="cpu")
    device = torch.get_default_device()
    ours, theirs = ([LAYOUTS[layout](base.to(device, dtype, copy=True)).detach()] for _ in range(2))
    fused = rule.make(ours, ema_decay=0.9, **rule.full)
    plain = rule.make(theirs, **rule.full)
    follower = Follower(theirs)
    for step in range(4):
        set_gradients(step, ours, theirs)
        if step == 2:  # the average alone in another order
            (average,) = averages_of(fused, ours)
            fused.state[ours[0]]["ema"] = torch.stack([average, average], dim=-1)[..., 0]
        fused.step()
        plain.step()
        follower.follow(0.9)
        assert_same(follower.averages, averages_of(fused, ours))
    assert_same_run(rule, (plain, theirs), (without_averages(fused), ours))


def test_threads_and_simd_levels_make_no_difference() -> None:
    found = []
    level = _core.build_info()["simd_level"]
    try:
        for name in _core.build_info()["simd_levels"]:
            for threads in (1, 2, 3):
                _core.set_simd_level(name)
                torch.set_num_threads(threads)
                model = parameters([(70_001,), (33,)]) + parameters([(20_001,)], torch.float16)
                fused = fastlr.FusedAdamW(model, lr=0.1, ema_decay=0.3, max_grad_norm=1.0)
                fused.measure_grad_norm = True
                for step in range(2):
                    set_gradients(step, model)
                    fused.step()
                found.append(averages_of(fused, model))
    finally:
        _core.set_simd_level(level)
    for other in found[1:]:
        assert_same(found[0], other)


# -- the decay -----------------------------------------------------------------------------------


@with_backends
@with_rules
def test_the_decay_warms_up_with_the_updates_before(rule: Rule) -> None:
    ours, theirs = (parameters(SHAPES) for _ in range(2))
    lr = fastlr.Triangular(rule.lr, 2 * rule.lr, 3)
    fused = rule.make(ours, lr=lr, ema_decay=0.35, ema_warmup=True)
    plain = rule.make(theirs, lr=lr)
    follower = Follower(theirs)
    for t in range(8):  # 0.1, 2/11, 0.25, 4/13, then 0.35
        set_gradients(t, ours, theirs)
        fused.step()
        plain.step()
        follower.follow(warm(0.35, t))
        assert_same(follower.averages, averages_of(fused, ours))
    fused.set_clock(updates=1000)
    assert fused.param_groups[0]["ema_decay"] == 0.35


@with_backends
@with_rules
def test_a_schedule_drives_it(rule: Rule) -> None:
    decay = fastlr.LinearRamp(0.0, 0.99, 20)
    ours, theirs = (parameters(SHAPES) for _ in range(2))
    fused, plain = rule.make(ours, ema_decay=decay, ema_warmup=True), rule.make(theirs)
    follower = Follower(theirs)
    for t in range(10):
        if t == 4:
            fused.set_schedule(ema_decay=0.25)
        if t == 6:
            fused.set_schedule(ema_decay=decay, start="zero")
        expected = 0.25 if t in (4, 5) else decay._native.value(t)
        assert fused.param_groups[0]["ema_decay"] == expected
        train(1, (ours, fused.step), (theirs, plain.step), start=t)
        follower.follow(warm(expected, t))
        assert_same(follower.averages, averages_of(fused, ours))


@with_backends
def test_groups_have_their_own() -> None:
    model = parameters([(300,), (40,), (50,)])
    groups = [
        {"params": model[:1], "ema_decay": 0.5},
        {"params": model[1:2], "ema_decay": None},
        {"params": model[2:]},
    ]
    fused = fastlr.FusedSGD(groups, lr=0.1, ema_decay=fastlr.Constant(0.9), ema_warmup=True)
    followers = [Follower([p]) for p in model]
    for t in range(3):
        train(1, (model, fused.step), start=t)
        followers[0].follow(warm(0.5, t))
        followers[2].follow(warm(0.9, t))
    assert "ema" not in fused.state.get(model[1], {})
    for k in (0, 2):
        assert_same(followers[k].averages, averages_of(fused, [model[k]]))
    (late,) = parameters([(8,)], seed=1)
    fused.add_param_group({"params": [late], "ema_decay": 0.25, "ema_warmup": False})
    follower = Follower([late])
    train(1, ([*model, late], fused.step), start=3)
    follower.follow(0.25)
    assert_same(follower.averages, averages_of(fused, [late]))


@with_backends
@with_rules
def test_it_is_switched_on_and_off_between_steps(rule: Rule) -> None:
    """What is switched on begins as the parameter then is; what is off stays."""
    ours, theirs = (parameters(SHAPES) for _ in range(2))
    fused, plain = rule.make(ours, **rule.full), rule.make(theirs, **rule.full)
    train(2, (ours, fused.step), (theirs, plain.step))
    fused.param_groups[0]["ema_decay"] = 0.9
    follower = Follower(theirs)
    for t in range(2, 4):
        train(1, (ours, fused.step), (theirs, plain.step), start=t)
        follower.follow(0.9)
    fused.param_groups[0]["ema_decay"] = None
    train(1, (ours, fused.step), (theirs, plain.step), start=4)
    assert_same(follower.averages, averages_of(fused, ours))
    assert_same_run(rule, (plain, theirs), (without_averages(fused), ours))


# -- updates that are not ------------------------------------------------------------------------


@with_backends
@with_rules
def test_skipped_updates_change_no_average(rule: Rule) -> None:
    lr, decay = fastlr.LinearRamp(rule.lr, 0.0, 10), fastlr.LinearRamp(0.1, 0.9, 10)
    ours, theirs = (parameters([(300,), (9000,), (4,)]) for _ in range(2))
    fused = rule.make(ours, lr=lr, ema_decay=decay, ema_warmup=True, max_grad_norm=1.0)
    plain = rule.make(theirs, lr=lr, max_grad_norm=1.0)
    follower = Follower(theirs)
    applied = 0
    for step in range(6):
        set_gradients(step, ours, theirs)
        skips = step in (0, 2, 3)
        if step == 2:
            ours[0].grad[7] = math.nan
        elif skips:
            fused.found_inf = torch.tensor(1.0)
        fused.step()
        fused.__dict__.pop("found_inf", None)
        if not skips:
            plain.step()
            follower.follow(warm(decay._native.value(applied), applied))
            applied += 1
        assert fused.last_step_skipped is skips
        if applied:
            assert_same(follower.averages, averages_of(fused, ours))
    assert fused.sync().updates == 3
    assert_same_run(rule, (plain, theirs), (without_averages(fused), ours))


@with_backends
@with_rules
def test_late_gradients(rule: Rule) -> None:
    """A parameter that begins late begins as it then is, and one without a gradient stands still."""
    model = parameters([(300,), (40,)])
    fused = rule.make(model, ema_decay=0.9, **rule.full)
    set_gradients(0, model)
    model[1].grad = None
    fused.step()
    assert model[1] not in fused.state
    with torch.no_grad():
        model[1] += 1.0  # by somebody else
    followers = [Follower([p]) for p in model]
    set_gradients(1, model)
    before = fused.state[model[0]]["ema"].clone()
    model[0].grad = None
    fused.step()
    followers[1].follow(0.9)
    assert_same([before, *followers[1].averages], averages_of(fused, model))


SKIPS = ["norm", "found_inf", "GradScaler"]


@with_backends
@with_rules
@pytest.mark.parametrize("by", SKIPS)
def test_they_begin_before_the_first_applied_update(rule: Rule, by: str, backend: str) -> None:
    """As the parameters then are, whatever was skipped before, and whoever has changed them since; on
    devices, which alone know what they skip, before the first step."""
    model = parameters([(300,), (9000,)])
    fused = rule.make(model, ema_decay=0.9, max_grad_norm=1.0 if by == "norm" else None, **rule.full)
    scaler = fastlr.GradScaler(torch.get_default_device().type, init_scale=4.0)
    scaler.scale(torch.zeros(()))  # sets it up
    for step in range(2):
        set_gradients(step, model)
        if step == 0:
            model[1].grad[7] = math.nan
        if by == "found_inf":
            fused.found_inf = torch.tensor(1.0 - step)
        if by == "GradScaler":
            scaler.step(fused)
            scaler.update()
        else:
            fused.step()
        assert fused.last_step_skipped == (step == 0)
        if step == 0:
            follower = Follower(model)
            with torch.no_grad():
                torch._foreach_mul_(model, 2.0)
            if backend == "cpu":
                follower = Follower(model)
    follower.follow(0.9)
    assert_same(follower.averages, averages_of(fused, model))


def test_a_distributed_checkpoint_before_the_first_update_is_of_none() -> None:
    """The first update has no dampening, whether or not there is an average, which is no zero."""

    def first_update(**options: Any) -> torch.Tensor:
        models = [torch.nn.Linear(3, 1, bias=False) for _ in range(2)]
        made = []
        for model in models:
            torch.nn.init.ones_(model.weight)
            parameters = model.parameters()
            made.append(fastlr.FusedSGD(parameters, lr=1.0, momentum=0.9, dampening=0.5, **options))
        dcp.set_optimizer_state_dict(models[1], made[1], dcp.get_optimizer_state_dict(models[0], made[0]))
        models[1].weight.grad = torch.ones_like(models[1].weight)
        made[1].step()
        return models[1].weight.detach()

    assert_same([first_update()], [first_update(ema_decay=0.9)])


# -- their use -----------------------------------------------------------------------------------


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[torch.Tensor], Any]:
    model: list[torch.Tensor] = list(parameters([(300,), (40,), (3,)], dtype))
    fused = fastlr.FusedSGD(model, lr=0.1, ema_decay=0.9, **options)
    set_gradients(0, model)
    model[2].grad = None  # never updated
    fused.step()
    return model, fused


@with_backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_averaged_weights_come_and_go_to_the_bit(dtype: torch.dtype) -> None:
    model, fused = trained(dtype)
    with torch.no_grad():
        model[0][0] = math.nan
        model[0][1] = -0.0
    addresses = [p.data_ptr() for p in model]
    words = {4: torch.int32, 2: torch.int16}[model[0].element_size()]
    before = [p.detach().clone() for p in model]
    averages = [average.clone() for average in averages_of(fused, model[:2])]
    with fused.averaged_weights():
        assert_same([*(a.to(dtype) for a in averages), before[2]], model)
        assert_same(averages, averages_of(fused, model[:2]))
        assert not torch.equal(model[1], before[1])
    with pytest.raises(KeyError), fused.averaged_weights():
        raise KeyError
    assert_same([p.view(words) for p in before], [p.detach().view(words) for p in model])
    assert addresses == [p.data_ptr() for p in model]
    train(1, (model, fused.step), start=1)


def test_before_the_first_update_weights_stay() -> None:
    model = network()
    fused = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9)
    before = copy.deepcopy(model.state_dict())
    with fused.averaged_weights():
        assert_same(before.values(), model.state_dict().values())
    fused.copy_averages_to(model)
    assert_same(before.values(), fused.averaged_state_dict(model).values())


@with_backends
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_come_back_where_putting_them_back_is_stopped(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model, fused = trained()
    before = [p.detach().clone() for p in model]
    copies = []

    def copy_or_stop(tensors: list[torch.Tensor], originals: list[torch.Tensor]) -> None:
        copies.append(tensors)
        if len(copies) == 2:
            raise error
        with torch.no_grad():
            torch._foreach_copy_(tensors, originals)

    monkeypatch.setattr(Runtime, "copy", staticmethod(copy_or_stop))
    with pytest.raises(error), fused.averaged_weights():
        pass
    assert_same(before, model)
    set_gradients(0, model)
    fused.step()  # which nothing keeps off


@with_backends
def test_a_parameter_that_becomes_another_in_the_block_costs_no_other_its_weights() -> None:
    model, fused = trained()
    before = [p.detach().clone() for p in model]
    with pytest.raises(RuntimeError), fused.averaged_weights():
        model[0].data = model[0].data[:2]
    assert_same(before[1:], model[1:])
    model[0].data = before[0]
    set_gradients(0, model)
    fused.step()


def test_no_block_is_opened_while_a_step_runs() -> None:
    """Nor by the closure of a step, which then does not update averages."""
    model, fused = trained()
    block = fused.averaged_weights()

    def closure() -> float:
        block.__enter__()
        return 0.0

    before = [p.detach().clone() for p in model]
    with pytest.raises(RuntimeError, match=r"step\(\) inside averaged_weights\(\)"):
        fused.step(closure)
    block.__exit__(None, None, None)
    assert_same(before, model)
    large = parameters([(8_000_000,)])
    slow = fastlr.FusedAdamW(large, lr=0.1, ema_decay=0.9)
    set_gradients(0, large)
    slow.step()
    tries: list[str] = []

    def open_block() -> None:
        try:
            with slow.averaged_weights():
                tries.append("opened")
        except RuntimeError as error:
            tries.append(str(error))

    def step() -> None:
        while slow.clock().updates < 11:
            with contextlib.suppress(RuntimeError):
                slow.step()

    stepping = threading.Thread(target=step)
    stepping.start()
    while stepping.is_alive():
        open_block()
    stepping.join()
    told = set(tries) - {"opened"}
    assert told <= {"step() is already running on this optimizer, in another thread or further up the stack"}
    assert told


@with_backends
def test_what_averaged_weights_refuses() -> None:
    model, fused = trained()
    with fused.averaged_weights():
        with pytest.raises(RuntimeError, match=r"step\(\) inside averaged_weights\(\)"):
            fused.step()
        with pytest.raises(RuntimeError, match="open already"), fused.averaged_weights():
            pass
        assert fused.clock() == (1, 0)
    fused.step()
    plain = fastlr.FusedSGD(model, lr=0.1)
    for use in (plain.averaged_weights().__enter__, lambda: plain.copy_averages_to(model)):
        with pytest.raises(ValueError, match="FusedSGD keeps no averages, as ema_decay is None"):
            use()


def test_inside_the_block_the_model_has_the_averages() -> None:
    model, fused = trained_network()
    expected = fused.averaged_state_dict(model)
    with fused.averaged_weights():
        with pytest.raises(
            RuntimeError, match=r"open already; .* averages, as model\.state_dict\(\) has them"
        ):
            fused.averaged_state_dict(model)
        assert_same(expected.values(), model.state_dict().values())


@with_backends
def test_before_the_first_update_there_are_none() -> None:
    model = parameters([(300,), (40,)])
    fused = fastlr.FusedSGD(model, lr=0.1, ema_decay=0.9)
    before = [p.detach().clone() for p in model]
    with fused.averaged_weights():
        assert_same(before, model)
    fused.copy_averages_to(model)
    assert_same(before, model)
    train(1, (model, fused.step))


@with_backends
def test_groups_that_keep_none_stay_what_they_are() -> None:
    """Also where an average is left from before."""
    model = parameters([(300,), (40,)])
    fused = fastlr.FusedSGD([{"params": [p]} for p in model], lr=0.1, ema_decay=0.9)
    train(2, (model, fused.step))
    fused.param_groups[1]["ema_decay"] = None
    before, average = model[1].detach().clone(), averages_of(fused, model)[0].clone()
    with fused.averaged_weights():
        assert_same([average, before], model)
    fused.copy_averages_to(model)
    assert_same([average, before], model)


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


def trained_network(**options: Any) -> tuple[torch.nn.Module, Any]:
    model = network()
    fused = fastlr.FusedAdamW(model.named_parameters(), lr=0.1, ema_decay=0.9, **options)
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        fused.step()
        fused.zero_grad()
    return model, fused


@with_backends
def test_averages_are_copied_to_a_model() -> None:
    model, fused = trained_network()
    averages = averages_of(fused, list(model.parameters()))
    other = network()
    buffers = copy.deepcopy(dict(other.named_buffers()))
    fused.copy_averages_to(other)
    assert_same(averages, other.parameters())
    assert_same(buffers.values(), dict(other.named_buffers()).values())
    part = network()
    fused.copy_averages_to(part.parameters())
    assert_same(averages, part.parameters())
    fused.copy_averages_to(model)  # itself
    assert_same(averages, model.parameters())


def test_which_parameter_is_which_must_be_clear() -> None:
    model = network()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    fused = fastlr.FusedSGD([{"params": weights}, {"params": others}], lr=0.1, ema_decay=0.9)
    with pytest.raises(ValueError, match="which of the model's parameters is which of the 2 groups'"):
        fused.copy_averages_to(network())
    single = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9)
    with pytest.raises(ValueError, match="the model has 2 parameters, and the optimizer 6; pass those"):
        single.copy_averages_to(torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(3, 3\) in the model and \(3, 4\)"):
        single.copy_averages_to([torch.zeros(3, 3), *list(network().parameters())[1:]])
    named = fastlr.FusedSGD(model.named_parameters(), lr=0.1, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"the model has no parameter 0\.weight, .* but weight; pass"):
        named.copy_averages_to(torch.nn.Linear(4, 3))


@pytest.mark.parametrize("named", [False, True])
def test_a_model_of_trained_parameters_and_copies_is_refused(named: bool) -> None:
    model, _ = trained_network()
    model[1].weight.requires_grad_(False)
    given = [(name, p) for name, p in model.named_parameters() if named or p.requires_grad]
    fused = fastlr.FusedSGD(given if named else [p for _, p in given], lr=0.1, ema_decay=0.5)
    set_gradients(0, [p for _, p in given])
    fused.step()
    other = copy.deepcopy(model)
    other[2] = model[2]  # as networks that share their head
    before = [p.detach().clone() for p in (*model.parameters(), *other.parameters())]
    shared: Any = other if named else [p for p in other.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"has 2 of the trained parameters themselves and [34] like"):
        fused.copy_averages_to(shared)
    assert_same(before, [*model.parameters(), *other.parameters()])
    fused.copy_averages_to(model[1:])  # a part of the trained one, and what the optimizer may not have
    fused.copy_averages_to(model)
    assert_same(averages_of(fused, [p for _, p in given]), [p for _, p in given])


CANNOT_HOLD = {
    "integers": lambda p: torch.zeros(p.shape, dtype=torch.int64),
    "sparse": lambda p: torch.zeros(p.shape).to_sparse(),
    "complex": lambda p: torch.zeros(p.shape, dtype=torch.complex64),
    "expanded": lambda p: torch.zeros(()).expand(p.shape),
}


@pytest.mark.parametrize("make", CANNOT_HOLD.values(), ids=CANNOT_HOLD.keys())
def test_what_cannot_hold_an_average_is_refused_before_the_first_is_copied(make: Any) -> None:
    model = network()
    others = [torch.zeros_like(p) for p in model.parameters()]
    others[2] = make(others[2])
    fused = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9)
    set_gradients(0, list(model.parameters()))
    fused.step()
    with pytest.raises(ValueError, match=r"parameter 2 is torch\.\w+ with layout .* which cannot hold"):
        fused.copy_averages_to(others)
    assert not others[0].any()


@pytest.mark.parametrize("average", [torch.zeros(7), "lost"], ids=["shape", "word"])
def test_an_average_of_another_shape_is_refused_before_anything_is_written(average: Any) -> None:
    model, fused = trained_network()
    fused.state[model[2].bias]["ema"] = average
    before = [p.detach().clone() for p in model.parameters()]
    message = r"the average of parameter 5 of group 0 must have its shape \(2,\), got (shape \(7,\)|'lost')"
    for use in (fused.copy_averages_to, fused.averaged_state_dict):
        with pytest.raises(ValueError, match=message):
            use(model)
        assert_same(before, model.parameters())
    del fused.state[model[2].bias]["ema"]
    fused.copy_averages_to(model)


@with_backends
def test_a_state_dict_with_averages() -> None:
    model, fused = trained_network()
    found = fused.averaged_state_dict(model)
    expected = {
        name: average
        for (name, _), average in zip(
            model.named_parameters(), averages_of(fused, list(model.parameters())), strict=True
        )
    }
    assert list(found) == list(model.state_dict())
    for name, value in found.items():
        assert_same([expected.get(name, model.state_dict()[name])], [value])
        assert value.data_ptr() != model.state_dict()[name].data_ptr()
    network().load_state_dict(found)
    with pytest.raises(ValueError, match="the model has none of the optimizer's parameters"):
        fused.averaged_state_dict(network())


# -- files and copies ----------------------------------------------------------------------------


@with_backends
@with_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(rule: Rule, dtype: torch.dtype) -> None:
    options = {"ema_decay": fastlr.LinearRamp(0.5, 0.99, 6), "ema_warmup": True, **rule.full}
    ours = parameters(SHAPES, dtype)
    fused = rule.make(ours, **options)
    train(3, (ours, fused.step))
    file = fused.state_dict()
    assert leaves(file) <= {dict, tuple, int, float, str, bool, torch.Tensor, type(None)}
    loaded_model = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    loaded = rule.make(loaded_model)
    loaded.load_state_dict(through_file(file))
    copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded]
    for optimizer in copies:
        model = optimizer.param_groups[0]["params"]
        assert_same(averages_of(fused, ours), averages_of(optimizer, model))
    for step in range(3, 6):
        models = [optimizer.param_groups[0]["params"] for optimizer in (fused, *copies)]
        set_gradients(step, *models)
        for optimizer in (fused, *copies):
            optimizer.step()
    for optimizer, model in zip(copies, models[1:], strict=True):
        assert_same_run(rule, (fused, ours), (optimizer, model))


@with_backends
@with_rules
def test_files_of_torch_have_none(rule: Rule, backend: str) -> None:
    """Averages then begin as the parameters are; torch's optimizers carry them along."""
    ours, theirs = twins(SHAPES)
    fused, reference = rule.make(ours, ema_decay=0.9, **rule.full), rule.make_torch(theirs, **rule.full)
    train(2, (theirs, reference.step))
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.detach())
    fused.load_state_dict(through_file(reference.state_dict()))
    assert fused.param_groups[0]["ema_decay"] == 0.9
    follower = Follower(theirs)
    for step in range(2, 4):
        train(1, (ours, fused.step), (theirs, reference.step), start=step)
        follower.follow(0.9)
    assert_same(follower.averages, averages_of(fused, ours), close_on_devices(rule, backend))
    other = [torch.nn.Parameter(p.detach().cpu().clone()) for p in ours]
    back = rule.make_torch(other, **rule.full)
    back.load_state_dict(through_file(fused.state_dict()))
    set_gradients(4, theirs, other)
    reference.step()
    back.step()
    assert_same(theirs, other, close_on_devices(rule, backend))
    again = rule.make([torch.nn.Parameter(p.detach().clone()) for p in ours], ema_decay=0.5, **rule.full)
    again.load_state_dict(back.state_dict())
    assert_same(averages_of(fused, ours), averages_of(again, again.param_groups[0]["params"]))


@with_backends
def test_older_files_leave_the_decay_to_the_optimizer() -> None:
    model = parameters([(300,)])
    old = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    train(2, (model, old.step))
    file = old.state_dict()
    for group in file["param_groups"]:
        for name in [name for name in group if name.startswith("ema")]:
            del group[name]
    decay = fastlr.LinearRamp(0.5, 0.9, 4)
    new = fastlr.FusedSGD(model, lr=0.1, momentum=0.9, ema_decay=decay)
    new.load_state_dict(through_file(file))
    group = new.param_groups[0]
    assert (group["ema_decay_schedule"], group["ema_decay"]) == (decay, decay._native.value(2))
    follower = Follower(model)
    train(1, (model, new.step), start=2)
    follower.follow(decay._native.value(2))
    assert_same(follower.averages, averages_of(new, model))
    state = old.__getstate__()
    for group in state["param_groups"]:
        for name in [name for name in group if name.startswith("ema")]:
            del group[name]
    unpickled = fastlr.FusedSGD.__new__(fastlr.FusedSGD)
    unpickled.__setstate__(state)
    unpickled.step()


@with_backends
def test_distributed_checkpoints() -> None:
    model = network()
    fused = fastlr.FusedAdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    for _ in range(2):
        model(torch.randn(8, 4)).square().mean().backward()
        fused.step()
    saved = dcp.get_optimizer_state_dict(model, fused)
    other = network()
    other.load_state_dict(model.state_dict())
    fresh = fastlr.FusedAdamW(other.parameters(), lr=0.1, ema_decay=0.9)
    dcp.set_optimizer_state_dict(other, fresh, saved)
    assert_same(averages_of(fused, list(model.parameters())), averages_of(fresh, list(other.parameters())))


# -- what is refused -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one": ({"ema_decay": 1.0}, ValueError, r"ema_decay of parameter group 0 must be in \[0, 1\), got 1.0"),
    "negative": ({"ema_decay": -0.1}, ValueError, "got -0.1"),
    "nan": ({"ema_decay": math.nan}, ValueError, "got nan"),
    "text": ({"ema_decay": "1"}, TypeError, "must be a number, a fastlr schedule or None, got '1'"),
    "peak": ({"ema_decay": fastlr.Constant(1.0)}, ValueError, "its schedule peaks at 1.0"),
    "warmup": ({"ema_decay": 0.9, "ema_warmup": 1}, ValueError, "ema_warmup .* must be True or False, got 1"),
    "dtype": (
        {"ema_decay": 0.9, "ema_dtype": torch.bfloat16}, ValueError,
        "ema_dtype of parameter group 0 must be None or torch.float32, got torch.bfloat16",
    ),
    "nothing to warm up": (
        {"ema_warmup": True}, ValueError, "ema_warmup must be False without ema_decay, got True",
    ),
}  # fmt: skip


@with_rules
@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(rule: Rule, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rule.make(parameters([(3,)]), **given)


@with_backends
def test_what_is_written_into_a_group_is_checked() -> None:
    _, fused = trained()
    for value, message in ((1.0, "must be in"), (math.nan, "must be in"), ("a", "must be a number or None")):
        fused.param_groups[0]["ema_decay"] = value
        with pytest.raises(ValueError, match=f"ema_decay of parameter group 0 {message}"):
            fused.step()
    fused.param_groups[0]["ema_decay"] = None
    fused.step()
    fused.set_schedule(ema_decay=fastlr.Constant(0.9))
    fused.param_groups[0]["ema_decay"] = None
    with pytest.raises(RuntimeError, match=r"ema_decay .* was set to 1\.0 by something else"):
        fused.step()


MEMORY: dict[str, tuple[Any, str]] = {
    "the parameter": (lambda p, state: p.detach(), "the ema .* shares memory with the parameter"),
    "another slot": (
        lambda p, state: state["momentum_buffer"], "the ema and the momentum_buffer of .* share memory",
    ),
    "the gradient": (lambda p, state: p.grad, "shares memory with its own ema"),
    "shape": (lambda p, state: p.detach()[1:].clone(), r"the ema of .* has shape \(299,\)"),
    "type": (lambda p, state: p.detach().double(), "the ema of .* has float64; a parameter of float32 takes"),
    "expanded": (lambda p, state: p.detach()[:1].expand(300), "has elements that share memory"),
}  # fmt: skip


@with_backends
@pytest.mark.parametrize(("make", "message"), MEMORY.values(), ids=MEMORY.keys())
def test_averages_that_cannot_be_written(make: Any, message: str) -> None:
    (p,) = parameters([(300,)])
    fused = fastlr.FusedSGD([p], lr=0.1, momentum=0.9, ema_decay=0.9)
    train(1, ([p], fused.step))
    fused.state[p]["ema"] = make(p, fused.state[p])
    before = p.detach().clone()
    with pytest.raises(ValueError, match=message):
        fused.step()
    assert_same([before], [p])


@with_backends
def test_float64_averages_stay_float64() -> None:
    (p,) = parameters([(30,)], torch.float64)
    fused = fastlr.FusedSGD([p], lr=0.1, ema_decay=0.9)
    train(1, ([p], fused.step))
    fused.state[p]["ema"] = fused.state[p]["ema"].float()
    with pytest.raises(ValueError, match=r"the ema .* has float32; a parameter of float64 takes its own"):
        fused.step()


# -- devices -------------------------------------------------------------------------------------


@pytest.fixture
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


def test_it_is_the_same_launch(cuda: ModuleType) -> None:
    model = parameters([(33,), (7, 5), (20000,), (), (0,)])
    fused = fastlr.FusedAdamW(model, max_grad_norm=1.0, ema_decay=fastlr.Constant(0.9), ema_warmup=True)
    train(2, (model, fused.step))
    set_gradients(2, model)
    with counted(cuda) as counts:
        fused.step()
    assert (counts["launches"], counts["copies"], counts["stream_synchronizations"]) == (2, 0, 0)


def test_groups_with_and_without_are_two_launches(cuda: ModuleType) -> None:
    model = parameters([(33,), (7, 5)])
    fused = fastlr.FusedSGD([{"params": [p]} for p in model], lr=0.1)
    fused.param_groups[1]["ema_decay"] = 0.9
    train(2, (model, fused.step))
    with counted(cuda) as counts:
        train(1, (model, fused.step), start=2)
    assert counts["launches"] == 2


@with_rules
@pytest.mark.parametrize("limit", [0, 2], ids=["", "several launches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_move_on_every_replay(cuda: ModuleType, rule: Rule, dtype: torch.dtype, limit: int) -> None:
    cuda.limit_launch_capacity(limit)
    decay = fastlr.LinearRamp(0.1, 0.9, 5)
    ours, theirs = (parameters([(9,), (9000,), (4, 3), (5,)], dtype) for _ in range(2))
    fused = rule.make(ours, ema_decay=decay, ema_warmup=True, max_grad_norm=1.0, **rule.full)
    plain = rule.make(theirs, max_grad_norm=1.0, **rule.full)
    follower = Follower(theirs)
    applied = 0

    def follow() -> None:
        nonlocal applied
        follower.follow(warm(decay._native.value(min(applied, 5)), applied))
        applied += 1

    for step in range(2):
        train(1, (ours, fused.step), (theirs, plain.step), start=step)
        follow()
    set_gradients(2, ours)
    with counted(cuda) as counts:
        graph = Graph(cuda, fused.step)
    assert counts["copies"] == counts["loads_in_capture"] == counts["stream_synchronizations"] == 0
    for step in range(2, 9):
        set_gradients(step, theirs)
        if step == 4:
            theirs[1].grad[7] = math.nan
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad.copy_(its.grad)
        graph.replay()
        plain.step()
        if step != 4:
            follow()
        assert_same(follower.averages, averages_of(fused, ours))
        if step == 6:
            fused.set_schedule(ema_decay=fastlr.Constant(0.5))
            decay = fastlr.Constant(0.5)
    assert fused.sync() == (8, 0)
    assert_same_run(rule, (plain, theirs), (without_averages(fused), ours))


def test_a_graph_cannot_get_averages(cuda: ModuleType) -> None:
    model = parameters([(9,)])
    fused = fastlr.FusedSGD(model, lr=0.1)
    train(1, (model, fused.step))
    graph = Graph(cuda, fused.step)
    with pytest.raises(RuntimeError, match="captured its step without one"):
        fused.set_schedule(ema_decay=0.9)
    assert fused.param_groups[0]["ema_decay"] is None
    graph.replay()
    assert fused.sync() == (2, 0)


def test_a_graph_stops_where_they_are_switched_off(cuda: ModuleType) -> None:
    """As a decay of one would have it; and its memory stays while the graph does."""
    model = parameters([(9,)])
    fused = fastlr.FusedSGD(model, lr=0.1, ema_decay=0.5, ema_warmup=True)
    train(1, (model, fused.step))
    graph = Graph(cuda, fused.step)
    (average,) = averages_of(fused, model)
    graph.replay()
    before = average.clone()
    fused.param_groups[0]["ema_decay"] = None
    fused.step()
    graph.replay()
    assert_same([before], [average])


def test_a_file_goes_into_a_graphs_averages(cuda: ModuleType) -> None:
    model, other = (parameters([(9,), (40,)]) for _ in range(2))
    fused = fastlr.FusedAdam(model, lr=0.1, ema_decay=0.5)
    source = fastlr.FusedAdam(other, lr=0.1, ema_decay=0.25)
    train(1, (model, fused.step))
    graph = Graph(cuda, fused.step)
    train(3, (other, source.step))
    fused.load_state_dict(through_file(source.state_dict()))
    for p, q in zip(model, other, strict=True):
        p.data.copy_(q.detach())
    set_gradients(3, other)
    for p, q in zip(model, other, strict=True):
        p.grad.copy_(q.grad)
    graph.replay()
    source.step()
    assert_same(averages_of(source, other), averages_of(fused, model))
    plain = torch.optim.Adam([torch.nn.Parameter(p.detach().clone()) for p in model], lr=0.1)
    train(1, (plain.param_groups[0]["params"], plain.step))
    fused.load_state_dict(plain.state_dict())  # which has none: they begin anew
    assert_same(model, averages_of(fused, model))


def test_several_devices_and_the_host(cuda: ModuleType) -> None:
    ours, theirs = (parameters([(9,), (5,), (9000,)]) for _ in range(2))
    fused = fastlr.FusedAdamW([{"params": [p]} for p in ours], ema_decay=0.9, ema_warmup=True)
    plain = fastlr.FusedAdamW([{"params": [p]} for p in theirs])
    follower = Follower(theirs)
    cuda.set_device_count(2)
    for t in range(6):
        cuda.route_host_to_cuda(2 - t % 3)
        train(1, (ours, fused.step), (theirs, plain.step), start=t)
        follower.follow(warm(0.9, t))
        assert_same(follower.averages, averages_of(fused, ours))
    assert_same(theirs, ours)
