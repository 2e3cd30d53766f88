"""What is particular to CUDA: launches, uploads, clocks on the device, graphs, memory; on the emulated
CUDA, which also tells what was called."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import STREAM, Graph, Streams, counted
from helpers import assert_same, parameters, set_gradients, train, twins

import fastlr

CYCLE = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "triangular2"}


@pytest.fixture(autouse=True)
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


def reference(model: list[torch.nn.Parameter], **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model, foreach=False, **options)


# -- launches ------------------------------------------------------------------------------------


def test_a_step_is_one_launch_and_nothing_else(cuda: ModuleType):
    model = parameters([(33,), (7, 5), (20000,), (), (0,)])
    groups = [{"params": model[:2]}, {"params": model[2:], "max_lr": 0.5, "weight_decay": 0.1}]
    optimizer = fastlr.FusedCyclicSGD(groups, **CYCLE, momentum=0.9)
    train(2, (model, optimizer.step))  # the second one has momenta
    set_gradients(2, model)
    with counted(cuda) as counts:
        optimizer.step()
    assert counts["launches"] == 1
    assert counts["copies"] == 0
    assert counts["stream_synchronizations"] == 0


def test_one_launch_a_storage_type(cuda: ModuleType):
    model = parameters([(33,), (5,)]) + parameters([(9,)], torch.bfloat16) + parameters([(9,)], torch.float64)
    model += parameters([(4, 3)], torch.complex64)  # pairs of float32
    optimizer = fastlr.FusedSGD(model, momentum=0.9)
    train(1, (model, optimizer.step))
    with counted(cuda) as counts:
        train(1, (model, optimizer.step), start=1)
    assert counts["launches"] == 3
    optimizer.sync()
    assert optimizer.clock().updates == 2


@pytest.mark.parametrize(
    ("driver", "limit", "options", "launches", "bytes_most"),
    [
        (12010, 0, {}, 2, 32764),
        (12000, 0, {}, 9, 4096),
        (12010, 0, {"ema_decay": 0.9}, 9, 4096),
        (12010, 5, {}, 801, 4096),
    ],
    ids=["large-arguments", "small-arguments", "with-a-stage", "limited"],
)
def test_more_tensors_take_more_launches(
    cuda: ModuleType, driver: int, limit: int, options: dict[str, Any], launches: int, bytes_most: int
):
    cuda.set_driver_version(driver)
    cuda.limit_launch_capacity(limit)
    try:
        ours, theirs = twins([(3,)] * 4001)
        optimizer = fastlr.FusedSGD(ours, lr=fastlr.Exponential(0.1, 0.5), momentum=0.9, **options)
        sgd = reference(theirs, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
        for step in range(3):
            with counted(cuda) as counts:
                train(1, (theirs, sgd.step), (ours, optimizer.step), start=step)
            scheduler.step()
            sizes = [launch["parameter_bytes"] for launch in counts["recent_launches"]]
            assert counts["launches"] == launches + (step == 0)  # and the clock's first evaluation
            assert max(sizes) <= bytes_most
        assert_same(theirs, ours)
        assert optimizer.sync().updates == 3
    finally:
        cuda.set_driver_version(12010)


def test_an_old_driver_is_reported_with_both_versions(cuda: ModuleType):
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model)
    set_gradients(0, model)
    before = model[0].detach().clone()
    cuda.set_driver_version(11080)
    try:
        with pytest.raises(RuntimeError, match=r"driver supports version 11\.8, but .* CUDA 12\.1"):
            optimizer.step()
    finally:
        cuda.set_driver_version(12010)
    assert_same([before], [model[0].detach()])
    assert optimizer.clock().updates == 0


def test_tensors_that_share_memory_are_updated_in_order(cuda: ModuleType):
    base_ours, base_theirs = (torch.arange(10.0) for _ in range(2))
    models = [[torch.nn.Parameter(b[:6]), torch.nn.Parameter(b[4:])] for b in (base_ours, base_theirs)]
    optimizer = fastlr.FusedSGD(models[0], lr=0.1, weight_decay=0.5)
    sgd = reference(models[1], lr=0.1, weight_decay=0.5)
    with counted(cuda) as counts:
        train(3, (models[1], sgd.step), (models[0], optimizer.step))
    assert counts["launches"] == 1 + 3 * 2
    assert_same([base_theirs], [base_ours])


def test_gradients_in_another_layout_are_copied_and_keep_the_one_launch(cuda: ModuleType):
    ours, theirs = twins([(6, 5), (4, 3, 2, 2)])
    optimizer = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9)
    sgd = reference(theirs, lr=0.1, momentum=0.9)
    for step in range(3):
        set_gradients(step, ours, theirs)
        ours[0].grad = ours[0].grad.t().contiguous().t()
        ours[1].grad = ours[1].grad.to(memory_format=torch.channels_last)
        with counted(cuda) as counts:
            optimizer.step()
        sgd.step()
        assert counts["launches"] == 1 + (step == 0)
        assert (counts["copies"] == 0) == (step > 0)
    assert_same(theirs, ours)


def test_parameters_that_are_not_dense_take_the_strided_kernel(cuda: ModuleType):
    ours, theirs = (torch.zeros(9, 20000) for _ in range(2))
    models = [[torch.nn.Parameter(whole[1::2, ::3])] for whole in (ours, theirs)]
    optimizer = fastlr.FusedSGD(models[0], lr=0.1, momentum=0.9)
    sgd = reference(models[1], lr=0.1, momentum=0.9)
    with counted(cuda) as counts:
        train(3, (models[1], sgd.step), (models[0], optimizer.step))
    assert counts["launches"] == 3 + 1
    assert_same([theirs], [ours])


# -- the clock on the device ---------------------------------------------------------------------


def test_skipped_updates_leave_the_host_ahead_until_sync(cuda: ModuleType):
    ours, theirs = twins([(9,), (40000,)])
    optimizer = fastlr.FusedCyclicSGD(ours, **CYCLE, momentum=0.9)
    sgd = reference(theirs, lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(sgd, **CYCLE, cycle_momentum=False)
    found = torch.zeros(())
    for step in range(10):
        set_gradients(step, ours, theirs)
        found.fill_(float(step in (0, 4, 5)))
        optimizer.found_inf = found
        with counted(cuda) as counts:
            optimizer.step()
        assert counts["stream_synchronizations"] == 0
        if step not in (0, 4, 5):
            sgd.step()
            scheduler.step()
    assert optimizer.clock().updates == 10
    assert optimizer.sync().updates == 7
    assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert not optimizer.last_step_skipped
    assert_same(theirs, ours)


def test_sync_does_not_hide_what_else_was_written(cuda: ModuleType):
    model = parameters([(9,)])
    optimizer = fastlr.FusedCyclicSGD(model, **CYCLE, momentum=0.9)
    train(2, (model, optimizer.step))
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was set to 0\.5 by something else"):
        optimizer.step()


def test_a_first_update_that_was_skipped_is_still_to_come(cuda: ModuleType):
    ours, theirs = twins([(9,), (5,)])
    optimizer = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9, dampening=0.5)
    sgd = reference(theirs, lr=0.1, momentum=0.9, dampening=0.5)
    set_gradients(0, ours)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    assert optimizer.last_step_skipped
    assert optimizer.state_dict()["state"] == {}
    assert copy.deepcopy(optimizer).state_dict()["state"] == {}
    assert pickle.loads(pickle.dumps(optimizer)).state_dict()["state"] == {}
    train(2, (theirs, sgd.step), (ours, optimizer.step))
    assert_same(theirs, ours)
    assert len(optimizer.state_dict()["state"]) == 2


def test_a_late_gradient_is_a_first_update(cuda: ModuleType):
    ours, theirs = twins([(9,), (5,)])
    optimizer = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9, dampening=0.5)
    sgd = reference(theirs, lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(6):
        set_gradients(step, ours, theirs)
        if step < 2 or step == 4:
            for model in (ours, theirs):
                model[1].grad = None
        optimizer.step()
        sgd.step()
    assert_same(theirs, ours)


def test_momentum_scheduled_through_zero(cuda: ModuleType):
    ours, theirs = twins([(9,)])
    values = [0.0, 0.0, 0.5, 0.0, 0.9, 0.9]
    optimizer = fastlr.FusedSGD(ours, lr=0.1, momentum=fastlr.Tabulated(values, len(values)))
    sgd = reference(theirs, lr=0.1)
    for step, value in enumerate(values):
        sgd.param_groups[0]["momentum"] = value
        train(1, (theirs, sgd.step), (ours, optimizer.step), start=step)
        assert ("momentum_buffer" in optimizer.state_dict()["state"].get(0, {})) == (step >= 2)
    assert_same(theirs, ours)


def test_a_step_without_gradients_counts(cuda: ModuleType):
    model = parameters([(9,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.5))
    train(1, (model, optimizer.step))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.sync().updates == 2
    before = model[0].detach().clone()
    set_gradients(1, model)
    gradient = model[0].grad.clone()
    optimizer.step()
    assert_same([torch.add(before, gradient, alpha=-0.025)], [model[0].detach()])


def test_the_samples_clock_moves_on_the_device(cuda: ModuleType):
    ours, theirs = twins([(9,)])
    schedule = fastlr.LinearRamp(0.0, 1.0, 1000, unit="sample")
    optimizer = fastlr.FusedSGD(ours, lr=schedule)
    sgd = reference(theirs, lr=0.0)
    found = torch.zeros(())
    for step in range(6):
        set_gradients(step, ours, theirs)
        found.fill_(float(step == 2))
        optimizer.found_inf = found
        optimizer.step()
        with counted(cuda) as counts:
            optimizer.advance_samples(128)
        assert counts["stream_synchronizations"] == counts["copies"] == 0
        if step != 2:
            sgd.param_groups[0]["lr"] = schedule(step * 128)
            sgd.step()
    assert optimizer.sync() == (5, 6 * 128)
    assert_same(theirs, ours)


def test_the_end_of_a_schedule_is_reported_at_sync(cuda: ModuleType):
    model = parameters([(9,)])
    schedule = fastlr.Cosine(0.1, 0.01, 4)
    optimizer = fastlr.FusedSGD(model, lr=schedule)
    train(1, (model, optimizer.step))
    graph = Graph(cuda, optimizer.step)
    for _ in range(4):
        graph.replay()
    optimizer.sync()  # at 5, the update at clock 4 was the last of the schedule
    graph.replay()
    with pytest.warns(UserWarning, match="Cosine ended at update 4 and holds its last value"):
        optimizer.sync()
    assert optimizer.clock().updates == 6
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_hyperparameters_and_groups_changed_between_steps(cuda: ModuleType):
    ours, theirs = twins([(9,), (5,), (7,)])
    optimizer = fastlr.FusedSGD(ours[:2], lr=fastlr.Exponential(0.1, 0.5), momentum=0.9)
    sgd = reference(theirs[:2], lr=0.1, momentum=0.9)
    pairs = (theirs[:2], sgd.step), (ours[:2], optimizer.step)
    for step in range(8):
        sgd.param_groups[0]["lr"] = 0.1 * 0.5 ** min(step, 4)
        if step == 2:
            for o in (sgd, optimizer):
                o.param_groups[0]["weight_decay"] = 0.1
        if step == 4:
            optimizer.set_schedule(lr=0.1 * 0.5**4)
        if step == 6:
            optimizer.add_param_group({"params": [ours[2]], "lr": 0.3})
            sgd.add_param_group({"params": [theirs[2]], "lr": 0.3})
            pairs = (theirs, sgd.step), (ours, optimizer.step)
        train(1, *pairs, start=step)
    assert optimizer.sync().updates == 8
    assert [group["updates"] for group in optimizer.param_groups] == [8, 8]
    assert_same(theirs, ours)


# -- graphs --------------------------------------------------------------------------------------


def test_replays_advance_schedule_and_cycled_momentum(cuda: ModuleType):
    cycle = {**CYCLE, "cycle_momentum": True}
    ours, theirs = twins([(9,), (9000,), (4, 3)])
    optimizer = fastlr.FusedCyclicSGD(ours, **cycle)
    sgd = reference(theirs, lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(sgd, **cycle)

    def reference_step() -> None:
        sgd.step()
        scheduler.step()

    train(2, (theirs, reference_step), (ours, optimizer.step))
    set_gradients(2, ours, theirs)
    with counted(cuda) as counts:
        graph = Graph(cuda, optimizer.step)
    assert counts["copies"] == counts["loads_in_capture"] == counts["stream_synchronizations"] == 0
    assert optimizer.clock().updates == 2  # nothing has run
    for step in range(2, 12):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad.fill_(step / 10)  # in place: the graph holds the gradients' addresses
            other.grad = mine.grad.clone()
        graph.replay()
        reference_step()
    assert_same(theirs, ours)
    assert optimizer.sync().updates == 12
    assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"]
    train(2, (theirs, reference_step), (ours, optimizer.step), start=12)  # steps go on from replays
    assert_same(theirs, ours)


def test_a_graph_skips_what_the_device_finds(cuda: ModuleType):
    ours, theirs = twins([(9,)])
    optimizer = fastlr.FusedCyclicSGD(ours, **CYCLE, momentum=0.9)
    sgd = reference(theirs, lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(sgd, **CYCLE, cycle_momentum=False)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(4.0)
    set_gradients(0, ours, theirs, scale=0.25)
    optimizer.step()
    graph = Graph(cuda, optimizer.step)
    for step in range(8):
        if step != 0:
            optimizer.found_inf.fill_(float(step % 3 == 1))
            optimizer.grad_scale.fill_(2.0**step)
            graph.replay()
        if step % 3 != 1:
            theirs[0].grad = ours[0].grad * (2.0**step if step else 4.0) ** -1
            sgd.step()
            scheduler.step()
    assert_same(theirs, ours)
    assert optimizer.sync().updates == 5


def test_what_cannot_be_captured_raises_with_the_remedy(cuda: ModuleType):
    model = parameters([(9,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.5), momentum=0.9)
    set_gradients(0, model)
    before = model[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"Run a step .* before the capture"):
        Graph(cuda, optimizer.step)
    assert_same([before], [model[0].detach()])
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()

    def with_change(change: Callable[[], object]) -> Callable[[], None]:
        def captured() -> None:
            change()
            optimizer.step()

        return captured

    def replaced() -> None:
        model[0].data = model[0].data.clone()

    changes: dict[str, Callable[[], object]] = {
        "hyperparameter": lambda: optimizer.param_groups[0].update(weight_decay=0.1),
        "parameters or their state have": replaced,
        "waits for the device": optimizer.sync,
    }
    for message, change in changes.items():
        clock = optimizer.clock()
        with pytest.raises(RuntimeError, match=message):
            Graph(cuda, with_change(change))
        assert optimizer.clock() == clock
        optimizer.step()  # outside a capture it is fine
        Graph(cuda, optimizer.step)  # and then inside too


def test_a_captured_graph_follows_set_schedule(cuda: ModuleType):
    ours, theirs = twins([(9,)])
    optimizer = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9)
    sgd = reference(theirs, lr=0.1, momentum=0.9)
    train(1, (theirs, sgd.step), (ours, optimizer.step))
    graph = Graph(cuda, optimizer.step)
    long = fastlr.Cosine(0.2, 0.1, 3).then(fastlr.MultiStep(0.05, [2, 3, 4], 0.5), at=3)
    optimizer.set_schedule(lr=long)
    for step in range(8):
        sgd.param_groups[0]["lr"] = long(step)
        sgd.step()
        graph.replay()
    assert_same(theirs, ours)
    optimizer.set_schedule(lr=0.3, momentum=0.5)
    sgd.param_groups[0].update(lr=0.3, momentum=0.5)
    sgd.step()
    graph.replay()
    assert_same(theirs, ours)
    assert optimizer.sync().updates == 10


def test_a_captured_graph_follows_set_clock(cuda: ModuleType):
    ours, theirs = twins([(9,), (5,)])
    decay = fastlr.Exponential(0.1, 0.5, unit="sample")
    groups = [{"params": ours[:1]}, {"params": ours[1:], "lr": decay}]
    optimizer = fastlr.FusedSGD(groups, lr=fastlr.Exponential(0.5, 0.75), momentum=0.9)
    sgd = reference([{"params": [p]} for p in theirs], lr=0.5, momentum=0.9)
    sgd.param_groups[1]["lr"] = 0.1
    train(1, (theirs, sgd.step), (ours, optimizer.step))
    graph = Graph(cuda, optimizer.step)
    optimizer.set_clock(updates=5, samples=3)
    assert optimizer.clock() == optimizer.sync() == (5, 3)
    for step in range(5, 9):
        sgd.param_groups[0]["lr"], sgd.param_groups[1]["lr"] = 0.5 * 0.75**step, 0.1 * 0.5**3
        sgd.step()
        graph.replay()
    assert_same(theirs, ours)
    assert optimizer.sync() == (9, 3)
    optimizer.set_clock(updates=0)  # also back, while the device is ahead of what the host saw last
    graph.replay()
    sgd.param_groups[0]["lr"] = 0.5
    sgd.step()
    assert_same(theirs, ours)
    assert optimizer.sync() == (1, 3)

    def captured() -> None:
        optimizer.set_clock(updates=7)

    with pytest.raises(RuntimeError, match="outside the capture"):
        Graph(cuda, captured)
    assert optimizer.sync() == (1, 3)


def test_what_a_graph_refuses_changes_nothing_on_the_host_either(cuda: ModuleType):
    ours, theirs = twins([(9,)])
    optimizer = fastlr.FusedSGD(ours, lr=fastlr.Exponential(0.1, 0.5))
    sgd = reference(theirs, lr=0.1)
    train(1, (theirs, sgd.step), (ours, optimizer.step))
    graph = Graph(cuda, optimizer.step)
    file = optimizer.state_dict()
    kept = str(file)
    file["param_groups"][0].update(momentum=0.9, updates=7)
    for change in (
        lambda: optimizer.load_state_dict(file),
        lambda: optimizer.set_schedule(lr=0.7, momentum=0.9),
    ):
        with pytest.raises(RuntimeError, match="captured its step without one"):
            change()
        assert str(optimizer.state_dict()) == kept
    sgd.param_groups[0]["lr"] = 0.05
    sgd.step()
    graph.replay()
    assert_same(theirs, ours)
    assert optimizer.sync() == (2, 0)


def test_a_captured_graph_goes_on_from_a_loaded_state(cuda: ModuleType):
    ours, theirs = twins([(9,), (5,)])
    optimizer = fastlr.FusedCyclicSGD(ours, **CYCLE, momentum=0.9)
    train(3, (ours, optimizer.step))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in ours]
    graph = Graph(cuda, optimizer.step)
    for _ in range(4):
        graph.replay()
    optimizer.load_state_dict(saved)
    for p, q, w in zip(ours, theirs, weights, strict=True):
        p.data.copy_(w)
        q.data.copy_(w)
    other = fastlr.FusedCyclicSGD(theirs, **CYCLE, momentum=0.9)
    other.load_state_dict(saved)
    for step in range(4):
        for mine, copied in zip(ours, theirs, strict=True):
            copied.grad = mine.grad.clone()
        graph.replay()
        other.step()
        assert_same(theirs, ours)
        assert optimizer.sync().updates == 4 + step


def test_a_captured_graph_starts_anew_from_a_state_without_momenta(cuda: ModuleType):
    ours, theirs = twins([(9,)])
    optimizer = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9, dampening=0.5)
    empty = optimizer.state_dict()
    train(2, (ours, optimizer.step))
    graph = Graph(cuda, optimizer.step)
    optimizer.load_state_dict(empty)
    assert optimizer.state_dict()["state"] == {}
    theirs[0].data.copy_(ours[0].data)
    sgd = reference(theirs, lr=0.1, momentum=0.9, dampening=0.5)
    theirs[0].grad = ours[0].grad.clone()
    for _ in range(3):
        graph.replay()
        sgd.step()
    assert_same(theirs, ours)
    assert optimizer.sync().updates == 3


def test_a_graph_keeps_alive_what_it_refers_to(cuda: ModuleType, streams: Streams):
    ours, theirs = twins([(9,), (5,)])
    optimizer = fastlr.FusedCyclicSGD(ours, **CYCLE, momentum=0.9)
    sgd = reference(theirs, lr=0.0, momentum=0.9)
    optimizer.measure_grad_norm = True
    schedule = fastlr.Tabulated([0.01 * (i + 1) for i in range(30)])
    set_gradients(0, ours, theirs)
    optimizer.step()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
    graph = Graph(cuda, optimizer.step)
    optimizer.set_schedule(lr=schedule)  # which the graph reads, but has not captured
    weights = [p.detach() for p in ours]
    gradients = [p.grad for p in ours]
    captured = [weakref.ref(optimizer.found_inf), weakref.ref(optimizer.grad_scale)]
    captured += [weakref.ref(entry["momentum_buffer"]) for entry in optimizer.state.values()]
    tables = [memory for memory in streams.memory if memory() is not None]
    assert len(tables) == 4  # clocks and groups, schedules, tensors, squares
    gone = weakref.ref(ours[0])
    del optimizer, ours
    gc.collect()
    assert gone() is None  # its memory is kept, not the parameter with its hooks
    assert all(kept() is not None for kept in (*captured, *tables))
    for _ in range(5):
        graph.replay()
    for lr in (CYCLE["base_lr"], *schedule.values(0, 5)):
        sgd.param_groups[0]["lr"] = float(lr)
        sgd.step()
    assert_same(theirs, weights)
    del graph, gradients
    gc.collect()
    assert all(kept() is None for kept in (*captured, *tables))


def test_samples_in_a_graph_move_the_clock_without_the_optimizer(cuda: ModuleType, streams: Streams):
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.5, unit="sample"))
    train(1, (model, optimizer.step))
    graph = Graph(cuda, functools.partial(optimizer.advance_samples, 2))
    graph.replay()
    assert optimizer.sync() == (1, 2)
    tables = [memory for memory in streams.memory if memory() is not None]
    del optimizer
    gc.collect()
    assert sum(memory() is not None for memory in tables) == 2  # clocks and groups, schedules
    graph.replay()


def test_what_writes_to_a_device_raises_in_a_capture(cuda: ModuleType):
    model = parameters([(3,)])
    optimizer = fastlr.FusedCyclicSGD(model, **CYCLE, momentum=0.9)
    train(2, (model, optimizer.step))
    saved, before = copy.deepcopy(optimizer.state_dict()), model[0].detach().clone()
    saved["state"][0]["momentum_buffer"] = torch.full((3,), 7.0)
    for refused in (lambda: optimizer.load_state_dict(saved), lambda: optimizer.set_schedule(lr=0.5)):
        with pytest.raises(RuntimeError, match="cannot capture"):
            Graph(cuda, refused)
    assert_same([before], model)
    assert optimizer.clock() == (2, 0)
    assert optimizer.param_groups[0]["lr_schedule"] is not None
    assert not torch.equal(optimizer.state[model[0]]["momentum_buffer"], torch.full((3,), 7.0))
    train(1, (model, optimizer.step), start=2)


def test_large_tables_go_through_pinned_memory(cuda: ModuleType, streams: Streams):
    """From other memory CUDA takes so much only when the stream has made room."""
    sizes: list[int] = []
    upload = streams.upload
    streams.upload = lambda memory, offset, data: sizes.append(len(data)) or upload(memory, offset, data)
    rates = fastlr.Tabulated(lambda t: 0.1 / (t + 1), 20_000)
    ours, theirs = twins([(3,)] * 2000)
    optimizer = fastlr.FusedSGD(ours, lr=rates, momentum=0.9)
    sgd = reference(theirs, lr=0.1, momentum=0.9)
    for step in range(3):
        sgd.param_groups[0]["lr"] = rates(step)
        train(1, (theirs, sgd.step), (ours, optimizer.step), start=step)
    assert_same(theirs, ours)
    assert len(sizes) == 2  # the schedule's values, and the tensors
    assert min(sizes) > 64 << 10
    with counted(cuda) as counts:
        optimizer.set_schedule(lr=rates)
    assert len(sizes) == 2  # the same schedule, from another clock on
    assert counts["uploaded_bytes"] < 64 << 10


def test_other_threads_run_while_one_waits_for_the_device(cuda: ModuleType):
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    optimizer.measure_grad_norm = True
    train(1, (model, optimizer.step))

    def asks() -> list[Callable[[], object]]:
        return [
            optimizer.sync,
            optimizer.state_dict,
            lambda: optimizer.last_step_skipped,
            lambda: optimizer.last_grad_norm,
        ]

    for ask in asks():
        answers: list[object] = []
        cuda.reset_statistics()
        cuda.hold_streams()
        waiting = threading.Thread(target=lambda ask=ask, answers=answers: answers.append(ask()))
        waiting.start()
        while waiting.is_alive() and cuda.statistics()["stream_synchronizations"] == 0:
            time.sleep(0.001)
        assert not answers
        cuda.let_streams_go()
        waiting.join()
        assert len(answers) == 1


def test_what_moves_while_one_waits_for_the_device_is_not_moved_back(cuda: ModuleType):
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.5), momentum=0.9)
    train(3, (model, optimizer.step))
    cuda.reset_statistics()
    cuda.hold_streams()
    waiting = threading.Thread(target=optimizer.sync)
    waiting.start()
    while waiting.is_alive() and cuda.statistics()["stream_synchronizations"] == 0:
        time.sleep(0.001)
    train(1, (model, optimizer.step), start=3)  # after the clock was read
    optimizer.advance_samples(5)
    cuda.let_streams_go()
    waiting.join()
    assert optimizer.clock() == (4, 5)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4
    train(1, (model, optimizer.step), start=4)
    assert optimizer.sync() == (5, 5)


def change_schedule(optimizer: fastlr.FusedSGD) -> None:
    optimizer.set_schedule(lr=fastlr.Tabulated([0.1 + 1e-6 * i for i in range(20_000)]), momentum=0.5)


def change_clock(optimizer: fastlr.FusedSGD) -> None:
    optimizer.set_clock(updates=7)


def load_own_file(optimizer: fastlr.FusedSGD) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {"updates": 9, "weight_decay": 0.25}
    saved["param_groups"][0]["lr"] = fastlr.Cosine(0.1, 0.0, 50)(9)
    optimizer.load_state_dict(saved)


def outgrow_the_table(optimizer: fastlr.FusedSGD) -> None:
    optimizer.step()  # where there are 70 groups


CHANGES = (change_schedule, change_clock, load_own_file, outgrow_the_table)


@pytest.mark.parametrize("method", ["new_bytes", "upload", "enter", "stream"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_device_goes_on_as_before_after_an_error(
    streams: Streams, change: Callable[[fastlr.FusedSGD], None], method: str
):
    """Whichever call fails of those that take memory or let Python code run."""

    def made() -> tuple[list[torch.nn.Parameter], fastlr.FusedSGD]:
        model = parameters([(5,)] * 71)
        lr = fastlr.Cosine(0.1, 0.0, 50)
        optimizer = fastlr.FusedSGD(model[:1], lr=lr, momentum=0.9, weight_decay=0.01)
        train(2, (model[:1], optimizer.step))
        if change is outgrow_the_table:
            for p in model[1:]:
                optimizer.add_param_group({"params": [p], "lr": fastlr.Cosine(0.2, 0.0, 50)})
        set_gradients(2, model)
        return model, optimizer

    @contextmanager
    def failing(fail_at: int | None = None) -> Iterator[list[int]]:
        """Counts the method's calls, and lets one of them fail."""
        calls = [0]
        original = getattr(streams, method)

        def call(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] - 1 == fail_at:
                raise MemoryError("for the test")
            return original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, method, call, raising=False)
            yield calls

    _, clean = made()
    with failing() as calls:
        change(clean)
    for fail_at in range(calls[0]):
        (model, optimizer), (twin, control) = made(), made()
        with failing(fail_at), pytest.raises(MemoryError, match="for the test"):
            change(optimizer)
        for step in range(2, 6):
            train(1, (twin, control.step), (model, optimizer.step), start=step)
        assert optimizer.sync() == control.sync(), fail_at
        assert optimizer.param_groups[0]["lr"] == control.param_groups[0]["lr"]
        assert_same(twin, model)
        for one in (optimizer, control):
            change(one)
        train(2, (twin, control.step), (model, optimizer.step), start=6)
        assert optimizer.sync() == control.sync(), fail_at
        assert_same(twin, model)


