"""On a real CUDA device: PyTorch's graphs, streams, scaler and several devices, against the CPU."""

from __future__ import annotations

import copy
import gc
import io
import time
from collections.abc import Callable

import pytest
import torch
from helpers import assert_same, parameters, set_gradients, train

import fastlr

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
    pytest.mark.skipif(not fastlr.build_info()["cuda"], reason="this build of fastlr has no CUDA kernels"),
]

CYCLE = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "triangular2"}
SHAPES = [(9,), (9000,), (4, 3), ()]


def pair(
    make: Callable[[list[torch.nn.Parameter]], fastlr.FusedSGD], dtype: torch.dtype = torch.float32
) -> tuple[list[torch.nn.Parameter], fastlr.FusedSGD, list[torch.nn.Parameter], fastlr.FusedSGD]:
    """The same parameters and optimizer on the device and on the CPU."""
    on_cpu = parameters(SHAPES, dtype)
    on_cuda = [torch.nn.Parameter(p.detach().cuda()) for p in on_cpu]
    return on_cuda, make(on_cuda), on_cpu, make(on_cpu)


def gradients_for(step: int, on_cuda: list[torch.nn.Parameter], on_cpu: list[torch.nn.Parameter]) -> None:
    """New values in the gradients that there are, or new gradients."""
    set_gradients(step, on_cpu)
    for p, q in zip(on_cuda, on_cpu, strict=True):
        if p.grad is None:
            p.grad = q.grad.to(p.device, copy=True)
        else:
            p.grad.copy_(q.grad)


def cyclic(model: list[torch.nn.Parameter]) -> fastlr.FusedSGD:
    return fastlr.FusedCyclicSGD(model, **CYCLE, cycle_momentum=True, weight_decay=1e-3)


def on_cpu(model: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().cpu() for p in model]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_and_cpu_agree_to_the_bit(dtype: torch.dtype):
    model, optimizer, twin, reference = pair(cyclic, dtype)
    for step in range(12):
        gradients_for(step, model, twin)
        optimizer.step()
        reference.step()
    assert_same([p.detach() for p in twin], on_cpu(model))
    assert optimizer.sync() == reference.clock()


