"""Checkpoints and copies of every rule: torch's format, exact continuation, both ways."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, leaves, parameters, set_gradients, through_file, train, twins
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import (
    RULES,
    Rule,
    assert_same_run,
    close_on_devices,
    drive,
    slots,
    with_cases,
    with_counting_rules,
    with_rules,
)
from torch.distributed.checkpoint.state_dict import _init_optim_state

import fastlr

pytestmark = pytest.mark.usefixtures("backend")


# -- fastlr's own files ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(list(RULES.values())),
    full=st.booleans(),
    scheduled=st.booleans(),
    saves=st.sets(st.integers(0, 11), max_size=5),
    late=st.integers(0, 11),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.complex64]),
    state_dtype=st.sampled_from([None, torch.float32]),
)
def test_saving_and_loading_midway_changes_nothing(
    rule: Rule,
    full: bool,
    scheduled: bool,
    saves: set[int],
    late: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
) -> None:
    """Into an optimizer that was built without schedules, with defaults and this type of state."""
    one, other = parameters([(9,), (4,)], dtype), parameters([(9,), (4,)], dtype)
    options = rule.full if full else {}
    steady, resumed = (rule.make(m, state_dtype=state_dtype, **options) for m in (one, other))
    if scheduled:
        for optimizer in (steady, resumed):
            optimizer.set_schedule(**rule.drives)
    for step in range(12):
        if step in saves:
            saved = through_file(resumed.state_dict())
            resumed = rule.fused(other, state_dtype=state_dtype)
            resumed.load_state_dict(saved)
        set_gradients(step, one, other)
        if step < late:
            one[1].grad = other[1].grad = None
        steady.step()
        resumed.step()
    assert_same_run(rule, (steady, one), (resumed, other))
    assert resumed.state_dict()["param_groups"] == steady.state_dict()["param_groups"]


@with_rules
def test_a_file_holds_plain_values(rule: Rule) -> None:
    model = parameters([(9,)])
    optimizer = rule.make(model, state_dtype=torch.float32, **rule.full)
    optimizer.set_schedule(**rule.drives)
    train(3, (model, optimizer.step))
    saved = through_file(optimizer.state_dict())
    assert leaves(saved) <= {dict, int, float, str, bool, type(None), torch.Tensor, tuple}
    assert {type(beta) for beta in saved["param_groups"][0].get("betas", ())} <= {float}


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}


@with_rules
@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES.keys())
def test_copies_continue_alike(rule: Rule, clone: Any) -> None:
    model = parameters([(9,), (5, 5)])
    optimizer = rule.make(model, **rule.full)
    optimizer.set_schedule(**rule.drives)
    optimizer.measure_grad_norm = True
    train(5, (model, optimizer.step))
    twin = clone(optimizer)
    twin_model = twin.param_groups[0]["params"]
    assert twin_model[0] is not model[0]
    assert type(twin) is rule.fused
    train(5, (model, optimizer.step), (twin_model, twin.step), start=5)
    assert_same_run(rule, (optimizer, model), (twin, twin_model))
    assert twin.sync() == optimizer.sync() == (10, 0)
    assert twin.last_grad_norm == optimizer.last_grad_norm
    twin.add_param_group({"params": parameters([(3,)])})
    assert twin.state_dict()["param_groups"][0] == optimizer.state_dict()["param_groups"][0]


CYCLIC = {
    "SGD": (fastlr.FusedCyclicSGD, {"momentum": 0.9}),
    "Adam": (fastlr.FusedCyclicAdam, {"cycle_momentum": True, "amsgrad": True}),
    "AdamW": (fastlr.FusedCyclicAdamW, {"cycle_momentum": True, "base_momentum": 0.5}),
}


@pytest.mark.parametrize(("kind", "options"), CYCLIC.values(), ids=CYCLIC.keys())
@pytest.mark.parametrize("clone", [*COPIES.values(), None], ids=[*COPIES, "file"])
def test_cyclic_ones_continue_alike(kind: Any, options: dict[str, Any], clone: Any) -> None:
    model = parameters([(9,), (5, 5)])
    optimizer = kind(model, 0.01, 0.1, 3, mode="triangular2", **options)
    train(5, (model, optimizer.step))
    if clone is None:
        twin = kind([torch.nn.Parameter(p.detach().clone()) for p in model], 0.5, 0.75)
        twin.load_state_dict(through_file(optimizer.state_dict()))
    else:
        twin = clone(optimizer)
    twin_model = twin.param_groups[0]["params"]
    train(5, (model, optimizer.step), (twin_model, twin.step), start=5)
    assert_same(model, twin_model)
    assert twin.sync() == optimizer.sync() == (10, 0)
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


# -- torch's files ---------------------------------------------------------------------------------


@with_cases
def test_a_torch_run_goes_on_here_and_back(rule: Rule, options: dict[str, Any], backend: str) -> None:
    """Into optimizers built with defaults; one parameter is frozen and one gets its gradients late."""
    ours, theirs = twins([(9,), (5, 4), (3,), (6,)])
    reference = rule.make_torch(theirs, **options)

    def step_all(start: int, *optimizers: Any) -> None:
        for step in range(start, start + 3):
            set_gradients(step, ours, theirs)
            for model in (ours, theirs):
                model[2].grad = None
                model[3].grad = None if step < 2 else model[3].grad
            for optimizer in optimizers:
                optimizer.step()

    step_all(0, reference)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    fused = rule.fused(ours)
    fused.load_state_dict(through_file(reference.state_dict()))
    step_all(3, reference, fused)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))
    file, wanted = through_file(fused.state_dict()), reference.state_dict()
    assert set(file["state"]) == {k for k, entry in wanted["state"].items() if any_tensor(entry)}
    for key, entry in file["state"].items():
        assert set(entry) == {name for name, value in wanted["state"][key].items() if value is not None}
        for name, value in entry.items():
            other = wanted["state"][key][name]
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
    for key, value in wanted["param_groups"][0].items():
        assert file["param_groups"][0].get(key) == value, key

    if backend == "cuda":
        return  # where torch's own arithmetic is another
    back = rule.make_torch(ours)
    back.load_state_dict(file)
    step_all(6, reference, back)
    assert_same_run(rule, (reference, theirs), (back, ours))


def any_tensor(entry: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in entry.values())


@with_rules
def test_a_torch_run_goes_on_beside_schedules(rule: Rule, backend: str) -> None:
    """The file knows none, so that the optimizer's own go on, where set_clock() says."""
    ours, theirs = twins([(9,)])
    reference = rule.make_torch(theirs, **rule.full)
    for step in range(4):
        drive(reference.param_groups[0], rule.drives, step)
        train(1, (theirs, reference.step), start=step)
    ours[0].data.copy_(theirs[0].detach())
    fused = rule.make(ours)
    fused.set_schedule(**rule.drives)
    with pytest.warns(UserWarning, match="the file has no clock") as caught:
        fused.load_state_dict(reference.state_dict())
    told = str(caught[0].message)
    assert all(
        f"the {name} schedule of parameter group 0 goes on at updates=0" in told for name in rule.drives
    )
    fused.set_clock(updates=4)
    for step in range(4, 9):
        drive(reference.param_groups[0], rule.drives, step)
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


