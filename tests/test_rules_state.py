"""The state of every rule: how it lies in memory, what may be done to it between steps, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import GRADIENTS, LAYOUTS, assert_same, channels_last, parameters, set_gradients, train, twins
from rule_table import (
    ADAM_DECOUPLES,
    NOT_DECOUPLED,
    RULES,
    Rule,
    assert_same_run,
    close_on_devices,
    slots,
    states,
    with_counting_rules,
    with_rules,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlr
from fastlr import _core
from fastlr._runtime import Runtime

pytestmark = pytest.mark.usefixtures("backend")


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the strides of the transposed shape."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


# -- layouts ---------------------------------------------------------------------------------------


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@with_rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_updates_its_own_elements_only(rule: Rule, dtype: torch.dtype) -> None:
    """Each kind of parameter with each kind of gradient, against dense ones, which are tested elsewhere."""
    ours, theirs, gradients, bases, covers = [], [], [], [], []
    for layout in LAYOUTS.values():
        for gradient in GRADIENTS.values():
            base = parameters([(6, 4, 5, 3)], dtype, seed=len(ours))[0].detach()
            base = layout(base) if layout is channels_last else base
            covered = torch.zeros_like(base, dtype=torch.bool)
            view, cover = (base, covered) if layout is channels_last else (layout(base), layout(covered))
            cover.fill_(True)
            ours.append(torch.nn.Parameter(view))
            theirs.append(torch.nn.Parameter(view.clone(memory_format=torch.contiguous_format)))
            gradients.append(gradient)
            bases.append(base)
            covers.append(covered)
    before = [base.clone() for base in bases]
    fused, dense = rule.make(ours, **rule.full), rule.make(theirs, **rule.full)
    for step in range(3):
        set_gradients(step, ours)
        for p, q, gradient in zip(ours, theirs, gradients, strict=True):
            p.grad = gradient(p.grad)
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        fused.step()
        dense.step()
    assert_same_run(rule, (dense, theirs), (fused, ours))
    for old, base, covered in zip(before, bases, covers, strict=True):
        assert torch.equal(old[~covered], base[~covered])
        assert not torch.equal(old[covered], base[covered])


# How each of a parameter's tensors of state lies, in turn.
STRIDES: list[Callable[[torch.Tensor], torch.Tensor]] = [transposed, with_gaps, torch.clone]


@with_rules
@pytest.mark.parametrize("turn", range(3))
def test_slots_that_lie_each_in_their_own_way_are_used_where_they_lie(
    rule: Rule, turn: int, backend: str
) -> None:
    ours, theirs = twins([(6, 5), (4, 3, 2), (9,)])
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    train(2, (theirs, reference.step), (ours, fused.step))
    kept = []
    for p in ours:
        for place, (name, value) in enumerate(sorted(slots(fused, p).items())):
            fused.state[p][name] = STRIDES[(place + turn) % 3](value)
            kept.append(fused.state[p][name])
    train(4, (theirs, reference.step), (ours, fused.step), start=2)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))
    now = [value for p in ours for _, value in sorted(slots(fused, p).items())]
    assert all(a is b for a, b in zip(kept, now, strict=True))


@with_rules
def test_state_is_loaded_into_the_parameters_layout(rule: Rule, backend: str) -> None:
    ours, theirs = twins([(6, 5), (4, 3, 2)])
    reference = rule.make_torch(theirs, **rule.full)
    train(3, (theirs, reference.step))
    saved = reference.state_dict()
    for entry in saved["state"].values():
        for place, name in enumerate(sorted(entry)):
            if name != "step":
                entry[name] = STRIDES[place % 3](entry[name])
    for p, q in zip(ours, theirs, strict=True):
        p.data = transposed(q.detach().to(p.device))
    fused = rule.make(ours)
    fused.load_state_dict(saved)
    for p in ours:
        assert all(value.stride() == p.stride() for value in slots(fused, p).values())
    train(3, (theirs, reference.step), (ours, fused.step), start=3)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


@with_rules
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "data_ptr"])
@pytest.mark.parametrize("place", ["meta", "fake"])
def test_tensors_without_values_get_their_state_and_the_clock_moves(
    rule: Rule, place: str, exchange: bool
) -> None:
    mode = FakeTensorMode() if place == "fake" else torch.device("meta")
    _core.set_exchange_enabled(exchange)
    try:
        with mode:
            p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
            optimizer = rule.make([p], state_dtype=torch.float32, **rule.full)
            optimizer.set_schedule(lr=fastlr.Exponential(0.5, 0.5))
            for _ in range(2):
                p.grad = torch.ones_like(p)
                optimizer.step()
    finally:
        _core.set_exchange_enabled(True)
    assert optimizer.clock().updates == 2
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert p._version == 2
    reference = rule.torch([q := torch.nn.Parameter(torch.ones(3, 2, device="cpu"))], **rule.full)
    q.grad = torch.ones_like(q)
    reference.step()
    assert set(optimizer.state[p]) == set(reference.state[q])
    for name, value in slots(optimizer, p).items():
        assert (value.shape, value.device, value.dtype) == (p.shape, p.device, torch.float32), name
        assert type(value) is type(p.data)


# -- surgery: what may change between two steps ----------------------------------------------------

# Options before and after, and what torch's state needs then, which it does not make itself.
SWITCHED: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "Adam-amsgrad": ("Adam", {}, {"amsgrad": True}, ("max_exp_avg_sq",)),
    "Adam-amsgrad-off": ("Adam", {"amsgrad": True}, {"amsgrad": False}, ()),
    "AdamW-amsgrad": ("AdamW", {}, {"amsgrad": True}, ("max_exp_avg_sq",)),
    "Adam-decoupled": ("Adam", {"weight_decay": 0.1}, {"decoupled_weight_decay": True}, ()),
    "RMSprop-momentum": ("RMSprop", {}, {"momentum": 0.9}, ("momentum_buffer",)),
    "RMSprop-momentum-off": ("RMSprop", {"momentum": 0.9}, {"momentum": 0.0}, ()),
    "RMSprop-centered": ("RMSprop", {}, {"centered": True}, ("grad_avg",)),
    "RMSprop-both": ("RMSprop", {}, {"centered": True, "momentum": 0.5}, ("grad_avg", "momentum_buffer")),
    "SGD-momentum": ("SGD", {}, {"momentum": 0.9}, ()),
    "Adagrad-lr_decay": ("Adagrad", {}, {"lr_decay": 0.1}, ()),
    "Adadelta-rho": ("Adadelta", {}, {"rho": 0.5, "eps": 1e-3}, ()),
}  # fmt: skip


@pytest.mark.parametrize(("name", "before", "after", "made"), SWITCHED.values(), ids=SWITCHED.keys())
def test_options_switched_in_mid_run(
    name: str, before: dict[str, Any], after: dict[str, Any], made: tuple[str, ...], backend: str
) -> None:
    """Also of a parameter that gets its first gradient only then."""
    if "decoupled_weight_decay" in after and not ADAM_DECOUPLES:
        pytest.skip(NOT_DECOUPLED)
    rule = RULES[name]
    ours, theirs = twins([(9,), (5, 3)])
    fused, reference = rule.make(ours, **before), rule.make_torch(theirs, **before)
    for step in range(8):
        set_gradients(step, ours, theirs)
        if step < 5:
            ours[1].grad = theirs[1].grad = None
        if step == 4:
            fused.param_groups[0].update(after)
            reference.param_groups[0].update(after)
            for key in made:
                reference.state[theirs[0]][key] = torch.zeros_like(theirs[0])
        fused.step()
        reference.step()
        assert_same(theirs, ours, close_on_devices(rule, backend))
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


class Stopping(Runtime):
    """Raises where everything is ready to be written."""

    stops = False

    def will_write(self, parameters: list[torch.Tensor]) -> None:  # type: ignore[override]
        if self.stops:
            raise KeyboardInterrupt
        Runtime.will_write(parameters)


@pytest.mark.parametrize(("name", "before", "after", "made"), SWITCHED.values(), ids=SWITCHED.keys())
def test_a_step_that_is_stopped_leaves_no_room_for_state(
    name: str, before: dict[str, Any], after: dict[str, Any], made: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Neither in a parameter's state, where some is missing, nor for a parameter that has none."""
    rule, stopping = RULES[name], Stopping()
    monkeypatch.setattr("fastlr.optim._base.Runtime", lambda: stopping)
    ours, theirs = parameters([(9,), (5, 3)]), parameters([(9,), (5, 3)])
    stopped, untouched = rule.make(ours, **before), rule.make(theirs, **before)
    for step in range(6):
        set_gradients(step, ours, theirs)
        if step < 3:
            ours[1].grad = theirs[1].grad = None
        if step == 3:
            for optimizer in (stopped, untouched):
                optimizer.param_groups[0].update(after)
            kept = {p: dict(entry) for p, entry in stopped.state.items()}
            stopping.stops = True
            with pytest.raises(KeyboardInterrupt):
                stopped.step()
            stopping.stops = False
            assert dict(stopped.state) == kept
        stopped.step()
        untouched.step()
    assert_same_run(rule, (untouched, theirs), (stopped, ours))
    assert set(made) <= set(stopped.state[ours[0]])


