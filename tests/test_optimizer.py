"""FusedSGD and FusedCyclicSGD as torch optimizers: groups, schedules, clocks, hooks, errors."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, parameters, set_gradients, train, twins
from torch.optim import optimizer as torch_optimizer

import fastlr

pytestmark = pytest.mark.usefixtures("backend")

# -- groups ---------------------------------------------------------------------------------------


def test_groups_have_schedules_of_their_own() -> None:
    ours, theirs = twins([(9,), (5, 3), (33,)])
    cosine, cycle = fastlr.Cosine(0.2, 0.01, 20), fastlr.Triangular(0.8, 0.95, 5, inverted=True)
    fused = fastlr.FusedSGD(
        [
            {"params": ours[:1], "lr": cosine},
            {"params": ours[1:2], "momentum": cycle, "weight_decay": 0.1},
            {"params": ours[2:], "nesterov": True},
        ],
        lr=0.05,
        momentum=0.9,
    )
    reference = torch.optim.SGD(
        [
            {"params": theirs[:1]},
            {"params": theirs[1:2], "weight_decay": 0.1},
            {"params": theirs[2:], "nesterov": True},
        ],
        lr=0.05,
        momentum=0.9,
        foreach=False,
    )
    for step in range(25):
        reference.param_groups[0]["lr"] = cosine._native.value(step)
        reference.param_groups[1]["momentum"] = cycle(step)
        for mine, other in zip(fused.param_groups, reference.param_groups, strict=True):
            assert (mine["lr"], mine["momentum"]) == (other["lr"], other["momentum"])
        if step <= 20:
            train(1, (theirs, reference.step), (ours, fused.step), start=step)
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train(1, (theirs, reference.step), (ours, fused.step), start=step)
            assert len(caught) == (step == 21)
            assert all("Cosine ended at update 20" in str(w.message) for w in caught)
    assert_same(theirs, ours)
    assert fused.param_groups[0]["lr_schedule"] is cosine
    assert fused.param_groups[0]["momentum_schedule"] is None


def test_a_group_added_later_starts_its_schedule_then() -> None:
    ours, theirs = twins([(9,), (7,)])
    fused = fastlr.FusedSGD(ours[:1], lr=fastlr.Exponential(0.1, 0.5), momentum=0.9)
    reference = torch.optim.SGD(theirs[:1], lr=0.1, momentum=0.9, foreach=False)
    for step in range(6):
        if step == 3:
            added = {"params": ours[1:], "lr": fastlr.Exponential(1.0, 0.25), "momentum": 0.5}
            fused.add_param_group(added)
            assert fused.param_groups[1] is added
            reference.add_param_group({"params": theirs[1:], "momentum": 0.5})
            assert fused.param_groups[1]["lr"] == 1.0
        reference.param_groups[0]["lr"] = 0.1 * 0.5**step
        if step >= 3:
            reference.param_groups[1]["lr"] = 0.25 ** (step - 3)
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        assert fused.clock() == (step + 1, 0)
    assert_same(theirs, ours)


def test_added_group_inherits_defaults_and_cycle() -> None:
    model = parameters([(3,), (3,), (3,)])
    optimizer = fastlr.FusedCyclicSGD(model[:1], 0.1, 0.5, 4, mode="triangular2", weight_decay=0.1)
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.add_param_group({"params": model[1:2]})
    optimizer.add_param_group({"params": model[2:], "max_lr": 0.9, "mode": "triangular"})
    groups = optimizer.param_groups
    assert groups[1]["lr_schedule"] == groups[0]["lr_schedule"] == fastlr.Triangular2(0.1, 0.5, 4)
    assert groups[2]["lr_schedule"] == fastlr.Triangular(0.1, 0.9, 4)
    assert groups[2]["weight_decay"] == 0.1
    assert "max_lr" not in groups[2]


def bad_value(model: list[torch.nn.Parameter]) -> dict[str, Any]:
    return {"params": iter(model), "base_lr": 0.2, "max_lr": 0.1, "weight_decay": 0.5}


def late_bad_value(model: list[torch.nn.Parameter]) -> dict[str, Any]:
    return {"params": iter(model), "base_lr": 0.2, "max_lr": 0.9, "momentum": 0.5, "dampening": "no"}


def known_parameter(model: list[torch.nn.Parameter]) -> dict[str, Any]:
    return {"params": [model[0]], "base_lr": 0.2, "max_lr": 0.9, "mode": "triangular2", "weight_decay": 0.5}


def not_a_leaf(model: list[torch.nn.Parameter]) -> dict[str, Any]:
    return {"params": [model[1] * 2], "base_lr": 0.2, "max_lr": 0.9, "mode": "triangular2"}


@pytest.mark.parametrize(
    "group", [bad_value, late_bad_value, known_parameter, not_a_leaf], ids=lambda f: f.__name__
)
def test_a_group_that_could_not_be_added_stays_as_it_was(group: Any) -> None:
    model = parameters([(3,), (3,)])
    optimizer = fastlr.FusedCyclicSGD(model[:1], 0.1, 0.5, 4)
    added = group(model)
    before = dict(added)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(added)
    assert added.keys() == before.keys()
    assert all(added[key] is before[key] for key in before)
    assert len(optimizer.param_groups) == 1


def test_parameters_read_once_are_there_for_a_second_try() -> None:
    model = parameters([(3,), (3,)])
    optimizer = fastlr.FusedCyclicSGD(model[:1], 0.1, 0.5, 4)
    added = {"params": iter(model), "max_lr": 0.9}
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(added)
    assert added == {"params": model, "max_lr": 0.9}
    added["params"] = added["params"][1:]
    optimizer.add_param_group(added)
    assert optimizer.param_groups[1] is added
    assert added["lr_schedule"] == fastlr.Triangular(0.1, 0.9, 4)
    assert "max_lr" not in added


KINDS: dict[str, Any] = {
    "FusedSGD": lambda groups: fastlr.FusedSGD(groups, lr=0.1, momentum=0.9),
    "FusedCyclicSGD": lambda groups: fastlr.FusedCyclicSGD(groups, 0.1, 0.5, 4, momentum=0.9),
    "lists": lambda groups: fastlr.FusedCyclicSGD(groups, [0.1, 0.2], [0.5, 0.6], 4),
}


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_a_constructor_leaves_the_callers_groups_alone(build: Any) -> None:
    model = parameters([(3,), (3,)])
    groups = [{"params": model[:1], "weight_decay": 0.1}, {"params": model[1:]}]
    before = [dict(group) for group in groups]
    build(groups)
    assert groups == before
    cyclic = fastlr.FusedCyclicSGD(groups, 0.01, 0.1, 5)  # used before, and cycles
    assert all(g["lr_schedule"] == fastlr.Triangular(0.01, 0.1, 5) for g in cyclic.param_groups)


USED: dict[str, Any] = {
    "torch": lambda model: torch.optim.SGD(model, lr=0.25),
    "fused": lambda model: fastlr.FusedSGD(model, lr=0.25),
    "scheduled": lambda model: fastlr.FusedSGD(model, lr=fastlr.Constant(0.25)),
}


@pytest.mark.parametrize("make", USED.values(), ids=USED)
def test_a_used_group_with_a_rate_of_its_own_does_not_silently_stop_cycling(make: Any) -> None:
    groups = make(parameters([(3,)])).param_groups
    message = r"lr of parameter group 0 is 0.25, but FusedCyclicSGD cycles .* leave lr out .*Constant\(0.25\)"
    with pytest.raises(ValueError, match=message):
        fastlr.FusedCyclicSGD(groups, 0.01, 0.1, 5)
    rest = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
    if rest[0].get("lr_schedule") is not None:
        with pytest.raises(
            ValueError, match=r"lr_schedule of parameter group 0 is Constant.*leave lr_schedule"
        ):
            fastlr.FusedCyclicSGD(rest, 0.01, 0.1, 5)
        del rest[0]["lr_schedule"]
    optimizer = fastlr.FusedCyclicSGD(rest, 0.01, 0.1, 5)
    assert optimizer.param_groups[0]["lr_schedule"] == fastlr.Triangular(0.01, 0.1, 5)


def test_a_group_of_a_cyclic_optimizer_may_be_kept_fixed() -> None:
    model = parameters([(3,), (3,)])
    groups = [{"params": model[:1], "lr": fastlr.Constant(0.25)}, {"params": model[1:]}]
    optimizer = fastlr.FusedCyclicSGD(groups, 0.01, 0.1, 5)
    train(3, (model, optimizer.step))
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, fastlr.Triangular(0.01, 0.1, 5)(3)]


def test_bounds_as_lists_are_one_for_each_group() -> None:
    model = parameters([(3,), (3,)])
    groups = [{"params": model[:1]}, {"params": model[1:]}]
    optimizer = fastlr.FusedCyclicSGD(groups, [0.1, 0.2], [0.5, 0.6])
    assert [g["lr_schedule"].max for g in optimizer.param_groups] == [0.5, 0.6]
    assert groups == [{"params": model[:1]}, {"params": model[1:]}]
    with pytest.raises(ValueError, match="base_lr has 1 values for 2 groups"):
        fastlr.FusedCyclicSGD(groups, [0.1], 0.5)


def test_hyperparameters_changed_between_steps() -> None:
    ours, theirs = twins([(9,), (7,)])
    fused = fastlr.FusedSGD(ours, lr=0.1)
    reference = torch.optim.SGD(theirs, lr=0.1, foreach=False)
    changes: list[dict[str, Any]] = [
        {"lr": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "dampening": 0.5},
        {"maximize": True},
        {"dampening": 0, "nesterov": True},
        {"momentum": 0.0},
        {"lr": 1},
    ]
    for step, change in enumerate(changes):
        for optimizer in (fused, reference):
            optimizer.param_groups[0].update(change)
        train(2, (theirs, reference.step), (ours, fused.step), start=2 * step)
        assert_same(theirs, ours)


# -- schedules and clocks -------------------------------------------------------------------------


def test_set_schedule() -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=0.3, momentum=0.9)
    decay = fastlr.Exponential(1.0, 0.5)
    train(2, (model, optimizer.step))

    optimizer.set_schedule(lr=decay)
    assert optimizer.param_groups[0]["lr"] == 1.0
    train(1, (model, optimizer.step))
    assert optimizer.param_groups[0]["lr"] == 0.5

    optimizer.set_schedule(lr=decay, start="zero")
    assert optimizer.param_groups[0]["lr"] == 0.125

    optimizer.set_schedule(momentum=fastlr.Constant(0.5))
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.param_groups[0]["lr_schedule"] is decay

    optimizer.set_schedule(lr=0.25, momentum=0.75)
    assert optimizer.param_groups[0]["lr_schedule"] is None
    train(1, (model, optimizer.step))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.75)
    assert optimizer.clock().updates == 4


def test_a_tensor_written_into_a_group_stands_for_its_number() -> None:
    ours, theirs = twins([(9,)])
    fused = fastlr.FusedSGD(ours, lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(theirs, lr=0.5, momentum=0.25, foreach=False)
    fused.param_groups[0]["lr"] = torch.tensor(0.5)
    fused.set_schedule(momentum=0.25)
    train(2, (theirs, reference.step), (ours, fused.step))
    assert_same(theirs, ours)


def test_set_schedule_for_one_group() -> None:
    model = parameters([(3,), (3,)])
    optimizer = fastlr.FusedSGD([{"params": [p]} for p in model], lr=0.3)
    optimizer.set_schedule(lr=fastlr.Constant(0.5), group=1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.5]


def test_schedules_in_samples_follow_the_samples_clock() -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.StepDecay(1.0, every=100, gamma=0.5, unit="sample"))
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        train(1, (model, optimizer.step))
        optimizer.advance_samples(64)
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert optimizer.clock() == optimizer.sync() == fastlr.Clock(updates=5, samples=320)
    with pytest.raises(ValueError, match="samples must be an integer >= 0, got -1"):
        optimizer.advance_samples(-1)


def test_set_clock_is_as_if_the_updates_had_been_made() -> None:
    def built(model: list[torch.nn.Parameter]) -> fastlr.FusedSGD:
        return fastlr.FusedSGD(
            [{"params": model[:1]}, {"params": model[1:], "momentum": fastlr.Triangular(0.8, 0.9, 3)}],
            lr=fastlr.Exponential(0.1, 0.5, unit="sample"),
        )

    ours, theirs = twins([(3,), (3,)])
    moved, stepped = built(ours), built(theirs)
    for _ in range(5):
        stepped.step()
        stepped.advance_samples(2)
    moved.set_clock(updates=5)
    assert moved.clock() == (5, 0)
    moved.set_clock(samples=10)
    assert moved.clock() == moved.sync() == (5, 10)
    assert moved.state_dict()["param_groups"] == stepped.state_dict()["param_groups"]
    train(3, (theirs, stepped.step), (ours, moved.step))
    assert_same(theirs, ours)
    moved.set_clock(updates=0, samples=0)
    assert moved.clock() == moved.sync() == (0, 0)
    assert moved.param_groups[1]["momentum"] == 0.8


def test_set_clock_before_the_zero_of_a_schedule_is_an_error() -> None:
    model = parameters([(3,), (3,)])
    optimizer = fastlr.FusedSGD([{"params": [p]} for p in model], lr=0.1)
    train(4, (model, optimizer.step))
    optimizer.set_schedule(lr=fastlr.Exponential(0.1, 0.5), group=1)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"updates must be >= 4, where the lr schedule of parameter group 1"):
        optimizer.set_clock(updates=3)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    optimizer.set_schedule(lr=fastlr.Exponential(0.1, 0.5), group=1, start="zero")
    optimizer.set_clock(updates=3)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.0125]


WRITES = {"lr": 0.123, "momentum": 0.5}


@pytest.mark.parametrize("name", WRITES)
def test_writing_what_a_schedule_owns_raises_and_says_what_to_do(name: str) -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.9), momentum=fastlr.Constant(0.9))
    set_gradients(0, model)
    optimizer.step()
    expected = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = WRITES[name]
    before = model[0].detach().clone()
    with pytest.raises(
        RuntimeError, match=rf"{name} of parameter group 0.*set_schedule\({name}=0\."
    ) as error:
        optimizer.step()
    assert "ReadOnlyScheduler" in str(error.value)
    assert repr(expected) in str(error.value)
    assert_same([before], [model[0].detach()])
    assert optimizer.clock().updates == 1
    optimizer.set_schedule(**{name: WRITES[name]})
    optimizer.step()


def test_a_torch_scheduler_on_an_owned_rate_is_an_error() -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    set_gradients(0, model)
    optimizer.step()
    scheduler.step()
    with pytest.raises(RuntimeError, match="a schedule owns it"):
        optimizer.step()


def test_a_torch_scheduler_drives_an_unowned_rate() -> None:
    ours, theirs = twins([(9,)])
    fused, reference = fastlr.FusedSGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1, foreach=False)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (fused, reference)]
    for step in range(10):
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        for scheduler in schedulers:
            scheduler.step()
    assert_same(theirs, ours)


def test_read_only_scheduler_reports_and_never_writes() -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(0.1, 0.5))
    scheduler = fastlr.integrations.ReadOnlyScheduler(optimizer)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    keys = set(optimizer.param_groups[0])
    for step in range(4):
        assert scheduler.get_last_lr() == [0.1 * 0.5**step]
        train(1, (model, optimizer.step))
        scheduler.step()
        scheduler.step()
    assert set(optimizer.param_groups[0]) == keys
    assert "step" not in vars(optimizer)
    other = fastlr.integrations.ReadOnlyScheduler(optimizer)
    other.load_state_dict(scheduler.state_dict())
    assert other.last_epoch == 8
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got int"):
        fastlr.integrations.ReadOnlyScheduler(3)  # type: ignore[arg-type]


# -- torch's protocol -----------------------------------------------------------------------------


def test_closure() -> None:
    model = parameters([(4,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model[0].square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.clock().updates == 5


def test_step_hooks_run_once_in_torchs_order() -> None:
    model = parameters([(4,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre")),
        optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post")),
        torch_optimizer.register_optimizer_step_pre_hook(lambda *a: calls.append("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *a: calls.append("global post")),
    ]
    set_gradients(0, model)
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["global pre", "pre", "post", "global post"]
    assert optimizer.clock().updates == 2


def test_pre_hook_may_replace_the_closure() -> None:
    model = parameters([(4,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


def test_subclass_with_a_step_of_its_own_runs_hooks_once() -> None:
    class Logging(fastlr.FusedSGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    optimizer = Logging(parameters([(4,)]))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    optimizer.step()
    assert calls == ["pre"]


def test_profiler_label() -> None:
    model = parameters([(4,)])
    optimizer = fastlr.FusedSGD(model, lr=0.1)
    set_gradients(0, model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#FusedSGD.step" in [event.key for event in profile.key_averages()]


def test_a_stale_backward_raises() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    version = p._version
    fastlr.FusedSGD([p], lr=0.1).step()
    assert p._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_updated_parameters_change_version() -> None:
    model = parameters([(3,), (3,)])
    model[0].grad = torch.ones(3)
    fastlr.FusedSGD(model).step()
    assert [p._version for p in model] == [1, 0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = parameters([(4,)])
    optimizer = fastlr.FusedSGD(model)
    set_gradients(0, model)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert model[0].grad is None if set_to_none else not model[0].grad.any()


def test_repr_shows_rate_and_schedule() -> None:
    text = repr(fastlr.FusedSGD(parameters([(4,)]), lr=fastlr.Constant(0.25)))
    assert text.startswith("FusedSGD (")
    assert "lr: 0.25" in text
    assert "Constant(" in text


def test_drives_a_compiled_model_and_a_compiled_caller() -> None:
    ours, theirs = twins([(4, 4)])
    fused, reference = fastlr.FusedSGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1, foreach=False)
    compiled = torch.compile(fused.step, backend="eager")
    train(3, (theirs, reference.step), (ours, compiled))
    assert_same(theirs, ours)


def test_a_cycle_through_a_hook_is_garbage() -> None:
    def run() -> weakref.ref[torch.Tensor]:
        layer = torch.nn.Linear(3, 2)
        optimizer = fastlr.FusedSGD(layer.parameters(), lr=0.1, momentum=0.9)
        layer.weight.register_hook(lambda g: g * optimizer.param_groups[0]["lr"])
        layer.bias.owner = optimizer
        for _ in range(3):
            layer(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weakref.ref(layer.weight)

    parameter = run()
    gc.collect()
    assert parameter() is None


def test_a_step_keeps_nothing_alive() -> None:
    model = parameters([(3,), (3,)])
    optimizer = fastlr.FusedSGD(model, momentum=0.9)
    train(1, (model, optimizer.step))
    buffer = weakref.ref(optimizer.state[model[0]]["momentum_buffer"])
    optimizer.state.clear()
    assert buffer() is None
    model[1].grad = torch.ones(3).to_sparse()
    gradient = weakref.ref(model[0].grad)
    with pytest.raises(ValueError, match="parameter 1"):
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert gradient() is None


def test_a_step_inside_a_step_is_an_error() -> None:
    model = parameters([(3,)])
    optimizer = fastlr.FusedSGD(model, momentum=0.9)
    set_gradients(0, model)

    class Nested(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.empty_like:
                optimizer.step()
            return func(*args, **(kwargs or {}))

    before = model[0].detach().clone()
    with Nested(), pytest.raises(RuntimeError, match="already running"):
        optimizer.step()
    assert_same([before], [model[0].detach()])
    optimizer.step()
    assert optimizer.clock().updates == 1


def test_a_schedule_set_during_a_step_loses_no_update(backend: str) -> None:
    """The step lets other threads run while it updates tensors."""
    if backend != "cpu":
        pytest.skip("launches do not wait for each other")
    model = [torch.nn.Parameter(torch.zeros(4_000_000)) for _ in range(4)]
    for p in model:
        p.grad = torch.ones_like(p)
    optimizer = fastlr.FusedSGD(model, lr=1.0)
    step = threading.Thread(target=optimizer.step)
    step.start()
    while step.is_alive():
        optimizer.set_schedule(lr=1.0)
    assert all(bool((p == -1.0).all()) for p in model)


def test_a_plain_dict_as_state_works() -> None:
    ours, theirs = twins([(9,)])
    fused = fastlr.FusedSGD(ours, momentum=0.9)
    reference = torch.optim.SGD(theirs, momentum=0.9, foreach=False)
    fused.state = {}
    train(3, (theirs, reference.step), (ours, fused.step))
    assert_same(theirs, ours)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_first_step_with_rate_zero_and_zero_gradients_is_a_step(momentum: float) -> None:
    ours, theirs = twins([(9,), (4,)])
    options: dict[str, Any] = {"momentum": momentum, "dampening": 0.3 * (momentum > 0), "weight_decay": 0.1}
    warmup = fastlr.LinearRamp(0.0, 0.1, 10)
    fused = fastlr.FusedSGD(ours, lr=warmup, **options)
    reference = torch.optim.SGD(theirs, lr=0.0, foreach=False, **options)
    fused.measure_grad_norm = True
    calls: list[str] = []
    fused.register_step_post_hook(lambda *_: calls.append("post"))
    for step in range(4):
        set_gradients(step, ours, theirs, scale=0.0 if step < 2 else 1.0)
        reference.param_groups[0]["lr"] = warmup(step)
        reference.step()
        fused.step()
        assert fused.clock().updates == len(calls) == step + 1
        assert (fused.last_grad_norm == 0.0) == (step < 2)
        assert_same(theirs, ours)


def test_groups_of_another_optimizer_bring_their_schedules() -> None:
    old = fastlr.FusedSGD(parameters([(3,)]), lr=fastlr.Cosine(0.1, 0.0, 10))
    new = fastlr.FusedSGD(old.param_groups)
    assert new.param_groups[0]["lr_schedule"] == fastlr.Cosine(0.1, 0.0, 10)


def test_a_warning_past_the_end_points_at_the_caller() -> None:
    optimizer = fastlr.FusedSGD(parameters([(3,)]), lr=fastlr.Tabulated([0.1]))
    optimizer.step()
    with pytest.warns(UserWarning, match="Tabulated ended at update 0") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


# -- errors in arguments --------------------------------------------------------------------------

nan, inf = float("nan"), float("inf")
BAD_SGD: dict[str, tuple[dict[str, Any], str]] = {
    "negative-lr": ({"lr": -0.1}, "lr of parameter group 0 must be finite and >= 0, got -0.1"),
    "nan-lr": ({"lr": nan}, "lr .* got nan"),
    "infinite-lr": ({"lr": inf}, "lr .* got inf"),
    "momentum-1.2": ({"momentum": 1.2}, r"momentum of parameter group 0 must be in \[0, 1\), got 1.2"),
    "momentum-nan": ({"momentum": nan}, "momentum .* got nan"),
    "momentum-schedule": ({"momentum": fastlr.Constant(1.0)}, r"momentum .* stay in \[0, 1\).* peaks at 1.0"),
    "dampening": ({"dampening": inf}, "dampening .* finite, got inf"),
    "weight_decay": ({"weight_decay": -1.0}, "weight_decay .* got -1.0"),
    "nesterov-without-momentum": ({"nesterov": True}, "momentum .* > 0 with nesterov=True, got 0.0"),
    "nesterov-with-dampening": (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "dampening .* 0 with nesterov=True, got 0.1",
    ),
    "momentum_dtype": ({"momentum_dtype": torch.bfloat16}, "momentum_dtype .* None or torch.float32"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_SGD.values(), ids=BAD_SGD.keys())
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = parameters([(4,), (4,)])
    with pytest.raises(ValueError, match=message):
        fastlr.FusedSGD(model, **arguments)
    optimizer = fastlr.FusedSGD(model[:1])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message.replace("group 0", "group 1")):
        optimizer.add_param_group({"params": model[1:], **arguments})
    assert optimizer.state_dict() == before
    names = set(arguments) & {"lr", "momentum"}
    if names == set(arguments):
        with pytest.raises(ValueError, match=message):
            optimizer.set_schedule(**arguments)
        assert optimizer.state_dict() == before


@pytest.mark.parametrize("value", [torch.tensor(0.1), "0.1", None, [0.1]], ids=repr)
def test_rates_of_a_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError, match="lr of parameter group 0 must be a number or a fastlr schedule"):
        fastlr.FusedSGD(parameters([(4,)]), lr=value)


BAD_CYCLIC: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "cosine"}, "mode must be triangular, triangular2 or exp_range, got 'cosine'"),
    "gamma": ({"gamma": 0.9}, "gamma=0.9.*belong to mode=.exp_range., got mode='triangular'"),
    "decay_base": ({"decay_base": True}, "decay_base=True belong to"),
    "base_momentum": ({"base_momentum": 0.8}, "base_momentum=0.8 needs cycle_momentum=True"),
    "max_momentum": ({"max_momentum": 0.9}, "max_momentum=0.9 needs cycle_momentum=True"),
    "both": ({"cycle_momentum": True, "momentum": 0.9}, "momentum=0.9 cannot be fixed and cycled"),
    "swapped": ({"base_lr": 1.0}, "max_lr must be >= base_lr, got base_lr=1.0, max_lr=0.5; swap them$"),
    "base_lr": ({"base_lr": -0.1}, "base_lr must be a finite number >= 0, got -0.1"),
    "max_lr": ({"max_lr": inf}, "max_lr must be a finite number >= 0, got inf"),
    "negative": ({"cycle_momentum": True, "base_momentum": -0.1}, "base_momentum must be .* >= 0, got -0.1"),
    "step_size_up": ({"step_size_up": -1}, "step_size_up must be a finite number >= 0, got -1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CYCLIC.values(), ids=BAD_CYCLIC.keys())
def test_bad_cyclic_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastlr.FusedCyclicSGD(parameters([(4,)]), **{"base_lr": 0.1, "max_lr": 0.5, **arguments})


BAD_WRITES = {
    "lr": (-1.0, "lr of parameter group 0 must be finite and >= 0, got -1.0"),
    "momentum": (1.0, r"momentum of parameter group 0 must be in \[0, 1\), got 1.0"),
    "weight_decay": (nan, "weight_decay of parameter group 0 must be finite and >= 0, got nan"),
    "dampening": (inf, "dampening of parameter group 0 must be finite, got inf"),
}


@pytest.mark.parametrize("name", BAD_WRITES)
def test_bad_values_written_later_are_caught_by_the_step(name: str) -> None:
    model = parameters([(4,)])
    optimizer = fastlr.FusedSGD(model)
    set_gradients(0, model)
    before = model[0].detach().clone()
    optimizer.param_groups[0][name], message = BAD_WRITES[name]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same([before], [model[0].detach()])
    del optimizer.param_groups[0][name]
    with pytest.raises(KeyError, match=name):
        optimizer.step()


BAD_GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "lr_schedule": ({"lr_schedule": "cos"}, "lr_schedule of a parameter group must be a fastlr schedule"),
    "updates": ({"updates": -1}, "clock of parameter group 0 is out of range: -1 updates"),
    "too-late": ({"updates": 2**63 - 1}, "clock of parameter group 0 is out of range"),
}


@pytest.mark.parametrize(("change", "message"), BAD_GROUPS.values(), ids=BAD_GROUPS.keys())
def test_damaged_groups_are_caught_by_the_step(change: dict[str, Any], message: str) -> None:
    model = parameters([(4,)])
    optimizer = fastlr.FusedSGD(model)
    set_gradients(0, model)
    before = model[0].detach().clone()
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same([before], [model[0].detach()])


def test_wrong_types_and_contradictions_are_named() -> None:
    model = parameters([(4,)])
    with pytest.raises(TypeError, match=r"weight_decay of parameter group 0 must be a number .*, got None"):
        fastlr.FusedSGD(model, weight_decay=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a group takes lr or base_lr, not both"):
        fastlr.FusedCyclicSGD([{"params": model, "lr": 0.1, "base_lr": 0.2}], 0.1, 0.5)
    optimizer = fastlr.FusedSGD(model)
    optimizer.advance_samples(2**62)
    with pytest.raises(ValueError, match="would pass 2"):
        optimizer.advance_samples(2**62)


def test_torchs_own_errors_are_kept() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        fastlr.FusedSGD([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        fastlr.FusedSGD(torch.zeros(3))
    with pytest.raises(TypeError, match="ordered collections"):
        fastlr.FusedSGD([{"params": {torch.nn.Parameter(torch.zeros(1))}}])
    for kind in (fastlr.FusedSGD, lambda p: fastlr.FusedCyclicSGD(p, 0.1, 0.2)):
        with pytest.raises(ValueError, match="empty parameter list"):
            kind([])
        with pytest.raises(ValueError, match="non-leaf"):
            kind([torch.nn.Parameter(torch.zeros(1)) * 2])
    for start in ("later", np.array([1, 2])):
        with pytest.raises(ValueError, match="start must be one of now, zero, got"):
            fastlr.FusedSGD(parameters([(1,)])).set_schedule(lr=0.1, start=start)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"group must be in 0 .. 0, got 1"):
        fastlr.FusedSGD(parameters([(1,)])).set_schedule(lr=0.1, group=1)


# -- Ctrl-C ---------------------------------------------------------------------------------------


class Interrupting(torch.nn.Parameter):
    """Ctrl-C comes while its hash is computed for the k-th time from now on, which is Python code."""

    left = -1

    def __hash__(self) -> int:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return id(self)


@pytest.mark.parametrize("k", range(1, 4))
def test_ctrl_c_where_a_buffer_gets_its_place_stops_the_whole_step(k: int) -> None:
    model = [*parameters([(5,)]), Interrupting(parameters([(7,)])[0].detach())]
    twin = [p.detach().clone().requires_grad_() for p in model]
    set_gradients(0, model, twin)
    before = [p.detach().clone() for p in model]
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Cosine(0.1, 0.0, 9), momentum=0.9)
    reference = fastlr.FusedSGD(twin, lr=fastlr.Cosine(0.1, 0.0, 9), momentum=0.9)
    model[1].left = k
    try:
        optimizer.step()
    except KeyboardInterrupt:
        assert_same(before, model)
        assert (optimizer.clock().updates, len(optimizer.state)) == (0, 0)
        optimizer.step()
    reference.step()
    assert_same(twin, model)
    assert optimizer.clock() == reference.clock()
    assert len(optimizer.state) == 2


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (fastlr.FusedCyclicSGD, fastlr.FusedSGD),
        (fastlr.FusedCyclicAdam, fastlr.FusedAdam),
        (fastlr.FusedCyclicAdamW, fastlr.FusedAdamW),
    ],
)
def test_cyclic_optimizers_take_a_rate_of_their_cycles_only(kind: Any, plain: Any) -> None:
    """Code that gives every optimizer an lr, as frameworks do, is told what to give instead."""
    model = parameters([(4,)])
    remedy = rf"use {plain.__name__} with lr=fastlr.Triangular\(base_lr, max_lr, step_size_up\)"
    schedule = fastlr.Constant(0.1)
    for lr, cycle, error, message in (
        (0.05, {}, TypeError, r"lr must come with base_lr and max_lr, .* got 0.05 alone"),
        (0.05, {"base_lr": 0.1, "max_lr": 0.2}, ValueError, r"\[0.1, 0.2\], got 0.05"),
        (
            0.05,
            {"base_lr": np.array([0.1, 0.3])[:1], "max_lr": (0.4,)},
            ValueError,
            r"\[0.1, 0.4\], got 0.05",
        ),
        (float("nan"), {"base_lr": 0.1, "max_lr": 0.2}, ValueError, "got nan"),
        (
            schedule,
            {"base_lr": 0.1, "max_lr": 0.2},
            TypeError,
            r"lr must be a number between .* got Constant",
        ),
    ):
        with pytest.raises(error, match=f"{message}.* {remedy}"):
            kind(model, lr=lr, **cycle)
    cycling = kind(model, 0.1, 0.2, 3)
    instead = plain(model, lr=fastlr.Triangular(0.1, 0.2, 3))
    for lr in (0.1, 0.15, np.float64(0.2), None):
        taking = kind(model, 0.1, 0.2, 3, lr=lr)
        for each in (taking, instead):
            assert each.param_groups[0]["lr_schedule"] == cycling.param_groups[0]["lr_schedule"]


OVERWRITTEN = {
    "advance_samples": lambda optimizer: optimizer.advance_samples(8),
    "set_clock": lambda optimizer: optimizer.set_clock(updates=3),
    "another schedule": lambda optimizer: optimizer.set_schedule(momentum=0.5),
    "another group": lambda optimizer: optimizer.set_schedule(lr=0.5, group=1),
}


@pytest.mark.parametrize("move", OVERWRITTEN.values(), ids=OVERWRITTEN.keys())
def test_no_move_of_the_clock_hides_who_wrote_a_scheduled_rate(move: Any) -> None:
    model = [{"params": [p]} for p in parameters([(4,), (3,)])]
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Cosine(0.1, 0.0, 10))
    optimizer.param_groups[0]["lr"] = 0.07
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was set to 0\.07 by something else"):
        move(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.07
    assert optimizer.clock() == (0, 0)
    optimizer.set_schedule(lr=0.07)  # as the message says
    move(optimizer)


def test_a_gradient_that_changes_the_groups_is_an_error() -> None:
    class Greedy(torch.nn.Parameter):
        @property
        def grad(self) -> torch.Tensor:  # type: ignore[override]
            optimizer.param_groups[0]["params"].clear()
            return torch.ones(3)

    optimizer = fastlr.FusedSGD([Greedy(torch.zeros(3)), *parameters([(3,), (4,)])], lr=0.1)
    with pytest.raises(RuntimeError, match="groups have changed during the step"):
        optimizer.step()
