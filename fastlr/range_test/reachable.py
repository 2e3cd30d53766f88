"""What can be reached from some objects, and how to put all of it back as it was.

The walk follows attributes, slots, containers, the objects of bound methods and of partial functions. It
stops at what cannot change (numbers, strings, functions, classes) and at what is no state of training and
must not be wound back: modules, loggers, threads, processes, locks, sockets, and PyTorch's own machinery.
Objects are put back in place: the same dict with the entries of before, in their order.
"""

from __future__ import annotations

import array
import collections
import contextlib
import copy
import ctypes
import enum
import functools
import io
import logging
import operator
import random
import sys
import threading
import types
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset, Sampler

Undo: TypeAlias = Callable[..., object]

# NOTE: [what is copied of loaders]
# Of a model all is copied: that is the price of a range test. What a loader holds may be the whole data set.
# A copy of that would double the memory it takes, for data that hardly anybody writes to. So the walk, which
# reaches the near before the far, copies up to this many bytes of tensors and arrays, and as much again of
# objects and containers, so that a sampler's state is not left out for large data. It watches tensors and
# arrays that do not fit in: the first have version counters, the second a checksum, which costs about a
# second for each GiB.
LIMIT = 2**28

# What an object costs besides its contents: an entry among those seen, its path, its dict and the undo.
_OVERHEAD = 1024

_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, range, slice, type(None), type(Ellipsis), torch.dtype}
    | {torch.device, torch.Size, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type}
)
_INERT = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType),
    *(enum.Enum, functools._lru_cache_wrapper, np.generic, np.dtype),
    *(logging.Filterer, threading.Thread, BaseProcess),
)
# With the attribute that is None when they are done.
_IN_FLIGHT: dict[type, str] = {
    types.GeneratorType: "gi_frame",
    types.CoroutineType: "cr_frame",
    types.AsyncGeneratorType: "ag_frame",
}
# With the bytes that an entry takes, about.
_CONTAINERS: dict[type, int] = {
    dict: 24,
    set: 24,
    list: 8,
    collections.deque: 8,
    array.array: 8,
    bytearray: 1,
}
_CTYPES: tuple[type, ...] = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union)

# Objects of these packages have state in C++, on other ranks or in other threads that belongs together with
# their attributes, such as whether they have been set up; or they run the training that the test is called
# from, and lead from its model to all that there is. Those are left alone.
_LIGHTNING, _FABRIC = ("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric")
_MACHINERY = tuple(
    f"{name}."
    for name in (
        *("torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch._inductor", "torch._functorch"),
        *("torch.jit", "torch.multiprocessing", "multiprocessing", "threading", "_thread", "concurrent"),
        *("asyncio", "subprocess", "socket", "logging", "importlib"),
        *(f"{lightning}.{part}" for lightning in _LIGHTNING for part in ("trainer", "loops", "strategies")),
        *(f"{fabric}.{part}" for fabric in _FABRIC for part in ("fabric", "strategies", "connector")),
    )
)
_SHARED_NUMBERS = "multiprocessing.sharedctypes"


class Path(NamedTuple):
    """How an object was reached."""

    parent: Path | None
    step: str

    def __str__(self) -> str:
        steps, path = [], self
        while path.parent is not None:
            steps.append(path.step)
            path = path.parent
        return "".join([path.step, *reversed(steps)])


class CannotPutBackError(TypeError):
    """Something was met whose state could not be put back; the message names it."""


