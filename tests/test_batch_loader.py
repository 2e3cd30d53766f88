"""The loader: every size at its sample, every sample once, exact gradients, exact resumption."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import random
import types
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import Rule, with_rules
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fastlr
from fastlr import BatchPlan, GrowingBatchSampler, GrowingLoader

pytestmark = pytest.mark.usefixtures("_one_thread")

N = 23
PHASES = [(0, 4), (0.5, 6), (1.4, 12)]


def make_plan(tail: str = "carry", epochs: int = 3, phases: Any = PHASES, size: int = N) -> BatchPlan:
    return BatchPlan.from_phases(phases, dataset_size=size, epochs=epochs, lr=0.1, momentum=0.9, tail=tail)


@pytest.fixture
def _one_thread() -> None:
    """The tensors are so small that a second thread costs more than it brings."""
    torch.set_num_threads(1)


class Numbers(Dataset[torch.Tensor]):
    def __init__(self, size: int = N) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Noisy(Numbers):
    """Each sample with a draw from every generator that an augmentation may use."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()])  # noqa: NPY002


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, size: int = N) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        for k in range(self.size):
            yield torch.tensor([k, self.epoch, random.random()])


class SharedStream(Stream):
    """A stream that shares itself out among workers, as PyTorch's documentation says it should."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        for k, sample in enumerate(super().__iter__()):
            if info is None or k % info.num_workers == info.id:
                yield sample


class Seen(NamedTuple):
    epoch: int
    position: int
    global_batch: int
    samples: int
    weight: float
    ends_update: bool
    data: tuple[float, ...]


def seen(batch: fastlr.Batch) -> Seen:
    assert batch.samples == len(batch.data)
    return Seen(
        batch.epoch, batch.position, batch.global_batch, batch.samples, batch.weight, batch.ends_update,
        tuple(batch.data.flatten().tolist()),
    )  # fmt: skip


def run(loader: GrowingLoader) -> list[Seen]:
    found = []
    for epoch in loader.epochs():
        batches = [seen(batch) for batch in epoch]
        assert len(epoch) == len(batches)
        assert {batch.epoch for batch in batches} <= {epoch.index}
        found += batches
    return found


# -- sizes and settings ----------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "1 worker": {"num_workers": 1},
    "2 workers": {"num_workers": 2, "prefetch_factor": 4},
    "persistent": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 1},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
each_kind = pytest.mark.parametrize("dataset", [Noisy(), SharedStream()], ids=["map", "stream"])


@every_setting
@each_kind
def test_no_setting_changes_a_batch(dataset: Any, options: dict[str, Any]) -> None:
    plain = run(GrowingLoader(dataset, make_plan(), 3))
    assert plain == run(GrowingLoader(dataset, make_plan(), 3, **options))


@pytest.mark.parametrize("tail", ["keep", "drop"])
def test_workers_change_no_tail(tail: str) -> None:
    plain = run(GrowingLoader(Noisy(), make_plan(tail), 3))
    assert plain == run(GrowingLoader(Noisy(), make_plan(tail), 3, num_workers=1, persistent_workers=True))


@each_kind
def test_spawned_workers_can_be_sent_what_they_read(dataset: Any) -> None:
    loader = GrowingLoader(dataset, make_plan(), 3, seed=5)
    reader = pickle.loads(pickle.dumps(loader._reading.loader.dataset))
    micro_batches = pickle.loads(pickle.dumps(list(GrowingBatchSampler(
        make_plan(), 3, seed=5, shuffle=isinstance(dataset, Noisy))
    )))  # fmt: skip
    read = [tuple(reader.__getitems__(micro).flatten().tolist()) for micro in micro_batches]
    assert read == [batch.data for batch in run(loader)]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_pinning_changes_no_batch() -> None:
    loader = GrowingLoader(Noisy(), make_plan(), 3, pin_memory=True)
    assert run(loader) == run(GrowingLoader(Noisy(), make_plan(), 3))


def updates_of(batches: list[Seen]) -> list[tuple[int, int]]:
    """``(position, samples)`` of each update."""
    updates: dict[int, int] = {}
    for batch in batches:
        updates[batch.position] = updates.get(batch.position, 0) + batch.samples
    return list(updates.items())


# N = 23, three epochs: phases begin at samples 0, 12 and 32, epochs at 0, 23 and 46.
EXPECTED = {
    "carry": [
        (0, 4), (4, 4), (8, 4), (12, 6), (18, 6), (24, 6), (30, 2), (32, 12), (44, 12), (56, 12), (68, 1),
    ],
    "keep": [
        (0, 4), (4, 4), (8, 4), (12, 6), (18, 5), (23, 6), (29, 3), (32, 12), (44, 2), (46, 12), (58, 11),
    ],
    "drop": [(0, 4), (4, 4), (8, 4), (12, 6), (23, 6), (32, 12), (46, 12)],
}  # fmt: skip


@pytest.mark.parametrize("tail", EXPECTED)
def test_sizes_change_at_the_very_sample(tail: str) -> None:
    batches = run(GrowingLoader(Numbers(), make_plan(tail), 3))
    assert updates_of(batches) == EXPECTED[tail]
    for batch in batches:
        assert batch.weight == batch.samples / batch.global_batch
        assert batch.samples <= 3


def test_drop_last_is_the_tail_rule_drop() -> None:
    loader = GrowingLoader(Numbers(), make_plan(), 3, drop_last=True)
    assert updates_of(run(loader)) == EXPECTED["drop"]
    assert loader.plan.tail == "drop"


def test_full_batches_are_cut_into_equal_micro_batches() -> None:
    plan = make_plan(phases=[(0, 6), (1, 12), (2, 16)], size=48)
    batches = run(GrowingLoader(Numbers(48), plan, 4))
    assert {(batch.global_batch, batch.samples) for batch in batches} == {(6, 3), (12, 4), (16, 4)}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("tail", ["carry", "keep"])
def test_each_sample_once_an_epoch(tail: str, shuffle: bool) -> None:
    taken: list[int] = []
    for epoch in GrowingLoader(Numbers(), make_plan(tail), 3, shuffle=shuffle).epochs():
        for batch in epoch:
            taken += batch.data.tolist()
        assert tail == "carry" or len(taken) == (epoch.index + 1) * N
    orders = [taken[:N], taken[N : 2 * N], taken[2 * N :]]
    assert [sorted(order) for order in orders] == [list(range(N))] * 3
    assert (orders[0] == orders[1]) is not shuffle
    assert (orders[0] == list(range(N))) is not shuffle


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_is_made_of_the_updates_that_begin_in_it(world: int) -> None:
    plan = make_plan(phases=[(0, 4), (0.5, 6), (1.4, 8)], size=N - 1)
    loader = GrowingLoader(Numbers(N - 1), plan, 2, rank=0, world_size=world)
    for epoch in loader.epochs():
        batches = list(epoch)
        starts = [batch.position for batch in batches if batch.starts_update]
        size = plan.dataset_size
        assert starts == [u.start for u in plan.updates_from() if u.start // size == epoch.index]
        assert batches[-1].ends_update
        assert {batch.samples for batch in batches if batch.full} <= {1, 2}


def test_the_order_is_the_same_under_any_default_device() -> None:
    expected = list(GrowingBatchSampler(make_plan(), 4, seed=1))
    with torch.device("meta"):
        assert list(GrowingBatchSampler(make_plan(), 4, seed=1)) == expected


def test_seeds_make_orders() -> None:
    first, same, other = (run(GrowingLoader(Numbers(), make_plan(), seed=s)) for s in (0, 0, 1))
    assert first == same != other


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A plan that any number of ranks in 1 .. 3 can meet, and how to run it."""
    world = draw(st.integers(1, 3))
    size, epochs = draw(st.integers(12, 40)), draw(st.integers(1, 3))
    total = size * epochs
    starts = [0, *sorted(draw(st.sets(st.integers(1, total - 1), max_size=3)))]
    sizes = [world * draw(st.integers(1, size // world)) for _ in starts]
    lr = fastlr.Constant(0.1, unit="sample")
    tail = draw(st.sampled_from(["carry", "keep", "drop"]))
    micro = draw(st.integers(1, 8))
    try:
        plan = BatchPlan(tuple(starts), tuple(sizes), lr, lr, size, epochs, tail)
        for rank in range(world):
            GrowingBatchSampler(plan, micro, rank=rank, world_size=world)
    except ValueError:
        sizes, micro = [world] * len(starts), 2
        plan = BatchPlan((0,), (world,), lr, lr, size, epochs, "drop")
    return {"plan": plan, "world": world, "micro": micro, "seed": draw(st.integers(0, 3))}


@settings(deadline=None, max_examples=30)
@given(cases())
def test_ranks_share_every_update(case: dict[str, Any]) -> None:
    plan, world, micro = case["plan"], case["world"], case["micro"]
    ranks = [
        list(GrowingBatchSampler(plan, micro, seed=case["seed"], rank=rank, world_size=world))
        for rank in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(GrowingBatchSampler(plan, micro, rank=0, world_size=world)) == len(ranks[0])
    samples: dict[int, list[tuple[int, int]]] = {}
    weights: dict[int, float] = {}
    for together in zip(*ranks, strict=True):
        assert len({b.ends_update for b in together}) == len({b.update for b in together}) == 1
        assert min(map(len, together)) >= 1
        assert max(map(len, together)) <= micro
        update = together[0].update
        if update.size % world == 0:
            assert len(set(map(len, together))) == 1
        else:
            assert max(map(len, together)) - min(map(len, together)) <= 1
        for batch in together:
            samples.setdefault(update.start, []).extend(zip(batch.epochs, batch, strict=True))
            weights[update.start] = weights.get(update.start, 0.0) + batch.weight / world
    assert weights == pytest.approx(dict.fromkeys(weights, 1.0))
    # One rank alone sees the same samples in each update.
    alone = list(GrowingBatchSampler(plan, micro_batch_size=plan.dataset_size, seed=case["seed"]))
    for batch in alone:
        start = batch.update.start
        expected, samples[start] = samples[start], samples[start]
        assert set(zip(batch.epochs, batch, strict=True)) <= set(expected)
    assert {b.update.start for b in alone} == set(samples)
    taken = [sample for update in samples.values() for sample in update]
    assert len(taken) == len(set(taken))
    if plan.tail != "drop":
        assert len(taken) == plan.total_samples


@settings(deadline=None, max_examples=25)
@given(cases(), st.data())
def test_save_and_load_midway_changes_nothing(case: dict[str, Any], data: st.DataObject) -> None:
    plan, world = case["plan"], case["world"]
    numbers = Numbers(plan.dataset_size)
    options = {"seed": case["seed"], "rank": world - 1, "world_size": world, "seed_samples": False}
    loader = GrowingLoader(numbers, plan, case["micro"], **options)
    whole = run(loader)
    stop = data.draw(st.integers(0, len(whole)))
    loader = GrowingLoader(numbers, plan, case["micro"], **options)
    before = []
    for batch in loader if stop else ():
        before.append(seen(batch))
        if len(before) == stop:
            break
    state = loader.state_dict()
    # Only completed updates count: of one that was under way the beginning comes again.
    done = [b for b in before if b.position < state["samples"]]
    resumed = GrowingLoader(numbers, plan, case["micro"], **{**options, "seed": 99})
    resumed.load_state_dict(state)
    assert len(resumed) == len(whole) - len(done)
    assert done + run(resumed) == whole
    # Without a file the same loader goes on, too.
    assert done + run(loader) == whole


# -- iteration -------------------------------------------------------------------------------------


def test_the_loader_itself_goes_through_all_epochs() -> None:
    loader = GrowingLoader(Numbers(), make_plan(), 3)
    length = len(loader)
    batches = [seen(batch) for batch in loader]
    assert batches == run(GrowingLoader(Numbers(), make_plan(), 3))
    assert length == len(batches)
    assert len(loader) == 0
    assert list(loader) == []
    assert loader.samples == 3 * N


def test_an_epoch_left_early_is_noticed() -> None:
    loader = GrowingLoader(Numbers(), make_plan(), 4)
    epochs = loader.epochs()
    for _ in next(epochs):
        break
    with pytest.raises(RuntimeError, match="epoch 0 was left before its end, at sample 4"):
        next(epochs)
    assert [epoch.index for epoch in [next(loader.epochs())]] == [0]
    with pytest.raises(RuntimeError, match="epoch 0 was left before its end"):
        list(loader.epochs())


def test_an_epoch_is_gone_through_once() -> None:
    loader = GrowingLoader(Numbers(), make_plan(), 3)
    epoch = next(loader.epochs())
    list(epoch)
    with pytest.raises(RuntimeError, match="epoch 0 is over"):
        list(epoch)


def test_two_iterations_at_once_are_noticed() -> None:
    loader = GrowingLoader(Numbers(), make_plan(), 3)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(first)


def test_an_iterator_that_is_not_exhausted_ends_its_epoch_all_the_same() -> None:
    """Frameworks that know an epoch's length take so many batches and never ask for one more."""
    loader = GrowingLoader(Numbers(), make_plan(), 3)
    whole = run(GrowingLoader(Numbers(), make_plan(), 3))
    found, kept = [], []
    for epoch in loader.epochs():
        batches = iter(epoch)
        kept.append(batches)
        found += [seen(next(batches)) for _ in range(len(epoch))]
    assert found == whole


# -- batches -----------------------------------------------------------------------------------------


def test_a_batch_moves_whatever_it_holds() -> None:
    class Pair(NamedTuple):
        x: torch.Tensor
        name: str

    x = torch.ones(2, dtype=torch.float32)
    data = {"a": [x, (x, "text")], "b": Pair(x, "name"), "c": 3, "d": None}
    batch = fastlr.Batch(data, 2, 0.5, 10, 4, 0, True, False)
    moved = batch.to(torch.float64)
    assert moved.data["a"][0].dtype == moved.data["a"][1][0].dtype == moved.data["b"].x.dtype == torch.float64
    assert isinstance(moved.data["b"], Pair)
    assert (moved.data["a"][1][1], moved.data["b"].name, moved.data["c"], moved.data["d"]) == (
        "text", "name", 3, None,
    )  # fmt: skip
    assert (moved.samples, moved.weight, moved.position, moved.ends_update) == (2, 0.5, 10, False)
    assert batch.data["a"][0].dtype == torch.float32


class Row(NamedTuple):
    x: torch.Tensor
    name: str


class Pair(tuple[Any, ...]):
    pass


@dataclasses.dataclass
class Plain:
    x: torch.Tensor
    name: str = "name"
    made: torch.Tensor = dataclasses.field(init=False, default_factory=lambda: torch.zeros(1))
    never_set: int = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    scale: dataclasses.InitVar[float] = 1.0


class Immutable(Mapping[str, Any]):
    def __init__(self, items: dict[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Named(dict[str, Any]):
    """A dict that needs more than its items to be made."""

    def __init__(self, name: str, **items: Any) -> None:
        super().__init__(items)
        self.name = name


class Own(MutableMapping[str, Any]):
    """A mapping whose copy shares what holds its items."""

    def __init__(self, name: str, **items: Any) -> None:
        self.name, self.items_ = name, items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


class OwnList(MutableSequence[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = list(items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.items[index] = value

    def __delitem__(self, index: Any) -> None:
        del self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def insert(self, index: int, value: Any) -> None:
        self.items.insert(index, value)


class Encoding(collections.UserDict[str, Any]):
    """A mapping that moves itself."""

    def to(self, dtype: torch.dtype) -> Encoding:
        moved = Encoding({key: value.to(dtype) for key, value in self.items()})
        moved.asked = True
        return moved


ONE = torch.ones(2)
CONTAINERS: dict[str, Any] = {
    "dict": {"x": ONE, "n": 3},
    "defaultdict": collections.defaultdict(list, x=ONE),
    "OrderedDict": collections.OrderedDict(b=ONE, a="text"),
    "UserDict": collections.UserDict(x=ONE),
    "dict with a constructor of its own": Named("name", x=ONE),
    "mapping of one's own": Own("name", x=ONE),
    "sequence of one's own": OwnList(ONE),
    "Mapping": Immutable({"x": ONE}),
    "mappingproxy": types.MappingProxyType({"x": ONE}),
    "list": [ONE, None],
    "tuple": (ONE, "text", b"bytes"),
    "tuple's subclass": Pair([ONE, 2]),
    "namedtuple": Row(ONE, "name"),
    "deque": collections.deque([ONE], maxlen=3),
    "UserList": collections.UserList([ONE]),
    "dataclass": Plain(ONE),
    "frozen dataclass": Frozen(ONE),
    "nested": {"a": [(Row(ONE, "b"), collections.defaultdict(int, c=Frozen(ONE)))]},
}


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if dataclasses.is_dataclass(value):
        return tensors_of([getattr(value, f.name, None) for f in dataclasses.fields(value)])
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return []
    return [tensor for item in value for tensor in tensors_of(item)]


def of(data: Any) -> fastlr.Batch:
    return fastlr.Batch(data, 2, 0.5, 10, 4, 0, True, False)


@pytest.mark.parametrize("data", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_keep_their_types(data: Any) -> None:
    moved = of(data).to(torch.float64).data
    assert type(moved) is type(data)
    assert {tensor.dtype for tensor in tensors_of(moved)} == {torch.float64}
    assert {tensor.dtype for tensor in tensors_of(data)} == {torch.float32}  # is left as it was
    assert len(tensors_of(moved)) == len(tensors_of(data))
    if isinstance(data, Mapping):
        assert list(moved) == list(data)
    for name in ("default_factory", "maxlen", "name"):
        assert getattr(moved, name, None) == getattr(data, name, None)
    assert moved is not data
    assert of(moved).to(torch.float64).data is moved  # nothing to move: nothing is copied


def test_whatever_moves_itself_is_asked() -> None:
    moved = of({"inputs": Encoding({"x": ONE})}).to(torch.float64).data["inputs"]
    assert moved.asked
    assert moved["x"].dtype == torch.float64


def test_what_moves_its_own_items_is_left_as_it_was() -> None:
    class InPlace(collections.UserDict[str, Any]):  # as transformers' BatchEncoding
        def to(self, dtype: torch.dtype) -> InPlace:
            self.data = {key: value.to(dtype) for key, value in self.data.items()}
            return self

    data = InPlace({"x": ONE})
    assert of(data).to(torch.float64).data["x"].dtype == torch.float64
    assert data["x"].dtype == torch.float32


@pytest.mark.parametrize(
    "data",
    [None, "text", b"bytes", bytearray(b"ab"), 3, range(3000), np.ones(2), torch.nn.Linear, Plain, {1, 2}],
    ids=lambda data: type(data).__name__,
)
def test_what_holds_no_tensor_stays(data: Any) -> None:
    assert of([data]).to(torch.float64).data[0] is data


def test_a_container_that_cannot_be_made_anew_is_named() -> None:
    class Odd(Immutable):
        def __init__(self, a: int, b: int) -> None:
            super().__init__({"x": ONE})

    with pytest.raises(
        TypeError, match=r"a Odd in a batch's data cannot be made anew from a dict.*to\(\.\.\.\)"
    ):
        of(Odd(1, 2)).to(torch.float64)


def test_a_container_that_cannot_be_copied_is_named_and_left_as_it_was() -> None:
    class Deep(Own):
        def __init__(self, **items: Any) -> None:
            self.items_ = collections.ChainMap(items)  # type: ignore[assignment]

    data = Deep(x=ONE)
    with pytest.raises(TypeError, match=r"a Deep in a batch's data cannot be copied: .* __copy__\(\)"):
        of(data).to(torch.float64)
    assert data["x"] is ONE


def test_sync_asks_the_model_only_before_an_updates_end() -> None:
    entered = []

    class Model(torch.nn.Linear):
        def no_sync(self) -> Any:
            entered.append(self)
            return torch.no_grad()

    first, last = (fastlr.Batch(None, 2, 0.5, 0, 4, 0, not end, end) for end in (False, True))
    model = Model(2, 2)
    with first.sync(model):
        assert not torch.is_grad_enabled()
    with last.sync(model), last.sync(torch.nn.Linear(2, 2)), first.sync(torch.nn.Linear(2, 2)):
        assert torch.is_grad_enabled()
    assert len(entered) == 1


# -- accumulation ------------------------------------------------------------------------------------

FEATURES = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))


class Classified(Numbers):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return FEATURES[index], TARGETS[index]


def make_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("tail", ["carry", "keep", "drop"])
@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_accumulated_gradients_are_the_large_batchs(tail: str, micro: int) -> None:
    plan = make_plan(tail, phases=[(0, 4), (1.1, 20)])
    model, large = make_model(), make_model()
    whole = iter(GrowingBatchSampler(plan, micro_batch_size=N))
    sizes = set()
    for batch in GrowingLoader(Classified(), plan, micro, seed_samples=False):
        x, y = batch.data
        (torch.nn.functional.cross_entropy(model(x), y) * batch.weight).backward()
        if not batch.ends_update:
            continue
        taken = next(whole)
        indices = list(taken)
        if not taken.ends_update:  # a carried batch comes in two parts
            indices += next(whole)
        torch.nn.functional.cross_entropy(large(FEATURES[indices]), TARGETS[indices]).backward()
        torch.testing.assert_close(gradient(model), gradient(large), rtol=1e-6, atol=1e-6)
        sizes.add(batch.global_batch)
        model.zero_grad()
        large.zero_grad()
    assert len(sizes) > (1 if tail == "drop" else 2)  # partial updates were among them


@pytest.mark.parametrize("tail", ["carry", "keep"])
def test_counts_weigh_by_what_the_loss_averages_over(tail: str) -> None:
    """A loss over the tokens that are not padding: the mean is over tokens, not samples."""
    ignored = -100
    tokens = torch.randint(0, 3, (N, 6), generator=torch.Generator().manual_seed(5))
    tokens[torch.rand(N, 6, generator=torch.Generator().manual_seed(6)) < 0.5] = ignored
    tokens[:, 0] = 0
    data = [(FEATURES[k].repeat(6, 1), tokens[k]) for k in range(N)]

    def loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=ignored)

    plan = make_plan(tail)
    count = lambda data: (data[1] != ignored).sum()  # noqa: E731
    loader = GrowingLoader(data, plan, 3, count=count)
    model, large = make_model(), make_model()
    window: list[Any] = []
    orders = []
    for epoch in loader.epochs():
        orders.append(0)
        for batch in epoch:
            orders[-1] += batch.samples
            window.append(batch.data)
            (loss(model, *batch.data) * batch.weight).backward()
            if batch.ends_update:
                x, y = (torch.cat(parts) for parts in zip(*window, strict=True))
                loss(large, x, y).backward()
                torch.testing.assert_close(gradient(model), gradient(large), rtol=1e-6, atol=1e-6)
                model.zero_grad()
                large.zero_grad()
                window = []
    assert sum(orders) == 3 * N
    assert tail == "carry" or orders == [N] * 3  # looking ahead does not move a sample to another epoch


def test_counts_of_nothing_are_refused() -> None:
    loader = GrowingLoader(Numbers(), make_plan(), 3, count=lambda data: 0)
    with pytest.raises(ValueError, match=r"count\(data\) must be > 0 .*update at sample 0"):
        next(iter(loader))


# -- together with the optimizer -----------------------------------------------------------------------


def bound(plan: BatchPlan, **options: Any) -> tuple[torch.nn.Module, fastlr.FusedSGD, GrowingLoader]:
    model = make_model()
    opt = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)
    return model, opt, GrowingLoader(Classified(), plan, 3, **options).bind(opt)


def decaying(tail: str = "carry") -> BatchPlan:
    return BatchPlan.from_schedule(
        fastlr.MultiStep(0.1, [1, 2], 0.25, unit="epoch"),
        batch_size=4, dataset_size=N, epochs=3, momentum=0.9, max_batch_size=8, tail=tail,
    )  # fmt: skip


@pytest.mark.parametrize("tail", ["carry", "keep", "drop"])
def test_rate_momentum_and_batch_move_together(tail: str) -> None:
    plan = decaying(tail)
    model, opt, loader = bound(plan)
    for batch in loader:
        assert opt.clock().samples == batch.position == loader.samples
        assert opt.param_groups[0]["lr"] == plan.lr(batch.position)
        x, y = batch.data
        (torch.nn.functional.cross_entropy(model(x), y) * batch.weight).backward()
        if batch.ends_update:
            opt.step()
            opt.zero_grad()
            assert opt.clock().samples == loader.samples > batch.position
    assert opt.clock() == (plan.total_updates, plan.total_samples)


def test_skipped_amp_updates_count_their_samples() -> None:
    plan = decaying("keep")
    model, opt, loader = bound(plan)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rates, sizes, skipped = [], [], 0
    for batch in loader:
        x, y = batch.data
        loss = torch.nn.functional.cross_entropy(model(x), y) * batch.weight
        scaler.scale(loss).backward()
        if batch.ends_update:
            if len(rates) in (1, 6, 7):
                next(model.parameters()).grad[0, 0] = float("inf")
            rates.append(opt.param_groups[0]["lr"])
            sizes.append(plan.phase_at(opt.clock().samples).batch_size)
            assert batch.global_batch in (sizes[-1], N % sizes[-1])
            scaler.step(opt)
            skipped += opt.last_step_skipped
            scaler.update()
            opt.zero_grad()
    assert skipped == 3
    assert opt.clock() == (plan.total_updates - 3, plan.total_samples)
    assert rates == [plan.lr(update.start) for update in plan.updates_from()]


def test_an_update_skipped_by_hand_counts_too() -> None:
    _, opt, loader = bound(decaying())
    for batch in loader:
        assert opt.clock().samples == batch.position
    assert opt.clock() == (0, 3 * N)


def test_a_step_in_the_middle_of_an_update_is_refused() -> None:
    _, opt, loader = bound(make_plan(phases=[(0, 6)]))
    batches = iter(loader)
    next(batches)
    with pytest.raises(RuntimeError, match="in the middle of the update at sample 0"):
        opt.step()
    next(batches)
    opt.step()
    assert opt.clock() == (1, 6)
    opt.step()  # of something else: no samples of this loader
    assert opt.clock() == (2, 6)


def test_a_clock_that_stands_elsewhere_is_noticed() -> None:
    _, opt, loader = bound(decaying())
    opt.advance_samples(7)
    with pytest.raises(
        RuntimeError, match=r"lr schedule stands at sample 7, the loader at 0; load the state of both"
    ):
        next(iter(loader))


@with_rules
def test_every_rule_goes_by_a_plan(rule: Rule) -> None:
    """By the plan's rate, and what the rule has as momentum by the plan's, where it has any."""
    plan = make_plan()
    plan = dataclasses.replace(plan, lr=fastlr.LinearRamp(0.1, 0.0, 3 * N, unit="sample"))
    part = next((name for name in ("momentum", "beta1") if name in rule.drives), None)
    model = torch.nn.Linear(1, 1)
    optimizer = rule.make(model.parameters(), lr=plan.lr)
    if part is not None:
        optimizer.set_schedule(**{part: plan.momentum})
    loader = GrowingLoader(Numbers(), plan, micro_batch_size=2).bind(optimizer)
    for batch in loader:
        (model(batch.data[:, None].float()).mean() * batch.weight).backward()
        if batch.ends_update:
            assert optimizer.param_groups[0]["lr"] == plan.lr(batch.position)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.clock() == (plan.total_updates, 3 * N)
    if part is not None:
        loader = GrowingLoader(Numbers(), plan).bind(rule.make(model.parameters()))
        other = loader._place._optimizer
        other.advance_samples(7)
        other.set_schedule(**{part: plan.momentum}, start="zero")
        with pytest.raises(RuntimeError, match=rf"{part} schedule stands at sample 7, the loader at 0"):
            next(iter(loader))


def decaying_plan(**options: Any) -> BatchPlan:
    return BatchPlan.from_schedule(
        fastlr.MultiStep(0.1, [1, 2], 0.5, unit="epoch"),
        **{"batch_size": 2, "dataset_size": 24, "epochs": 3, **options},
    )


@with_rules
def test_linear_scaling_with_an_adaptive_rule_is_told(rule: Rule) -> None:
    optimizer = rule.make(torch.nn.Linear(1, 1).parameters())
    loader = GrowingLoader(Numbers(24), decaying_plan())
    if rule.fused is fastlr.FusedSGD:
        assert loader.bind(optimizer) is loader
        return
    name = rule.fused.__name__
    with pytest.warns(
        UserWarning, match=f'as SGD does .scaling="linear".*in {name} .* scaling="sqrt"'
    ) as told:
        assert loader.bind(optimizer) is loader
    assert told[0].filename == __file__
    assert optimizer.clock() == (0, 0)
    for batch in loader:  # goes on all the same
        if batch.ends_update:
            optimizer.step()
    assert optimizer.clock().samples == 72


@pytest.mark.parametrize(
    "plan",
    [
        decaying_plan(scaling="sqrt", max_batch_size=8),
        decaying_plan(mode="decay"),
        decaying_plan(max_batch_size=2),  # which leaves nothing to trade
        make_plan(),  # whose rates are as they were given
        make_plan().grown(8, 12),
    ],
    ids=["sqrt", "decay", "constant batch", "by hand", "grown by measurement"],
)
@pytest.mark.parametrize("fused", [fastlr.FusedSGD, fastlr.FusedAdamW, fastlr.FusedCyclicAdam])
def test_what_trades_no_rate_for_batch_is_bound_in_silence(plan: BatchPlan, fused: Any) -> None:
    bounds = {"base_lr": 0.01, "max_lr": 0.1} if fused is fastlr.FusedCyclicAdam else {}
    GrowingLoader(Numbers(plan.dataset_size), plan).bind(fused(torch.nn.Linear(1, 1).parameters(), **bounds))


def test_binding_needs_a_samples_clock() -> None:
    loader = GrowingLoader(Numbers(), make_plan())
    with pytest.raises(TypeError, match=r"only a fastlr optimizer has a samples clock, got SGD"):
        loader.bind(torch.optim.SGD(make_model().parameters(), lr=0.1))


# -- randomness ----------------------------------------------------------------------------------------


def test_randomness_belongs_to_the_sample_and_epoch() -> None:
    draws: dict[tuple[int, int], tuple[float, ...]] = {}
    rows = torch.cat([batch.data for batch in GrowingLoader(Noisy(), make_plan(), 3)])
    for k, row in enumerate(rows.tolist()):
        draws[k // N, int(row[0])] = tuple(row[1:])
    assert len(draws) == len(set(draws.values())) == 3 * N
    again = GrowingLoader(Noisy(), make_plan(phases=[(0, 9)]), 2, num_workers=2)
    for k, row in enumerate(torch.cat([batch.data for batch in again]).tolist()):
        assert draws[k // N, int(row[0])] == tuple(row[1:])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_programs_own_randomness_is_left_alone(workers: int) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002

    before = states()
    run(GrowingLoader(Noisy(), make_plan(), 3, num_workers=workers))
    assert states() == before


def mixed(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) * torch.rand(())


def test_a_random_collate_function_is_seeded_too() -> None:
    options = {"collate_fn": mixed}
    assert run(GrowingLoader(Noisy(), make_plan(), 3, **options)) == run(
        GrowingLoader(Noisy(), make_plan(), 3, num_workers=2, **options)
    )


def test_unseeded_samples_are_read_together() -> None:
    class Together(Numbers):
        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            asked.append(indices)
            return [torch.tensor(index) for index in indices]

    asked: list[list[int]] = []
    found = run(GrowingLoader(Together(), make_plan(), 3, seed_samples=False))
    assert found == run(GrowingLoader(Numbers(), make_plan(), 3))
    assert [list(batch.data) for batch in found] == asked


# -- resuming ------------------------------------------------------------------------------------------


def test_a_state_in_the_middle_of_an_update_is_its_beginning() -> None:
    loader = GrowingLoader(Numbers(), make_plan(phases=[(0, 9)]), 3)
    for k, _ in enumerate(loader):
        if k == 4:
            assert loader.state_dict()["samples"] == 9
        if k == 5:  # the last micro-batch of the second update
            assert loader.state_dict()["samples"] == 18
            break


def test_states_hold_plain_values(tmp_path: Any) -> None:
    loader = GrowingLoader(Numbers(), make_plan())
    list(next(loader.epochs()))
    state = loader.state_dict()
    torch.save(state, tmp_path / "loader.pt")
    assert torch.load(tmp_path / "loader.pt", weights_only=True) == state
    assert (state["epoch"], state["samples"], state["seed"]) == (1, 24, 0)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 3), (2, 1), (3, 4)])
def test_other_ranks_and_micro_batches_see_the_same_samples(world: int, micro: int) -> None:
    plan = make_plan(phases=[(0, 6), (1, 12)], size=24)
    loader = GrowingLoader(Numbers(24), plan, 3)
    whole: dict[int, list[float]] = {}
    for batch in run(loader):
        whole.setdefault(batch.position, []).extend(batch.data)
    first = GrowingLoader(Numbers(24), plan, 6)
    for batch in first:
        if batch.position == 12 and batch.ends_update:
            break
    resumed: dict[int, list[float]] = {}
    for rank in range(world):
        part = GrowingLoader(Numbers(24), plan, micro, rank=rank, world_size=world)
        part.load_state_dict(first.state_dict())
        for batch in run(part):
            resumed.setdefault(batch.position, []).extend(batch.data)
    assert {at: sorted(data) for at, data in resumed.items()} == {
        at: sorted(data) for at, data in whole.items() if at >= 18
    }


def test_growing_on_the_way_keeps_the_rate_and_the_scaling() -> None:
    plan = BatchPlan.from_phases([(0, 4)], dataset_size=16, epochs=2, lr=0.5, scaling="sqrt")
    loader = GrowingLoader(Numbers(16), plan)
    batches = iter(loader)
    next(batches)
    loader.grow(16)
    assert (loader.plan.scaling, loader.plan.starts, loader.plan.lr) == ("sqrt", (0, 4), plan.lr)
    # Four times the batch is worth half the rate.
    assert [phase.noise_scale for phase in loader.plan.phases] == [1.0, 0.5]
    resumed = GrowingLoader(Numbers(16), BatchPlan.from_dict(loader.state_dict()["plan"]))
    resumed.load_state_dict(loader.state_dict())
    assert resumed.plan == loader.plan
    other = GrowingLoader(Numbers(16), dataclasses.replace(plan, scaling="linear"))
    with pytest.raises(ValueError, match=r"another plan: scaling \('sqrt' in the file, 'linear' here\)"):
        other.load_state_dict(loader.state_dict())


def test_growing_on_the_way_is_exact_and_resumes() -> None:
    def grown(options: dict[str, Any]) -> tuple[GrowingLoader, list[Seen]]:
        loader = GrowingLoader(Numbers(), make_plan(phases=[(0, 4)]), 4, **options)
        found = []
        for batch in loader:
            found.append(seen(batch))
            if batch.position == 8:
                loader.grow(8)
        return loader, found

    loader, found = grown({})
    assert updates_of(found) == [(0, 4), (4, 4), (8, 4), *((12 + 8 * k, 8) for k in range(7)), (68, 1)]
    for options in ({"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}):
        assert grown(options)[1] == found

    stopped = GrowingLoader(Numbers(), make_plan(phases=[(0, 4)]), 4)
    for batch in stopped:
        if batch.position == 8:
            stopped.grow(8)
        if batch.position == 20 and batch.ends_update:
            break
    resumed = GrowingLoader(Numbers(), make_plan(phases=[(0, 4)]), 4)
    resumed.load_state_dict(stopped.state_dict())
    assert run(resumed) == [batch for batch in found if batch.position >= 28]
    assert resumed.plan == loader.plan


# -- iterable data sets --------------------------------------------------------------------------------


def test_streams_begin_anew_each_epoch() -> None:
    for epoch in GrowingLoader(Stream(), make_plan("keep"), 3).epochs():
        rows = torch.cat([batch.data for batch in epoch])
        assert rows[:, 0].tolist() == list(range(N))
        assert set(rows[:, 1].tolist()) == {epoch.index}


def test_streams_are_shared_by_ranks() -> None:
    plan = make_plan(phases=[(0, 6)], size=24)
    ranks = [run(GrowingLoader(Stream(24), plan, 3, rank=r, world_size=2)) for r in range(2)]
    for a, b in zip(*ranks, strict=True):
        assert a.data[0] + 1 == b.data[0]
    taken = [(batch.epoch, batch.data[k]) for rank in ranks for batch in rank for k in range(0, 9, 3)]
    assert sorted(taken) == [(e, float(k)) for e in range(3) for k in range(24)]


def test_a_short_stream_is_an_error_that_says_where() -> None:
    loader = GrowingLoader(Stream(20), make_plan(), 3)
    with pytest.raises(RuntimeError, match="ended after 20 samples of epoch 0, but the plan counts on 23"):
        run(loader)


# -- bad input -----------------------------------------------------------------------------------------


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size


BAD = {
    "more data": (lambda: GrowingLoader(Numbers(24), make_plan()), "is for 23 samples, .* set has 24"),
    "less data": (lambda: GrowingLoader(Numbers(22), make_plan()), "is for 23 samples, .* set has 22"),
    "short stream": (lambda: GrowingLoader(SizedStream(9), make_plan()), "the plan is for 23 .* set has 9"),
    "shuffled stream": (lambda: GrowingLoader(Stream(), make_plan(), shuffle=True), "shuffles itself"),
    "no data set": (lambda: GrowingLoader(iter([]), make_plan()), "must have a length and items"),
    "no plan": (lambda: GrowingLoader(Numbers(), 128), "plan must be a BatchPlan, got 128"),
    "batch_size": (lambda: GrowingLoader(Numbers(), make_plan(), batch_size=3), "takes no batch_size"),
    "in_order": (lambda: GrowingLoader(Numbers(), make_plan(), in_order=False), "takes no in_order"),
    "count": (lambda: GrowingLoader(Numbers(), make_plan(), count=3), "count must be a function"),
    "drop_last": (lambda: GrowingLoader(Numbers(), make_plan(), drop_last=1), "must be True or False"),
    "micro": (lambda: GrowingLoader(Numbers(), make_plan(), 0), "must be an integer >= 1, got 0"),
    "seed": (lambda: GrowingLoader(Numbers(), make_plan(), seed=-1), "seed must be an integer >= 0, got -1"),
    "rank alone": (lambda: GrowingLoader(Numbers(), make_plan(), rank=1), "give both rank and"),
    "rank": (lambda: GrowingLoader(Numbers(), make_plan(), rank=2, world_size=2), r"in 0 .. 1, got 2"),
    "ranks": (
        lambda: GrowingLoader(Numbers(), make_plan(), rank=0, world_size=3),
        "a batch of 4 samples cannot be shared evenly between 3 ranks; .*multiples of 3, such as 3 or 6"),
    "tail of one sample": (
        lambda: GrowingLoader(Numbers(), make_plan(), rank=0, world_size=2),
        'the update that ends at sample 69 has 1 sample, fewer than the 2 ranks; use tail="drop"'),
    "tail of four samples, one at a time": (
        lambda: GrowingLoader(
            Numbers(10), make_plan(phases=[(0, 6)], size=10, epochs=1), 1, rank=0, world_size=3
        ),
        "ends at sample 10 has 4 samples, which 3 ranks cannot share .*two at once.* use micro_batch_size=2"),
    "micro-batches": (
        lambda: GrowingLoader(Numbers(), make_plan(phases=[(0, 19)]), 4),
        "a batch of 19 samples on 1 rank cannot be cut .*multiples of 4, such as 16 or 20"),
    "count of other ranks": (
        lambda: GrowingLoader(Numbers(24), make_plan(size=24), rank=0, world_size=2, count=len),
        "count adds up over torch.distributed's 1 ranks, but world_size is 2"),
    "prefetch without workers": (
        lambda: GrowingLoader(Numbers(), make_plan(), prefetch_factor=2), "prefetch_factor"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_training(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_leaving_in_mid_update_and_going_on_is_exact() -> None:
    """After a break the update that was left comes again: with its gradients zeroed nothing has changed."""
    weights = []
    for stops in ([], [1, 7, 8, 20]):
        model, opt, loader = bound(make_plan(phases=[(0, 6), (1, 12)]), num_workers=int(bool(stops)))
        for stop in [*stops, None]:
            opt.zero_grad()
            for k, batch in enumerate(loader):
                if k == stop:
                    break
                x, y = batch.data
                (torch.nn.functional.cross_entropy(model(x), y) * batch.weight).backward()
                if batch.ends_update:
                    opt.step()
                    opt.zero_grad()
        assert opt.clock().samples == 3 * N
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_process_of_torchrun_without_its_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2, but .* is not initialised"):
        GrowingLoader(Numbers(), make_plan())
    GrowingLoader(Numbers(), make_plan(), rank=0, world_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": make_plan("keep").to_dict()}, r"another plan: tail \('keep' in the file, 'carry' here\)"),
        ({"shuffle": False}, "shuffle=False, this loader True"),
        ({"samples": 5}, "no update of the plan begins at sample 5"),
    ],
)
def test_a_state_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    loader = GrowingLoader(Numbers(), make_plan())
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    state = loader.state_dict()
    del state["seed"]
    with pytest.raises(ValueError, match="the state of a GrowingLoader has seed too"):
        loader.load_state_dict(state)
    run(loader)


# -- the sampler in a DataLoader of one's own ----------------------------------------------------------


def test_the_sampler_works_in_any_data_loader() -> None:
    sampler = GrowingBatchSampler(make_plan(), 3)
    batches = DataLoader(Numbers(), batch_sampler=sampler, num_workers=1)
    expected = run(GrowingLoader(Numbers(), make_plan(), 3))
    assert len(batches) == len(sampler) == len(expected)
    for _ in range(2):
        assert [tuple(data.tolist()) for data in batches] == [batch.data for batch in expected]


# -- why not PyTorch's own -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changed_at"),
    [({"drop_last": True}, None), ({"num_workers": 1, "prefetch_factor": 3}, 6)],
    ids=["drop_last", "prefetching"],
)
def test_pytorch_ignores_a_changed_batch_size_or_takes_it_late(options: Any, changed_at: int | None) -> None:
    loader = DataLoader(Numbers(60), batch_size=4, **options)
    sizes = []
    for k, batch in enumerate(loader):
        sizes.append(len(batch))
        if k == 2:  # the fourth batch should be larger
            loader.batch_sampler.batch_size = 8
    assert sizes.index(8) == changed_at if changed_at else 8 not in sizes


def test_ctrl_c_right_after_an_update_leaves_loader_and_optimizer_at_one_sample() -> None:
    """It is seen before the loader's own hook; a checkpoint that is written then is of one moment."""
    plan = make_plan()
    model = torch.nn.Linear(1, 1)
    optimizer = fastlr.FusedSGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_post_hook(interrupt)
    loader = GrowingLoader(Numbers(), plan, micro_batch_size=4).bind(optimizer)
    batches = iter(loader)
    first = next(batches)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    assert optimizer.clock() == (1, first.samples)
    assert loader.state_dict()["samples"] == loader.samples == first.samples
    assert next(iter(loader)).position == first.samples


# -- range tests -----------------------------------------------------------------------------------------


class Bound:
    """A training by a plan, in which there can be a range test."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        self.data = torch.utils.data.TensorDataset(torch.randn(48, 4), torch.randint(3, (48,)))
        plan = BatchPlan.from_phases([(0, 4), (1, 8)], dataset_size=48, epochs=2, lr=0.1, momentum=0.9)
        self.opt = fastlr.FusedSGD(self.model.parameters(), lr=plan.lr, momentum=plan.momentum)
        self.loader = GrowingLoader(self.data, plan, 4).bind(self.opt)

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch.data[0]), batch.data[1]) * batch.weight

    def range_test(self, kind: str) -> None:
        options: dict[str, Any] = {"num_steps": 8, "progress": False}
        if kind == "DataLoader":
            options["train_loader"] = DataLoader(self.data, 8, shuffle=True)
            options["loss_fn"] = torch.nn.functional.cross_entropy
        else:
            own = self.loader if kind == "bound" else GrowingLoader(self.data, self.loader.plan)
            options |= {"step_fn": self.loss, "train_loader": own}
        assert len(fastlr.range_test(self.model, self.opt, **options).losses) == 8

    def train(self, kind: str | None = None) -> list[Any]:
        updates = 0
        if kind is not None:
            self.range_test(kind)
        for epoch in self.loader.epochs():
            for batch in epoch:
                self.loss(batch).backward()
                if batch.ends_update:
                    self.opt.step()
                    self.opt.zero_grad()
                    updates += 1
                    if kind not in (None, "bound") and updates % 5 == 0:
                        self.range_test(kind)
        weights = [p.tolist() for p in self.model.parameters()]
        return [weights, tuple(self.opt.clock()), self.loader.state_dict(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("kind", ["DataLoader", "GrowingLoader", "bound"])
def test_a_range_test_of_a_bound_optimizer_leaves_no_trace(kind: str) -> None:
    assert Bound().train(kind) == Bound().train()


def test_a_bound_optimizer_and_its_loader_are_copied_after_an_epoch() -> None:
    run = Bound()
    list(next(run.loader.epochs()))
    loader, opt = copy.deepcopy((run.loader, run.opt))
    assert pickle.loads(pickle.dumps(loader)).state_dict() == loader.state_dict() == run.loader.state_dict()
    assert opt.clock() == run.opt.clock()
    assert loader._place._optimizer is opt


def test_ranks_with_plans_that_differ_in_the_middle_do_not_agree(monkeypatch):
    """Of many phases a plan's repr names the first and the last only."""
    told = []
    monkeypatch.setattr("fastlr.batch_growth.loader.ranks_agree", lambda number: told.append(number) or True)
    for middle in ([4, 5], [4, 5], [5, 4]):
        sizes = [4] * 5 + middle + [4] * 5
        phases = list(zip(range(0, 240, 20), sizes, strict=True))
        plan = fastlr.BatchPlan.from_phases(phases, unit="sample", dataset_size=240, epochs=1, lr=0.1)
        loader = fastlr.GrowingLoader(list(range(240)), plan)
        loader._one_run = True
        loader._check_ranks()
    assert told[0] == told[1] != told[2]