def replace_slot(optimizer: Any, p: torch.Tensor, name: str) -> None:
    optimizer.state[p][name] = optimizer.state[p][name].clone()


def move_data(optimizer: Any, p: torch.Tensor, name: str) -> None:
    optimizer.state[p][name].data = optimizer.state[p][name].data.clone()


def replace_entry(optimizer: Any, p: torch.Tensor, name: str) -> None:
    optimizer.state[p] = dict(reversed(optimizer.state[p].items()))


def replace_all(optimizer: Any, p: torch.Tensor, name: str) -> None:
    state = optimizer.state
    optimizer.state = type(state)(dict)
    for key, value in reversed(state.items()):
        optimizer.state[key] = dict(value)


def move_parameter(optimizer: Any, p: torch.Tensor, name: str) -> None:
    p.data = transposed(p.data)


CHANGES = [replace_slot, move_data, replace_entry, replace_all, move_parameter]


@with_rules
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_nothing_is_remembered_that_may_move(rule: Rule, change: Callable[..., None], backend: str) -> None:
    ours, theirs = twins([(5, 5), (3, 7)])
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    for step in range(6):
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        for p in ours:
            for name in list(fused.state[p]):
                old = fused.state[p][name]
                pointer = old.data_ptr()
                change(fused, p, name)
                if fused.state[p][name] is not old and fused.state[p][name].data_ptr() != pointer:
                    old.fill_(float("nan"))
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


