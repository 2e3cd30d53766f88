"""range_test() puts back whatever can be reached, in place, or says beforehand what it cannot put back."""

from __future__ import annotations

import array
import collections
import contextlib
import ctypes
import functools
import io
import itertools
import mmap
import multiprocessing
import random
import threading
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from fingerprint import differences, fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_table import RULES, with_rules
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, RandomSampler, Sampler, Subset

import fastlr
from fastlr.range_test import keeping, snapshot

FEATURES, CLASSES, SAMPLES = 5, 3, 24


class Plain:
    def __init__(self, **values):
        vars(self).update(values)

    def method(self):
        pass


class Slotted:
    __slots__ = ("empty", "items", "number")

    def __init__(self):
        self.number, self.items = 0, []


class Other(Plain):
    pass


Pair = collections.namedtuple("Pair", "first second")


def change(thing, **values):
    vars(thing).update(values)


def cyclic():
    """Two objects that hold each other and share a list."""
    shared = []
    a = Plain(items=shared)
    a.other = Plain(items=shared, other=a)
    return a


def use_cyclic(a):
    a.other.items.append(1)
    a.other = Plain(items=[], other=None)


def use_slotted(s):
    s.number += 1
    s.empty = 3
    s.items.append(s)


def replace_dict(thing):
    thing.__dict__ = {"other": 1}


def use_weak(pair):
    owner, weak = pair
    weak[Plain()] = 1  # gone at once
    owner.kept.clear()  # and with it the key that stood there before


def weak():
    key = Plain()
    return (Plain(kept=[key]), weakref.WeakKeyDictionary({key: "value"}))


def view_of_shared():
    base = torch.zeros(6)
    return [base[:3], base[2:]]


def unused(thing):
    pass


def locked():
    values = np.arange(3)
    values.flags.writeable = False
    return values


def of_tensor():
    return torch.zeros(3).numpy()


def windows():
    """Read-only, over an array that is not."""
    return np.lib.stride_tricks.sliding_window_view(np.zeros(5), 3)


def write_under(values):
    under = values
    while not under.flags.writeable:
        under = under.base if isinstance(under.base, np.ndarray) else under.base.base
    under += 1


class Interface:
    """An array for NumPy, whose memory is a tensor's."""

    def __init__(self):
        self.tensor = torch.zeros(3)
        self.__array_interface__ = self.tensor.numpy().__array_interface__


def write_locked(values):
    values.flags.writeable = True
    values += 1
    values.flags.writeable = False


def empty_storage(t):
    t.untyped_storage().resize_(0)


def set_elsewhere(t):
    t.set_(torch.ones(7))


def data_elsewhere(t):
    t.data = torch.ones(2, 2, dtype=torch.float64)


def join_a_graph(t):
    t += torch.ones(1, requires_grad=True)


def hooked():
    t = torch.zeros(2, requires_grad=True)
    t.register_hook(lambda g: g)
    return [t, torch.zeros(2, requires_grad=True)]


def hook_more(ts):
    for t in ts:
        t.register_hook(lambda g: g)
        t.register_post_accumulate_grad_hook(lambda p: None)


def add_gradient(t):
    (t * 2).sum().backward()


def text_file():
    file = open(__file__, encoding="utf-8")  # noqa: SIM115
    weakref.finalize(file, file.close)
    file.read(10)
    return file


def sparse():
    return torch.eye(3).to_sparse().coalesce()


with warnings.catch_warnings():  # once in a process PyTorch says that these are new
    warnings.simplefilter("ignore")
    FULL = torch.ones(3, 3).to_sparse_csr()