@with_rules
def test_fixed_values_come_back_in_place_of_the_schedules_that_they_replaced(rule: Rule) -> None:
    def built() -> Any:
        optimizer = rule.make(parameters([(9,)]), **rule.full)
        optimizer.set_schedule(**rule.drives)
        return optimizer

    first, second = built(), built()
    first.set_schedule(**dict.fromkeys(rule.drives, 0.25))
    train(3, (first.param_groups[0]["params"], first.step))
    saved = through_file(first.state_dict())
    second.load_state_dict(saved)
    assert second.state_dict()["param_groups"] == saved["param_groups"]
    for name in rule.drives:
        assert second.param_groups[0][f"{name}_schedule"] is None


# What torch's implementations leave in a file.
MADE_BY = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
}


@with_rules
@pytest.mark.parametrize("made_by", MADE_BY.values(), ids=MADE_BY.keys())
def test_files_of_torchs_other_implementations(rule: Rule, made_by: dict[str, bool], backend: str) -> None:
    ours, theirs = twins([(9,), (5, 4)])
    with torch.device("cpu"):  # `theirs` are there, and torch's makes its step tensors on the default device
        try:
            other = rule.torch(theirs, **{"lr": rule.lr, **rule.full, **made_by})
        except TypeError:
            pytest.skip("torch's optimizer has no such implementation")
        if "capturable" not in made_by:  # its steps are a GPU's
            train(3, (theirs, other.step))
    reference = rule.make_torch(theirs, **rule.full)
    fused = rule.make(ours)
    saved = through_file(other.state_dict())
    for optimizer in (reference, fused):
        optimizer.load_state_dict(saved)
    for group in reference.param_groups:
        group.update(foreach=False, fused=False, capturable=False)
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.detach())
    train(3, (theirs, reference.step), (ours, fused.step), start=3)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))
    again = rule.torch(theirs, foreach=False)
    again.load_state_dict(through_file(fused.state_dict()))
    for key, value in made_by.items():
        assert again.param_groups[0][key] == value