@pytest.mark.parametrize("driven", ["lr", "momentum"])
def test_the_same_schedule_from_a_later_clock_on(cuda: ModuleType, driven: str):
    schedule = fastlr.Triangular(0.1, 0.9, 3)
    ours, theirs = twins([(9,)])
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.5}
    optimizer = fastlr.FusedSGD(ours, **{**options, driven: schedule})
    sgd = reference(theirs, **options)
    for step in range(8):
        if step == 4:
            optimizer.set_schedule(**{driven: schedule})
        sgd.param_groups[0][driven] = schedule(step % 4)
        train(1, (theirs, sgd.step), (ours, optimizer.step), start=step)
    assert_same(theirs, ours)


def test_a_captured_table_is_never_rewritten(cuda: ModuleType):
    model = parameters([(9,), (5,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    train(1, (model, optimizer.step))
    graph = Graph(cuda, optimizer.step)
    captured = model[0].data
    model[0].data = torch.zeros(9)  # steps now go elsewhere, the graph does not
    set_gradients(1, model)
    before = captured.clone()
    optimizer.step()
    assert_same([before], [captured])
    elsewhere = model[0].data.clone()
    graph.replay()
    assert_same([elsewhere], [model[0].data])
    assert not torch.equal(before, captured)
    assert optimizer.sync().updates == 3


def test_groups_are_refused_where_a_graph_has_no_room_for_them(cuda: ModuleType):
    model = parameters([(3,)] * 66)
    optimizer = fastlr.FusedSGD(model[:1], lr=0.1)
    train(1, (model[:1], optimizer.step))
    Graph(cuda, optimizer.step)
    for p in model[1:64]:
        optimizer.add_param_group({"params": [p]})
    train(1, (model[:64], optimizer.step))
    optimizer.add_param_group({"params": [model[64]]})
    with pytest.raises(RuntimeError, match="room for 64 parameter groups"):
        train(1, (model[:65], optimizer.step))


def test_a_graph_without_momentum_cannot_get_one(cuda: ModuleType):
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)
    train(1, (model, optimizer.step))
    Graph(cuda, optimizer.step)
    with pytest.raises(RuntimeError, match="captured its step without one"):
        optimizer.set_schedule(momentum=0.9)


def test_a_group_added_after_a_capture_is_free_of_it(cuda: ModuleType):
    ours, theirs = twins([(9,), (5,)])
    optimizer = fastlr.FusedSGD(ours[:1], lr=0.1)
    sgd = reference(theirs[:1], lr=0.1)
    train(1, (theirs[:1], sgd.step), (ours[:1], optimizer.step))
    Graph(cuda, optimizer.step)
    for o, model in ((optimizer, ours), (sgd, theirs)):
        o.add_param_group({"params": model[1:], "momentum": 0.9})
    for step in range(1, 5):
        for o in (optimizer, sgd):
            o.param_groups[1]["weight_decay"] = step / 10
        train(1, (theirs, sgd.step), (ours, optimizer.step), start=step)
    assert_same(theirs, ours)


# -- memory --------------------------------------------------------------------------------------


def test_every_table_is_recorded_once_on_every_stream_that_uses_it(cuda: ModuleType, streams: Streams):
    model = parameters([(9,), (5,)])
    optimizer = fastlr.FusedCyclicSGD(model, **CYCLE, momentum=0.9)
    for stream in (STREAM, STREAM, 8, 8, 9, STREAM, 9):
        streams.current = stream
        train(1, (model, optimizer.step))
    assert {stream for _, stream in streams.allocated} == {STREAM}
    tables = [table for table, _ in streams.allocated]
    assert sorted(streams.recorded) == sorted((table, stream) for table in tables for stream in (8, 9))
    assert {launch["stream"] for launch in cuda.statistics()["recent_launches"]} >= {STREAM, 8, 9}


def test_tables_stay_where_they_are_while_nothing_grows(cuda: ModuleType, streams: Streams):
    model = parameters([(9,), (5,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    train(2, (model, optimizer.step))
    allocated = len(streams.allocated)
    for step in range(5):
        model[0].data = model[0].data.clone()
        train(1, (model, optimizer.step), start=step)
    assert len(streams.allocated) == allocated


def test_a_checkpoint_comes_back(cuda: ModuleType):
    ours, theirs = twins([(9,), (5,)])
    first = fastlr.FusedCyclicSGD(ours, **CYCLE, momentum=0.9)
    train(5, (ours, first.step))
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in ours], "optimizer": first.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    second = fastlr.FusedCyclicSGD(theirs, **CYCLE, momentum=0.9)
    second.load_state_dict(loaded["optimizer"])
    for p, value in zip(theirs, loaded["model"], strict=True):
        p.data.copy_(value)
    train(5, (ours, first.step), (theirs, second.step), start=5)
    assert_same(ours, theirs)
    assert first.sync() == second.sync() == (10, 0)


@pytest.mark.parametrize("skipped", [1, 3], ids=["warm", "never-applied"])
def test_a_range_test_leaves_the_devices_as_they_were(cuda: ModuleType, skipped: int):
    def run(with_range_test: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = fastlr.FusedCyclicSGD(model.parameters(), **CYCLE, momentum=0.9, dampening=0.5)
        batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(8)]

        def fit(found: list[float]) -> None:
            for (x, y), inf in zip(batches, found, strict=False):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.found_inf = torch.tensor(inf)
                optimizer.step()

        fit([1.0] * skipped + [0.0] * (3 - skipped))
        del optimizer.found_inf
        optimizer.zero_grad()
        if with_range_test:
            fastlr.range_test(
                model, optimizer, torch.nn.functional.cross_entropy, batches, num_steps=20, progress=False
            )
        fit([0.0] * 6)
        assert optimizer.sync().updates == 3 - skipped + 6
        return [p.detach() for p in model.parameters()]

    assert_same(run(False), run(True))


def test_several_devices_in_one_optimizer(cuda: ModuleType):
    """Each has a clock of its own; a group without gradients, or a skipped step, leaves none behind."""
    cuda.set_device_count(2)
    cuda.route_host_to_cuda(2)
    ours, theirs = twins([(9,), (5,), (9000,)])
    groups = [[{"params": [p]} for p in model] for model in (ours, theirs)]
    optimizer = fastlr.FusedCyclicSGD(groups[0], **CYCLE, momentum=0.9)
    sgd = reference(groups[1], lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(sgd, **CYCLE, cycle_momentum=False)
    found = optimizer.found_inf = torch.zeros(())
    for step in range(8):
        set_gradients(step, ours, theirs)
        if step in (2, 3):
            ours[1].grad = theirs[1].grad = None  # all that the second device has
        found.fill_(float(step == 5))
        with counted(cuda) as counts:
            optimizer.step()
        launches = [launch["device"] for launch in counts["recent_launches"]]
        assert sorted(launches) == ([0, 0, 1, 1] if step == 0 else [0, 1])
        assert counts["stream_synchronizations"] == 0
        optimizer.advance_samples(10)
        if step != 5:
            sgd.step()
            scheduler.step()
    assert_same(theirs, ours)
    assert optimizer.sync() == (7, 80)
    assert optimizer.param_groups[1]["lr"] == sgd.param_groups[1]["lr"]

    graph = Graph(cuda, optimizer.step)
    found.fill_(0.0)
    for _ in range(3):
        graph.replay()
        sgd.step()
        scheduler.step()
    assert_same(theirs, ours)
    assert optimizer.sync().updates == 10


def test_capturing_only_some_of_the_devices_is_an_error(cuda: ModuleType, streams: Streams):
    cuda.set_device_count(2)
    cuda.route_host_to_cuda(2)
    model = parameters([(9,), (5,)])
    optimizer = fastlr.FusedSGD([{"params": [p]} for p in model], lr=0.1)
    train(1, (model, optimizer.step))
    streams.others[-2] = STREAM + 1
    with pytest.raises(RuntimeError, match="of which only some are being captured"):
        Graph(cuda, optimizer.step)
    before = [p.detach().clone() for p in model]
    train(1, (model, optimizer.step))  # outside of a capture both take part
    assert not any(torch.equal(p, q) for p, q in zip(before, model, strict=True))
    assert optimizer.sync().updates == 2


def test_host_and_devices_in_one_optimizer(cuda: ModuleType):
    """The first parameters are updated by the CPU's kernels, the others by CUDA's."""
    ours, theirs = twins([(9,), (5,)])
    optimizer = fastlr.FusedCyclicSGD(ours, **CYCLE, momentum=0.9)
    sgd = reference(theirs, lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CyclicLR(sgd, **CYCLE, cycle_momentum=False)
    for step in range(8):
        cuda.route_host_to_cuda(1 - step % 2)
        train(1, (theirs, sgd.step), (ours, optimizer.step), start=step)
        scheduler.step()
    assert_same(theirs, ours)
    assert optimizer.sync().updates == 8
