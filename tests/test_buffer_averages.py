"""Averages of a model's buffers, which follow the optimizer's updates."""

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
from helpers import assert_same, leaves, through_file
from test_averages import warm
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import swa_utils

import fastlr
from fastlr._runtime import Runtime

with_backends = pytest.mark.usefixtures("backend")
BOTH = pytest.mark.parametrize("kind", [fastlr.FusedSGD, fastlr.FusedAdamW], ids=lambda kind: kind.__name__)


class Replacing(torch.nn.Module):
    """With buffers of other kinds: one that forward passes replace, others that have no averages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.scale = 0.5 * self.scale + x.detach().abs().mean()
        return x


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), Replacing(), torch.nn.Linear(3, 2)
    )


AVERAGED = ("1.running_mean", "1.running_var", "2.scale")


def backward(model: torch.nn.Module, seed: int) -> None:
    """A forward pass, which moves the buffers, and gradients; the same for a seed."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), device="cpu")
    model.zero_grad()
    p = next(model.parameters())
    model(x.to(p.device, p.dtype) + seed).square().mean().backward()


def buffers_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [model.get_buffer(name) for name in AVERAGED]


def averages_of(optimizer: fastlr.FusedOptimizer) -> list[torch.Tensor]:
    found = optimizer.param_groups[0]["ema_buffers"]
    assert tuple(found) == AVERAGED
    return list(found.values())