def as_gradient(optimizer: Any, model: list[torch.nn.Parameter], name: str) -> None:
    model[1].grad = optimizer.state[model[0]][name][-model[1].numel() :]


def as_state(optimizer: Any, model: list[torch.nn.Parameter], name: str) -> None:
    optimizer.state[model[1]][name] = optimizer.state[model[0]][name][-model[1].numel() :]


@with_rules
@pytest.mark.parametrize("share", [as_gradient, as_state], ids=lambda f: f.__name__)
def test_state_that_another_update_reads_or_writes_is_updated_in_order(
    rule: Rule, share: Callable[..., None], backend: str
) -> None:
    """What the first thread writes last, the second would read first."""
    torch.set_num_threads(2)
    unit = 100_000 if backend == "cpu" else 100
    ours, theirs = twins([(4 * unit,), (unit,), (3 * unit,)])
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    train(1, (theirs, reference.step), (ours, fused.step))
    for step in range(1, 4):
        set_gradients(step, ours, theirs)
        for optimizer, model in ((fused, ours), (reference, theirs)):
            share(optimizer, model, sorted(slots(fused, ours[0]))[0])
            optimizer.step()
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


@with_rules
def test_a_parameter_whose_state_is_taken_away_starts_anew(rule: Rule, backend: str) -> None:
    ours, theirs = twins([(9,), (5,)])
    fused = rule.make(ours, **rule.full)
    train(3, (ours, fused.step))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.detach())
    fused.state.clear()
    reference = rule.make_torch(theirs, **rule.full)
    train(3, (theirs, reference.step), (ours, fused.step), start=3)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