@with_counting_rules
@pytest.mark.parametrize("kind", [int, float, torch.tensor], ids=["int", "float", "int64-tensor"])
def test_a_step_of_an_older_torch_is_taken(rule: Rule, kind: Any, backend: str) -> None:
    ours, theirs = twins([(9,)])
    reference = rule.make_torch(theirs, **rule.full)
    train(3, (theirs, reference.step))
    saved = reference.state_dict()
    saved["state"] = {0: {**saved["state"][0], "step": kind(3)}}
    ours[0].data.copy_(theirs[0].detach())
    fused = rule.make(ours)
    fused.load_state_dict(saved)
    train(3, (theirs, reference.step), (ours, fused.step), start=3)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


def test_adamw_stays_decoupled_whatever_the_file_says(backend: str) -> None:
    ours, theirs = twins([(9,)])
    adam = RULES["Adam"].make_torch(theirs, weight_decay=0.25, betas=(0.5, 0.9))
    train(3, (theirs, adam.step))
    ours[0].data.copy_(theirs[0].detach())
    fused = fastlr.FusedAdamW(ours)
    fused.load_state_dict(through_file(adam.state_dict()))
    assert fused.param_groups[0]["decoupled_weight_decay"] is True
    adamw = RULES["AdamW"].make_torch(theirs)
    adamw.load_state_dict(adam.state_dict())
    train(3, (theirs, adamw.step), (ours, fused.step), start=3)
    assert_same_run(RULES["AdamW"], (adamw, theirs), (fused, ours), backend == "cuda")
    assert fused.param_groups[0]["weight_decay"] == 0.25

    coupled = fastlr.FusedAdam(ours)  # which takes both
    coupled.load_state_dict(fused.state_dict())
    assert coupled.param_groups[0]["decoupled_weight_decay"] is True


# -- a file of fastlr 0.1 --------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", [None, "float32"], ids=["own", "float32"])
def test_a_file_of_version_0_1(momentum_dtype: str | None) -> None:
    one, other = parameters([(9,)], torch.bfloat16), parameters([(9,)], torch.bfloat16)
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    steady = fastlr.FusedSGD(
        one,
        state_dtype=torch.float32 if momentum_dtype else None,
        **{**options, "lr": fastlr.Exponential(0.5, 0.9)},
    )
    train(3, (one, steady.step))
    new = steady.state_dict()
    group = new["param_groups"][0]
    old = {
        "state": {0: {"momentum_buffer": new["state"][0]["momentum_buffer"]}},
        "param_groups": [
            {
                "lr": group["lr"], "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True,
                "maximize": False, "momentum_dtype": momentum_dtype,
                "lr_schedule": {"type": "Exponential", "unit": "update", "start": 0.5, "gamma": 0.9},
                "lr_start": 0, "momentum_schedule": None, "momentum_start": 0, "updates": 3, "samples": 0,
                "fresh": False, "params": [0],
            }
        ],
    }  # fmt: skip
    resumed = fastlr.FusedSGD(other, weight_decay=fastlr.LinearRamp(0.5, 0.0, 9))
    resumed.load_state_dict(through_file(old))
    other[0].data.copy_(one[0].detach())
    assert resumed.state_dict()["param_groups"] == new["param_groups"]
    train(3, (one, steady.step), (other, resumed.step), start=3)
    assert_same_run(RULES["SGD"], (steady, one), (resumed, other))


