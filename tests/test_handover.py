"""Options as plain numbers for a while: whoever writes them then, and what comes of the schedules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu.recording import Graph
from helpers import assert_same, parameters, train, twins
from rule_table import Rule, with_rules

import fastlr

SHAPES = [(9,), (3, 4)]


def made(lr: Any = None, **options: Any) -> tuple[list[torch.nn.Parameter], fastlr.FusedSGD]:
    model = parameters(SHAPES)
    groups = [{"params": model[:1]}, {"params": model[1:], "momentum": fastlr.Triangular(0.5, 0.9, 3)}]
    lr = fastlr.Triangular2(0.01, 0.1, 3, 4) if lr is None else lr
    return model, fastlr.FusedSGD(groups, lr=lr, momentum=0.9, **options)


def plain(state: Any) -> Any:
    """A state_dict in a form that compares, as a file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    tensors = {
        key: {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in entry.items()}
        for key, entry in loaded["state"].items()
    }
    return {**loaded, "state": tensors}


@with_rules
def test_numbers_are_what_steps_take_and_schedules_go_on_behind(rule: Rule) -> None:
    ours, theirs = twins(SHAPES)
    optimizer, numbers = (rule.make(model, **rule.full) for model in (ours, theirs))
    optimizer.set_schedule(**rule.drives)

    def follow() -> None:
        """Has the twin use the same numbers, which it was always told."""
        group = optimizer.param_groups[0]
        keys = [key for key in numbers.param_groups[0] if key != "params" and not key.endswith("_schedule")]
        numbers.param_groups[0].update({key: group[key] for key in keys if not key.endswith("_start")})

    def steps(count: int) -> None:
        for step in range(count):
            follow()
            train(1, (ours, optimizer.step), (theirs, numbers.step), start=optimizer.clock().updates + step)

    steps(2)
    with optimizer.handed_over():
        group = optimizer.param_groups[0]
        assert all(group[f"{name}_schedule"] is None for name in rule.drives)
        group["lr"] = 0.03
        group["weight_decay"] = 0.02
        steps(3)
        assert (group["lr"], group["weight_decay"]) == (0.03, 0.02)
    assert optimizer.clock().updates == 5
    for name, schedule in rule.drives.items():
        assert group[f"{name}_schedule"] == schedule
    assert group["lr"] == rule.drives["lr"](5)
    if "betas" in group and "beta1" in rule.drives:
        assert group["betas"][0] == rule.drives["beta1"](5)
    steps(3)
    numbers.set_schedule(**rule.drives)
    assert_same(ours, theirs)
    assert optimizer.clock().updates == 8


def test_torchs_swalr_writes_what_it_likes() -> None:
    ours, theirs = twins(SHAPES)
    optimizer = fastlr.FusedSGD(ours, lr=fastlr.Cosine(0.1, 0.0, 20), momentum=0.9)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    with optimizer.handed_over():
        swalr = [torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3) for o in (optimizer, sgd)]
        for step in range(6):
            train(1, (theirs, sgd.step), (ours, optimizer.step), start=step)
            for scheduler in swalr:
                scheduler.step()
            assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert_same(theirs, ours)
    assert optimizer.param_groups[0]["lr"] == fastlr.Cosine(0.1, 0.0, 20)(6)


def test_what_is_made_inside_has_the_schedules_in_charge() -> None:
    """A checkpoint, a pickle and a copy are those of a run whose values were the schedules'."""
    model, optimizer = made(ema_decay=0.9)
    train(2, (model, optimizer.step))
    with optimizer.handed_over():
        groups = optimizer.param_groups
        saved = plain(optimizer.state_dict())
        groups[0]["lr"], groups[1]["momentum"] = 0.7, 0.25
        assert plain(optimizer.state_dict()) == saved
        assert (groups[0]["lr"], groups[0]["lr_schedule"]) == (0.7, None)  # nothing was written
        copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    assert plain(optimizer.state_dict()) == saved
    for made_inside in copies:
        assert plain(made_inside.state_dict()) == saved
        with made_inside.handed_over():  # which is not open in it
            assert made_inside.param_groups[0]["lr_schedule"] is None
    fresh = made(ema_decay=0.9)[1]
    fresh.load_state_dict(torch_read(optimizer.state_dict()))
    assert plain(fresh.state_dict()) == saved


def torch_read(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_what_is_loaded_inside_is_for_later() -> None:
    """As Lightning's search for a rate does, which ends by loading what it saved at its beginning."""
    model, optimizer = made()
    train(2, (model, optimizer.step))
    saved = torch_read(optimizer.state_dict())
    before = plain(saved)
    with optimizer.handed_over():
        for group in optimizer.param_groups:
            group["lr"] = 1e-8
        train(5, (model, optimizer.step))
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["lr_schedule"]) == (before["param_groups"][0]["lr"], None)
        group["lr"] = 0.5
        train(1, (model, optimizer.step))
        assert group["lr"] == 0.5
        optimizer.load_state_dict(saved)
        other = made(lr=fastlr.Cosine(0.2, 0.0, 9))[1].state_dict()
        optimizer.load_state_dict(other)  # of another schedule, which then is what owns
        optimizer.load_state_dict(saved)
    assert plain(optimizer.state_dict()) == before