@with_rules
def test_the_type_of_a_model_may_change_before_its_state_is_loaded_again(rule: Rule, backend: str) -> None:
    ours, theirs = twins([(9,), (5,)])
    fused, reference = rule.make(ours, **rule.full), rule.make_torch(theirs, **rule.full)
    train(3, (theirs, reference.step), (ours, fused.step))
    for model, optimizer in ((ours, fused), (theirs, reference)):
        saved = optimizer.state_dict()
        for p in model:
            p.grad = None
            p.data = p.data.double()
        optimizer.load_state_dict(saved)
    train(3, (theirs, reference.step), (ours, fused.step), start=3)
    assert_same_run(rule, (reference, theirs), (fused, ours), close_on_devices(rule, backend))


# -- bad state is named before anything is written -------------------------------------------------

BAD_SLOTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "shape": (lambda m: m[:3].clone(), r"the {slot} of parameter 1 .*, shape \(7,\) has shape \(3,\)"),
    "type": (lambda m: m.double(), "the {slot} of parameter 1 .* has float64; a parameter of float32 takes"),
    "half": (lambda m: m.half(), "the {slot} of parameter 1 .* has float16; a parameter of float32 takes"),
    "complex": (lambda m: m.to(torch.complex64), "the {slot} of parameter 1 .* has complex64; a param"),
    "expanded": (lambda m: m[:1].expand(7), "the {slot} of parameter 1 .* has elements that share memory"),
    "meta": (lambda m: m.to("meta"), "the {slot} of parameter 1 .* is a meta or fake tensor without memory"),
    "sparse": (lambda m: m.to_sparse(), "the {slot} of parameter 1 .* has layout torch.sparse_coo"),
}  # fmt: skip


@with_rules
@pytest.mark.parametrize(("make", "message"), BAD_SLOTS.values(), ids=BAD_SLOTS.keys())
def test_bad_slots_are_refused(rule: Rule, make: Callable[..., torch.Tensor], message: str) -> None:
    model = parameters([(9,), (7,)])
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    for slot in slots(optimizer, model[1]):
        kept = optimizer.state[model[1]][slot]
        optimizer.state[model[1]][slot] = make(kept)
        assert_refused(optimizer, model, message.format(slot=slot))
        optimizer.state[model[1]][slot] = kept
    train(1, (model, optimizer.step), start=2)
    assert optimizer.sync().updates == 3


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "data_ptr"])
def test_bad_state_is_refused_however_tensors_are_read(exchange: bool) -> None:
    """PyTorch before 2.10 has no exchange."""
    model = parameters([(9,), (7,)], device="cpu")
    optimizer = fastlr.FusedAdam(model)
    train(2, (model, optimizer.step))
    state = optimizer.state[model[1]]
    _core.set_exchange_enabled(exchange)
    try:
        for slot, bad, message in (
            ("exp_avg", state["exp_avg"].to("meta"), "exp_avg of parameter 1 .* is a meta or fake tensor"),
            ("exp_avg", state["exp_avg"].long(), "exp_avg of parameter 1 .* has int64; a param"),
            ("exp_avg", state["exp_avg"].to(torch.int8), "exp_avg of parameter 1 .* has int8; a param"),
            ("step", torch.tensor(2), "step of parameter 1 .* must be one float32 on cpu, got int64 of"),
        ):
            kept, state[slot] = state[slot], bad
            assert_refused(optimizer, model, message)
            state[slot] = kept
        train(1, (model, optimizer.step), start=2)
    finally:
        _core.set_exchange_enabled(True)


