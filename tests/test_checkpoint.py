"""state_dict and load_state_dict: torch's format, exact continuation, nothing lost.

What is the same for every rule is in ``test_rules_checkpoint.py``."""

from __future__ import annotations

import copy
import io
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, leaves, parameters, set_gradients, through_file, train, twins

import fastlr

pytestmark = pytest.mark.usefixtures("backend")

SCHEDULES = {
    "triangular2": fastlr.Triangular2(0.01, 0.1, 3, 4),
    "joined": fastlr.LinearRamp(0.0, 0.1, 4).then(2.0 * fastlr.Cosine(0.05, 0.0, 30)),
    "table": fastlr.Tabulated(lambda t: 0.1 / (1 + t), 50),
    "epochs": fastlr.MultiStep(0.1, [1, 3], 0.5, unit="epoch").in_updates(3),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(schedule: fastlr.Schedule) -> None:
    def make(model: list[torch.nn.Parameter], lr: Any) -> fastlr.FusedSGD:
        return fastlr.FusedSGD(model, lr=lr, momentum=fastlr.Triangular(0.8, 0.9, 5), weight_decay=0.1)

    whole, halves = parameters([(9,), (5, 4)]), parameters([(9,), (5, 4)])
    optimizer, first = make(whole, schedule), make(halves, schedule)
    train(7, (whole, optimizer.step), (halves, first.step))
    saved = through_file(first.state_dict())
    assert leaves(saved) <= {dict, int, float, str, bool, type(None), torch.Tensor}
    second = make(halves, 0.5)  # made without the schedule: the file brings it
    second.load_state_dict(saved)
    assert second.param_groups[0]["lr_schedule"] == schedule
    train(8, (whole, optimizer.step), (halves, second.step), start=7)
    assert_same(whole, halves)
    assert second.clock() == optimizer.clock() == (15, 0)


def test_a_checkpoint_with_momentum_buffer_none_loads() -> None:
    ours, theirs = twins([(9,)])
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    saved = reference.state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    fused = fastlr.FusedSGD(ours)
    fused.load_state_dict(saved)
    assert not fused.state
    train(3, (theirs, reference.step), (ours, fused.step))
    assert_same(theirs, ours)


def test_a_tensor_rate_in_an_sgd_checkpoint_becomes_a_number() -> None:
    ours, theirs = twins([(9,)])
    reference = torch.optim.SGD(theirs, lr=torch.tensor(0.25), momentum=0.9, foreach=False)
    fused = fastlr.FusedSGD(ours)
    fused.load_state_dict(reference.state_dict())
    assert fused.param_groups[0]["lr"] == 0.25
    train(3, (theirs, reference.step), (ours, fused.step))
    assert_same(theirs, ours)


def test_the_schedule_is_kept_when_the_file_knows_no_schedules() -> None:
    model = parameters([(9,)])
    optimizer = fastlr.FusedCyclicSGD(model, 0.1, 0.5, 4)
    with pytest.warns(UserWarning, match="the file has no clock"):
        optimizer.load_state_dict(torch.optim.SGD(model, lr=0.7, momentum=0.9).state_dict())
    assert optimizer.param_groups[0]["lr_schedule"] == fastlr.Triangular(0.1, 0.5, 4)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_a_fixed_value_comes_back_in_place_of_the_schedule_that_it_replaced() -> None:
    def built() -> fastlr.FusedSGD:
        return fastlr.FusedSGD(
            parameters([(9,)]), lr=fastlr.Cosine(0.1, 0.0, 100), momentum=fastlr.Triangular(0.8, 0.9, 5)
        )

    first, second = built(), built()
    first.set_schedule(lr=0.01, momentum=0.5)
    train(3, (first.param_groups[0]["params"], first.step))
    saved = through_file(first.state_dict())
    second.load_state_dict(saved)
    assert second.state_dict()["param_groups"] == saved["param_groups"]
    train(
        3,
        (first.param_groups[0]["params"], first.step),
        (second.param_groups[0]["params"], second.step),
        start=3,
    )
    for optimizer in (first, second):
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.01, 0.5)
        assert optimizer.param_groups[0]["lr_schedule"] is None


