"""Which tensors a step takes, and that it writes nothing but their elements.

Layouts, and what may be done to state, are in ``test_rules_state.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import assert_same, parameters, set_gradients, train, twins

import fastlr
from fastlr import _core

pytestmark = pytest.mark.usefixtures("backend")

MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_misaligned_views_leave_their_neighbours_alone(dtype: torch.dtype, offset: int) -> None:
    for size in (1, 7, 8, 9, 33, 600):
        poison = torch.full((size + 64,), float("nan"), dtype=dtype)
        view = poison[offset : offset + size].copy_(torch.arange(1, size + 1))
        p = torch.nn.Parameter(view)
        p.grad = torch.ones_like(p)
        fastlr.FusedSGD([p], lr=0.5).step()
        assert torch.equal(p.data, (torch.arange(1, size + 1).to(dtype) - 0.5).to(dtype))
        assert poison[:offset].isnan().all()
        assert poison[offset + size :].isnan().all()


def test_dimensions_up_to_pytorchs_limit() -> None:
    base = torch.randn(2, 3).reshape([2] + [1] * 60 + [3])
    p, q = torch.nn.Parameter(base.clone()), torch.nn.Parameter(base.cpu().clone())
    p.grad = torch.randn(base.shape)
    q.grad = p.grad.cpu().clone()
    p.data = p.data.transpose(0, -1).contiguous().transpose(0, -1)
    fastlr.FusedSGD([p], lr=0.1).step()
    torch.optim.SGD([q], lr=0.1, foreach=False).step()
    assert_same([q.data], [p.data])


# -- what may change between two steps ------------------------------------------------------------


def replace_data(p: torch.nn.Parameter, opt: fastlr.FusedSGD) -> None:
    p.data = p.data.clone()


def into_larger_storage(p: torch.nn.Parameter, opt: fastlr.FusedSGD) -> None:
    p.data = torch.cat([p.data, p.data])[: p.shape[0]]


def reorder_parameters(p: torch.nn.Parameter, opt: fastlr.FusedSGD) -> None:
    opt.param_groups[0]["params"].reverse()


def collect_garbage(p: torch.nn.Parameter, opt: fastlr.FusedSGD) -> None:
    import gc

    gc.collect()


CHANGES = [replace_data, into_larger_storage, reorder_parameters, collect_garbage]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_nothing_is_remembered_that_may_move(change: Callable[..., None]) -> None:
    ours, theirs = twins([(5, 5), (5, 5), (3, 7)])
    fused = fastlr.FusedSGD(ours, **MOMENTUM)
    reference = torch.optim.SGD(theirs, foreach=False, **MOMENTUM)
    for step in range(6):
        train(1, (theirs, reference.step), (ours, fused.step), start=step)
        for p in ours[1:]:
            old = p.data
            change(p, fused)
            if old.data_ptr() != p.data_ptr():
                old.fill_(float("nan"))
    assert_same(theirs, ours)


def test_same_memory_with_other_strides_is_seen() -> None:
    p = torch.nn.Parameter(torch.arange(9.0).reshape(3, 3))
    p.grad = torch.arange(9.0).reshape(3, 3)
    optimizer = fastlr.FusedSGD([p], lr=1.0)
    optimizer.step()
    assert p.eq(0).all()
    p.data = torch.arange(9.0).reshape(3, 3).t()
    p.grad = torch.arange(9.0).reshape(3, 3)
    expected = p.data - p.grad
    optimizer.step()
    assert_same([expected], [p.data])
    p.data = p.data.t()
    expected = p.data - p.grad
    optimizer.step()
    assert_same([expected], [p.data])


def test_type_may_change_after_construction() -> None:
    ours, theirs = twins([(5, 5)])
    fused = fastlr.FusedSGD(ours, lr=0.1)
    reference = torch.optim.SGD(theirs, lr=0.1, foreach=False)
    train(1, (theirs, reference.step), (ours, fused.step))
    for p in (*ours, *theirs):
        p.grad = None
        p.data = p.data.double()
    train(2, (theirs, reference.step), (ours, fused.step), start=1)
    assert_same(theirs, ours)


def test_swapped_modules_keep_training() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer = torch.nn.Linear(3, 2)
        optimizer = fastlr.FusedSGD(layer.parameters(), lr=0.5)
        for dtype in (torch.float32, torch.float64, torch.float32):
            layer.zero_grad()
            layer.to(dtype)
            before = layer.weight.detach().clone()
            layer(torch.ones(1, 3, dtype=dtype)).sum().backward()
            optimizer.step()
            assert_same([before - 0.5], [layer.weight.detach()])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# -- gradients that are missing, late, or of a kind of their own ----------------------------------


def test_missing_frozen_and_late_gradients() -> None:
    ours, theirs = twins([(9,), (9,), (9,)])
    fused = fastlr.FusedSGD(ours, dampening=0.5, **MOMENTUM)
    reference = torch.optim.SGD(theirs, foreach=False, dampening=0.5, **MOMENTUM)
    for model in (ours, theirs):
        model[1].requires_grad_(False)
    for step in range(6):
        set_gradients(step, ours, theirs)
        for model in (ours, theirs):
            model[1].grad = None
            if step in (0, 1, 4):
                model[2].grad = None
        fused.step()
        reference.step()
        assert_same(theirs, ours)
        assert (ours[2] in fused.state) == (step > 1)
    assert ours[1] not in fused.state


def test_step_without_any_gradient_counts() -> None:
    model = parameters([(3,)])
    before = model[0].detach().clone()
    optimizer = fastlr.FusedSGD(model, lr=fastlr.Exponential(1.0, 0.5))
    optimizer.step()
    assert optimizer.clock() == (1, 0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert_same([before], [model[0].detach()])


def test_lazily_conjugated_and_negated_gradients() -> None:
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    p.grad = torch.full((4,), 1 + 2j).conj()
    assert p.grad.is_conj()
    fastlr.FusedSGD([p], lr=1.0).step()
    assert_same([torch.full((4,), -1 + 2j, dtype=torch.complex64)], [p.data])
    for shape in ((4,), (2, 2), (1,), ()):
        q = torch.nn.Parameter(torch.zeros(shape))
        q.grad = torch.full(shape, 1 + 2j).conj().imag
        assert q.grad.is_neg()
        fastlr.FusedSGD([q], lr=1.0).step()
        assert_same([torch.full(shape, 2.0)], [q.data])


# -- memory that several parameters share ---------------------------------------------------------


def shared_storage(device: torch.device) -> list[torch.nn.Parameter]:
    base = torch.linspace(0, 1, 40000, device="cpu").to(device)
    return [torch.nn.Parameter(base[:30000]), torch.nn.Parameter(base[10000:])]


def interleaved_views(device: torch.device) -> list[torch.nn.Parameter]:
    base = torch.linspace(0, 1, 80000, device="cpu").to(device).view(40000, 2)
    return [torch.nn.Parameter(base[:, 0]), torch.nn.Parameter(base[:, 1])]


@pytest.mark.parametrize("make", [shared_storage, interleaved_views], ids=lambda f: f.__name__)
def test_parameters_that_share_memory_are_updated_one_after_another(
    make: Callable[[torch.device], list[torch.nn.Parameter]],
) -> None:
    torch.set_num_threads(2)
    ours, theirs = make(torch.get_default_device()), make(torch.device("cpu"))
    fused = fastlr.FusedSGD(ours, **MOMENTUM)
    reference = torch.optim.SGD(theirs, foreach=False, **MOMENTUM)
    train(5, (theirs, reference.step), (ours, fused.step))
    assert_same(theirs, ours)


# Where a gradient lies that is not memory of its own: (parameter, gradient) over one storage.
def itself(base: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(base[:30000], base[:30000])]


def itself_with_gaps(base: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = base.view(-1, 2)
    return [(pairs[:, 0], pairs[:, 0])]


def between_its_elements(base: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = base.view(-1, 2)
    return [(pairs[:, 0], pairs[:, 1])]


def an_earlier_parameter(base: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(base[:30000], base[60000:90000]), (base[30000:60000], base[:30000])]


def a_later_parameter(base: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(base[:30000], base[30000:60000]), (base[30000:60000], base[60000:90000])]


def parts_of_both_neighbours(base: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ends = torch.as_strided(base, (2, 10000), (60000, 1), 10000)
    own = torch.as_strided(base, (2, 10000), (10000, 1), 30000)
    return [
        (base[10000:20000], base[90000:100000]),
        (own, ends),
        (base[70000:80000], base[100000:110000]),
    ]


@pytest.mark.parametrize(
    "place",
    [itself, itself_with_gaps, between_its_elements, an_earlier_parameter, a_later_parameter,
     parts_of_both_neighbours],
    ids=lambda f: f.__name__,
)  # fmt: skip
@pytest.mark.parametrize("options", [{"lr": 0.1}, {**MOMENTUM, "weight_decay": 0.1}], ids=["plain", "all"])
def test_gradients_in_memory_that_the_step_writes_are_read_in_torchs_order(
    place: Callable[..., Any], options: dict[str, Any]
) -> None:
    torch.set_num_threads(2)
    bases, optimizers = [], []
    for kind, extra in ((torch.optim.SGD, {"foreach": False}), (fastlr.FusedSGD, {})):
        base = torch.linspace(1, 2, 120000)
        model = []
        for p, grad in place(base):
            model.append(torch.nn.Parameter(p))
            model[-1].grad = grad
        bases.append(base)
        optimizers.append(kind(model, **options, **extra))
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        assert_same(bases[:1], bases[1:])


def test_a_gradient_that_comes_to_lie_in_another_parameter_is_noticed() -> None:
    torch.set_num_threads(2)
    ours, theirs = twins([(30000,), (30000,), (30000,)])
    fused = fastlr.FusedSGD(ours, **MOMENTUM)
    reference = torch.optim.SGD(theirs, foreach=False, **MOMENTUM)
    train(2, (theirs, reference.step), (ours, fused.step))
    for model, optimizer in ((theirs, reference), (ours, fused)):
        model[2].grad = model[0].detach()
        optimizer.step()
    assert_same(theirs, ours)
    train(2, (theirs, reference.step), (ours, fused.step), start=2)
    assert_same(theirs, ours)


def shifted(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return base[:4000], base[1:4001]


def shifted_with_gaps(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = base.view(-1, 2)
    return pairs[:2000, 0], pairs[1:2001, 0]


def transposed(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = base[:3600].view(60, 60)
    return square, square.t()


def expanded(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return base[:4000], base[7:8].expand(4000)


@pytest.mark.parametrize(
    "place", [shifted, shifted_with_gaps, transposed, expanded], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_that_partly_lies_in_its_own_parameter_is_refused(
    place: Callable[..., Any], momentum: float
) -> None:
    base = torch.linspace(1, 2, 8000)
    data, gradient = place(base)
    model = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(data)]
    model[0].grad, model[1].grad = torch.ones(3), gradient
    before = base.clone()
    optimizer = fastlr.FusedSGD(model, lr=0.1, momentum=momentum)
    with pytest.raises(ValueError, match=r"gradient of parameter 1 of group 0, .* clone\(\)"):
        optimizer.step()
    assert_same([before, torch.ones(3)], [base, model[0].detach()])
    assert not optimizer.state
    model[1].grad = gradient.clone()
    optimizer.step()


def test_tensors_in_shared_memory() -> None:
    ours, theirs = twins([(100,)])
    ours[0].share_memory_()
    fused, reference = fastlr.FusedSGD(ours, **MOMENTUM), fastlr.FusedSGD(theirs, **MOMENTUM)
    train(3, (theirs, reference.step), (ours, fused.step))
    assert_same(theirs, ours)


# -- errors: they name the tensor, and nothing has been written -----------------------------------


def sparse(p: torch.nn.Parameter) -> None:
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], p.shape, check_invariants=True)


def overlapping(p: torch.nn.Parameter) -> None:
    p.data = torch.zeros(1).expand(p.shape)


def other_type(p: torch.nn.Parameter) -> None:
    p.data = p.data.double()


def integer(p: torch.nn.Parameter) -> None:
    p.grad = None
    p.requires_grad_(False)
    p.data = torch.ones(p.shape, dtype=torch.int32)
    p.grad = torch.ones(p.shape, dtype=torch.int32)


def other_shape(p: torch.nn.Parameter) -> None:
    p.data = torch.zeros(5)


def fake(p: torch.nn.Parameter) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p.grad = torch.empty(p.shape)


BROKEN = [
    (sparse, "gradient of parameter 1 of group 1, shape .7,. has layout torch.sparse_coo.*dense"),
    (overlapping, "parameter 1 of group 1, shape .7,. has elements that share memory.*clone"),
    (other_type, "gradient of parameter 1 of group 1, shape .7,. has float32 and the parameter float64"),
    (integer, "parameter 1 of group 1, shape .7,. has .*supported are"),
    (other_shape, "gradient of parameter 1 of group 1, shape .5,. has shape .7,."),
]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "data_ptr"])
@pytest.mark.parametrize(("breaking", "message"), BROKEN, ids=[f.__name__ for f, _ in BROKEN])
def test_what_cannot_be_updated_is_named_before_anything_is_written(
    breaking: Callable[[torch.nn.Parameter], None],
    message: str,
    exchange: bool,
) -> None:
    model = parameters([(7,)] * 4)
    optimizer = fastlr.FusedSGD(
        [{"params": model[:2]}, {"params": model[2:]}], lr=fastlr.Exponential(0.1, 0.5), momentum=0.9
    )
    set_gradients(0, model)
    breaking(model[3])
    before = [p.detach().clone() for p in model[:3]]
    fastlr._core.set_exchange_enabled(exchange)
    try:
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    finally:
        fastlr._core.set_exchange_enabled(True)
    assert_same(before, [p.detach() for p in model[:3]])
    assert not optimizer.state
    assert optimizer.clock() == (0, 0)
    assert optimizer.param_groups[0]["lr"] == 0.1


@contextmanager
def meta_device() -> Iterator[torch.device]:
    yield torch.device("meta")


@contextmanager
def fake_mode() -> Iterator[torch.device]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield torch.device("cpu")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "data_ptr"])
@pytest.mark.parametrize("place", [meta_device, fake_mode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tensors_without_values_get_their_state_and_the_clock_moves(
    place: Callable[[], Any], momentum: float, exchange: bool
) -> None:
    _core.set_exchange_enabled(exchange)
    try:
        with place() as device:
            layer = torch.nn.Linear(3, 2, device=device, dtype=torch.bfloat16)
            optimizer = fastlr.FusedSGD(
                layer.parameters(), lr=fastlr.Exponential(0.1, 0.5), momentum=momentum,
                momentum_dtype=torch.float32,
            )  # fmt: skip
            version = layer.weight._version
            for _ in range(2):
                layer(torch.ones(1, 3, device=device, dtype=torch.bfloat16)).sum().backward()
                optimizer.step()
    finally:
        _core.set_exchange_enabled(True)
    assert optimizer.clock().updates == 2
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert layer.weight._version == version + 2
    assert len(optimizer.state) == (2 if momentum else 0)
    for p, entry in optimizer.state.items():
        buffer = entry["momentum_buffer"]
        assert (buffer.shape, buffer.device, buffer.dtype) == (p.shape, p.device, torch.float32)
        assert type(buffer) is type(p.data)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "data_ptr"])
def test_tensors_without_values_beside_others(exchange: bool) -> None:
    ours, theirs = twins([(9,)])
    shapes = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in (5, 0)]
    for shape in shapes:
        shape.grad = torch.empty_like(shape)
    fused = fastlr.FusedSGD([*shapes, *ours], **MOMENTUM)
    reference = torch.optim.SGD(theirs, foreach=False, **MOMENTUM)
    _core.set_exchange_enabled(exchange)
    try:
        train(3, (theirs, reference.step), (ours, fused.step))
    finally:
        _core.set_exchange_enabled(True)
    assert_same(theirs, ours)
    assert all(fused.state[shape]["momentum_buffer"].is_meta for shape in shapes)


def test_a_fake_gradient_of_a_real_parameter_is_refused() -> None:
    model = parameters([(7,)])
    fake(model[0])
    with pytest.raises(ValueError, match=r"gradient of parameter 0 of group 0.*memory"):
        fastlr.FusedSGD(model).step()


class Quarter(torch.Tensor):
    """Holds a quarter of the values that it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) * 4 if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "data_ptr"])
def test_tensors_whose_memory_means_something_else_are_refused(exchange: bool) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.Tensor._make_subclass(Quarter, torch.ones(4))
    fastlr._core.set_exchange_enabled(exchange)
    try:
        with pytest.raises(ValueError, match=r"gradient of parameter 0 of group 0.*Quarter without plain"):
            fastlr.FusedSGD([p]).step()
    finally:
        fastlr._core.set_exchange_enabled(True)


def test_named_parameters_are_named_in_errors() -> None:
    layer = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = fastlr.FusedSGD(layer.named_parameters(), lr=0.1)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"group 0 \(weight\), shape \(4, 3\)"):
        optimizer.step()