@with_rules
def test_lazily_conjugated_and_negated_slots_are_refused(rule: Rule) -> None:
    """Their memory holds other values than they say."""
    message = "the {slot} of parameter 1 .* is a lazily conjugated or negated view; replace it by {slot}.res"
    for dtype, size in ((torch.complex64, 7), (torch.float32, 7), (torch.float32, 1)):
        model = parameters([(9,), (size,)], dtype)
        optimizer = rule.make(model, **rule.full)
        train(2, (model, optimizer.step))
        for slot, kept in slots(optimizer, model[1]).items():
            lazy = kept.clone().conj() if kept.is_complex() else torch.complex(kept, -kept).conj().imag
            assert lazy.is_conj() or lazy.is_neg()
            optimizer.state[model[1]][slot] = lazy
            assert_refused(optimizer, model, message.format(slot=slot))
            optimizer.state[model[1]][slot] = lazy.resolve_conj().resolve_neg()
        train(1, (model, optimizer.step), start=2)


def assert_refused(optimizer: Any, model: list[torch.nn.Parameter], message: str) -> None:
    """A step raises and has changed nothing."""

    def tensors() -> list[torch.Tensor]:
        plain = [t for t in states(optimizer, model) if not (t.is_meta or t.is_sparse)]
        return [t.detach().clone() for t in (*model, *plain)]

    before, clock = tensors(), optimizer.sync()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same(before, tensors())
    assert optimizer.sync() == clock


@with_rules
@pytest.mark.parametrize("shift", [0, 3], ids=["the-same", "a-part"])
def test_state_that_shares_memory_is_refused(rule: Rule, shift: int) -> None:
    """With another slot, with the parameter, with the gradient."""
    model = parameters([(9,), (7,)])
    memory = torch.zeros(3, 10)
    model[1].data = memory[0, :7].copy_(model[1].detach())
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    entry = optimizer.state[model[1]]
    for slot in slots(optimizer, model[1]):
        kept = entry[slot]
        entry[slot] = memory[0, shift : shift + 7]
        assert_refused(
            optimizer, model, f"the {slot} of parameter 1 .* shares memory with the parameter; .*clone"
        )
        entry[slot] = memory[1, :7].copy_(kept)
        gradient, model[1].grad = model[1].grad, memory[1, shift : shift + 7]
        assert_refused(
            optimizer, model, f"gradient of parameter 1 .* shares memory with its own {slot}; .*clone"
        )
        model[1].grad = gradient
        for other in slots(optimizer, model[1]):
            if other == slot:
                continue
            kept_other, entry[other] = entry[other], memory[1, shift : shift + 7]
            names = rf"({slot} and the {other}|{other} and the {slot})"
            assert_refused(optimizer, model, rf"the {names} of parameter 1 .* share memory; .*clone")
            entry[other] = kept_other
        entry[slot] = kept
    train(1, (model, optimizer.step), start=2)


