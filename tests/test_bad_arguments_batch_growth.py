"""Every argument of the public names of fastlr.batch_growth is checked; states hold plain values and are
checked before one of them is taken."""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fastlr
from fastlr import AdaptiveGrowth, BatchPlan, GradientNoiseScale, GrowingBatchSampler, GrowingLoader

DATA = torch.arange(24.0)
LR = fastlr.Constant(0.1, unit="sample")


def plan(**options: Any) -> BatchPlan:
    return BatchPlan.from_phases(
        **{"phases": [(0, 4), (1, 8)], "dataset_size": 24, "epochs": 2, "lr": 0.1, **options}
    )


def loader(**options: Any) -> GrowingLoader:
    return GrowingLoader(**{"dataset": DATA, "plan": plan(), "micro_batch_size": 4, **options})


def noise() -> GradientNoiseScale:
    return GradientNoiseScale([torch.zeros(2, requires_grad=True)])


def growth(**options: Any) -> AdaptiveGrowth:
    return AdaptiveGrowth(**{"noise": noise(), "loader": loader(), "max_batch_size": 8, **options})


def batch() -> fastlr.Batch:
    return next(iter(loader()))


# -- the table: what no argument of a kind may be ------------------------------------------------------------

NOT_NUMERIC = [np.True_, torch.tensor(True), np.array(True), bytearray(b"3"), memoryview(b"3"), np.array("3")]
NOT_COUNT = [-1, 1.5, 4.0, math.nan, math.inf, "3", None, [3], True, 2**70, 1j, np.float64(4.0)]
NOT_COUNT += NOT_NUMERIC
NOT_REAL = [math.nan, math.inf, -1.0, "0.1", None, [0.1], 1j, np.complex128(1 + 1j), True, 10**400,
            torch.tensor([0.1, 0.2]), torch.tensor(1 + 0j), *NOT_NUMERIC]  # fmt: skip
NOT_WORD = ["grow", "", None, 3, ["carry"], np.array(["carry"])]
NOT_FLAG = [1, 0.0, "yes", [True]]
NOT_OBJECT = [None, 3, "a", [1], {}]
REFUSED: dict[str, list[Any]] = {
    "count": [*NOT_COUNT, 0],
    "count or 0": NOT_COUNT,
    "count or 0, or None": [bad for bad in NOT_COUNT if bad is not None],
    "count or None": [bad for bad in [*NOT_COUNT, 0] if bad is not None],
    "real": NOT_REAL,
    "positive": [*NOT_REAL, 0.0],
    "real or None": [bad for bad in NOT_REAL if bad is not None],
    "counts": [None, 3, ["a"], [1.5], [], "ab", [-1], [True]],
    "word": NOT_WORD,
    "word or None": [bad for bad in NOT_WORD if bad is not None],
    "flag": [*NOT_FLAG, None],
    "flag or None": NOT_FLAG,
    "function": [3, "sum", [len], 0, ""],
    "object": NOT_OBJECT,
    "schedule": [*NOT_OBJECT, fastlr.Constant(0.1), fastlr.Constant(0.1, unit="epoch")],
    "any schedule": [None, 3, "a", [0.1]],
    "rate": [*(bad for bad in NOT_REAL if bad is not True), True, fastlr.Constant(0.1)],
    "phases": [
        None,
        3,
        "ab",
        [],
        [4],
        [(0,)],
        [(0, 4.5)],
        [("0", 4)],
        [(math.nan, 4)],
        [(0, 4), (1e300, 8)],
        [(0, 4), (1, True)],
    ],
    "tensors": [
        None,
        3,
        "a",
        ["a"],
        [],
        {},
        torch.zeros(2),
        [torch.zeros(1), None],
        [("w", torch.zeros(1))],
        [{"params": [torch.zeros(1)]}],
        [DATA, DATA],
    ],
    "data set": [None, 3, iter([]), DATA[1:], torch.tensor(24), np.array(24)],
    "plan's dict": [
        None,
        3,
        "a",
        [],
        {},
        {"starts": [0]},
        {**plan().to_dict(), "more": 1},
        {**plan().to_dict(), "lr": None},
        {**plan().to_dict(), "lr": {"type": "Nope"}},
        {**plan().to_dict(), "starts": None},
        {**plan().to_dict(), "epochs": "2"},
    ],
}