# -- damaged files ---------------------------------------------------------------------------------

NO_AGE = "the file's step 1 must be a number of updates, got "
BAD_STEPS: dict[str, tuple[Any, str]] = {
    "missing": (None, "the file's state of parameter 1 has .*, but no step"),
    "negative": (torch.tensor(-1.0), NO_AGE + r"tensor\(-1"),
    "nan": (float("nan"), NO_AGE + "nan"),
    "infinite": (float("inf"), NO_AGE + "inf"),
    "between": (2.5, NO_AGE + "2.5"),
    "two": (torch.ones(2), NO_AGE + r"tensor\(\[1"),
    "flag": (True, NO_AGE + "True"),
    "huge": (1e300, NO_AGE + r"1e\+300"),
    "huge-int": (10**400, NO_AGE + "1000"),
    "longer": (10**5000, NO_AGE + "an integer of 16610 bits"),
    "beyond-a-clock": (2**63, NO_AGE + "9223372036854775808"),
    "huge-tensor": (torch.tensor(1e300, dtype=torch.float64), NO_AGE + r"tensor\(1.0000e\+300"),
    "complex": (torch.tensor(1 + 1j), NO_AGE + r"tensor\(1.\+1.j"),
    "flag-tensor": (torch.tensor(True), NO_AGE + r"tensor\(True"),
    "sparse": (torch.ones(1, device="cpu").to_sparse(), NO_AGE + r"tensor\(indices"),
    "meta": (torch.ones((), device="meta"), NO_AGE + r"tensor\(\.\.\."),
    "word": ("2", "the file's state of parameter 1 .* as step, got str"),
}


@with_counting_rules
@pytest.mark.parametrize(("step", "message"), BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_a_bad_step_in_a_file_changes_nothing(rule: Rule, step: Any, message: str) -> None:
    def damage(entry: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in entry.items() if k != "step"}, **({} if step is None else {"step": step})}

    assert_load_refused(rule, damage, message)


@with_rules
def test_a_slot_of_another_shape_in_a_file_changes_nothing(rule: Rule) -> None:
    (names,) = {tuple(slots(o, p)) for o, p in [one_step(rule)]}
    for name in names:
        assert_load_refused(rule, lambda e, name=name: {**e, name: torch.ones(3)}, f"{name} 1 has shape")
        assert_load_refused(rule, lambda e, name=name: {**e, name: 3}, f"a tensor as {name}, got int")


NO_SLOTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse": (lambda m: m.to_sparse(), "must be a dense tensor with values, got one of .* torch.sparse_coo"),
    "meta": (lambda m: m.to("meta"), "must be a dense tensor with values, got one of .* on meta"),
    "nested": (lambda m: torch.nested.nested_tensor([m]), "must be a dense tensor with values"),
    "complex": (lambda m: m.to(torch.complex64), r"has shape \(4,\) and torch.complex64, its parameter"),
    "codes": (lambda m: m.to(torch.uint8), r"has torch.uint8, as of another optimizer, .* take it out of"),
}  # fmt: skip


