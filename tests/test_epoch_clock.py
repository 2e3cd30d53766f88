"""Schedules that count epochs: how the optimizer's clock is told, saved, mixed and given to torch."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import Graph, Streams
from helpers import assert_same, parameters, set_gradients, through_file, train, twins, weight
from rule_table import Rule, with_rules

import fastlr

EPOCHS = fastlr.LinearRamp(0.5, 0.0, 5, unit="epoch").then(fastlr.StepDecay(0.25, 2, 0.5, unit="epoch"))
SHAPES = [(9,), (3, 4)]
with_backends = pytest.mark.usefixtures("backend")


@with_backends
@with_rules
def test_epochs_of_any_length_move_as_torchs_scheduler_does(rule: Rule) -> None:
    """Through skipped updates and epochs that are no whole number of them, every option that is driven."""
    ours, theirs = twins(SHAPES)
    fused, numbers = rule.make(ours), rule.make(theirs)
    drives = {name: fastlr.Tabulated(each.values(0, 12), unit="epoch") for name, each in rule.drives.items()}
    fused.set_schedule(**drives)
    step, applied = itertools.count(), 0
    for epoch in range(6):
        numbers.set_schedule(**{name: each(epoch) for name, each in drives.items()})
        for update in range((3, 1, 0, 4, 2, 3)[epoch]):
            set_gradients(next(step), ours, theirs)
            skips = (epoch, update) in ((0, 0), (3, 2))
            for each in (fused, numbers):
                device = each.param_groups[0]["params"][0].device
                each.found_inf = torch.tensor(float(skips), device=device)
                each.step()
            applied += not skips
        fused.advance_epoch()
    assert_same(theirs, ours)
    assert repr(fused.sync()) == f"EpochClock(updates={applied}, epochs=6)"
    assert all(fused.param_groups[0][f"{name}_schedule"] == each for name, each in drives.items())


@with_backends
@pytest.mark.parametrize("way", ["file", "copy", "pickle"])
def test_a_run_goes_on_from_what_was_saved(way: str) -> None:
    model, twin = parameters(SHAPES), parameters(SHAPES)

    def made(params: list[torch.nn.Parameter], lr: Any) -> fastlr.FusedOptimizer:
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.125}]
        return fastlr.FusedAdamW(groups, lr=lr, betas=(EPOCHS, 0.999))

    def epochs(first: int, last: int, opt: fastlr.FusedOptimizer) -> None:
        for epoch in range(first, last):
            params = [p for group in opt.param_groups for p in group["params"]]
            train(2, (params, opt.step), start=2 * epoch)
            opt.advance_epoch()

    whole, first = made(model, EPOCHS), made(twin, EPOCHS)
    epochs(0, 7, whole)
    epochs(0, 3, first)
    if way == "file":
        second = made([torch.nn.Parameter(p.detach().clone()) for p in twin], 0.1)
        second.load_state_dict(through_file(first.state_dict()))
    else:
        second = copy.deepcopy(first) if way == "copy" else pickle.loads(pickle.dumps(first))
    clock = second.clock()
    assert isinstance(clock, fastlr.EpochClock)
    assert (clock, clock.epochs, clock._asdict()) == ((6, 3), 3, {"updates": 6, "epochs": 3})
    with pytest.raises(AttributeError, match="no samples, as it counts epochs: 3 so far"):
        _ = clock.samples
    epochs(3, 7, second)
    assert_same(model, [p for group in second.param_groups for p in group["params"]])


def test_it_stands_where_scheduler_step_stood() -> None:
    """Accumulation over 4 of 10 micro-batches: a drop comes at the epoch's end, wherever that is."""
    ours, theirs = twins(SHAPES)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(sgd, [1, 3], 0.5)
    opt = fastlr.FusedSGD(ours, lr=fastlr.MultiStep(0.1, [1, 3], 0.5, unit="epoch"), momentum=0.9)
    for epoch in range(5):
        for micro in range(10):
            if (10 * epoch + micro) % 4 == 3:
                set_gradients(10 * epoch + micro, ours, theirs)
                opt.step()
                sgd.step()
                assert opt.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
        scheduler.step()
        opt.advance_epoch()
    assert_same(theirs, ours)