def test_a_file_of_torchs_loaded_inside_leaves_the_schedules() -> None:
    model, optimizer = made()
    sgd = torch.optim.SGD([{"params": [p]} for p in parameters(SHAPES)], lr=0.3, momentum=0.9)
    with optimizer.handed_over(), pytest.warns(UserWarning, match="the file has no clock"):
        optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr_schedule"] == fastlr.Triangular2(0.01, 0.1, 3, 4)
    assert optimizer.param_groups[0]["lr"] == 0.01
    train(2, (model, optimizer.step))


REFUSED: dict[str, Callable[[fastlr.FusedSGD], object]] = {
    "set_schedule": lambda optimizer: optimizer.set_schedule(lr=0.1),
    "set_clock": lambda optimizer: optimizer.set_clock(updates=1),
    "add_param_group": lambda optimizer: optimizer.add_param_group({"params": parameters([(2,)])}),
    "handed_over": lambda optimizer: optimizer.handed_over().__enter__(),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_the_schedules_is_refused_inside(call: Any, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    model, optimizer = made()
    before = plain(optimizer.state_dict())
    with optimizer.handed_over():
        with pytest.raises(RuntimeError, match=rf"{name}\(\) was called while the options are handed over"):
            call(optimizer)
        optimizer.param_groups[0]["lr"] = 0.5
        train(1, (model, optimizer.step))  # still handed over
    with optimizer.handed_over():
        pass
    assert len(optimizer.param_groups) == len(before["param_groups"])
    assert optimizer.param_groups[0]["lr"] == fastlr.Triangular2(0.01, 0.1, 3, 4)(1)


def test_nothing_is_handed_over_that_somebody_has_written() -> None:
    _, optimizer = made()
    optimizer.param_groups[0]["lr"] = 0.07
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was set to 0\.07 by something else"):
        optimizer.handed_over().__enter__()
    assert optimizer.param_groups[0]["lr_schedule"] is not None
    optimizer.set_schedule(lr=0.07)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_gives_the_options_back(error: type[BaseException]) -> None:
    model, optimizer = made()

    def interrupted() -> None:
        with optimizer.handed_over():
            optimizer.param_groups[0]["lr"] = 0.5
            train(3, (model, optimizer.step))
            raise error

    with pytest.raises(error):
        interrupted()
    assert optimizer.param_groups[0]["lr"] == fastlr.Triangular2(0.01, 0.1, 3, 4)(3)
    train(2, (model, optimizer.step))


def test_a_number_that_no_schedule_owned_stays_and_what_is_bad_is_said() -> None:
    model, optimizer = made(lr=fastlr.Constant(0.1))
    with optimizer.handed_over():
        optimizer.param_groups[0]["momentum"] = 0.5
        optimizer.param_groups[1]["momentum"] = 0.5
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.param_groups[1]["momentum"] == fastlr.Triangular(0.5, 0.9, 3)(0)
    bad = pytest.raises(ValueError, match=r"momentum of parameter group 0 must be in .* got 1\.5")
    with bad, optimizer.handed_over():
        optimizer.param_groups[0]["momentum"] = 1.5
    assert optimizer.param_groups[0]["lr_schedule"] == fastlr.Constant(0.1)  # in charge all the same
    optimizer.param_groups[0]["momentum"] = 0.9
    train(1, (model, optimizer.step))


def test_a_range_test_behind_the_block_is_undone_as_ever() -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = fastlr.FusedSGD(model.parameters(), lr=fastlr.Cosine(0.1, 0.0, 9))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
    test = (model, optimizer, torch.nn.functional.cross_entropy, batches)
    with optimizer.handed_over():
        optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(RuntimeError, match=r"set_schedule\(\) was called while"):
            fastlr.range_test(*test, num_steps=4, progress=False)
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.1
    fastlr.range_test(*test, num_steps=4, progress=False)


@pytest.mark.usefixtures("streams")
def test_a_captured_graph_takes_the_numbers_and_then_the_schedules(on_emulated_cuda: ModuleType) -> None:
    ours, theirs = twins([(9,)])
    schedule = fastlr.Exponential(0.5, 0.75)
    optimizer = fastlr.FusedSGD(ours, lr=schedule, momentum=0.9)
    sgd = torch.optim.SGD(theirs, lr=0.5, momentum=0.9, foreach=False)

    def reference(lr: float) -> None:
        sgd.param_groups[0]["lr"] = lr
        sgd.step()

    train(1, (theirs, sgd.step), (ours, optimizer.step))
    graph = Graph(on_emulated_cuda, optimizer.step)
    graph.replay()
    reference(schedule(1))
    with optimizer.handed_over():
        graph.replay()  # with the value that stood there
        reference(schedule(2))
        optimizer.param_groups[0]["lr"] = 0.03125
        optimizer.step()
        reference(0.03125)
        graph.replay()
        reference(0.03125)
    graph.replay()
    reference(schedule(5))
    assert_same(theirs, ours)
    assert optimizer.sync().updates == 6