class Reachable:
    """What can be reached from some objects.

    Args:
        others: objects that the walk leaves out, as another has them.
        limit: bytes of tensors and arrays to copy, and bytes of other objects; None: all.

    Attributes:
        seen: the objects walked, by their id; they live as long as this.
        undo: what puts each of them back, besides the tensors.
        tensors: the tensors, whose values the caller keeps.
        watched: what is too large to be copied: asks whether it is still as it was.
        beyond: containers that are too large to be copied, or hold too much to be walked.
        loaders: the DataLoaders.
        data: loaders, samplers and data sets that a walk without a limit met; it leaves them to one with.
    """

    def __init__(self, others: dict[int, object] | None = None, limit: int | None = None) -> None:
        self.seen: dict[int, object] = {}
        self.undo: list[tuple[Path, Undo]] = []
        self.tensors: list[KeptTensor] = []
        self.watched: list[tuple[Path, Callable[[], bool]]] = []
        self.beyond: list[Path] = []
        self.loaders: list[DataLoader[Any]] = []
        self.data: list[tuple[Path, object]] = []
        self._others = {} if others is None else others
        self._limited = limit is not None
        self._left = {"data": limit or 0, "objects": limit or 0}
        self._queue: collections.deque[tuple[Path, Any]] = collections.deque()

    def add(self, *roots: tuple[Path, object]) -> None:
        """Walks from some objects.

        Raises:
            CannotPutBackError: the walk meets something whose state cannot be read or put back.
            MemoryError: there is no room for the copies.
        """
        for path, thing in roots:
            self._meet(thing, path, "")
        while self._queue:
            where, found = self._queue.popleft()
            try:
                self._visit(found, where, type(found))
            except (CannotPutBackError, MemoryError):
                raise
            except Exception as error:
                raise CannotPutBackError(
                    f"{where} is a {type(found).__name__} whose state cannot be read, and so not put back "
                    f"({type(error).__name__}: {error}); set it to None for the test"
                ) from error

    def _meet(self, thing: object, parent: Path, step: str) -> None:
        if _is_constant(thing) or id(thing) in self.seen or id(thing) in self._others:
            return
        path = Path(parent, step) if step else parent
        self.seen[id(thing)] = thing
        self._queue.append((path, thing))

    def _meet_all(self, pairs: Iterable[tuple[object, object]], path: Path, form: str = "[{!r}]") -> None:
        pairs = [pair for pair in pairs if not _is_constant(pair[1])]
        if not self._affords("objects", _OVERHEAD * len(pairs)):
            self.beyond.append(path)
            return
        for name, value in pairs:
            self._meet(value, path, form.format(name))

    def _affords(self, kind: Literal["data", "objects"], size: int) -> bool:
        if not self._limited:
            return True
        if size > self._left[kind]:
            return False
        self._left[kind] -= size
        return True

    def _visit(self, thing: Any, path: Path, kind: type) -> None:
        # By type and not by isinstance(), which asks proxies and mocks for what they stand for.
        if kind in (weakref.ProxyType, weakref.CallableProxyType) or issubclass(kind, _INERT):
            return
        if issubclass(kind, torch.Tensor):
            self._tensor(thing, path)
        elif issubclass(kind, torch.nn.Module):
            self._module(thing, path)
        elif issubclass(kind, weakref.ref):
            self._meet(thing(), path, "()")  # it lives on, so that no entry of a weak dict vanishes
        elif issubclass(kind, (DataLoader, Dataset, Sampler)) and not self._limited:
            del self.seen[id(thing)]
            self.data.append((path, thing))
        elif _is_machinery(kind) and not issubclass(kind, (torch.optim.Optimizer, torch.amp.GradScaler)):
            return
        elif issubclass(kind, np.ndarray):
            self._array(thing, path)
            self._attributes(thing, path, kind)
        elif issubclass(kind, io.IOBase):
            self._file(thing, path, kind)
        else:
            if issubclass(kind, DataLoader):
                self.loaders.append(thing)
            known = self._container(thing, path, kind) or self._native(thing, path, kind)
            has_attributes = self._attributes(thing, path, kind)
            if hasattr(kind, "__next__") and not (known or has_attributes):
                raise CannotPutBackError(
                    f"{path} is a {kind.__name__}, and what the sweep takes from an iterator cannot be put "
                    "back; keep what it iterates over and a position instead, or set it to None for the test"
                )

    # -- Python's own ------------------------------------------------------------------------------

    def _container(self, thing: Any, path: Path, kind: type) -> bool:
        """Whether it is a container, once its contents are kept."""
        if issubclass(kind, (tuple, frozenset)):
            self._meet_all(enumerate(thing), path)
            return True
        if not issubclass(kind, tuple(_CONTAINERS)):
            return False
        # By the methods of the built-in type: those of a class derived from it may do more.
        base: Any = next(b for b in _CONTAINERS if issubclass(kind, b))
        if not self._affords("objects", _CONTAINERS[base] * base.__len__(thing)):
            self.beyond.append(path)
        elif base is dict:
            contents = self._dict(thing, path)
            self._meet_all(contents.items(), path)
            self._meet_all(enumerate(contents), path, ".keys()[{}]")
        elif base in (bytearray, array.array):
            before = base.__getitem__(thing, slice(None))
            self.undo.append((path, functools.partial(base.__setitem__, thing, slice(None), before)))
        else:
            items, undo = _keep_items(thing, base)
            self.undo.append((path, undo))
            self._meet_all(enumerate(items), path)
        return True

    def _dict(self, thing: dict[Any, Any], path: Path) -> dict[Any, Any]:
        contents, undo = _keep_dict(thing)
        self.undo.append((path, undo))
        return contents

    def _native(self, thing: Any, path: Path, kind: type) -> bool:
        """Whether it is an object whose state lies elsewhere than in attributes, once that is kept."""
        if kind in _IN_FLIGHT:
            if getattr(thing, _IN_FLIGHT[kind]) is None:
                return True
            raise CannotPutBackError(
                f"{path} is a {kind.__name__} in the middle of its work, which cannot be put back; make it "
                "where it is used, or set it to None for the test"
            )
        if issubclass(kind, types.MethodType):
            self._meet(thing.__self__, path, ".__self__")
        elif issubclass(kind, functools.partial):
            for name in ("func", "args", "keywords"):
                self._meet(getattr(thing, name), path, f".{name}")
        elif issubclass(kind, random.Random):
            if not issubclass(kind, random.SystemRandom):
                self.undo.append((path, functools.partial(thing.setstate, thing.getstate())))
        elif issubclass(kind, torch.Generator):
            self.undo.append((path, functools.partial(thing.set_state, thing.get_state())))
        elif issubclass(kind, np.random.RandomState):
            self.undo.append((path, functools.partial(thing.set_state, thing.get_state(legacy=False))))
        elif issubclass(kind, np.random.Generator):
            self._meet(thing.bit_generator, path, ".bit_generator")
        elif issubclass(kind, np.random.BitGenerator):
            state = copy.deepcopy(thing.state)
            self.undo.append((path, functools.partial(setattr, thing, "state", state)))
            self._meet(getattr(thing, "seed_seq", None), path, ".seed_seq")
        elif issubclass(kind, np.random.SeedSequence):  # it counts the children that it has spawned
            state = thing.__reduce__()[2]
            self.undo.append((path, lambda: thing.__setstate_cython__(state)))
        elif issubclass(kind, _CTYPES):
            content, address = bytes(thing), ctypes.addressof(thing)
            self.undo.append((path, lambda: ctypes.memmove(address, content, len(content))))
        else:
            return False
        return True

    def _attributes(self, thing: object, path: Path, kind: type) -> bool:
        """Whether it has attributes, once those are kept."""
        attributes, slots = _attributes_of(thing), _slots(kind)
        if attributes is None and not slots:
            return False
        if attributes is not None and id(attributes) not in self.seen:  # some objects share theirs
            self.seen[id(attributes)] = attributes
            contents = self._dict(attributes, path)
            if issubclass(kind, DataLoader):
                contents = {name: value for name, value in contents.items() if name != "_iterator"}
            self._meet_all(contents.items(), path, ".{}")

            def undo_class() -> None:
                if type(thing) is not kind:
                    object.__setattr__(thing, "__class__", kind)
                if _attributes_of(thing) is not attributes:
                    object.__setattr__(thing, "__dict__", attributes)

            self.undo.append((path, undo_class))
        for slot in slots:
            try:
                value = slot.__get__(thing, kind)
            except AttributeError:
                self.undo.append((path, functools.partial(_empty_slot, slot, thing)))
                continue
            self.undo.append((path, functools.partial(slot.__set__, thing, value)))
            self._meet(value, path, f".{slot.__name__}")
        return True

    def _file(self, file: Any, path: Path, kind: type) -> None:
        """Keeps a file's position, and what stands in one in memory.

        A file's contents are out of reach, and a file that is only written to goes on at its end.
        """
        if file.closed or file is sys.stdin or file is sys.__stdin__:
            return
        if issubclass(kind, (io.BytesIO, io.StringIO)):
            self.undo.append((path, functools.partial(file.__setstate__, file.__getstate__())))
            return
        try:
            if not file.readable():
                return
            position = file.tell()
            seekable = file.seekable()
        except OSError:
            seekable = False
        if not seekable:
            raise CannotPutBackError(
                f"{path} is a file without a position to go back to; open it where it is read, or set it to "
                "None for the test"
            )
        self.undo.append((path, lambda: file.tell() == position or file.seek(position)))

    # -- NumPy's and PyTorch's -----------------------------------------------------------------------

    def _array(self, values: np.ndarray[Any, Any], path: Path) -> None:
        if _is_mapped(values):
            return  # a file, and as far away as those
        if self._affords("data", values.nbytes):
            self.undo.append((path, _keep_array(values)))
            if values.dtype == object:
                self._meet_all(enumerate(values.flat), path, ".flat[{}]")
        elif values.dtype.hasobject:
            self.beyond.append(path)
        elif values.flags.writeable:
            before = _checksum(values)
            self.watched.append((path, lambda: _checksum(values) == before))

    def _module(self, module: torch.nn.Module, path: Path) -> None:
        for name in ("_parameters", "_buffers", "_modules"):
            contents = getattr(module, name)
            if not isinstance(contents, dict):  # as those of a scripted module, which are made when asked for
                self._meet_all(contents.items(), path, ".{}")
            elif id(contents) not in self.seen:
                self.seen[id(contents)] = contents
                self._meet_all(self._dict(contents, path).items(), path, ".{}")
        if not _is_machinery(type(module)):
            self._attributes(module, path, type(module))
        self.undo.append((path, functools.partial(setattr, module, "training", module.training)))

    def _tensor(self, tensor: torch.Tensor, path: Path) -> None:
        kept = KeptTensor(tensor, path)
        if tensor.is_inference():
            pass  # nothing can write to it
        elif self._affords("data", kept.bytes):
            kept.copied = True
        else:
            version = kept.version
            self.watched.append((path, lambda: kept.version == version))
        self.tensors.append(kept)
        self._meet(kept.gradient, path, ".grad")
        for name, hooks in kept.hooks.items():
            self._meet(hooks, path, f".{name}")
        if not is_traceable_wrapper_subclass(tensor):
            self._attributes(tensor, path, type(tensor))