class Follower:
    """The averages of a model's buffers as torch has them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.averages: list[torch.Tensor] = []

    def begin(self) -> None:
        self.averages = [buffer.detach().cpu().clone() for buffer in buffers_of(self.model)]

    def follow(self, decay: float) -> None:
        if not self.averages:
            self.begin()
        for average, buffer in zip(self.averages, buffers_of(self.model), strict=True):
            average.lerp_(buffer.cpu(), 1 - decay)


def asked(
    kind: Callable[..., Any] = fastlr.FusedAdamW, **options: Any
) -> tuple[torch.nn.Module, Any, Follower]:
    model = network()
    optimizer = kind(model.parameters(), lr=0.1, **{"ema_decay": 0.9, **options})
    optimizer.average_buffers(model)
    return model, optimizer, Follower(model)


# -- what they are -------------------------------------------------------------------------------


@with_backends
@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9], ids=str)
def test_as_torchs_averaged_model(kind: Callable[..., Any], decay: float) -> None:
    model, optimizer, _ = asked(kind, ema_decay=decay)
    plain = copy.deepcopy(model)
    without = kind(plain.parameters(), lr=0.1, ema_decay=decay)
    reference = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )
    for step in range(5):
        backward(model, step)
        backward(plain, step)
        before = [buffer.clone() for buffer in model.buffers()]
        optimizer.step()
        without.step()
        reference.update_parameters(model)
        assert_same(before, model.buffers())
        assert_same([reference.module.get_buffer(name) for name in AVERAGED], averages_of(optimizer))
    assert_same(plain.parameters(), model.parameters())
    assert "ema_buffers" not in without.param_groups[0]
    assert all(buffer.grad is None for buffer in model.buffers())


@with_backends
def test_the_decay_is_that_of_the_parameters() -> None:
    """Number or schedule, warmed up, whoever changes it."""
    decay = fastlr.LinearRamp(0.1, 0.9, 12)
    model, optimizer, follower = asked(ema_decay=decay, ema_warmup=True)
    expected: dict[int, Callable[[int], float]] = {0: decay, 4: lambda t: 0.25, 7: decay}
    now = expected[0]
    for t in range(10):
        now = expected.get(t, now)
        if t == 4:
            optimizer.set_schedule(ema_decay=0.25)
        if t == 7:
            optimizer.set_schedule(ema_decay=decay, start="zero")
        if t == 8:
            optimizer.param_groups[0]["ema_warmup"] = False
        backward(model, t)
        optimizer.step()
        follower.follow(now(t) if t >= 8 else warm(now(t), t))
        assert_same(follower.averages, averages_of(optimizer))
    optimizer.set_clock(updates=2)
    backward(model, 10)
    optimizer.step()
    follower.follow(decay(2))
    optimizer.set_schedule(ema_decay=0.5)
    optimizer.param_groups[0]["ema_decay"] = 0.75
    backward(model, 11)
    optimizer.step()
    follower.follow(0.75)
    assert_same(follower.averages, averages_of(optimizer))


@with_backends
def test_a_decay_on_the_clock_of_samples() -> None:
    decay = fastlr.LinearRamp(0.1, 0.9, 100).in_samples(1)
    model, optimizer, follower = asked(ema_decay=decay)
    samples = 0
    for step in range(6):
        backward(model, step)
        skips = step == 2
        if skips:
            optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        optimizer.__dict__.pop("found_inf", None)
        if not skips:
            follower.follow(decay(samples))
        optimizer.advance_samples(8)
        samples += 8
    assert_same(follower.averages, averages_of(optimizer))


@with_backends
@pytest.mark.parametrize("ema_dtype", [None, torch.float32], ids=str)
def test_types(ema_dtype: torch.dtype | None) -> None:
    model = torch.nn.Linear(2, 2)
    values = {torch.bfloat16: 3.3, torch.float16: 3.3, torch.float64: 1e-300, torch.complex64: 1 + 2j}
    for dtype, value in values.items():
        model.register_buffer(f"in_{str(dtype)[6:]}", torch.full((5,), value, dtype=dtype))
    model.register_buffer("transposed", torch.randn(4, 3).t()[1:])
    optimizer = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.75, ema_dtype=ema_dtype)
    model.register_buffer("expanded", torch.ones(()).expand(3))
    optimizer.average_buffers(model)
    model.expanded = model.expanded.clone()
    optimizer.step()
    found = optimizer.param_groups[0]["ema_buffers"]
    followers = {name: average.clone() for name, average in found.items()}
    for name, buffer in model.named_buffers():
        if name == "expanded":
            assert name not in found
            continue
        wide = ema_dtype is not None and buffer.dtype in (torch.bfloat16, torch.float16)
        assert found[name].dtype == (torch.float32 if wide else buffer.dtype)
        buffer.mul_(-3)
        end = buffer.to(found[name].dtype)
        if buffer.is_complex():
            torch.view_as_real(followers[name]).lerp_(torch.view_as_real(end), 0.25)
        else:
            followers[name].lerp_(end, 0.25)
    optimizer.step()
    assert_same(followers.values(), found.values())


# -- updates that are not ------------------------------------------------------------------------

SKIPS: dict[str, dict[str, Any]] = {"found_inf": {}, "clipping": {"max_grad_norm": 1.0}}


@with_backends
@pytest.mark.parametrize("options", SKIPS.values(), ids=SKIPS)
def test_skipped_updates_move_nothing(options: dict[str, Any]) -> None:
    decay = fastlr.LinearRamp(0.1, 0.9, 10)
    model, optimizer, follower = asked(ema_decay=decay, ema_warmup=True, **options)
    applied = 0
    for step in range(8):
        backward(model, step)
        skips = step in (0, 3, 4)
        if step == 0:
            follower.begin()
        if skips and options:
            model[0].weight.grad[0, 0] = math.nan
        elif skips:
            optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        optimizer.__dict__.pop("found_inf", None)
        if not skips:
            follower.follow(warm(decay(applied), applied))
            applied += 1
        assert_same(follower.averages, averages_of(optimizer))
        if step == 4:
            assert optimizer.last_step_skipped
    assert optimizer.sync() == (5, 0)
    backward(model, 8)
    optimizer.step()
    follower.follow(warm(decay(5), 5))
    assert_same(follower.averages, averages_of(optimizer))


@with_backends
@pytest.mark.parametrize("scaler_of", [torch.amp.GradScaler, fastlr.GradScaler], ids=["torch", "fastlr"])
def test_grad_scalers(scaler_of: Callable[..., torch.amp.GradScaler]) -> None:
    model, optimizer, follower = asked()
    scaler = scaler_of(torch.get_default_device().type, init_scale=1024.0)
    for step in range(5):
        x = torch.randn(8, 4) * (math.inf if step == 2 else 1.0)
        if step == 2:
            model.eval()  # whose buffers stay finite
        scaler.scale(model(x).square().mean()).backward()
        model.train()
        with torch.no_grad():
            model[1].running_mean += step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 2:
            follower.follow(0.9)
        assert_same(follower.averages, averages_of(optimizer))
    assert optimizer.sync().updates == 4


@with_backends
def test_an_error_of_the_step_moves_nothing() -> None:
    model, optimizer, follower = asked()
    for step in range(3):
        backward(model, step)
        if step == 1:
            optimizer.param_groups[0]["lr"] = math.nan
            with pytest.raises(ValueError, match="lr of parameter group 0"):
                optimizer.step()
            assert_same(follower.averages, averages_of(optimizer))
            optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        follower.follow(0.9)
    assert_same(follower.averages, averages_of(optimizer))


# -- their use -----------------------------------------------------------------------------------


@with_backends
def test_state_dicts_and_blocks_with_averages() -> None:
    model, optimizer, _ = asked()
    for step in range(3):
        backward(model, step)
        optimizer.step()
    averages = dict(zip(AVERAGED, averages_of(optimizer), strict=True))
    own = copy.deepcopy(model.state_dict())
    found = optimizer.averaged_state_dict(model, buffers="average")
    assert list(found) == list(own)
    for name, buffer in model.named_buffers():
        if name in own:
            assert_same([averages.get(name, buffer)], [found[name]])
    parameters = optimizer.averaged_state_dict(model)
    for name, value in parameters.items():
        assert_same([own[name] if name in averages else found[name]], [value])
    with optimizer.averaged_weights(buffers="average"):
        assert_same(found.values(), model.state_dict().values())
    with optimizer.averaged_weights():
        assert_same(parameters.values(), model.state_dict().values())
    assert_same(own.values(), model.state_dict().values())
    wrapped = torch.nn.ModuleDict({"module": model})  # as DistributedDataParallel does
    assert_same(found.values(), optimizer.averaged_state_dict(wrapped, buffers="average").values())
    same, copied = copy.deepcopy((model, optimizer))
    for use in (
        copied.averaged_weights(buffers="average").__enter__,
        lambda: copied.averaged_state_dict(same, buffers="average"),
    ):
        with pytest.raises(ValueError, match=r"average_buffers\(model\) on; call it first"):
            use()
    assert "{3 averages}" in repr(optimizer)


def test_what_is_refused() -> None:
    model = network()
    plain = fastlr.FusedSGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="ema_decay of parameter group 0, which must be"):
        plain.average_buffers(model)
    model, optimizer, _ = asked()
    optimizer.step()
    with pytest.raises(ValueError, match="buffers must be one of copy, average, got 'own'"):
        optimizer.averaged_state_dict(model, buffers="own")
    file = optimizer.state_dict()
    before = str(file)
    for name, average, message in (
        ("bn.running_mean", torch.ones(3), "the buffer bn.running_mean, which the model given to"),
        ("2.scale", torch.ones(2), r"the buffer 2.scale has shape \(2,\)"),
        ("2.scale", 1.0, "ema_buffers of the file's parameter group 0 must be a dict of tensors"),
    ):
        damaged = copy.deepcopy(file)
        damaged["param_groups"][0]["ema_buffers"][name] = average
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(damaged)
        assert str(optimizer.state_dict()) == before


@with_backends
def test_a_model_without_buffers_has_no_averages() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9)
    optimizer.average_buffers(model)
    optimizer.step()
    assert "ema_buffers" not in optimizer.param_groups[0]
    optimizer.averaged_state_dict(model, buffers="average")


@with_backends
def test_a_model_may_be_converted() -> None:
    model, optimizer, follower = asked(fastlr.FusedSGD, ema_dtype=torch.float32)
    for step in range(4):
        if step == 2:
            model.double()
            follower.averages = [average.double() for average in follower.averages]
            for entry in optimizer.state.values():
                entry["ema"] = entry["ema"].double()
        backward(model, step)
        optimizer.step()
        follower.follow(0.9)
        assert_same(follower.averages, averages_of(optimizer))


# -- files and copies ----------------------------------------------------------------------------


@with_backends
@pytest.mark.parametrize("first", ["ask", "load"])
def test_a_resumed_run_equals_an_uninterrupted_one(first: str) -> None:
    options = {"ema_decay": fastlr.LinearRamp(0.5, 0.99, 6), "ema_warmup": True}
    model, optimizer, _ = asked(**options)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    file = optimizer.state_dict()
    assert leaves(file) <= {dict, tuple, int, float, str, bool, torch.Tensor, type(None)}

    def resumed(model: torch.nn.Module) -> fastlr.FusedOptimizer:
        new = fastlr.FusedAdamW(model.parameters(), lr=0.1, ema_decay=0.5)
        if first == "ask":
            new.average_buffers(model)
        new.load_state_dict(through_file(file))
        if first == "load":
            new.average_buffers(model)
        return new

    pairs = [(model, optimizer)]
    other = copy.deepcopy(model)
    pairs.append((other, resumed(other)))
    for made in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        made[1].average_buffers(made[0])
        pairs.append(made)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    for flat in (False, True):
        other = copy.deepcopy(model)
        new = fastlr.FusedAdamW(other.parameters(), lr=0.1, ema_decay=0.5)
        new.average_buffers(other)
        settings = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        template = dcp.get_optimizer_state_dict(other, new, options=settings)
        saved = dcp.get_optimizer_state_dict(model, optimizer, options=settings)
        assert template.keys() == saved.keys()
        dcp.set_optimizer_state_dict(other, new, saved, options=settings)
        pairs.append((other, new))
    kept = [average.clone() for average in averages_of(optimizer)]
    for _, new in pairs[1:]:
        assert_same(kept, averages_of(new))
    for step in range(3, 6):
        for other, new in pairs:
            backward(other, step)
            new.step()
    for other, new in pairs[1:]:
        assert_same(averages_of(optimizer), averages_of(new))
        assert_same(
            optimizer.averaged_state_dict(model, buffers="average").values(),
            new.averaged_state_dict(other, buffers="average").values(),
        )
    assert not torch.equal(kept[0], averages_of(optimizer)[0])


@with_backends
def test_files_without_them_begin_anew() -> None:
    model, optimizer, follower = asked()
    file = optimizer.state_dict()
    for step in range(2):
        backward(model, step)
        optimizer.step()
    optimizer.load_state_dict(through_file(file))
    assert "ema_buffers" not in optimizer.param_groups[0]
    for step in range(2, 4):
        backward(model, step)
        optimizer.step()
        follower.follow(0.9)
    assert_same(follower.averages, averages_of(optimizer))


@with_backends
def test_distributed_checkpoints_state_is_no_beginning() -> None:
    model, optimizer, follower = asked()
    dcp.get_optimizer_state_dict(model, optimizer)  # makes the state that a file could be read into
    for step in range(3):
        backward(model, step)
        optimizer.step()
        follower.follow(0.9)
    assert_same(follower.averages, averages_of(optimizer))


def test_a_range_test_leaves_them() -> None:
    model, optimizer, _ = asked()
    twin, other, _ = asked()
    twin.load_state_dict(model.state_dict())
    for trained, step in ((model, optimizer.step), (twin, other.step)):
        for seed in range(2):
            backward(trained, seed)
            step()
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(4)]
    fastlr.range_test(model, optimizer, torch.nn.functional.mse_loss, batches, num_steps=10, progress=False)
    assert_same(averages_of(other), averages_of(optimizer))
    for trained, step in ((model, optimizer.step), (twin, other.step)):
        backward(trained, 2)
        step()
    assert_same(averages_of(other), averages_of(optimizer))


# -- devices -------------------------------------------------------------------------------------


@pytest.fixture
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


def test_nothing_waits_for_a_device(cuda: ModuleType) -> None:
    model, optimizer, _ = asked(max_grad_norm=1.0)
    model[2].eval()  # a buffer that moves in memory has its address uploaded
    for step in range(2):
        backward(model, step)
        optimizer.step()
    backward(model, 2)
    optimizer.found_inf = torch.tensor(1.0)
    with counted(cuda) as counts:
        optimizer.step()
    assert (counts["copies"], counts["stream_synchronizations"]) == (0, 0)


@pytest.mark.parametrize("options", SKIPS.values(), ids=SKIPS)
def test_they_move_on_every_replay(cuda: ModuleType, options: dict[str, Any]) -> None:
    decay = fastlr.LinearRamp(0.1, 0.9, 8)
    model, optimizer, follower = asked(ema_decay=decay, ema_warmup=True, **options)
    found_inf = torch.zeros(())
    applied = 0

    def follow() -> None:
        nonlocal applied
        follower.follow(warm(decay(applied), applied))
        applied += 1

    model[2].eval()  # whose buffer stays where it is
    for step in range(3):
        backward(model, step)
        optimizer.found_inf = found_inf.fill_(step == 1)
        optimizer.step()
        if step != 1:
            follow()
    assert optimizer.sync() == (2, 0)
    gradients = [p.grad for p in model.parameters()]
    graph = Graph(cuda, optimizer.step)
    for step in range(3, 9):
        with torch.no_grad():
            model[1].running_mean += step
            skips = step in (4, 5)
            found_inf.fill_(skips and not options)
            gradients[0][0, 0] = math.nan if skips and options else 1.0
        graph.replay()
        if not skips:
            follow()
        assert_same(follower.averages, averages_of(optimizer))
        if step == 6:
            assert optimizer.sync().updates == applied
            decay = fastlr.Constant(0.5)
            optimizer.set_schedule(ema_decay=decay)
    file = copy.deepcopy(optimizer.state_dict())
    for average in file["param_groups"][0]["ema_buffers"].values():
        average.fill_(7.0)
    optimizer.load_state_dict(file)
    follower.averages = [torch.full_like(average, 7.0) for average in follower.averages]
    graph.replay()
    follow()
    assert_same(follower.averages, averages_of(optimizer))
    with pytest.raises(RuntimeError, match="before the capture"):
        optimizer.average_buffers(model)


def test_a_capture_needs_a_step_before(cuda: ModuleType) -> None:
    model = network()
    optimizer = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.9)
    backward(model, 0)
    optimizer.step()
    optimizer.average_buffers(model)
    with pytest.raises(RuntimeError, match="which a CUDA graph cannot capture"):
        Graph(cuda, optimizer.step)


@with_backends
@pytest.mark.parametrize("kind", ["expanded", "integers", "None"])
def test_a_buffer_that_has_become_another_kind_stops_a_step_before_it_begins(kind: str) -> None:
    model = network()
    fused = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.5)
    fused.average_buffers(model)
    backward(model, 0)
    fused.step()
    before = copy.deepcopy(fused.state_dict()), [p.detach().clone() for p in model.parameters()]
    backward(model, 1)
    others = {"expanded": torch.ones(1).expand(3), "integers": torch.ones(3, dtype=torch.int64), "None": None}
    model[1].running_mean = others[kind]
    with pytest.raises(ValueError, match=r"the buffer 1\.running_mean has become .*call average_buffers"):
        fused.step()
    assert_same(before[1], model.parameters())
    assert str(fused.state_dict()) == str(before[0])


@with_backends
def test_a_second_call_that_is_stopped_loses_no_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    fused = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=0.5)
    fused.average_buffers(model)
    backward(model, 0)
    fused.step()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "new_average", staticmethod(stop))
        with pytest.raises(KeyboardInterrupt):
            fused.average_buffers(model)
    backward(model, 1)
    fused.step()
    assert set(fused.state_dict()["param_groups"][0]["ema_buffers"]) == set(AVERAGED)