def test_a_momentum_of_0_written_beside_nesterov_is_saved_and_loaded() -> None:
    ours, theirs = twins([(9,)])
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    fused = fastlr.FusedSGD(ours, **options)
    reference = torch.optim.SGD(theirs, foreach=False, **options)
    train(2, (theirs, reference.step), (ours, fused.step))
    fused.param_groups[0]["momentum"] = reference.param_groups[0]["momentum"] = 0.0
    train(2, (theirs, reference.step), (ours, fused.step), start=2)
    fused.load_state_dict(through_file(fused.state_dict()))
    fused.set_schedule(lr=0.2)
    fused.set_schedule(momentum=0.8)
    reference.param_groups[0] |= {"lr": 0.2, "momentum": 0.8}
    train(2, (theirs, reference.step), (ours, fused.step), start=4)
    assert_same(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_buffers_keep_their_type_and_are_copies(dtype: torch.dtype) -> None:
    one, other = parameters([(9,)], dtype), parameters([(9,)], dtype)
    first = fastlr.FusedSGD(one, lr=0.1, momentum=0.9, momentum_dtype=torch.float32)
    train(3, (one, first.step))
    second = fastlr.FusedSGD(other, momentum_dtype=torch.float32)
    second.load_state_dict(first.state_dict())
    buffers = [opt.state[p]["momentum_buffer"] for opt, p in ((first, one[0]), (second, other[0]))]
    assert_same(buffers[:1], buffers[1:])
    assert buffers[0].dtype == (torch.complex64 if dtype.is_complex else torch.float32)
    assert buffers[0].data_ptr() != buffers[1].data_ptr()


def test_a_parameter_never_updated_has_no_buffer_in_the_file() -> None:
    model = parameters([(9,), (9,)])
    optimizer = fastlr.FusedSGD(model, momentum=0.9)
    model[0].grad = torch.ones(9)
    optimizer.step()
    assert set(optimizer.state_dict()["state"]) == {0}


def test_loading_does_not_change_the_file_and_failing_changes_nothing() -> None:
    model = parameters([(9,), (4,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Constant(0.5), momentum=0.9)
    train(2, (model, optimizer.step))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert str(saved) == str(kept)

    wrong_shape = copy.deepcopy(saved)
    wrong_shape["state"][1]["momentum_buffer"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"momentum_buffer 1 has shape \(1,\).*parameter \(4,\)"):
        optimizer.load_state_dict(wrong_shape)
    wrong_size = copy.deepcopy(saved)
    wrong_size["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(wrong_size)
    assert str(optimizer.state_dict()) == str(kept)


@pytest.mark.parametrize("tick", [1, 5])
@pytest.mark.parametrize("share", [1.0, 0.65])
def test_a_table_that_groups_have_in_common_stands_in_a_file_once(share: float, tick: int) -> None:
    def size_of(groups: int) -> tuple[int, fastlr.FusedOptimizer, dict[str, Any]]:
        given = [{"params": parameters([(2,)]), "lr": 0.1 * share**place} for place in range(groups)]
        made = torch.optim.SGD(given)
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda t: 1 / (1 + t / 1000))
        fused = fastlr.fuse(made, scheduler, updates_per_tick=tick, horizon=20_000 * tick)
        file = io.BytesIO()
        torch.save(fused.state_dict(), file)
        return file.tell(), fused, through_file(fused.state_dict())

    (one, _, _), (several, fused, saved) = size_of(1), size_of(8)
    assert several < one + 8000 < 200_000
    apart = copy.deepcopy(saved)
    for place, group in enumerate(apart["param_groups"]):  # as an older version wrote it
        group["lr_schedule"] = fused.param_groups[place]["lr_schedule"].to_dict()
    for file in (saved, apart):
        loaded = fastlr.FusedSGD([{"params": parameters([(2,)])} for _ in range(8)])
        loaded.load_state_dict(file)
        for ours, theirs in zip(loaded.param_groups, fused.param_groups, strict=True):
            assert ours["lr_schedule"] == theirs["lr_schedule"]
        again = io.BytesIO()
        torch.save(loaded.state_dict(), again)
        assert again.tell() == several


def test_state_dict_hooks_see_the_file_and_the_loaded_optimizer() -> None:
    model = parameters([(9,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Constant(0.5), momentum=0.9)
    train(1, (model, optimizer.step))
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(
        lambda opt, sd: seen.append(sd["param_groups"][0]["lr_schedule"]), prepend=True
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, sd: seen.append(sd["param_groups"][0]["lr_schedule"])
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["lr_schedule"]))
    optimizer.load_state_dict(optimizer.state_dict())
    plain = fastlr.Constant(0.5).to_dict()
    assert seen == ["pre", plain, plain, fastlr.Constant(0.5)]
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


# -- files of another optimizer, in the middle of a run ---------------------------------------------


def torch_run(model: list[torch.nn.Parameter]) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.CyclicLR]:
    sgd = torch.optim.SGD(model, lr=0.01, momentum=0.9, foreach=False)
    return sgd, torch.optim.lr_scheduler.CyclicLR(sgd, 0.01, 0.1, 5, cycle_momentum=False)


def test_a_run_of_sgd_and_cyclic_lr_goes_on_where_it_was() -> None:
    ours, theirs = twins([(9,), (5, 4)])
    sgd, scheduler = torch_run(theirs)
    for step in range(8):
        train(1, (theirs, sgd.step), start=step)
        scheduler.step()
    for mine, other in zip(ours, theirs, strict=True):
        mine.data.copy_(other.data)
    fused = fastlr.FusedCyclicSGD(ours, 0.01, 0.1, 5, momentum=0.9)
    with pytest.warns(UserWarning, match="the file has no clock") as caught:
        fused.load_state_dict(through_file(sgd.state_dict()))
    assert [w.filename for w in caught] == [__file__]
    told = str(caught[0].message)
    assert "lr schedule of parameter group 0 goes on at updates=0 with 0.01" in told
    assert f"(the file's last lr is {sgd.param_groups[0]['lr']!r})" in told
    assert "optimizer.set_clock(updates=..., samples=...)" in told
    assert "momentum schedule" not in told

    fused.set_clock(updates=8)
    assert fused.clock() == (8, 0)
    for step in range(8, 20):
        assert fused.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
        train(1, (theirs, sgd.step), (ours, fused.step), start=step)
        scheduler.step()
    assert_same(theirs, ours)


@pytest.mark.parametrize("unit", ["update", "sample"])
def test_the_warning_names_the_clock_that_is_missing(unit: Any) -> None:
    model = parameters([(9,)])
    fused = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.5, unit=unit), momentum=fastlr.Constant(0.9))
    saved = fused.state_dict()
    for group in saved["param_groups"]:
        for key in ("lr_schedule", "momentum_schedule", "updates", "samples"):
            del group[key]
    with pytest.warns(UserWarning, match=rf"lr schedule .* at {unit}s=0 .*; the momentum .* at updates=0"):
        fused.load_state_dict(saved)


def test_a_file_without_clock_is_no_news_where_nothing_follows_a_clock() -> None:
    model = parameters([(9,)])
    fused = fastlr.FusedSGD(model, lr=0.1)
    fused.load_state_dict(torch_run(model)[0].state_dict())  # a warning would be an error


# -- damaged files ----------------------------------------------------------------------------------


def test_a_damaged_clock_is_an_error() -> None:
    model = parameters([(9,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Tabulated([0.1, 0.2]))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr_start"] = 5
    with pytest.raises(ValueError, match="starts at 5, after the clock, which is at 0"):
        optimizer.load_state_dict(saved)


def test_going_back_to_an_earlier_checkpoint_takes_back_a_schedule_set_since() -> None:
    model = parameters([(9,)])
    optimizer = fastlr.FusedSGD(model, lr=0.5)
    train(1, (model, optimizer.step))
    saved = through_file(optimizer.state_dict())
    train(2, (model, optimizer.step), start=1)
    optimizer.set_schedule(lr=fastlr.Cosine(0.1, 0.0, 10))
    optimizer.load_state_dict(saved)
    assert optimizer.clock().updates == 1
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["lr_schedule"] is None


def group_with(**values: Any) -> Any:
    def damage(saved: dict[str, Any]) -> object:
        saved["param_groups"][-1].update(values)
        return saved

    return damage


def without(key: str) -> Any:
    return lambda saved: {name: value for name, value in saved.items() if name != key}


def entry(value: Any) -> Any:
    def damage(saved: dict[str, Any]) -> object:
        saved["state"][1] = value
        return saved

    return damage


DAMAGED: dict[str, tuple[Any, str]] = {
    "empty": (lambda saved: {}, r"state_dict must hold a list under 'param_groups', .* got the keys \[\]"),
    "none": (lambda saved: None, "state_dict must be a dict, got NoneType"),
    "list": (lambda saved: [saved], "state_dict must be a dict, got list"),
    "no-groups": (without("param_groups"), r"list under 'param_groups', .* got the keys \['state'\]"),
    "no-state": (without("state"), r"dict under 'state', .* got the keys \['param_groups'\]"),
    "groups": (lambda saved: {**saved, "param_groups": {}}, "list under 'param_groups', .* got dict"),
    "group": (lambda saved: {**saved, "param_groups": [3, 4]}, "parameter group 0 must be a dict .* got int"),
    "fresh": (
        group_with(fresh="no"),
        "fresh of the file's parameter group 1 must be True or False, got 'no'",
    ),
    "params": (group_with(params=None), "parameter group 1 must be a dict with a list under 'params'"),
    "fewer-params": (group_with(params=[]), "doesn't match the size"),
    "entry": (entry(3), "state of parameter 1 must be a dict .* got int"),
    "buffer": (entry({"momentum_buffer": 3}), "state of parameter 1 .* a tensor as momentum_buffer, got int"),
    "shape": (entry({"momentum_buffer": torch.zeros(1)}), r"momentum_buffer 1 has shape \(1,\)"),
    "lr-nan": (group_with(lr=float("nan")), "lr of the file's parameter group 1 must be finite"),
    "lr-tensor": (group_with(lr=torch.zeros(2)), "lr of the file's parameter group 1 must be a number, got"),
    "lr-word": (group_with(lr="fast"), "lr of the file's parameter group 1 must be a number, got 'fast'"),
    "momentum": (group_with(momentum=1.5), r"momentum of the file's parameter group 1 must be in \[0, 1\)"),
    "dampening": (group_with(dampening=None), "dampening of the file's .* must be a number, got None"),
    "weight_decay": (group_with(weight_decay=-1), "weight_decay of the file's parameter group 1"),
    "maximize": (group_with(maximize="False"), "maximize of the file's .* True or False, got 'False'"),
    "nesterov": (group_with(nesterov="no"), "nesterov of the file's .* True or False, got 'no'"),
    "momentum_dtype": (group_with(momentum_dtype="load"), "momentum_dtype of the file's parameter group 1"),
    "updates-negative": (group_with(updates=-1), "updates of the file's .* integer >= 0, got -1"),
    "updates-late": (group_with(updates=2**63 - 1), "updates of the file's .* beyond a 64-bit clock"),
    "updates-word": (group_with(updates="7"), "updates of the file's .* integer >= 0, got '7'"),
    "samples": (group_with(samples=1.5), "samples of the file's .* integer >= 0, got 1.5"),
    "lr_start": (group_with(lr_start=-1), "lr_start of the file's .* integer >= 0, got -1"),
    "start-late": (group_with(lr_start=5), "starts at 5, after the clock, which is at 2"),
    "schedule": (group_with(lr_schedule="cos"), "a schedule must be what its .* got 'cos'"),
    "policy": (group_with(lr_schedule={"type": "Nope"}), "type must be the name of a schedule, got 'Nope'"),
    "field": (
        group_with(lr_schedule={"type": "Constant", "valve": 1.0}),
        "Constant has the fields unit, value, got valve",
    ),
    "epochs": (
        group_with(lr_schedule=fastlr.Constant(0.1, unit="epoch").to_dict()),
        "clock_unit of the file's .* got sample with schedules in epochs",
    ),
    "peak": (
        group_with(momentum_schedule=fastlr.Constant(1.0).to_dict()),
        "momentum of the file's parameter group 1 must stay in .* peaks at 1.0",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_changes_nothing(damage: Any, message: str) -> None:
    ours, theirs = twins([(9,), (4,)])

    def built(model: list[torch.nn.Parameter]) -> fastlr.FusedSGD:
        return fastlr.FusedSGD(
            [{"params": [p]} for p in model], lr=fastlr.Exponential(0.5, 0.9), momentum=0.9
        )

    touched, untouched = built(ours), built(theirs)
    train(2, (ours, touched.step), (theirs, untouched.step))
    kept = copy.deepcopy(touched.state_dict())
    groups, state = touched.param_groups, touched.state
    with pytest.raises((ValueError, TypeError), match=message):
        touched.load_state_dict(damage(copy.deepcopy(kept)))
    assert touched.param_groups is groups
    assert touched.state is state
    assert str(touched.state_dict()) == str(kept)
    train(2, (ours, touched.step), (theirs, untouched.step), start=2)
    assert_same(theirs, ours)


# -- what a file holds ------------------------------------------------------------------------------


def test_numpys_values_are_saved_as_plain_ones() -> None:
    model = parameters([(3,), (3,)])
    optimizer = fastlr.FusedSGD(
        model[:1],
        lr=fastlr.Triangular(
            np.float64(0.1),
            np.float32(0.5),
            np.int64(4),
            interpolation=np.str_("linear"),
            unit=np.str_("sample"),
        ),
        momentum=np.float32(0.5),
        dampening=np.int64(0),
        weight_decay=np.float64(1e-4),
        nesterov=np.bool_(True),
        maximize=np.bool_(False),
    )
    optimizer.add_param_group(
        {"params": model[1:], "lr": fastlr.Tabulated(np.full(4, 0.1)), "weight_decay": np.float64(0.1)}
    )
    optimizer.param_groups[0]["dampening"] = np.float64(0.0)
    optimizer.param_groups[0]["maximize"] = np.bool_(True)
    optimizer.param_groups[1]["mine"] = {"a": [np.int64(3), np.array([1.0, 2.0])], "b": (np.str_("x"),)}
    optimizer.advance_samples(np.int64(7))
    optimizer.set_clock(updates=np.int32(3))
    saved = through_file(optimizer.state_dict())
    assert leaves(saved) <= {dict, int, float, str, bool, type(None), torch.Tensor, tuple}
    first, second = saved["param_groups"]
    assert (first["weight_decay"], first["maximize"], second["weight_decay"]) == (1e-4, True, 0.1)
    assert second["mine"] == {"a": [3, [1.0, 2.0]], "b": ("x",)}
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict() == kept


WRITTEN = {
    "tensor": ("weight_decay", torch.tensor(0.25)),
    "fraction": ("dampening", Fraction(1, 4)),
    "decimal": ("lr", Decimal("0.25")),
}


@pytest.mark.parametrize(("name", "value"), WRITTEN.values(), ids=WRITTEN.keys())
def test_what_a_step_takes_a_file_brings_back(name: str, value: Any) -> None:
    model = parameters([(4,)])
    set_gradients(0, model)
    optimizer = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    optimizer.param_groups[0][name] = value
    optimizer.step()
    other = fastlr.FusedSGD(model, lr=0.1, momentum=0.9)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0][name] == 0.25