class KeptTensor:
    """A tensor: where it lies, what else it has, and the part of its memory that holds its values.

    Attributes:
        path: how it was reached.
        copied: whether its values are kept.
    """

    def __init__(self, tensor: torch.Tensor, path: Path) -> None:
        self.path, self.copied = path, False
        self._tensor = tensor
        # An alias stays where the tensor was when `.data =`, set_() or resize_() makes that lie elsewhere.
        self._alias = tensor.detach() if _is_plain(tensor) else None
        self._size = 0 if self._alias is None else self._alias.untyped_storage().nbytes()
        self._requires_grad, self._leaf = tensor.requires_grad, tensor.is_leaf
        self.gradient = tensor.grad if tensor.is_leaf else None
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        self.hooks: dict[str, Any] = {name: getattr(tensor, name) for name in hooks}

    @property
    def values(self) -> torch.Tensor:
        """What is to be copied: of an expanded tensor each value once."""
        if self._alias is None:
            return self._tensor.detach()
        values = self._alias
        for dimension, (n, stride) in enumerate(zip(values.shape, values.stride(), strict=True)):
            if stride == 0 and n > 1:
                values = values.narrow(dimension, 0, 1)
        return values

    @property
    def bytes(self) -> int:
        values = self.values
        if values.layout is torch.sparse_coo:
            values = values._values()
        elif values.layout in _COMPRESSED:
            values = values.values()
        return values.numel() * values.element_size()

    @property
    def version(self) -> int:
        """Of what the tensor's memory holds."""
        return (self._tensor if self._alias is None else self._alias)._version

    def put_back_values(self, values: torch.Tensor | None) -> None:
        """Puts the memory back as it was; no values: they were not copied."""
        if self._alias is not None:
            storage = self._alias.untyped_storage()
            if storage.nbytes() != self._size:
                storage.resize_(self._size)
            if values is not None:
                self.values.copy_(values)
        elif values is not None:
            if self._tensor.layout in (torch.sparse_coo, *_COMPRESSED):  # how many there are may differ
                self._tensor.data = values.to(self._tensor.device, copy=True)
            else:
                self._tensor.copy_(values)

    def put_back_tensor(self) -> None:
        """Makes the tensor lie in that memory again, with the gradient and hooks that it had."""
        tensor = self._tensor
        if self._alias is not None and _place(tensor) != _place(self._alias):
            tensor.data = self._alias
        if tensor.is_inference():
            return
        if self._leaf:
            if not tensor.is_leaf:
                tensor.detach_()
            if tensor.requires_grad != self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self.gradient:
                tensor.grad = self.gradient
        for name, hooks in self.hooks.items():
            added = getattr(tensor, name)
            if added is not hooks:
                added.clear()  # autograd holds on to it
                setattr(tensor, name, hooks)


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _is_constant(thing: object) -> bool:
    kind = type(thing)
    return kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, thing)))  # type: ignore[call-overload]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has a storage and strides."""
    if tensor.layout is not torch.strided or tensor.is_nested or is_traceable_wrapper_subclass(tensor):
        return False
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # some accelerators show none
        return False
    return True


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata  # which one, as all empty ones have one address
    at = (tensor.device, tensor.dtype, storage, tensor.storage_offset())
    return (*at, tensor.shape, tensor.stride())


