"""The gradients' norm on CUDA: launches, graphs, several devices; on the emulated CUDA."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from cuda_on_cpu.recording import STREAM, Graph, Streams, counted
from helpers import parameters, set_gradients, train

import fastlr
from fastlr import _core
from fastlr.batch_growth.noise_scale import squared_norm


@pytest.fixture(autouse=True)
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


def on_the_host(cuda: ModuleType, tensors: list[torch.Tensor]) -> float:
    """By the CPU's kernels."""
    cuda.route_host_to_cuda(0)
    try:
        return squared_norm(tensors)
    finally:
        cuda.route_host_to_cuda(1)


def gradients(model: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in model if p.grad is not None]


def measuring(model: list[torch.nn.Parameter]) -> fastlr.FusedSGD:
    opt = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    opt.measure_grad_norm = True
    return opt


# -- of a step -----------------------------------------------------------------------------------


def test_a_measured_step_is_one_launch_and_nothing_else(cuda: ModuleType):
    model = parameters([(33,), (20_000,), (0,)])
    opt = measuring(model)
    train(2, (model, opt.step))
    set_gradients(2, model)
    with counted(cuda) as counts:
        opt.step()
    assert (counts["launches"], counts["copies"], counts["stream_synchronizations"]) == (1, 0, 0)
    with counted(cuda) as counts:
        assert opt.last_grad_norm == math.sqrt(on_the_host(cuda, gradients(model)))
    assert (counts["launches"], counts["stream_synchronizations"]) == (0, 1)


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_chunks_are_added_in_the_optimizers_order_whatever_the_launches(cuda: ModuleType, limit: int):
    """Types go to launches of their own, and a launch takes so many tensors."""
    cuda.limit_launch_capacity(limit)
    types = (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16)
    model = [p for dtype in types for p in parameters([(9000,), (3,), (300,)], dtype)]
    opt = measuring(model)
    train(1, (model, opt.step))
    assert opt.last_grad_norm == math.sqrt(on_the_host(cuda, gradients(model)))


def test_a_graph_measures_on_each_replay(cuda: ModuleType):
    model = parameters([(300,), (9000,)])
    opt = measuring(model)
    train(1, (model, opt.step))
    found = opt.found_inf = torch.zeros(())
    graph, captured = Graph(cuda, opt.step), gradients(model)
    for factor in (1.0, 2.0, 4.0):
        for gradient in captured:
            gradient.mul_(factor)
        graph.replay()
        assert opt.last_grad_norm == math.sqrt(on_the_host(cuda, captured))
    found.fill_(1.0)
    graph.replay()
    assert math.isnan(opt.last_grad_norm)
    found.fill_(0.0)
    more = parameters([(9,)] * 20)  # replaces the tables, which the graph goes on with
    opt.add_param_group({"params": more})
    train(1, (model + more, opt.step))
    assert opt.last_grad_norm == math.sqrt(on_the_host(cuda, gradients(model + more)))
    for gradient in captured:
        gradient.mul_(2.0)
    graph.replay()
    assert opt.last_grad_norm == math.sqrt(on_the_host(cuda, captured))


def test_a_graph_measures_if_it_was_captured_so(cuda: ModuleType):
    model = parameters([(300,)])
    opt = measuring(model)
    train(1, (model, opt.step))
    measured = Graph(cuda, opt.step)
    opt.measure_grad_norm = False
    unmeasured = Graph(cuda, opt.step)
    opt.measure_grad_norm = True
    opt.step()
    unmeasured.replay()
    assert opt.last_grad_norm is None
    opt.measure_grad_norm = False
    opt.step()
    assert opt.last_grad_norm is None
    measured.replay()
    assert opt.last_grad_norm == math.sqrt(on_the_host(cuda, gradients(model)))
    model[0].grad = None
    opt.step()
    assert opt.last_grad_norm is None


def test_a_step_that_failed_leaves_the_norm(cuda: ModuleType):
    model = parameters([(300,)])
    opt = measuring(model)
    set_gradients(0, model)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture"):
        Graph(cuda, opt.step)
    assert opt.last_grad_norm is None
    opt.step()
    norm = opt.last_grad_norm
    model[0].grad.mul_(2)
    opt.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr"):
        opt.step()
    assert opt.last_grad_norm == norm


def test_what_a_capture_cannot_do_about_a_norm(cuda: ModuleType):
    model = parameters([(300,)])
    opt = fastlr.FusedSGD(model, lr=0.1)
    train(1, (model, opt.step))
    opt.measure_grad_norm = True
    with pytest.raises(RuntimeError, match="norm was not measured before, which a CUDA graph cannot capture"):
        Graph(cuda, opt.step)
    assert opt.last_grad_norm is None
    train(1, (model, opt.step))
    with pytest.raises(RuntimeError, match=r"reading the gradients' norm .* waits for the device"):
        Graph(cuda, lambda: opt.last_grad_norm)


