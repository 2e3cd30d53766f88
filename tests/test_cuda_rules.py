"""Every rule on CUDA: launches, ages on the device, graphs; on the emulated CUDA."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams, counted
from helpers import assert_same, parameters, set_gradients, through_file, train, twins
from rule_table import RULES, Rule, assert_same_run, drive, slots, states, with_counting_rules, with_rules

import fastlr


@pytest.fixture(autouse=True)
def cuda(on_emulated_cuda: ModuleType, streams: Streams) -> ModuleType:
    return on_emulated_cuda


def pair(rule: Rule, drives: dict[str, fastlr.Schedule], shapes: Any = ((9,), (9000,), (4, 3))) -> Any:
    """(model, optimizer) of fastlr's and of torch's."""
    ours, theirs = twins(shapes)
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    fused.set_schedule(**drives)
    return ours, fused, theirs, reference


def reference_steps(
    model: list[torch.Tensor],
    twin: list[torch.Tensor],
    reference: Any,
    drives: dict[str, fastlr.Schedule],
    clock: int,
) -> None:
    """One, with the gradients that the other model has."""
    for p, q in zip(model, twin, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    drive(reference.param_groups[0], drives, clock)
    reference.step()


# -- launches --------------------------------------------------------------------------------------


@with_rules
def test_a_step_is_one_launch_and_nothing_else(cuda: ModuleType, rule: Rule):
    model = parameters([(33,), (7, 5), (20000,), (), (0,)])
    optimizer = rule.make(model, **rule.full)
    optimizer.set_schedule(**rule.drives)
    train(2, (model, optimizer.step))
    set_gradients(2, model)
    with counted(cuda) as counts:
        optimizer.step()
    assert (counts["launches"], counts["copies"], counts["stream_synchronizations"]) == (1, 0, 0)


@with_rules
@pytest.mark.parametrize("limit", [1, 3])
def test_launches_make_no_difference(cuda: ModuleType, rule: Rule, limit: int):
    cuda.limit_launch_capacity(limit)
    ours, fused, theirs, reference = pair(rule, rule.drives, [(5,)] * 7 + [(8200,)])
    for step in range(4):
        set_gradients(step, ours)
        reference_steps(ours, theirs, reference, rule.drives, step)
        fused.step()
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_rules
def test_several_devices(cuda: ModuleType, rule: Rule):
    """Groups are dealt out to two; skipped steps and groups without gradients leave none behind."""
    cuda.set_device_count(2)
    cuda.route_host_to_cuda(2)
    ours, theirs = twins([(9,), (5,), (9000,)])
    fused = rule.make([{"params": [p]} for p in ours], **rule.full)
    reference = rule.make_torch([{"params": [p]} for p in theirs], **rule.full)
    fused.set_schedule(**rule.drives)
    found, applied = torch.zeros(()), 0
    fused.found_inf = found
    for step in range(8):
        set_gradients(step, ours, theirs)
        if step in (2, 3):
            ours[1].grad = theirs[1].grad = None  # all that the second device has
        found.fill_(float(step in (0, 5)))
        fused.step()
        if not found:
            for group in reference.param_groups:
                drive(group, rule.drives, applied)
            reference.step()
            applied += 1
    assert fused.sync().updates == applied == 6
    assert_same_run(rule, (reference, theirs), (fused, ours))


# -- graphs ----------------------------------------------------------------------------------------


@with_rules
def test_replays_age_the_state_and_move_every_schedule(cuda: ModuleType, rule: Rule):
    ours, fused, theirs, reference = pair(rule, rule.drives)
    for step in range(2):
        set_gradients(step, ours)
        if step == 0:
            ours[2].grad = None  # of another age
        reference_steps(ours, theirs, reference, rule.drives, step)
        fused.step()
    set_gradients(2, ours)
    with counted(cuda) as counts:
        graph = Graph(cuda, fused.step)
    assert counts["copies"] == counts["loads_in_capture"] == counts["stream_synchronizations"] == 0
    assert fused.clock().updates == 2  # nothing has run
    for step in range(2, 10):
        for p in ours:
            p.grad.mul_(-0.75)  # in place: the graph holds the gradients' addresses
        reference_steps(ours, theirs, reference, rule.drives, step)
        graph.replay()
    assert_same_run(rule, (reference, theirs), (fused, ours))
    assert fused.sync().updates == 10
    for name in ("lr", "betas", "alpha", "rho", "momentum", "weight_decay"):
        drive(reference.param_groups[0], rule.drives, 10)
        assert fused.param_groups[0].get(name) == reference.param_groups[0].get(name)
    for step in range(10, 13):  # steps go on from replays
        set_gradients(step, ours)
        reference_steps(ours, theirs, reference, rule.drives, step)
        fused.step()
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_rules
def test_a_graph_ages_no_state_where_the_device_finds_an_inf(cuda: ModuleType, rule: Rule):
    ours, fused, theirs, reference = pair(rule, rule.drives, [(9,), (5,)])
    fused.found_inf, fused.grad_scale = torch.ones(()), torch.tensor(4.0)
    set_gradients(0, ours)
    fused.step()  # skipped: the first update is still to come
    graph = Graph(cuda, fused.step)
    applied = 0
    for step in range(8):
        fused.found_inf.fill_(float(step % 3 == 1))
        fused.grad_scale.fill_(2.0**step)
        if step % 3 != 1:
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad * 2.0**-step
            drive(reference.param_groups[0], rule.drives, applied)
            reference.step()
            applied += 1
        graph.replay()
    assert fused.sync().updates == applied == 5
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_rules
def test_set_schedule_reaches_a_captured_graph(cuda: ModuleType, rule: Rule):
    """Schedules, and then numbers, for every option that one can drive."""
    ours, fused, theirs, reference = pair(rule, {}, [(9,), (5,)])
    set_gradients(0, ours)
    reference_steps(ours, theirs, reference, {}, 0)
    fused.step()
    graph = Graph(cuda, fused.step)
    fused.set_schedule(**rule.drives)
    for step in range(5):
        reference_steps(ours, theirs, reference, rule.drives, step)
        graph.replay()
    assert_same_run(rule, (reference, theirs), (fused, ours))
    fixed: dict[str, fastlr.Schedule] = {name: fastlr.Constant(0.125) for name in rule.drives}
    fused.set_schedule(**dict.fromkeys(rule.drives, 0.125))
    for step in range(3):
        reference_steps(ours, theirs, reference, fixed, step)
        graph.replay()
    assert_same_run(rule, (reference, theirs), (fused, ours))
    assert fused.sync().updates == 9


@with_rules
def test_a_graph_goes_on_from_loaded_state(cuda: ModuleType, rule: Rule):
    """In the tensors whose addresses it knows."""
    ours, fused, theirs, reference = pair(rule, rule.drives, [(9,), (5,)])
    for step in range(3):
        set_gradients(step, ours)
        reference_steps(ours, theirs, reference, rule.drives, step)
        fused.step()
    saved = through_file(copy.deepcopy(fused.state_dict()))
    weights = [p.detach().clone() for p in ours]
    addresses = [t.data_ptr() for t in states(fused, ours)]
    graph = Graph(cuda, fused.step)
    for _ in range(4):
        graph.replay()
    fused.load_state_dict(saved)
    assert [t.data_ptr() for t in states(fused, ours)] == addresses
    for p, w in zip(ours, weights, strict=True):
        p.data.copy_(w)
    for step in range(3, 7):
        reference_steps(ours, theirs, reference, rule.drives, step)
        graph.replay()
        assert_same(theirs, ours)
    assert_same_run(rule, (reference, theirs), (fused, ours))
    assert fused.sync().updates == 7


@with_rules
def test_a_graph_starts_anew_from_a_file_without_state(cuda: ModuleType, rule: Rule):
    ours, theirs = twins([(9,), (5,)])
    fused = rule.make(ours, **rule.full)
    empty = fused.state_dict()
    train(2, (ours, fused.step))
    graph = Graph(cuda, fused.step)
    fused.load_state_dict(empty)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.detach())
    if rule.counts:
        assert all(float(fused.state[p]["step"]) == 0.0 for p in ours)
    else:
        assert fused.state_dict()["state"] == {}
    reference = rule.make_torch(theirs, **rule.full)
    for step in range(3):
        reference_steps(ours, theirs, reference, {}, step)
        graph.replay()
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_counting_rules
def test_a_graph_goes_on_from_a_torch_file(cuda: ModuleType, rule: Rule):
    ours, fused, theirs, reference = pair(rule, {}, [(9,), (5,)])
    train(1, (ours, fused.step))
    graph = Graph(cuda, fused.step)
    train(5, (theirs, reference.step))
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.detach())
    fused.load_state_dict(reference.state_dict())
    for step in range(3):
        reference_steps(ours, theirs, reference, {}, step)
        graph.replay()
    assert_same_run(rule, (reference, theirs), (fused, ours))


# Options that bring state which a captured step has not.
MORE_STATE = {
    "SGD": ({}, {"momentum": 0.9}),
    "Adam": ({}, {"amsgrad": True}),
    "RMSprop": ({}, {"momentum": 0.9}),
    "RMSprop-centered": ({"momentum": 0.9}, {"centered": True}),
}


@pytest.mark.parametrize("name", MORE_STATE)
def test_a_graph_cannot_get_more_state(cuda: ModuleType, name: str):
    rule = RULES[name.partition("-")[0]]
    before, after = MORE_STATE[name]
    ours, theirs = twins([(9,)])
    fused, reference = rule.make(ours, **before), rule.make_torch(theirs, **before)
    train(1, (theirs, reference.step), (ours, fused.step))
    graph = Graph(cuda, fused.step)
    other = rule.make([torch.nn.Parameter(p.detach().clone()) for p in ours], **before, **after)
    train(2, (other.param_groups[0]["params"], other.step))
    kept = str(fused.state_dict())
    with pytest.raises(RuntimeError, match="captured its step without one"):
        fused.load_state_dict(other.state_dict())
    assert str(fused.state_dict()) == kept
    reference_steps(ours, theirs, reference, {}, 0)
    graph.replay()
    assert_same_run(rule, (reference, theirs), (fused, ours))


@with_rules
def test_copies_of_what_a_graph_has_moved(cuda: ModuleType, rule: Rule):
    """state_dict, deepcopy and pickle see what replays made of ages."""
    ours, fused, theirs, reference = pair(rule, rule.drives, [(9,), (5,)])
    set_gradients(0, ours)
    reference_steps(ours, theirs, reference, rule.drives, 0)
    fused.step()
    graph = Graph(cuda, fused.step)
    for step in range(1, 5):
        reference_steps(ours, theirs, reference, rule.drives, step)
        graph.replay()
    twin = copy.deepcopy(fused)
    twin_model = twin.param_groups[0]["params"]
    loaded_model = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    loaded = rule.fused(loaded_model)
    loaded.load_state_dict(through_file(fused.state_dict()))
    assert twin.clock() == loaded.clock() == (5, 0)
    for step in range(5, 8):
        set_gradients(step, ours, twin_model, loaded_model)
        reference_steps(ours, theirs, reference, rule.drives, step)
        for optimizer in (fused, twin, loaded):
            optimizer.step()
    for optimizer, model in ((fused, ours), (twin, twin_model), (loaded, loaded_model)):
        assert_same_run(rule, (reference, theirs), (optimizer, model))
    assert len(slots(loaded, loaded_model[0])) == len(slots(fused, ours[0]))