def _is_machinery(kind: type) -> bool:
    module = str(kind.__module__)
    return (module + ".").startswith(_MACHINERY) and module != _SHARED_NUMBERS


def _attributes_of(thing: object) -> dict[str, Any] | None:
    try:
        attributes = object.__getattribute__(thing, "__dict__")
        same = attributes is object.__getattribute__(thing, "__dict__")  # a property may make it anew
    except AttributeError:
        return None
    return attributes if same and isinstance(attributes, dict) else None


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """What ``__slots__`` of a class and its bases made; only classes written in Python have those."""
    return tuple(
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    )


def _empty_slot(slot: types.MemberDescriptorType, thing: object) -> None:
    with contextlib.suppress(AttributeError):  # it is empty still
        slot.__delete__(thing)


def _same(a: Iterable[object], b: Iterable[object]) -> bool:
    return all(map(operator.is_, a, b))


# Containers that hold what they held are not touched: somebody may be looking at them.


def _keep_dict(thing: dict[Any, Any]) -> tuple[dict[Any, Any], Undo]:
    # An OrderedDict keeps its order besides the dict, so that dict's own methods must not be used on it.
    base: Any = collections.OrderedDict if isinstance(thing, collections.OrderedDict) else dict
    contents = dict(base.items(thing))

    def undo() -> None:
        same = dict.__len__(thing) == len(contents)
        if same and _same(base.keys(thing), contents) and _same(base.values(thing), contents.values()):
            return
        base.clear(thing)
        for key, value in contents.items():
            base.__setitem__(thing, key, value)

    return contents, undo