@with_rules
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize(("make", "message"), NO_SLOTS.values(), ids=NO_SLOTS.keys())
def test_a_tensor_that_is_no_state_in_a_file_changes_nothing(
    rule: Rule, make: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    (names,) = {tuple(slots(o, p)) for o, p in [one_step(rule)]}
    for name in names:
        assert_load_refused(
            rule, lambda e, name=name: {**e, name: make(torch.ones(4))}, f"the file's {name} 1 {message}"
        )


@with_rules
def test_real_state_of_a_complex_parameter_in_a_file_changes_nothing(rule: Rule) -> None:
    """Its imaginary parts would be lost."""
    model = parameters([(4,)], torch.complex64)
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    saved = copy.deepcopy(optimizer.state_dict())
    before = str(optimizer.state_dict())
    for name in slots(optimizer, model[0]):
        bad = {**saved, "state": {0: {**saved["state"][0], name: torch.ones(4)}}}
        with pytest.raises(
            ValueError, match=rf"the file's {name} 0 has shape \(4,\) and torch.float32, its parameter .*x64"
        ):
            optimizer.load_state_dict(bad)
        assert str(optimizer.state_dict()) == before


def one_step(rule: Rule) -> tuple[Any, torch.nn.Parameter]:
    model = parameters([(4,)])
    optimizer = rule.make(model, **rule.full)
    train(1, (model, optimizer.step))
    return optimizer, model[0]


def assert_load_refused(rule: Rule, damage: Any, message: str) -> None:
    ours, theirs = twins([(9,), (4,)])
    touched, untouched = rule.make(ours, **rule.full), rule.make(theirs, **rule.full)
    train(2, (ours, touched.step), (theirs, untouched.step))
    kept = copy.deepcopy(touched.state_dict())
    bad = copy.deepcopy(kept)
    bad["param_groups"][0]["lr"] = 0.75
    bad["state"][1] = damage(bad["state"][1])
    with pytest.raises(ValueError, match=message):
        touched.load_state_dict(bad)
    assert str(touched.state_dict()) == str(kept)
    train(2, (ours, touched.step), (theirs, untouched.step), start=2)
    assert_same_run(rule, (untouched, theirs), (touched, ours))


# -- the step with which torch.distributed.checkpoint makes state ------------------------------------


@with_rules
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_an_initializing_step_changes_neither_weights_nor_clock_nor_what_follows(
    rule: Rule, full: bool
) -> None:
    ours, theirs = parameters([(9,), (4,)]), parameters([(9,), (4,)])
    options = rule.full if full else {}
    touched, untouched = rule.make(ours, **options), rule.make(theirs, **options)
    for optimizer in (touched, untouched):
        optimizer.set_schedule(lr=fastlr.Exponential(0.1, 0.9))
    calls: list[str] = []
    touched.register_step_post_hook(lambda *_: calls.append("post"))
    has_state = full or rule is not RULES["SGD"]
    for _ in range(2):  # a save, then a load: without state each of them initializes anew
        _init_optim_state(touched)
        assert_same(theirs, ours)
        assert touched.clock() == (0, 0)
        assert touched.param_groups[0]["lr"] == 0.1
        assert set(touched.state) == (set(ours) if has_state else set())
        assert all(entry.get("step", 0) == 0 for entry in touched.state.values())
    assert calls == []

    saved = through_file(touched.state_dict())
    touched.load_state_dict(saved)
    for step in range(4):
        set_gradients(step, ours, theirs)
        if step < 2:
            ours[1].grad = theirs[1].grad = None
        touched.step()
        untouched.step()
        assert_same(theirs, ours)
        assert len(touched.state) == len(untouched.state)
    assert_same_run(rule, (untouched, theirs), (touched, ours))
    if not has_state:
        touched.zero_grad()
        _init_optim_state(touched)  # in the middle of a run, where there is no state either
        assert touched.clock() == untouched.clock() == (4, 0)


# -- files of another kind -------------------------------------------------------------------------


def stepped(rule: Rule, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    """After three updates."""
    model = parameters([(9,), (5, 4)])
    optimizer = rule.make(model, **{**rule.full, **options})
    train(3, (model, optimizer.step))
    return model, optimizer


@pytest.mark.parametrize(
    ("made_by", "loaded_by"),
    [
        ("SGD", "Adam"), ("Adam", "SGD"), ("RMSprop", "AdamW"), ("Adagrad", "RMSprop"), ("Adam", "Adadelta"),
        ("Adam", "Lion"), ("RMSprop", "SGD"), ("Adadelta", "RMSprop"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(made_by: str, loaded_by: str) -> None:
    _, optimizer = stepped(RULES[made_by])
    _, other = stepped(RULES[loaded_by])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"state of parameter 0 has .*; it may be of another kind of optimizer"
    ):
        other.load_state_dict(optimizer.state_dict())
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert_same(entry.values(), after["state"][key].values())


@pytest.mark.parametrize(
    ("made_by", "loaded_by", "by_name"),
    [
        (torch.optim.NAdam, "Adam", "mu_product"),
        (torch.optim.NAdam, "Lion", "mu_product"),
        (torch.optim.Adamax, "Lion", "exp_inf"),
        (torch.optim.Adamax, "Adam", "exp_inf"),
    ],
)
def test_a_file_of_a_rule_that_there_is_not_here_is_refused(
    made_by: Any, loaded_by: str, by_name: str
) -> None:
    model = parameters([(9,), (5, 4)])
    theirs = made_by(model)
    train(3, (model, theirs.step))
    _, other = stepped(RULES[loaded_by])
    with pytest.raises(ValueError, match=rf"{by_name}.*it may be of another kind of optimizer"):
        other.load_state_dict(theirs.state_dict())


def test_what_a_user_keeps_beside_the_state_is_loaded() -> None:
    model, optimizer = stepped(RULES["Adam"])
    optimizer.state[model[0]]["average"] = torch.full_like(model[0], 0.5)
    saved = through_file(optimizer.state_dict())
    other_model, other = stepped(RULES["Adam"])
    other.load_state_dict(saved)
    assert torch.equal(other.state[other_model[0]]["average"].detach(), torch.full((9,), 0.5))


# -- state that torch's optimizer makes in its constructor -------------------------------------------


@pytest.mark.parametrize("updates", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_adagrads_initial_sums_reach_torch(updates: int, dtype: torch.dtype, backend: str) -> None:
    """Of parameters never updated too: torch's optimizer would begin with its own constructor's."""
    rule = RULES["Adagrad"]
    ours, theirs = (
        parameters([(9,), (4,), (3,)], dtype, device=device) for device in (torch.get_default_device(), "cpu")
    )
    options = {"initial_accumulator_value": 0.5, "lr_decay": 0.1}
    fused, reference = rule.make(ours, **options), rule.make_torch(theirs, **options)

    def step_all(start: int, *optimizers: Any, late: bool) -> None:
        for step in range(start, start + 3):
            set_gradients(step, ours, theirs)
            for model in (ours, theirs):
                model[2].grad = None
                model[1].grad = model[1].grad if late else None
            for optimizer in optimizers:
                optimizer.step()

    if updates:
        step_all(0, fused, reference, late=False)
    file, wanted = through_file(fused.state_dict()), reference.state_dict()
    assert {key: set(entry) for key, entry in file["state"].items()} == {
        key: set(entry) for key, entry in wanted["state"].items()
    }
    for key, entry in wanted["state"].items():
        if not dtype.is_complex:  # which torch's squares in another way
            assert_same([entry[name] for name in entry], [file["state"][key][name] for name in entry])
    assert set(fused.state) == (set(ours[:1]) if updates else set())  # nothing is made by saving
    if backend == "cuda" or dtype.is_complex:
        return
    back = rule.make_torch(ours)  # with 0
    back.load_state_dict(file)
    step_all(updates, back, reference, late=True)
    assert_same_run(rule, (reference, theirs), (back, ours))


# -- schedules beside a file that knows none ---------------------------------------------------------


def test_a_file_from_before_the_first_update_lacks_no_averages() -> None:
    """What torch's eager Adagrad has then, the sums, is state already."""
    first, second = (fastlr.FusedAdagrad(parameters([(3,)]), ema_decay=decay) for decay in (0.9, None))
    second.load_state_dict(through_file(first.state_dict()))  # a warning would be an error
    assert second.param_groups[0]["ema_decay"] == 0.9


@with_rules
def test_a_schedule_set_in_mid_run_goes_on_beside_a_file_without_one(rule: Rule) -> None:
    model, optimizer = stepped(rule)
    optimizer.set_schedule(**rule.drives)
    train(2, (model, optimizer.step), start=3)
    group = optimizer.param_groups[0]
    starts = {name: group[f"{name}_start"] for name in rule.drives}
    assert set(starts.values()) == {3}
    expected = optimizer.state_dict()["param_groups"]
    other = rule.make_torch(parameters([(9,), (5, 4)], device="cpu"), **rule.full)
    with pytest.warns(UserWarning, match="the file has no clock"):
        optimizer.load_state_dict(other.state_dict())
    assert {name: optimizer.param_groups[0][f"{name}_start"] for name in rule.drives} == starts
    loaded = optimizer.state_dict()["param_groups"]
    assert [{key: group[key] for key in expected[0]} for group in loaded] == expected