# Each kind of state that may hide in a model, sampler or data set: how it is made, and how it changes.
HIDDEN = {
    "torch.Generator": (torch.Generator, lambda s: torch.rand(3, generator=s)),
    "random.Random": (lambda: random.Random(1), lambda s: s.gauss(0, 1)),
    "numpy Generator": (
        lambda: np.random.default_rng(1),
        lambda s: (s.random(), s.integers(9, dtype=np.int32)),
    ),
    "numpy RandomState": (lambda: np.random.RandomState(1), lambda s: s.standard_normal()),
    "numpy MT19937": (lambda: np.random.MT19937(1), lambda s: s.random_raw()),
    "numpy Philox": (lambda: np.random.Philox(1), lambda s: s.random_raw()),
    "numpy SeedSequence": (lambda: np.random.SeedSequence(1), lambda s: s.spawn(2)),
    "numpy Generator's children": (lambda: np.random.default_rng(1), lambda s: s.spawn(1)),
    "list": (lambda: [3, 1, 2], lambda s: (s.sort(), s.append(4))),
    "dict": (lambda: {"b": 1, "a": 2}, lambda s: s.update(b=s.pop("b"), c=3)),
    "OrderedDict": (lambda: collections.OrderedDict(a=1, b=2), lambda s: s.move_to_end("a")),
    "defaultdict": (lambda: collections.defaultdict(list), lambda s: s["x"].append(1)),
    "Counter": (lambda: collections.Counter("abc"), lambda s: s.update("a")),
    "UserDict": (lambda: collections.UserDict(a=1), lambda s: s.update(a=2)),
    "set": (lambda: {1, 2, 3}, lambda s: (s.discard(2), s.add(4))),
    "set, emptied": (lambda: set(range(0, 90, 3)), lambda s: s.clear()),
    "frozenset of objects": (lambda: frozenset([Plain(n=0)]), lambda s: change(next(iter(s)), n=1)),
    "deque": (lambda: collections.deque([1, 2], maxlen=3), lambda s: (s.popleft(), s.extend([4, 5]))),
    "tuple of lists": (lambda: ([1], ([2],)), lambda s: s[1][0].append(3)),
    "namedtuple": (lambda: Pair([1], Plain(n=1)), lambda s: change(s.second, n=2)),
    "dict with object as key": (lambda: {Plain(n=1): 1}, lambda s: change(next(iter(s)), n=2)),
    "bytearray": (lambda: bytearray(b"abc"), lambda s: s.extend(b"d")),
    "array.array": (lambda: array.array("d", [1.0]), lambda s: s.append(2.0)),
    "ctypes": (lambda: ctypes.c_int(1), lambda s: setattr(s, "value", 2)),
    "shared number": (lambda: multiprocessing.Value("i", 1), lambda s: setattr(s, "value", 2)),
    "plain object": (lambda: Plain(n=1), lambda s: change(s, n=2, more=3)),
    "object with slots": (Slotted, use_slotted),
    "object with another dict": (lambda: Plain(n=1), replace_dict),
    "object of another class": (lambda: Plain(n=1), lambda s: setattr(s, "__class__", Other)),
    "cycle": (cyclic, use_cyclic),
    "weak references": (weak, use_weak),
    "partial": (lambda: functools.partial(print, [1]), lambda s: s.args[0].append(2)),
    "bound method": (lambda: Plain(n=1).method, lambda s: change(s.__self__, n=2)),
    "native bound method": (lambda: random.Random(1).random, lambda s: s()),
    "bound method of a list": (lambda: [].append, lambda s: s(1)),
    "bound method of a generator": (
        lambda: torch.Generator().manual_seed,
        lambda s: s(3 + s.__self__.initial_seed()),
    ),
    "special method of a list": (lambda: [].__iadd__, lambda s: s([1])),
    "staticmethod": (lambda: staticmethod([].append), lambda s: s(1)),
    "classmethod": (lambda: classmethod([].append), lambda s: s.__func__(1)),
    "property": (lambda: property(random.Random(1).random), lambda s: s.fget()),
    "slice": (lambda: slice([1], None), lambda s: s.start.append(2)),
    "exception": (lambda: ValueError([1]), lambda s: s.args[0].append(2)),
    "mappingproxy": (lambda: types.MappingProxyType({1: [2]}), lambda s: s[1].append(3)),
    "values of a dict": (lambda: {1: [2]}.values(), lambda s: next(iter(s)).append(3)),
    "memoryview": (lambda: memoryview(bytearray(3)), lambda s: s.__setitem__(0, s[0] + 1)),
    "pointer": (lambda: ctypes.pointer(ctypes.c_int(1)), lambda s: setattr(s.contents, "value", 2)),
    "mmap": (lambda: mmap.mmap(-1, 16), lambda s: s.read(3)),
    "storage": (lambda: torch.zeros(3).untyped_storage(), lambda s: s.fill_(s[0] + 1)),
    "BytesIO": (lambda: io.BytesIO(b"abc"), lambda s: s.write(b"xyzuvw")),
    "StringIO": (lambda: io.StringIO("abc"), lambda s: s.write("xyzuvw")),
    "file": (text_file, lambda s: s.read(7)),
    "file, read by lines": (text_file, lambda s: next(s)),
    "array": (lambda: np.arange(3), lambda s: np.add(s, 1, out=s)),
    "array, resized": (lambda: np.arange(3), lambda s: s.resize(s.size + 4, refcheck=False)),
    "array, made read-only": (lambda: np.arange(3), lambda s: s.setflags(write=False)),
    "array, reshaped": (lambda: np.arange(6)[:], lambda s: setattr(s, "shape", (2, s.size // 2))),
    "array, read-only but written": (locked, write_locked),
    "array that nobody can write": (lambda: np.frombuffer(b"abcd", np.uint8), unused),
    "array of a tensor": (of_tensor, lambda s: s.__iadd__(1)),
    "array of a shared tensor": (
        lambda: torch.zeros(3).share_memory_().numpy(),
        lambda s: s.__iadd__(1),
    ),
    **(
        {"array by DLPack": (lambda: np.from_dlpack(torch.zeros(3)), lambda s: s.__iadd__(1))}
        if np.from_dlpack(torch.zeros(3)).flags.writeable  # NumPy 1's are not
        else {}
    ),
    "array by its interface": (lambda: np.asarray(Interface()), lambda s: s.__iadd__(1)),
    "array with strides": (
        lambda: np.lib.stride_tricks.as_strided(np.zeros(6), (3, 2), (16, 8)),
        lambda s: s.__iadd__(1),
    ),
    "array of windows": (windows, write_under),
    "array, repeated": (lambda: np.broadcast_to(np.zeros(1), 3), write_under),
    "array of another type": (
        lambda: np.zeros(2),
        lambda s: setattr(s, "dtype", np.int64 if s.dtype == np.float64 else np.float64),
    ),
    "array, in Fortran's order": (lambda: np.ones((2, 3), order="F"), lambda s: s.fill(2.0)),
    "array of objects": (lambda: np.array([[1], Plain(n=1)], dtype=object), lambda s: change(s[1], n=2)),
    "tensor": (lambda: torch.zeros(3), lambda s: s.add_(1)),
    "tensor, resized": (lambda: torch.zeros(3), lambda s: s.resize_(100).fill_(1)),
    "tensor, shrunk": (lambda: torch.ones(2, 3), lambda s: s.resize_(1).fill_(2)),
    "tensor, its storage freed": (lambda: torch.ones(2, 3), empty_storage),
    "tensor, set_ to another": (lambda: torch.zeros(3), set_elsewhere),
    "tensor, another .data": (lambda: torch.zeros(3), data_elsewhere),
    "tensor, transposed": (lambda: torch.arange(6.0).view(2, 3), lambda s: s.t_()),
    "tensor, part of a graph": (lambda: torch.zeros(1), join_a_graph),
    "tensor, expanded": (lambda: torch.zeros(1).expand(4), lambda s: s[1].add_(1)),
    "tensors that overlap": (view_of_shared, lambda s: s[0].add_(1)),
    "tensor with attributes": (lambda: torch.nn.Parameter(torch.zeros(1)), lambda s: change(s, tag=1)),
    "tensor, its gradient": (lambda: torch.zeros(2, requires_grad=True), add_gradient),
    "tensor, frozen": (lambda: torch.zeros(2, requires_grad=True), lambda s: s.requires_grad_(False)),
    "tensor, hooked": (hooked, hook_more),
    "tensor, its hooks gone": (hooked, lambda s: setattr(s[0], "_backward_hooks", None)),
    "tensor, empty": (lambda: torch.zeros(0), lambda s: s.resize_(2).fill_(1)),
    "tensor, half": (lambda: torch.tensor([float("nan"), -0.0], dtype=torch.float16), lambda s: s.fill_(1)),
    "tensor, complex": (lambda: torch.ones(2, dtype=torch.complex64), lambda s: s.mul_(1j)),
    "tensor, sparse": (sparse, lambda s: s.mul_(2)),
    "tensor, CSR": (lambda: torch.eye(3).to_sparse_csr(), lambda s: s.values().add_(1)),
    "tensor, CSC": (lambda: torch.eye(3).to_sparse_csc(), lambda s: s.values().add_(1)),
    "tensor, BSR": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), lambda s: s.mul_(2)),
    "tensor, BSC": (lambda: torch.eye(4).to_sparse_bsc((2, 2)), lambda s: s.mul_(2)),
    "tensor, CSR, filled": (lambda: torch.eye(3).to_sparse_csr(), lambda s: s.add_(FULL)),
    "module": (lambda: torch.nn.BatchNorm1d(2), lambda s: s(torch.randn(4, 2))),
    "module with another child": (lambda: torch.nn.Sequential(), lambda s: s.append(torch.nn.ReLU())),
    "module with a list for a buffer": (lambda: torch.nn.Flatten(), lambda s: s._buffers.update(x=[1])),
}
each_state = pytest.mark.parametrize(("make", "use"), HIDDEN.values(), ids=HIDDEN.keys())


class Hiding:
    """States, and what uses them."""

    def __init__(self, states=HIDDEN):
        self.states = [make() for make, _ in states.values()]
        self.uses = [use for _, use in states.values()]

    def use(self):
        for state, use in zip(self.states, self.uses, strict=True):
            use(state)


class Net(torch.nn.Module):
    def __init__(self, hiding):
        super().__init__()
        self.linear = torch.nn.Linear(FEATURES, CLASSES)
        self.hiding = hiding
        self.register_buffer("mean", torch.zeros(2))
        self.calls = 0

    def forward(self, x):
        if self.calls < 2:  # a list that grows with each call is no different the third time
            self.hiding.use()
        self.calls += 1
        return self.linear(x)


class Order(Sampler):
    def __init__(self, hiding):
        self.hiding = hiding

    def __iter__(self):
        self.hiding.use()
        return iter(range(SAMPLES))


class Data(Dataset):
    def __init__(self, hiding):
        self.hiding, self.reads = hiding, 0
        self.x, self.y = torch.randn(SAMPLES, FEATURES), torch.arange(SAMPLES) % CLASSES

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        if self.reads == 0:
            self.hiding.use()
        self.reads += 1
        self.x[i] += 0.25  # an augmentation that forgot to copy
        return self.x[i], self.y[i]


class Criterion(torch.nn.Module):
    def __init__(self, hiding):
        super().__init__()
        self.hiding, self.calls = hiding, 0

    def forward(self, output, target):
        if self.calls == 0:
            self.hiding.use()
        self.calls += 1
        return torch.nn.functional.cross_entropy(output, target)


class Wrapper:
    """A loader around a loader, as frameworks and people write them."""

    def __init__(self, loader, hiding):
        self.parts, self.hiding = [{"loader": loader}], hiding

    def __iter__(self):
        self.hiding.use()
        return iter(self.parts[0]["loader"])


class Job:
    """A training job; what is passed hides where its name says."""

    def __init__(self, model=None, criterion=None, sampler=None, data=None, wrapper=None, rule=RULES["SGD"]):
        nothing = Hiding({})
        self.model = Net(model or nothing)
        self.criterion = Criterion(criterion or nothing)
        self.optimizer = rule.make(self.model.parameters(), **rule.full)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        sets = ConcatDataset([Data(data or nothing), Subset(Data(nothing), range(4))])
        batches = BatchSampler(Order(sampler or nothing), 6, drop_last=False)
        loader = DataLoader(sets, batch_sampler=batches, generator=torch.Generator().manual_seed(1))
        self.loader = Wrapper(loader, wrapper or nothing)
        self.val_loader = DataLoader(Data(nothing), 8, sampler=RandomSampler(range(SAMPLES)))

    def range_test(self, **options):
        options = {"num_steps": 8, "end_lr": 0.01, "val_every": 3, "progress": False} | options
        given = (self.model, self.optimizer, self.criterion, self.loader, self.val_loader)
        return fastlr.range_test(*given, scaler=self.scaler, **options)

    def fingerprint(self):
        return fingerprint(**vars(self))


@each_state
def test_the_fingerprint_notices_each_change(make, use):
    state = make()
    before = fingerprint(state=state)
    assert differences(before, fingerprint(state=state)) == []
    use(state)
    assert bool(differences(before, fingerprint(state=state))) != (use is unused)


@each_state
@pytest.mark.parametrize("place", ["model", "sampler", "data"])
def test_each_hidden_state_is_put_back(make, use, place):
    job = Job(**{place: Hiding({"one": (make, use)})})
    before = job.fingerprint()
    job.range_test()
    assert differences(before, job.fingerprint()) == []


@with_rules
@pytest.mark.parametrize("backup", ["device", "host", "file"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_state_of_every_rule_is_put_back(rule, backup, repeats):
    job = Job(rule=rule)
    job.optimizer.set_schedule(**rule.drives)
    job.model.train()
    for step in range(3):
        for place, p in enumerate(job.model.parameters()):  # some of them begin late
            p.grad = None if step < place % 3 else torch.full_like(p, 0.1 * (step + 1))
        job.optimizer.step()
    job.optimizer.zero_grad()
    before = job.fingerprint()
    job.range_test(backup=backup, repeats=repeats)
    assert differences(before, job.fingerprint()) == []


@pytest.mark.parametrize("backup", ["device", "host", "file"])
@pytest.mark.parametrize("ending", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model", "criterion", "sampler", "data", "wrapper"])
def test_all_of_them_at_once_are_put_back_however_the_sweep_ends(place, ending, backup):
    job = Job(**{place: Hiding()})
    before, calls = job.fingerprint(), iter(range(1000))

    def metric(output, target):
        if ending is not None and next(calls) == 3:
            raise ending("stop here")
        return 0.0

    if ending is None:
        job.range_test(metric=metric, backup=backup, repeats=2)
    else:
        with pytest.raises(ending, match="stop here"):
            job.range_test(metric=metric, backup=backup)
    assert differences(before, job.fingerprint()) == []


def test_repeats_start_from_the_same_hidden_state():
    job, seen = Job(model=Hiding()), []
    handle = job.model.register_forward_pre_hook(
        lambda module, args: seen.append(fingerprint(hiding=module.hiding)) if module.calls == 0 else None
    )
    job.range_test(repeats=3)
    handle.remove()
    assert len(seen) == 3
    assert [differences(seen[0], later) for later in seen[1:]] == [[], []]


def test_loaders_that_a_model_holds_are_put_back_once_and_not_between_repeats():
    job = Job()
    job.model.loader, epochs = job.loader, []
    job.loader.epoch = 0
    inner = job.loader.parts[0]["loader"]

    class Counting(Sampler):
        epoch = 0

        def __iter__(self):
            self.epoch += 1
            epochs.append(self.epoch)
            return iter(range(SAMPLES))

    inner.batch_sampler.sampler = Counting()
    job.model.sampler = inner.batch_sampler.sampler
    job.range_test(repeats=3)
    assert epochs == sorted(set(epochs))  # each pass is another one
    assert "epoch" not in vars(inner.batch_sampler.sampler)


def test_the_global_generators_go_on_between_repeats_whoever_holds_them():
    job, drawn = Job(), []
    job.model.holds = [random.random, random.shuffle, np.random.rand, torch.default_generator]
    generators = (random.random, np.random.rand, lambda: float(torch.rand(())))
    job.model.register_forward_pre_hook(
        lambda module, args: drawn.append([draw() for draw in generators]) if module.training else None
    )
    before = random.getstate()
    job.range_test(repeats=2)
    assert all(len(set(numbers)) == 16 for numbers in zip(*drawn, strict=True))
    assert random.getstate() == before


def popped(pool):
    """A pool of samples most of which are used up, in a table that has room for all."""
    pool -= {i for i in range(200) if i % 13}
    return pool


SETS = {
    "untouched": (lambda: popped(set(range(200))), unused, True),
    "some more": (lambda: set(range(0, 64, 3)), lambda s: s.update({7, 71}), True),
    "one less": (lambda: set(range(0, 64, 3)), lambda s: s.discard(9), True),
    "refilled": (lambda: set(range(0, 64, 3)), lambda s: (s.clear(), s.update(range(900))), True),
    "enlarged": (lambda: popped(set(range(200))), lambda s: s.update(range(5000)), False),
}


@pytest.mark.parametrize(("make", "use", "in_order"), SETS.values(), ids=SETS.keys())
def test_the_order_of_a_set_is_as_before_or_the_notes_say_so(make, use, in_order):
    job = Job(sampler=Hiding({"set": (make, use)}))
    pool = job.loader.parts[0]["loader"].batch_sampler.sampler.hiding.states[0]
    before = list(pool)
    notes = [note for note in job.range_test(repeats=2).notes if "set" in note]
    assert sorted(pool) == sorted(before)
    assert (list(pool) == before) == in_order == (not notes)
    for note in notes:
        assert note.startswith(
            "train_loader.parts[0]['loader'].batch_sampler.sampler.hiding.states[0]: changed"
        )


class Counted(list):
    """Tells when somebody looks."""

    looks = 0

    def __iter__(self):
        self.looks += 1
        return super().__iter__()

    def __len__(self):
        self.looks += 1
        return super().__len__()


class Fleeting:
    """Its attributes are made anew each time."""

    __slots__ = ()

    @property
    def __dict__(self):
        return {"n": 1}


def test_classes_with_ways_of_their_own_are_put_back():
    job = Job()
    job.model.counted, job.model.fleeting = Counted([1, 2]), Fleeting()
    job.model.register_forward_pre_hook(lambda module, args: module.counted.append(3))
    job.range_test()
    assert list.__len__(job.model.counted) == 2
    assert job.model.counted.looks == 0


@pytest.mark.parametrize("left", [0, 8], ids=["freed", "cut"])
@pytest.mark.parametrize("backup", ["device", "host", "file"])
@pytest.mark.parametrize("place", ["model", "data"])
def test_a_tensor_whose_storage_was_freed_before_is_put_back(place, backup, left):
    hiding = Hiding({"tensor": (lambda: torch.ones(3, 2000), lambda t: t.resize_(9000).fill_(2))})
    hiding.states[0].untyped_storage().resize_(left)
    job = Job(**{place: hiding})
    before = job.fingerprint()
    job.range_test(backup=backup)
    assert differences(before, job.fingerprint()) == []


LEAVES = st.sampled_from(list(HIDDEN))
TREES = st.recursive(
    LEAVES,
    lambda parts: st.tuples(
        st.sampled_from(["list", "tuple", "dict", "deque", "object", "array", "module"]),
        st.lists(parts, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


def grown(tree, hiding):
    """The tree as objects; its leaves are kept with what uses them."""
    if isinstance(tree, str):
        make, use = HIDDEN[tree]
        hiding.states.append(make())
        hiding.uses.append(use)
        return hiding.states[-1]
    kind, parts = tree[0], [grown(part, hiding) for part in tree[1]]
    if kind == "dict":
        return dict(enumerate(parts))
    if kind == "object":
        return Plain(parts=parts, first=parts[0])
    if kind == "array":
        array = np.empty(len(parts), dtype=object)
        for i, part in enumerate(parts):
            array[i] = part
        return array
    if kind == "module":
        module = torch.nn.Module()
        module.parts = parts
        return module
    return {"list": list, "tuple": tuple, "deque": collections.deque}[kind](parts)


@settings(max_examples=25, deadline=None)
@given(tree=TREES, place=st.sampled_from(["model", "sampler", "data"]), interrupted=st.booleans())
def test_states_in_any_tree_of_objects_are_put_back(tree, place, interrupted):
    leaves, calls = Hiding({}), iter(range(100))
    root = grown(tree, leaves)
    hiding = Hiding({})
    hiding.root, hiding.uses, hiding.states = root, leaves.uses, leaves.states
    job = Job(**{place: hiding})
    before = job.fingerprint()

    def metric(output, target):
        if interrupted and next(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        job.range_test(metric=metric)
    assert differences(before, job.fingerprint()) == []


# -- data sets that are too large to be copied ---------------------------------------------------------


class InPlace(Dataset):
    """Large data, and a pass that writes into them."""

    def __init__(self, values, write):
        self.values, self.write, self.small = values, write, torch.zeros(3)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        self.small += 1
        if self.write is not None:
            self.write(self.values, i)
        return torch.as_tensor(self.values[i]).float() / 16_000, 0


LARGE = {
    "tensor": lambda: torch.arange(8000.0).view(8, 1000),
    "view": lambda: torch.arange(16000.0).view(16, 1000)[1::2],
    "tensor, transposed": lambda: torch.arange(8000.0).view(1000, 8).T,
    "array": lambda: np.arange(8000, dtype=np.float32).reshape(8, 1000),
    "array, strided": lambda: np.arange(16000, dtype=np.float32).reshape(8, 2000)[:, ::2],
    "array, transposed": lambda: np.arange(8000, dtype=np.float32).reshape(1000, 8).T,
}


def write_item(values, i):
    values[i] = values[i] + 1


def write_past_the_counter(values, i):
    (values.data if isinstance(values, torch.Tensor) else values)[i] += 1


def write_by_numpy(values, i):
    np.asarray(values)[i] += 1


def shuffle(values, i):
    values[[0, 1, 2, 3, 4]] = values[[1, 2, 3, 4, 0]]


WRITES = {"read": None, "item": write_item, "past the counter": write_past_the_counter}
WRITES |= {"by NumPy": write_by_numpy, "shuffled": shuffle}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
def test_large_data_are_not_copied_but_watched(make, write, monkeypatch):
    monkeypatch.setattr(snapshot, "LIMIT", 20_000)  # the data take 32,000 bytes
    dataset, model = InPlace(make(), write), torch.nn.Linear(1000, CLASSES)
    opt = fastlr.FusedSGD(model.parameters(), momentum=0.9)
    loader, cross_entropy = DataLoader(dataset, 4), torch.nn.functional.cross_entropy
    before = fingerprint(model=model, optimizer=opt, small=dataset.small)

    def run():
        return fastlr.range_test(model, opt, cross_entropy, loader, num_steps=12, progress=False)

    if write:
        with pytest.raises(RuntimeError, match=r"train_loader\.dataset\.values could not .* was written to"):
            run()
    else:
        assert run().notes[0] == "train_loader.dataset.values: too large to be copied, and watched instead"
    assert differences(before, fingerprint(model=model, optimizer=opt, small=dataset.small)) == []


def test_large_data_leave_room_for_the_state_of_samplers(monkeypatch):
    monkeypatch.setattr(snapshot, "LIMIT", 55_000)
    states = {name: HIDDEN[name] for name in ("set", "deque", "plain object", "random.Random")}
    job = Job(sampler=Hiding(states))
    job.loader.large = [torch.zeros(12_000), np.zeros(6_000), np.zeros(6_000)]
    before = job.fingerprint()
    (watched,) = [note for note in job.range_test().notes if "too large" in note]
    assert (
        watched == "train_loader.large[1], train_loader.large[2]: too large to be copied, and watched instead"
    )
    assert differences(before, job.fingerprint()) == []


def test_containers_that_are_too_large_are_named(monkeypatch):
    monkeypatch.setattr(snapshot, "LIMIT", 20 * 1024)
    job = Job()
    job.loader.names = [[f"sample {i}"] for i in range(100_000)]
    found = job.range_test()
    assert "train_loader.names" in found.notes[0]
    assert "too large to be copied or watched" in found.notes[0]


def test_a_data_set_on_disk_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "LIMIT", 50_000)
    job = Job()
    job.loader.memory = np.memmap(tmp_path / "data", np.float32, "w+", shape=(100_000,))
    job.loader.tensor = torch.from_file(str(tmp_path / "tensor"), shared=True, size=100_000)
    read = []
    monkeypatch.setattr(keeping.zlib, "crc32", lambda *_: read.append(1))
    (watched,) = [note for note in job.range_test().notes if "too large" in note]
    assert watched == "train_loader.tensor: too large to be copied, and watched instead"
    assert not read


# -- what cannot be put back ---------------------------------------------------------------------------


def running():
    yield 1


IN_FLIGHT = {
    "generator": (running, r"\.secret is a generator in the middle"),
    "list iterator": (lambda: iter([1]), r"\.secret is a list_iterator"),
    "zip": (lambda: zip([1], [2], strict=True), r"\.secret is a zip"),
    "itertools.count": (itertools.count, r"\.secret is a count"),
    "deep": (lambda: {"a": [Plain(b=(itertools.count(),))]}, r"\.secret\['a'\]\[0\]\.b\[0\] is a count"),
    "in a slot": (
        lambda: (s := Slotted(), setattr(s, "items", iter(())))[0],
        r"\.secret\.items is a tuple_it",
    ),
}


def test_a_generator_that_is_done_does_no_harm():
    job = Job()
    job.model.done = running()
    list(job.model.done)
    job.range_test()


@pytest.mark.parametrize("place", ["model", "loader", "criterion", "optimizer"])
@pytest.mark.parametrize(("make", "message"), IN_FLIGHT.values(), ids=IN_FLIGHT.keys())
def test_what_is_in_flight_is_refused_by_name_before_the_sweep(place, make, message):
    job = Job()
    getattr(job, place).secret = make()
    before = job.fingerprint()
    name = {"loader": "train_loader", "criterion": "loss_fn"}.get(place, place)
    with pytest.raises(TypeError, match=name + message):
        job.range_test()
    assert differences(before, job.fingerprint()) == []
    assert job.model.calls == 0


class Measure:
    def __init__(self):
        self.calls, self.values = 0, torch.zeros(2)

    def __call__(self, *arguments, **named):
        self.calls += 1
        self.values += 1
        return 0.0

    def method(self, *arguments):
        return self(*arguments)


def first_of(measure, *arguments, other=None):
    measure(*arguments)
    return other(*arguments) if other is not None else 0.0


def test_what_a_partial_function_is_made_of_is_put_back():
    job = Job()
    parts = [Measure() for _ in range(3)]
    criterion = functools.partial(functools.partial(job.criterion))
    metric = functools.partial(functools.partial(first_of, parts[0]), other=functools.partial(parts[1]))
    before = [job.fingerprint(), fingerprint(parts=parts)]
    given = (job.model, job.optimizer, criterion, job.loader, job.val_loader)
    fastlr.range_test(*given, metric=metric, num_steps=4, val_every=1, progress=False)
    after = [job.fingerprint(), fingerprint(parts=parts)]
    assert [differences(*pair) for pair in zip(before, after, strict=True)] == [[], []]
    # The object of a method is whoever tests, and remembers.
    metric = functools.partial(first_of, parts[0].method, other=parts[1].method)
    fastlr.range_test(*given, metric=metric, num_steps=4, val_every=1, progress=False)
    assert parts[0].calls == parts[1].calls > 0


class Unreadable(random.Random):
    def getstate(self):
        raise OSError("no state")


def test_what_cannot_be_read_is_refused_by_name():
    job = Job()
    job.model.secret = [Unreadable()]
    before = job.fingerprint()
    message = r"model\.secret\[0\] is a Unreadable whose state cannot be read, .* \(OSError: no state\)"
    with pytest.raises(TypeError, match=message):
        job.range_test()
    assert differences(before, job.fingerprint()) == []


def test_a_lazy_buffer_is_refused():
    job = Job()
    job.model.linear = torch.nn.Sequential(job.model.linear, torch.nn.LazyBatchNorm1d(affine=False))
    with pytest.raises(ValueError, match="uninitialized parameters or buffers"):
        job.range_test()


def test_a_pipe_is_refused_by_name():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with open(receiver.fileno(), "rb", closefd=False) as file, receiver, sender:
        job = Job()
        job.loader.stream = file
        with pytest.raises(TypeError, match=r"train_loader\.stream is a file without a position"):
            job.range_test()


def test_a_file_that_is_being_read_by_lines_is_refused_by_name():
    job = Job()
    job.loader.lines = text_file()
    next(job.loader.lines)
    with pytest.raises(TypeError, match=r"train_loader\.lines is a file .* is being read by next"):
        job.range_test()


def test_what_is_no_state_of_training_is_left_alone():
    job = Job()
    thread = type("Worker", (threading.Thread,), {})()
    job.model.others = [
        thread,
        threading.Lock(),
        threading.Event(),
        threading.current_thread(),
        types,
        Plain,
        torch.float32,
    ]
    job.model.lock, job.loader.module = threading.RLock(), random
    before = job.fingerprint()
    job.range_test()
    assert differences(before, job.fingerprint()) == []


# -- whatever fails, the rest is put back ----------------------------------------------------------------


class Stubborn(random.Random):
    """Can be read, but not put back."""

    def setstate(self, state):
        if getattr(self, "stubborn", False):
            raise OSError("no")
        super().setstate(state)


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt])
def test_a_failure_is_named_and_all_the_rest_is_put_back(ending):
    job = Job(model=Hiding(), data=Hiding())
    job.model.first, job.loader.other = Stubborn(), Stubborn()
    job.model.first.stubborn = job.loader.other.stubborn = True
    before, calls = job.fingerprint(), iter(range(100))

    def metric(output, target):
        if ending is not None and next(calls) == 2:
            raise ending
        return 0.0

    message = r"model\.first, train_loader\.other could not be put back .* \(OSError: no\); everything else"
    with pytest.raises(RuntimeError, match=message) as raised:
        job.range_test(metric=metric)
    assert differences(before, job.fingerprint()) == []  # nobody drew from these generators
    chain = [raised.value]
    while chain[-1] is not None:
        chain.append(chain[-1].__context__)
    assert ending is None or any(isinstance(error, ending) for error in chain)  # it is not forgotten


def test_a_lost_backup_is_said_and_the_rest_is_put_back(tmp_path):
    job, path = Job(), tmp_path / "backup.pt"
    order, seen = job.loader.parts, []

    def metric(output, target):
        job.loader.parts = list(job.loader.parts)
        path.unlink(missing_ok=True)
        seen.append(True)
        return 0.0

    with pytest.raises(RuntimeError, match="the backup could not be put back"):
        job.range_test(metric=metric, backup=path)
    assert seen
    assert job.loader.parts is order