def _keep_items(thing: Any, base: Any) -> tuple[Iterable[Any], Undo]:
    """Of a list, deque or set, by the methods of that type."""
    contents = set(set.__iter__(thing)) if base is set else list(base.__iter__(thing))
    add = set.update if base is set else base.extend

    def undo() -> None:
        if base.__len__(thing) == len(contents):
            if base is not set and _same(base.__iter__(thing), contents):
                return
            if base is set and {id(x) for x in set.__iter__(thing)} == {id(x) for x in contents}:
                return
        base.clear(thing)
        add(thing, contents)

    return contents, undo


def _keep_array(values: np.ndarray[Any, Any]) -> Undo:
    before, writeable = values.copy(order="K"), values.flags.writeable

    def undo() -> None:
        if values.shape != before.shape:
            if values.size == before.size:
                values.shape = before.shape
            else:
                values.resize(before.shape, refcheck=False)
        try:
            values.flags.writeable = True
        except ValueError:
            return  # nobody else can write to it either
        np.copyto(values, before)
        values.flags.writeable = writeable

    return undo


def _is_mapped(values: np.ndarray[Any, Any]) -> bool:
    base: Any = values
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def _checksum(values: np.ndarray[Any, Any]) -> int:
    return functools.reduce(lambda so_far, part: zlib.crc32(part, so_far), _parts(values), 0)


def _parts(values: np.ndarray[Any, Any]) -> Iterator[Any]:
    """The bytes, in pieces that take little memory where they have to be gathered first."""
    if values.flags.c_contiguous:
        yield values.reshape(-1).view(np.uint8)
    elif values.flags.f_contiguous:
        yield from _parts(values.T)
    elif values.ndim == 1:
        yield from _parts(np.ascontiguousarray(values))
    else:
        for part in values:
            yield from _parts(part)