MIXED: dict[str, tuple[str, Callable[[fastlr.FusedOptimizer], Any]]] = {
    "samples": (
        r"^lr of parameter group 1 counts samples, but lr of parameter group 0 epochs, .* turn epochs into "
        r"samples with schedule.in_samples\(samples_per_epoch\)",
        lambda opt: opt.add_param_group({"params": [weight()], "lr": fastlr.Constant(0.1, unit="sample")}),
    ),
    "tokens": (
        r"weight_decay of .* counts tokens, but lr of .* epochs, .*in_tokens\(tokens_per_epoch\)",
        lambda opt: opt.set_schedule(weight_decay=fastlr.Constant(0.1, unit="token")),
    ),
    "advance_samples": (
        r"counts epochs, and stands at 2, so that it cannot count samples; .* advance_epoch\(\)",
        lambda opt: opt.advance_samples(3),
    ),
    "set_clock": ("schedules count epochs, so that its clock cannot", lambda opt: opt.set_clock(tokens=3)),
    "both": ("got tokens=3 and epochs=1; leave one", lambda opt: opt.set_clock(tokens=3, epochs=1)),
    "file": (
        "clock_unit of the file's .* one, and that of their schedules, got sample with schedules in epochs",
        lambda opt: opt.load_state_dict(edited(opt.state_dict(), clock_unit="sample")),
    ),
    "loader": (
        r"counts epochs, but a loader tells samples or tokens; .*in_samples\(len\(dataset\)\)",
        lambda opt: fastlr.GrowingLoader(torch.ones(8, 2), PLAN).bind(opt),
    ),
}
PLAN = fastlr.BatchPlan.from_phases([(0, 4)], dataset_size=8, epochs=1, lr=0.1)


def edited(state: dict[str, Any], **entries: Any) -> dict[str, Any]:
    state["param_groups"][0] = {**state["param_groups"][0], **entries}
    return state