def test_several_devices_and_the_host(cuda: ModuleType):
    """Each adds its own; the total is that of all gradients."""
    cuda.set_device_count(2)
    model = parameters([(9,), (300,), (9000,)])
    opt = fastlr.FusedSGD([{"params": [p]} for p in model], lr=0.1)
    opt.measure_grad_norm = True
    for devices in (2, 0, 1):
        cuda.route_host_to_cuda(devices)
        train(1, (model, opt.step))
        cuda.route_host_to_cuda(0)
        expected = math.sqrt(squared_norm(gradients(model)))
        assert opt.last_grad_norm == pytest.approx(expected, rel=1e-15)
    # A device without gradients in this step has none, and a skipped step no norm.
    cuda.route_host_to_cuda(2)
    model[0].grad = model[2].grad = None
    opt.step()
    assert opt.last_grad_norm == pytest.approx(float(model[1].grad.double().norm()), rel=1e-15)
    opt.found_inf = torch.ones(())
    opt.step()
    assert math.isnan(opt.last_grad_norm)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_that_the_host_skips_does_not_tell_the_devices_last_norm(
    cuda: ModuleType, before: bool, skipped: bool
):
    """The first step is a device's, the second, measured or not, the host's too, which skips it."""
    model = parameters([(9,)])
    opt = fastlr.FusedSGD(model, lr=0.1)
    opt.measure_grad_norm = before
    train(1, (model, opt.step))
    cuda.route_host_to_cuda(0)
    opt.measure_grad_norm = skipped
    opt.found_inf = torch.ones(())
    opt.step()
    assert (opt.last_grad_norm is None) is not skipped
    assert not skipped or math.isnan(opt.last_grad_norm)


def test_more_groups_than_there_was_room_for_leave_the_norm(cuda: ModuleType):
    model = parameters([(300,)])
    opt = measuring(model)
    train(1, (model, opt.step))
    norm = opt.last_grad_norm
    for _ in range(70):
        opt.add_param_group({"params": parameters([(3,)])})
    opt.set_schedule(lr=0.2)
    assert opt.last_grad_norm == norm
    assert not opt.last_step_skipped


def test_its_table_follows_the_streams(cuda: ModuleType, streams: Streams):
    model = parameters([(300,)])
    opt = measuring(model)
    for stream in (STREAM, 8, 8):
        streams.current = stream
        train(1, (model, opt.step))
    allocated, recorded = {p for p, _ in streams.allocated}, {p for p, s in streams.recorded if s == 8}
    assert len(allocated) == len(streams.allocated) == 3  # clocks and groups, tensors and sums of squares
    assert recorded == allocated
    assert len(streams.recorded) == 3


# -- of any tensors ------------------------------------------------------------------------------

TENSORS = [
    torch.randn(9001)[1:],
    torch.randn(70, 50).t(),
    torch.randn(130, 140)[:, ::2],
    torch.randn(33, dtype=torch.complex64),
    torch.randn(9000).to(torch.bfloat16),
    torch.randn(300, dtype=torch.float64),
    torch.zeros(0),
]


def test_the_norm_of_any_tensors_is_that_of_the_host(cuda: ModuleType):
    total, others = _core.SquaredNorm(Streams()).measure(TENSORS, 1)
    assert others == []
    assert total == on_the_host(cuda, TENSORS)
    assert squared_norm([]) == 0.0


def test_its_tables_are_uploaded_once(cuda: ModuleType):
    native = _core.SquaredNorm(Streams())
    native.measure(TENSORS, 1)
    with counted(cuda) as counts:
        for tensor in TENSORS:
            tensor.mul_(2)
        assert native.measure(TENSORS, 1)[0] == on_the_host(cuda, TENSORS)
    assert counts["launches"] == 4  # three types, and what is strided
    assert counts["uploaded_bytes"] == 0
    assert counts["stream_synchronizations"] == 1
    assert native.measure(TENSORS[:2], 1)[0] == on_the_host(cuda, TENSORS[:2])


def test_a_norm_cannot_be_captured(cuda: ModuleType):
    native = _core.SquaredNorm(Streams())
    with pytest.raises(RuntimeError, match="measuring a norm waits for the device, which a CUDA graph"):
        Graph(cuda, lambda: native.measure(TENSORS, 1))


def test_what_no_kernel_reads_is_told(cuda: ModuleType):
    whole, sparse = torch.arange(3), torch.eye(3).to_sparse()
    total, others = _core.SquaredNorm(Streams()).measure([torch.ones(2), whole, sparse], 1)
    assert total == 2.0
    assert [id(other) for other in others] == [id(whole), id(sparse)]