@with_rules
def test_a_slot_of_another_type_than_its_group_says_is_refused(rule: Rule) -> None:
    model = parameters([(9,), (7,)], torch.bfloat16)
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    name = sorted(slots(optimizer, model[1]))[0]
    optimizer.state[model[1]][name] = optimizer.state[model[1]][name].float()
    own = "float32; a parameter of bfloat16 takes its own type with state_dtype=None. Load the optimizer's"
    assert_refused(optimizer, model, f"the {name} of parameter 1 of group 0.* has {own} state_dict again")
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@with_rules
def test_a_type_of_state_that_is_written_into_a_group_is_that_of_new_state(rule: Rule, backend: str) -> None:
    """And refused where there is state of another one, which loading the optimizer's own file converts."""
    ours, others = (parameters([(9,), (7,)], torch.bfloat16) for _ in range(2))
    written, made = rule.make(ours, **rule.full), rule.make(others, state_dtype=torch.float32, **rule.full)
    written.param_groups[0]["state_dtype"] = torch.float32
    train(2, (ours, written.step), (others, made.step))
    assert_same_run(rule, (made, others), (written, ours))

    written.param_groups[0]["state_dtype"] = None
    assert_refused(
        written, ours, "of parameter 0 of group 0.* has float32; a parameter of bfloat16 takes its own type"
    )
    written.load_state_dict(written.state_dict())
    assert all(m.dtype is torch.bfloat16 for p in ours for m in slots(written, p).values())
    train(2, (ours, written.step), start=2)
    written.param_groups[0]["state_dtype"] = torch.float32
    assert_refused(
        written, ours, "of parameter 0 of group 0.* has bfloat16; a parameter of bfloat16 takes float32 with"
    )
    for value in (torch.float64, "float32", 32):
        written.param_groups[0]["state_dtype"] = value
        assert_refused(written, ours, f"state_dtype of parameter group 0 must be None, .*, got .*{value}")


def test_the_constructors_name_for_the_type_of_state_is_refused_in_a_group_in_use() -> None:
    """It would be read by nothing."""
    for kind in (fastlr.FusedSGD, fastlr.FusedCyclicSGD):
        model = parameters([(9,), (7,)], torch.bfloat16)
        bounds = (
            {"lr": 0.1} if kind is fastlr.FusedSGD else {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 3}
        )
        optimizer = kind([{"params": [p], "momentum_dtype": torch.float32} for p in model], **bounds)
        set_gradients(0, model)
        optimizer.step()
        for value in (torch.float32, None):
            optimizer.param_groups[1]["momentum_dtype"] = value
            assert_refused(
                optimizer,
                model,
                "momentum_dtype of parameter group 1 is a constructor's name for state_dtype; write",
            )
        del optimizer.param_groups[1]["momentum_dtype"]
        optimizer.step()


BAD_STEPS: dict[str, tuple[Callable[[], Any], str]] = {
    "int64": (lambda: torch.tensor(2), "must be one float32 on cpu, got int64 of shape ()"),
    "float64": (lambda: torch.tensor(2.0, dtype=torch.float64), "must be one float32 on cpu, got float64"),
    "two": (lambda: torch.tensor([2.0, 2.0]), "must be one float32 on cpu, got float32 of shape (2,)"),
    "none": (lambda: torch.zeros(0), "must be one float32 on cpu, got float32 of shape (0,)"),
}
BAD_AGES: dict[str, tuple[float, str]] = {
    "negative": (-1.0, "must be a number of updates, got -1"),
    "nan": (float("nan"), "must be a number of updates, got nan"),
    "infinite": (float("inf"), "must be a number of updates, got inf"),
    "between": (2.5, "must be a number of updates, got 2.5"),
}