@pytest.mark.parametrize(("message", "call"), MIXED.values(), ids=MIXED)
def test_one_optimizer_counts_epochs_or_another_thing(
    message: str, call: Callable[[fastlr.FusedOptimizer], Any]
) -> None:
    opt = fastlr.FusedSGD([weight()], lr=EPOCHS)
    opt.set_clock(updates=7, epochs=2)
    before = str(opt.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(opt)
    assert str(opt.state_dict()) == before


def test_a_bound_loader_never_moves_epochs() -> None:
    opt = fastlr.FusedSGD([weight()], lr=fastlr.Constant(0.5))
    loader = fastlr.GrowingLoader(torch.ones(8, 2), PLAN).bind(opt)
    opt.set_schedule(EPOCHS)
    batches = iter(loader)
    next(batches)
    with pytest.raises(RuntimeError, match="counts epochs, but a loader tells samples"):
        opt.step()
    assert repr(opt.clock()) == "EpochClock(updates=0, epochs=0)"
    opt.set_schedule(0.1)
    opt.set_clock(samples=0)
    fastlr.GrowingLoader(torch.ones(8, 2), PLAN).bind(opt)
    opt.step()


def test_numbers_alone_count_what_they_are_told_first() -> None:
    opt = fastlr.FusedSGD([weight()], lr=0.1)
    opt.step()
    opt.advance_epoch()
    assert repr(opt.clock()) == "EpochClock(updates=1, epochs=1)"
    with opt.handed_over():
        opt.advance_epoch()
    opt.set_schedule(EPOCHS, start="zero")
    assert opt.param_groups[0]["lr"] == EPOCHS(2)
    with opt.handed_over(), pytest.raises(RuntimeError, match="cannot count tokens"):
        opt.advance_tokens(1)

    counted = fastlr.FusedSGD([weight()], lr=fastlr.Constant(0.1, unit="sample"))
    with counted.handed_over(), pytest.raises(RuntimeError, match="counts samples, and stands at 0"):
        counted.advance_epoch()

    torchs = torch.optim.SGD([weight()], lr=0.25)
    opt = fastlr.FusedSGD([weight()], lr=EPOCHS)
    with pytest.warns(UserWarning, match=r"goes on at epochs=0.*set_clock\(updates=\.\.\., epochs=\.\.\.\)"):
        opt.load_state_dict(torchs.state_dict())


def test_averages_of_buffers_follow_epochs() -> None:
    model = torch.nn.BatchNorm1d(2)
    decay = fastlr.Tabulated([0.5, 0.75], unit="epoch")
    opt = fastlr.FusedSGD(model.parameters(), lr=0.1, ema_decay=decay)
    opt.average_buffers(model)
    mean, expected = model.running_mean, 0.0
    assert isinstance(mean, torch.Tensor)
    for epoch, value in enumerate((0.0, 4.0)):
        mean.fill_(value)
        opt.step()
        expected += (1 - decay(epoch)) * (value - expected)
        opt.advance_epoch()
    assert opt.averaged_state_dict(model, buffers="average")["running_mean"].tolist() == [expected] * 2


@pytest.mark.parametrize("begun", [0, 3])
def test_torchs_scheduler_is_stepped_per_epoch(begun: int) -> None:
    ours, theirs = twins(SHAPES)
    schedule = fastlr.StepDecay(0.1, every=2, gamma=0.5, unit="epoch")
    opts = [fastlr.FusedSGD(model, lr=schedule, momentum=0.9) for model in (ours, theirs)]
    for epoch in range(begun):
        train(2, (ours, opts[0].step), (theirs, opts[1].step), start=2 * epoch)
        for opt in opts:
            opt.advance_epoch()
    optimizer, scheduler = opts[1].to_torch(foreach=False)
    assert (type(scheduler).__name__, scheduler.step_size, scheduler.last_epoch) == ("StepLR", 2, begun)
    for epoch in range(begun, 7):
        assert optimizer.param_groups[0]["lr"] == opts[0].param_groups[0]["lr"]
        train(2, (ours, opts[0].step), (theirs, optimizer.step), start=2 * epoch)
        opts[0].advance_epoch()
        scheduler.step()
    assert_same(theirs, ours)


def test_torch_gets_values_per_epoch_where_it_has_no_scheduler() -> None:
    opt = fastlr.FusedSGD([weight()], lr=EPOCHS * 0.5, momentum=fastlr.Constant(0.5, unit="epoch"))
    opt.set_clock(updates=11, epochs=4)
    with pytest.warns(UserWarning, match="a LambdaLR gives their values"):
        optimizer, scheduler = opt.to_torch()
    for epoch in range(4, 9):
        assert optimizer.param_groups[0]["lr"] == 0.5 * EPOCHS(epoch)
        optimizer.step()
        scheduler.step()

    held = fastlr.StepDecay(0.5, 2, 0.5, unit="epoch").in_updates(3) * 0.5
    with pytest.warns(UserWarning, match="a LambdaLR gives their values"):
        optimizer, scheduler = fastlr.FusedSGD([weight()], lr=held).to_torch()
    for epoch in range(5):
        assert optimizer.param_groups[0]["lr"] == held(3 * epoch)
        optimizer.step()
        scheduler.step()

    mixed = fastlr.FusedSGD([weight()], lr=EPOCHS, momentum=fastlr.Constant(0.5))
    with pytest.raises(
        ValueError, match=r"momentum schedule counts updates, but that of lr epochs, .*in_upd"
    ):
        mixed.to_torch()
    mixed.step()  # it is still in charge


def test_a_captured_graph_follows_epochs(on_emulated_cuda: ModuleType, streams: Streams) -> None:
    ours, theirs = twins(SHAPES)
    fused = fastlr.FusedSGD(ours, lr=EPOCHS, momentum=0.5)
    numbers = fastlr.FusedSGD(theirs, lr=EPOCHS(0), momentum=0.5)
    train(1, (ours, fused.step), (theirs, numbers.step))
    set_gradients(1, ours, theirs)
    graph = Graph(on_emulated_cuda, fused.step)
    for epoch in range(7):
        numbers.set_schedule(lr=EPOCHS(epoch))
        for _ in range(3):
            graph.replay()
            numbers.step()
        fused.advance_epoch()
    assert repr(fused.sync()) == "EpochClock(updates=22, epochs=7)"
    assert fused.param_groups[0]["lr"] == EPOCHS(7)
    assert_same(theirs, ours)