class Call(NamedTuple):
    function: Callable[..., Any]
    valid: Callable[[], dict[str, Any]]
    kinds: dict[str, str]
    checked_elsewhere: tuple[str, ...] = ()


def of(make: Callable[[], Any], method: str) -> Callable[..., Any]:
    """A method of a new object."""

    def call(**arguments: Any) -> Any:
        return getattr(make(), method)(**arguments)

    call.__signature__ = inspect.signature(getattr(make(), method))  # type: ignore[attr-defined]
    return call


def first(iterator: Callable[..., Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return next(iterator(**arguments))

    call.__signature__ = inspect.signature(iterator)  # type: ignore[attr-defined]
    return call


RUN = {"dataset_size": "count", "epochs": "count", "tail": "word", "micro_batch_size": "count or None",
       "ranks": "count", "scaling": "word", "sequence_length": "count or None"}  # fmt: skip
CALLS = {
    "BatchPlan": Call(
        BatchPlan,
        lambda: {"starts": (0, 24), "batch_sizes": (4, 8), "lr": LR, "momentum": LR, "dataset_size": 24,
                 "epochs": 2},
        {**RUN, "starts": "counts", "batch_sizes": "counts", "lr": "schedule", "momentum": "schedule",
         "mode": "word"},
    ),
    "BatchPlan.from_phases": Call(
        BatchPlan.from_phases,
        lambda: {"phases": [(0, 4), (1, 8)], "dataset_size": 24, "epochs": 2, "lr": 0.1},
        {**RUN, "phases": "phases", "unit": "word", "lr": "rate", "momentum": "rate"},
    ),
    "BatchPlan.from_schedule": Call(
        BatchPlan.from_schedule,
        lambda: {"schedule": fastlr.Constant(0.1), "batch_size": 4, "dataset_size": 24, "epochs": 2},
        {**RUN, "schedule": "any schedule", "batch_size": "count", "momentum": "real", "mode": "word",
         "max_batch_size": "count or None", "hybrid_drops": "count", "lr_scale": "positive",
         "batch_scale": "word or None", "raised_momentum": "real or None", "granularity": "count or None"},
    ),
    "BatchPlan.from_dict": Call(
        BatchPlan.from_dict, lambda: {"data": plan().to_dict()}, {"data": "plan's dict"}
    ),
    "BatchPlan.grown": Call(
        of(plan, "grown"),
        lambda: {"sample": 4, "batch_size": 8},
        {"sample": "count or 0", "batch_size": "count"},
    ),
    "BatchPlan.clock_at": Call(of(plan, "clock_at"), lambda: {"sample": 4}, {"sample": "count or 0"}),
    "BatchPlan.phase_at": Call(of(plan, "phase_at"), lambda: {"sample": 4}, {"sample": "count or 0"}),
    "BatchPlan.noise_scale": Call(of(plan, "noise_scale"), lambda: {"sample": 4}, {"sample": "count or 0"}),
    "BatchPlan.updates_from": Call(
        first(of(plan, "updates_from")), lambda: {"sample": 4}, {"sample": "count or 0"}
    ),
    "GrowingBatchSampler": Call(
        GrowingBatchSampler,
        lambda: {"plan": plan(), "rank": 0, "world_size": 2},
        {"plan": "object", "micro_batch_size": "count or None", "seed": "count or 0", "shuffle": "flag",
         "rank": "count or 0", "world_size": "count"},
    ),
    "GrowingBatchSampler.micro_batches": Call(
        first(of(lambda: GrowingBatchSampler(plan()), "micro_batches")),
        lambda: {"sample": 4},
        {"sample": "count or 0", "epoch": "count or 0, or None"},
    ),
    "GrowingLoader": Call(
        GrowingLoader,
        lambda: {"dataset": DATA, "plan": plan(), "rank": 0, "world_size": 1},
        {"dataset": "data set", "plan": "object", "micro_batch_size": "count or None", "seed": "count or 0",
         "shuffle": "flag or None", "count": "function", "drop_last": "flag", "rank": "count or 0",
         "world_size": "count", "seed_samples": "flag", "collate_fn": "function", "num_workers": "count or 0",
         "prefetch_factor": "count or None", "pin_memory": "flag", "persistent_workers": "flag",
         "timeout": "real", "worker_init_fn": "function"},
    ),
    "GrowingLoader.bind": Call(
        of(loader, "bind"),
        lambda: {"optimizer": fastlr.FusedSGD([torch.zeros(2)], lr=0.1)},
        {"optimizer": "object"},
    ),
    "GrowingLoader.grow": Call(of(loader, "grow"), lambda: {"batch_size": 8}, {"batch_size": "count"}),
    "GradientNoiseScale": Call(
        GradientNoiseScale,
        lambda: {"parameters": [torch.zeros(2)], "decay": 0.9},
        {"parameters": "tensors", "decay": "real"},
    ),
    "GradientNoiseScale.attach": Call(
        of(noise, "attach"), lambda: {"model": Reducing()}, {"model": "object"}
    ),
    "GradientNoiseScale.observe": Call(
        of(noise, "observe"), lambda: {"batch": batch()}, {"batch": "object", "grad_scale": "positive"}
    ),
    "AdaptiveGrowth": Call(
        AdaptiveGrowth,
        lambda: {"noise": noise(), "loader": loader(), "max_batch_size": 8},
        {"noise": "object", "loader": "object", "max_batch_size": "count", "factor": "count",
         "margin": "positive", "patience": "count", "apply": "flag"},
    ),
    "AdaptiveGrowth.update": Call(of(growth, "update"), lambda: {"batch": batch()}, {"batch": "object"}),
}  # fmt: skip

# What the package makes itself and hands out, and methods that take what is described elsewhere.
HANDED_OUT = {"Batch", "Epoch", "Growth", "Phase"}
ELSEWHERE = {
    "BatchPlan.plot",
    "GrowingBatchSampler.schedule",
    "GrowingBatchSampler.steps",
    *(f"{name}.load_state_dict" for name in ("GrowingLoader", "GradientNoiseScale", "AdaptiveGrowth")),
}


class Reducing:
    def register_comm_hook(self, state: Any, hook: Any) -> None:
        pass


def label(value: object) -> str:
    shown = "" if isinstance(value, memoryview) else repr(value)  # which says where it lies
    return f"{type(value).__name__}:{shown}"[:30]


@pytest.mark.filterwarnings("ignore:.*one batch size only")
@pytest.mark.parametrize("name", CALLS)
def test_valid_arguments_are_taken(name: str) -> None:
    call = CALLS[name]
    call.function(**call.valid())


@pytest.mark.parametrize(
    ("name", "argument", "bad"),
    [
        pytest.param(name, argument, bad, id=f"{name}-{argument}-{label(bad)}")
        for name, call in CALLS.items()
        for argument, kind in call.kinds.items()
        for bad in REFUSED[kind]
    ],
)
def test_refused(name: str, argument: str, bad: object) -> None:
    call = CALLS[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        call.function(**{**call.valid(), argument: bad})
    message = str(caught.value)
    # It is this package's, not what Python or PyTorch happen to say where the value is used.
    assert any(
        word in message
        for word in (" must ", "cannot ", "needs ", "give both", "only a fastlr", "plan is for")
    )
    frame = caught.traceback[-1]
    assert "fastlr" in str(frame.path), frame


def test_the_table_names_every_argument() -> None:
    named = set(CALLS) | HANDED_OUT | ELSEWHERE
    for name in fastlr.batch_growth.__all__:
        assert name in named
        if name in HANDED_OUT:
            continue
        for method, value in vars(getattr(fastlr, name)).items():
            function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            takes = set(inspect.signature(function).parameters) - {"self", "cls"}
            assert f"{name}.{method}" in named or not takes, f"{name}.{method}"
    for name, call in CALLS.items():
        parameters = inspect.signature(call.function).parameters.values()
        assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} <= set(call.kinds), name


COUNTS = {
    "a word": lambda data: "3",
    "None": lambda data: None,
    "complex": lambda data: torch.tensor(1 + 1j),
    "several": lambda data: data,
    "negative": lambda data: -1.0,
    "NaN": lambda data: math.nan,
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_counts_are_checked(count: Any) -> None:
    with pytest.raises(ValueError, match=r"^count\(data\) must be a finite number >= 0, got"):
        next(iter(loader(count=count)))


# -- states --------------------------------------------------------------------------------------------------


def trained() -> tuple[GrowingLoader, GradientNoiseScale, AdaptiveGrowth]:
    """A loader that has grown, and what made it grow."""
    weight = torch.zeros(1, requires_grad=True)
    measured = GradientNoiseScale([weight], decay=0.5)
    batches = loader(plan=plan(phases=[(0, 8)], epochs=4))
    follows = growth(noise=measured, loader=batches, max_batch_size=24, patience=1, margin=1e-9, apply=True)
    for item in batches:
        ((weight - item.data).square().mean() * item.weight).backward()
        measured.observe(item)
        if item.ends_update:
            weight.grad = None
            follows.update(item)
            if item.position > 40:
                break
    assert follows.log
    assert batches.state_dict()["growths"]
    return batches, measured, follows


OWNERS = {"GrowingLoader": 0, "GradientNoiseScale": 1, "AdaptiveGrowth": 2}
each_owner = pytest.mark.parametrize("owner", OWNERS)


def damages(state: dict[str, Any], bad: dict[str, list[Any]]) -> list[Any]:
    found: list[Any] = [None, 3, "a", [], {}]
    found += [{key: value for key, value in state.items() if key != name} for name in state]
    return found + [{**state, name: value} for name, values in bad.items() for value in values]


COUNTED = [-1, 1.5, "3", None, [1], True, 10**30]
NUMBERED = [math.nan, math.inf, "a", None, [1.0], 1j, True]
BAD_STATES: dict[str, dict[str, list[Any]]] = {
    "GrowingLoader": {
        "epoch": [*COUNTED, 0, 2, 4, 10**9],
        "samples": [*COUNTED, 5, 10**6],
        "seed": COUNTED,
        "shuffle": [*NOT_FLAG, None, False],
        "plan": [*REFUSED["plan's dict"], plan(epochs=3).to_dict()],
        "growths": [
            None,
            3,
            "ab",
            [3],
            [[1]],
            [[0, 1, 2]],
            [[-1, 8]],
            [[0, 0]],
            [[5, 8]],
            [[8, 100]],
            [[8, 8.5]],
            [[8, "8"]],
            [[10**9, 8]],
        ],
    },
    "GradientNoiseScale": {
        "observations": [*COUNTED, 0],
        "gradient": NUMBERED,
        "noise": NUMBERED,
        "weight": [*NUMBERED, -0.5, 0.0],
    },
    "AdaptiveGrowth": {
        "batch_size": [*COUNTED, 0, 25],
        "above": COUNTED,
        "observations": [*COUNTED, 10**6],
        "sample": COUNTED,
        "log": [
            None,
            3,
            "ab",
            [3],
            [[1, 2.0, 3]],
            [[-1, 2.0, 8, 16]],
            [[1, math.nan, 8, 16]],
            [[1, "2", 8, 16]],
            [[1, 2.0, 16, 8]],
            [[1, 2.0, 8, 16.5]],
        ],
    },
}


@each_owner
def test_a_damaged_state_changes_nothing(owner: str) -> None:
    target = trained()[OWNERS[owner]]
    state = target.state_dict()
    assert set(BAD_STATES[owner]) == set(state)
    for damaged in damages(state, BAD_STATES[owner]):
        with pytest.raises((ValueError, TypeError)) as caught:
            target.load_state_dict(damaged)
        assert "fastlr" in str(caught.traceback[-1].path), damaged
        assert target.state_dict() == state, damaged
    target.load_state_dict(copy.deepcopy(state))
    assert target.state_dict() == state


@each_owner
@pytest.mark.parametrize("state", [{}, {"more": 1}])
def test_a_state_without_its_entries_is_refused(owner: str, state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^the state of an? {owner} has .* too; got \["):
        trained()[OWNERS[owner]].load_state_dict(state)


def assert_plain(value: Any) -> None:
    assert type(value) in (int, float, bool, str, list, dict, type(None), torch.Tensor), repr(value)
    for item in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        assert_plain(item)


@each_owner
def test_states_can_be_read_with_weights_only(owner: str) -> None:
    state = trained()[OWNERS[owner]].state_dict()
    assert_plain(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state


word = np.str_
NUMPY_SCHEDULES = {
    "constant": lambda: fastlr.Constant(np.float64(0.1), unit=word("sample")),
    "triangular": lambda: fastlr.Triangular(
        np.float32(0.1), np.float64(0.5), np.int64(4), interpolation=word("linear"), inverted=np.bool_(False),
        unit=word("sample"),
    ),
    "one cycle": lambda: fastlr.OneCycle(
        np.float64(0.1), np.int64(48), anneal_strategy=word("cos"), three_phase=np.bool_(False),
        unit=word("sample"),
    ),
    "steps": lambda: fastlr.MultiStep(
        np.float64(0.1), np.array([4, 8]), np.float64(0.5), unit=word("epoch")
    ),
    "table": lambda: fastlr.Tabulated(np.array([0.1, 0.2]), unit=word("epoch")),
}  # fmt: skip


@pytest.mark.parametrize("schedule", NUMPY_SCHEDULES.values(), ids=NUMPY_SCHEDULES)
def test_numpys_numbers_words_and_flags_become_plain(schedule: Callable[[], fastlr.Schedule]) -> None:
    made = plan(
        phases=[(np.float64(0), np.int64(4)), (np.int64(1), np.int32(8))],
        dataset_size=np.int64(24), epochs=np.uint8(2), lr=schedule(), momentum=np.float32(0.5),
        tail=word("keep"), micro_batch_size=np.int64(4), ranks=np.int16(1),
    )  # fmt: skip
    batches = loader(
        plan=made, micro_batch_size=np.int64(4), seed=np.int64(3), shuffle=np.bool_(True),
        drop_last=np.bool_(False), seed_samples=np.bool_(True), rank=np.int64(0), world_size=np.int64(1),
    )  # fmt: skip
    optimizer = fastlr.FusedSGD([torch.zeros(1, requires_grad=True)], lr=made.lr, momentum=made.momentum)
    batches.bind(optimizer)
    list(batches.epochs().__next__())
    batches.grow(np.int64(12))
    for state in (made.to_dict(), batches.state_dict(), optimizer.state_dict()):
        assert_plain(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)


def test_numpys_arguments_of_a_grown_plan_become_plain() -> None:
    made = BatchPlan.from_schedule(
        fastlr.StepDecay(np.float64(0.1), every=np.int64(1), gamma=np.float64(0.5), unit=word("epoch")),
        batch_size=np.int64(4), dataset_size=np.int64(24), epochs=np.int64(3), momentum=np.float64(0.5),
        mode=word("hybrid"), max_batch_size=np.int64(16), hybrid_drops=np.int64(1), lr_scale=np.float64(1.0),
        batch_scale=word("linear"), raised_momentum=np.float64(0.5), granularity=np.int64(4),
        tail=word("keep"),
    )  # fmt: skip
    assert_plain(made.to_dict())
    assert made == BatchPlan.from_schedule(
        fastlr.StepDecay(0.1, 1, 0.5, unit="epoch"), batch_size=4, dataset_size=24, epochs=3, momentum=0.5,
        mode="hybrid", max_batch_size=16, granularity=4, tail="keep",
    )  # fmt: skip


def test_the_end_of_a_run_is_in_no_later_epoch() -> None:
    batches = loader()
    list(batches)
    state = batches.state_dict()
    assert (state["epoch"], state["samples"]) == (2, 48)
    with pytest.raises(
        ValueError, match="epoch must be the one that the run stands in at sample 48, 2, got 3"
    ):
        batches.load_state_dict({**state, "epoch": 3})