@with_counting_rules
@pytest.mark.parametrize(("step", "message"), BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_bad_steps_are_refused(
    rule: Rule, step: Callable[[], torch.Tensor], message: str, backend: str
) -> None:
    model = parameters([(9,), (7,)])
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    kept = optimizer.state[model[1]]["step"]
    optimizer.state[model[1]]["step"] = step()
    device = "cuda:0" if backend == "cuda" else "cpu"
    assert_refused(optimizer, model, f"step of parameter 1 .*{re.escape(message)}".replace("cpu", device))
    optimizer.state[model[1]]["step"] = kept
    optimizer.step()


@with_counting_rules
@pytest.mark.parametrize(("age", "message"), BAD_AGES.values(), ids=BAD_AGES.keys())
def test_bad_ages_are_refused(rule: Rule, age: float, message: str, backend: str) -> None:
    if backend != "cpu":
        pytest.skip("a device's memory is not read before a step")
    model = parameters([(9,), (7,)])
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    optimizer.state[model[1]]["step"].fill_(age)
    assert_refused(optimizer, model, f"step of parameter 1 .*{re.escape(message)}")


@with_counting_rules
def test_state_without_its_step_is_refused(rule: Rule) -> None:
    """Its age is nowhere else; as new it would be corrected for a bias that it has not."""
    model = parameters([(9,), (7,)])
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    kept = optimizer.state[model[1]].pop("step")
    assert_refused(optimizer, model, "the state of parameter 1 of group 0, .* has no step")
    optimizer.state[model[1]]["step"] = kept
    optimizer.step()


@with_counting_rules
def test_a_step_that_shares_memory_is_refused(rule: Rule) -> None:
    """With the parameter, its gradient, or another tensor of its state."""
    model = parameters([(9,), (7,)])
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    entry = optimizer.state[model[1]]
    kept = entry["step"]
    shared = {"the parameter": model[1].detach(), "the gradient": model[1].grad}
    for name, tensor in {**shared, **slots(optimizer, model[1])}.items():
        entry["step"] = tensor[3].copy_(2.0)
        assert_refused(optimizer, model, f"the step of parameter 1 .* shares memory with {name}; .*clone")
    # Between its elements, and beside them.
    memory = torch.full((7, 2), 2.0)
    memory[:, 0] = model[1].detach()
    model[1].data = memory[:, 0]
    entry["step"] = memory[3, 1]
    train(1, (model, optimizer.step), start=2)
    assert entry["step"] == 3.0
    assert memory[3, 1] == 3.0
    entry["step"] = kept


# -- numbers beyond a type ---------------------------------------------------------------------------

BEYOND: dict[str, dict[str, Any]] = {
    "lr": {"lr": 1e39},
    "lr-far": {"lr": 1e300},
    "scheduled": {"lr": fastlr.Constant(1e39)},
    "weight_decay": {"weight_decay": 1e39},
    "eps": {"eps": 1e39},
    "dampening": {"dampening": -1e39},
    "initial_accumulator_value": {"initial_accumulator_value": 1e39},
}
BEYOND_TOGETHER = {"lr": 1e20, "weight_decay": 1e20}


@with_rules
@pytest.mark.parametrize("options", BEYOND.values(), ids=BEYOND.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_numbers_beyond_float32_are_refused(rule: Rule, options: dict[str, Any], dtype: torch.dtype) -> None:
    (name,) = options
    model = parameters([(9,), (7,)], dtype)
    if name not in rule.make(model).param_groups[0]:
        pytest.skip("an option of other rules")
    optimizer = rule.make(model, **options)
    set_gradients(0, model)
    value = re.escape(str(optimizer.param_groups[0][name]))
    assert_refused(
        optimizer,
        model,
        f"^{name}={value} of parameter group 0 leads beyond the range of float32, in which parameter 0 of "
        r"group 0, shape \(9,\) is computed; give it a smaller one, or make it float64",
    )
    assert not optimizer.state
    for p in model:
        p.data = p.data.to(torch.complex128 if p.is_complex() else torch.float64)
    set_gradients(0, model)
    optimizer.step()


@with_rules
def test_what_follows_from_numbers_is_no_further_than_float32(rule: Rule, backend: str) -> None:
    model = parameters([(9,), (7,)])
    optimizer = rule.make(model, **BEYOND_TOGETHER)
    set_gradients(0, model)
    if rule in (RULES["AdamW"], RULES["Lion"]):  # whose decay is a factor
        assert_refused(optimizer, model, r"^lr=1e\+20, weight_decay=1e\+20 of parameter group 0 leads beyond")
    else:
        optimizer.step()
    if rule in (RULES["Adam"], RULES["AdamW"]) and backend == "cpu":  # a device's ages are not known
        optimizer = rule.make(model, lr=1e38, betas=(0.99, 0.999), weight_decay=0.0)
        assert_refused(optimizer, model, r"^lr=1e\+38 of parameter group 0 leads beyond the range of float32")
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        for p in model:
            optimizer.state[p]["step"].fill_(5000.0)  # the bias is gone
        optimizer.param_groups[0]["lr"] = 1e38
        optimizer.step()


@with_rules
def test_a_parameter_that_is_listed_twice(rule: Rule, backend: str) -> None:
    """torch's loop updates it twice, and so do rules that count nothing; the others would count once."""
    (p, q), (r, s) = parameters([(9,), (7,)]), parameters([(9,), (7,)], device="cpu")
    fused, reference = rule.make([p, q], **rule.full), rule.make_torch([r, s], **rule.full)
    for optimizer, again in ((fused, p), (reference, r)):
        optimizer.param_groups[0]["params"].append(again)
    if rule.counts:
        set_gradients(0, [p, q])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"parameter 2 of group 0, shape \(9,\) is in the .* twice"):
                fused.step()
        fused.param_groups[0]["params"].pop()
        fused.step()
    elif backend == "cpu":
        train(3, ([r, s], reference.step), ([p, q], fused.step))
        assert_same([r, s], [p, q])


@with_counting_rules
def test_state_that_is_no_tensor_is_refused(rule: Rule) -> None:
    model = parameters([(9,), (7,)])
    optimizer = rule.make(model, **rule.full)
    train(2, (model, optimizer.step))
    for name, kept in dict(optimizer.state[model[1]]).items():
        optimizer.state[model[1]][name] = 3
        with pytest.raises(ValueError, match=f"the {name} of parameter 1 .* must be a tensor, got a int"):
            optimizer.step()
        optimizer.state[model[1]][name] = kept
    train(1, (model, optimizer.step), start=2)


# -- state that something has taken a part of --------------------------------------------------------


@with_counting_rules
def test_state_that_lacks_what_every_update_needs_is_refused(rule: Rule) -> None:
    """Zeros in its place, at the age of the rest, would be a wrong update."""
    (p,) = parameters([(9,)])
    optimizer = rule.make([p], **rule.full)
    set_gradients(0, [p])
    optimizer.step()
    saved = optimizer.state_dict()
    for name in optimizer._plan.always_live():
        entry = dict(saved["state"][0])
        del entry[name]
        with pytest.raises(
            ValueError, match=f"the file's state of parameter 0 has .*, but no {name}; it may"
        ):
            rule.make([p], **rule.full).load_state_dict({**saved, "state": {0: entry}})
        kept = optimizer.state[p].pop(name)
        before = p.detach().clone()
        with pytest.raises(ValueError, match=f"the state of parameter 0 of group 0.* has no {name}, which"):
            optimizer.step()
        assert torch.equal(before, p)
        optimizer.state[p][name] = kept
    optimizer.step()


@with_rules
def test_a_group_without_state_dtype_is_an_error_with_its_name(rule: Rule) -> None:
    (p,) = parameters([(9,)])
    optimizer = rule.make([p], **rule.full)
    del optimizer.param_groups[0]["state_dtype"]
    set_gradients(0, [p])
    with pytest.raises((KeyError, ValueError), match="state_dtype"):
        optimizer.step()


@with_rules
def test_an_optimizer_that_an_older_version_pickled_goes_on(rule: Rule) -> None:
    """It knew fewer schedules, and SGD's type of state by another name."""
    (p,) = parameters([(9,)], torch.bfloat16)
    optimizer = rule.make([p], state_dtype=torch.float32, **rule.full)
    set_gradients(0, [p])
    optimizer.step()
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for name in ("weight_decay_schedule", "weight_decay_start"):
            del group[name]
        if rule.fused is fastlr.FusedSGD:
            group["momentum_dtype"] = group.pop("state_dtype")
    old = rule.fused.__new__(rule.fused)
    old.__setstate__(state)
    assert old.param_groups[0]["state_dtype"] is torch.float32
    old.step()
    old.set_schedule(weight_decay=fastlr.Constant(0.0))