def test_a_captured_training_step_keeps_cycling():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    model, twin = layers.cuda(), copy.deepcopy(layers).cuda()
    optimizer, reference = cyclic(list(model.parameters())), cyclic(list(twin.parameters()))
    x = torch.randn(32, 8, device="cuda")

    def forward_and_backward(net: torch.nn.Module) -> None:
        net(x).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            forward_and_backward(model)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        forward_and_backward(model)
        optimizer.step()
    assert optimizer.clock().updates == 3
    for _ in range(10):
        graph.replay()
    for _ in range(13):
        reference.zero_grad()
        forward_and_backward(twin)
        reference.step()
    assert optimizer.sync() == reference.sync() == (13, 0)
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)  # the captured matrix products may be others
    optimizer.set_schedule(lr=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    graph.replay()
    assert_same(before, [p.detach() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # what was refused is not in it
def test_capturing_the_first_step_raises_with_the_remedy():
    model, optimizer, _, _ = pair(cyclic)
    for p in model:
        p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()
    assert optimizer.sync().updates == 1


def test_a_scaler_skips_on_the_device():
    model, optimizer, twin, reference = pair(cyclic)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.zeros((), device="cuda"))
    for step in range(8):
        gradients_for(step, model, twin)
        for p in model:
            p.grad.mul_(scaler.get_scale())
        if step in (0, 3):
            model[0].grad[2] = float("inf")
        else:
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.last_step_skipped == (step in (0, 3))
    assert_same([p.detach() for p in twin], on_cpu(model))
    assert optimizer.sync() == reference.clock()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_does_not_wait_for_the_device():
    model, optimizer, twin, _ = pair(cyclic)
    gradients_for(0, model, twin)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.advance_samples(32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.sync() == (2, 32)


def test_the_host_is_never_behind_the_stream():
    """Nor while tables are uploaded that CUDA would take only as the stream makes room."""
    model = [torch.nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(4001)]
    for p in model:
        p.grad = torch.ones_like(p)
    rates = fastlr.Tabulated(lambda t: 0.1 / (t + 1), 1_000_000)
    cyclic(model[:1]).step()  # loads the kernels
    optimizer = fastlr.FusedSGD(model, lr=rates, momentum=0.9)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    asleep = torch.cuda.Event()
    asleep.record()
    for _ in range(3):
        optimizer.step()
        optimizer.advance_samples(32)
    assert not asleep.query()
    assert optimizer.sync() == (3, 96)
    expected = torch.zeros(3)
    momentum = 0.0
    for step in range(3):
        momentum = 1.0 + (momentum * 0.9 if step else 0.0)
        expected -= rates(step) * momentum
    torch.testing.assert_close(model[-1].detach().cpu(), expected)


def test_a_graph_goes_on_without_its_optimizer():
    model, optimizer, twin, reference = pair(cyclic)
    gradients_for(0, model, twin)
    optimizer.found_inf = torch.zeros((), device="cuda")
    optimizer.grad_scale = torch.full((), 4.0, device="cuda")
    reference.grad_scale = torch.full((), 4.0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    weights, gradients = [p.detach() for p in model], [p.grad for p in model]
    del optimizer, model
    gc.collect()
    torch.cuda.empty_cache()
    poison = [
        torch.full((n,), float("nan"), device="cuda") for n in (1, 16, 512, 4096, 9000) for _ in range(50)
    ]
    for _ in range(7):
        graph.replay()
    for _ in range(8):
        reference.step()
    assert_same(twin, weights)
    del poison, gradients
    before = torch.cuda.memory_allocated()
    del graph, weights
    gc.collect()
    torch.cuda.synchronize()
    deadline = time.monotonic() + 10  # CUDA tells of it in a thread of its own
    while torch.cuda.memory_allocated() >= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() < before


def test_steps_on_several_streams():
    model, optimizer, twin, reference = pair(cyclic)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for step in range(9):
        stream = streams[step % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradients_for(step, model, twin)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        reference.step()
    assert_same([p.detach() for p in twin], on_cpu(model))


def test_a_loader_works_where_the_gpu_is_the_default_device():
    plan = fastlr.BatchPlan.from_phases([(0, 4)], dataset_size=20, epochs=2, lr=0.1)
    data = torch.arange(20, device="cpu")

    def samples() -> list[list[int]]:
        return [batch.data.tolist() for batch in fastlr.GrowingLoader(data, plan, 4, seed=1)]

    expected = samples()
    torch.set_default_device("cuda")
    try:
        assert samples() == expected
    finally:
        torch.set_default_device(None)


def test_a_checkpoint_goes_to_the_cpu_and_back():
    model, optimizer, twin, reference = pair(cyclic)
    for step in range(4):
        gradients_for(step, model, twin)
        optimizer.step()
        reference.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    reference.load_state_dict(saved)
    second = cyclic(model)
    second.load_state_dict(saved)
    for step in range(4, 8):
        gradients_for(step, model, twin)
        second.step()
        reference.step()
    assert_same([p.detach() for p in twin], on_cpu(model))


def test_a_model_moved_after_its_first_step_is_an_error_with_the_remedy():
    layer = torch.nn.Linear(3, 2)
    optimizer = fastlr.FusedSGD(layer.parameters(), lr=0.1, momentum=0.9)
    train(1, (list(layer.parameters()), optimizer.step))
    layer.cuda()
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"is on cpu and the parameter on cuda:0.*after moving it"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.sync().updates == 2


def test_host_and_device_in_one_optimizer():
    model, _, twin, reference = pair(cyclic)
    mixed = [model[0], torch.nn.Parameter(model[1].detach().cpu()), *model[2:]]
    optimizer = cyclic(mixed)
    for step in range(6):
        gradients_for(step, mixed, twin)
        optimizer.step()
        reference.step()
    assert_same([p.detach() for p in twin], on_cpu(mixed))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_in_one_optimizer():
    model, _, twin, reference = pair(cyclic)
    spread = [torch.nn.Parameter(p.detach().to(f"cuda:{i % 2}")) for i, p in enumerate(model)]
    optimizer = cyclic(spread)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale(torch.zeros((), device="cuda"))
    for step in range(6):
        gradients_for(step, spread, twin)
        for p in spread:
            p.grad.mul_(scaler.get_scale())
        if step == 2:
            spread[1].grad[0] = float("nan")
        else:
            reference.step()
        scaler.step(optimizer)
        scaler.update()
    assert_same([p.detach() for p in twin], on_cpu(spread))
    assert optimizer.sync() == reference.clock()
    assert torch.cuda.current_device() == 0
