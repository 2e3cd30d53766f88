"""What can be reached from some objects, and how to put all of it back as it was.

The walk follows attributes, slots, containers, and what only leads to others: views, bound methods, also
those of native types, partial functions and the like. It stops at what cannot change (numbers, strings,
functions, classes) and at what is no state of training and must not be wound back: modules, loggers, threads,
processes, locks, sockets, and PyTorch's own machinery.
Objects are put back in place: the same dict with the entries of before, in their order.
"""

from __future__ import annotations

import array
import collections
import copy
import ctypes
import enum
import functools
import gc
import io
import logging
import mmap
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset, Sampler

from fastlr._runtime import Runtime
from fastlr.range_test.keeping import (
    KeptTensor,
    Path,
    Undo,
    attributes_of,
    checksum,
    empty_slot,
    is_locked,
    is_mapped,
    keep_array,
    keep_dict,
    keep_items,
    keep_set,
    slots_of,
)

# NOTE: [what is copied of loaders]
# Of a model all is copied: that is the price of a range test. What a loader holds may be the whole data set.
# A copy of that would double the memory it takes, for data that hardly anybody writes to. So the walk, which
# reaches the near before the far, copies up to this many bytes of tensors and arrays, and as much again of
# objects and containers, so that a sampler's state is not left out for large data. It watches tensors and
# arrays that do not fit in, by a checksum, which costs about half a second for each GiB, twice. Memory of
# devices and of files is not read for that: version counters of tensors see what PyTorch's functions write.
LIMIT = 2**28

# What an object costs besides its contents: an entry among those seen, its path, its dict and the undo.
_OVERHEAD = 1024

_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, range, type(None), type(Ellipsis), torch.dtype}
    | {torch.device, torch.Size, types.FunctionType, types.ModuleType, type}
)
_INERT = (
    *(type, types.ModuleType, types.FunctionType, types.CodeType),
    *(enum.Enum, functools._lru_cache_wrapper, np.generic, np.dtype),
    *(logging.Filterer, threading.Thread, BaseProcess),
)
# Whoever runs the test puts these back, at the end; between repeats they go on.
_GLOBAL_GENERATORS = frozenset(
    map(id, (random.random.__self__, np.random.rand.__self__, torch.default_generator))  # type: ignore[attr-defined]
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
_CTYPES: tuple[type, ...] = (
    ctypes._SimpleCData,
    ctypes.Array,
    ctypes.Structure,
    ctypes.Union,
    ctypes._Pointer,
)
# Objects that cannot change and lead to others, with the attributes that do.
_LINKS: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__self__",),
    types.BuiltinMethodType: ("__self__",),
    types.MethodWrapperType: ("__self__",),
    functools.partial: ("func", "args", "keywords"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    slice: ("start", "stop", "step"),
    memoryview: ("obj",),
    BaseException: ("args", "__cause__", "__context__"),
    np.random.Generator: ("bit_generator",),
}
# The same without attributes: what they show is found by the garbage collector's means.
_VIEWS: tuple[type, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))

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
        reordered: sets that hold what they held, once that is put back, but in another order.
        loaders: the DataLoaders.
        data: loaders, samplers and data sets that a walk without a limit met; it leaves them to one with.
    """

    def __init__(self, others: dict[int, object] | None = None, limit: int | None = None) -> None:
        self.seen: dict[int, object] = {}
        self.undo: list[tuple[Path, Undo]] = []
        self.tensors: list[KeptTensor] = []
        self.watched: list[tuple[Path, Callable[[], bool]]] = []
        self.beyond: list[Path] = []
        self.reordered: list[Path] = []
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
        if id(thing) in _GLOBAL_GENERATORS:
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
        elif issubclass(kind, torch.UntypedStorage):
            self._tensor(torch.empty(0, dtype=torch.uint8, device=thing.device).set_(thing), path)
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
            if base is set:
                items, undo = keep_set(thing, lambda: self.reordered.append(path))
            else:
                items, undo = keep_items(thing, base)
            self.undo.append((path, undo))
            self._meet_all(enumerate(items), path)
        return True

    def _dict(self, thing: dict[Any, Any], path: Path) -> dict[Any, Any]:
        contents, undo = keep_dict(thing)
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
        if issubclass(kind, tuple(_LINKS)):
            for name in next(_LINKS[base] for base in _LINKS if issubclass(kind, base)):
                self._meet(getattr(thing, name), path, f".{name}")
        elif issubclass(kind, _VIEWS):
            for held in gc.get_referents(thing):
                self._meet(held, path, "")
        elif issubclass(kind, random.Random):
            if not issubclass(kind, random.SystemRandom):
                self.undo.append((path, functools.partial(thing.setstate, thing.getstate())))
        elif issubclass(kind, torch.Generator):
            self.undo.append((path, functools.partial(thing.set_state, thing.get_state())))
        elif issubclass(kind, np.random.RandomState):
            self.undo.append((path, functools.partial(thing.set_state, thing.get_state(legacy=False))))
        elif issubclass(kind, np.random.BitGenerator):
            state = copy.deepcopy(thing.state)
            self.undo.append((path, functools.partial(setattr, thing, "state", state)))
            self._meet(getattr(thing, "seed_seq", None), path, ".seed_seq")
        elif issubclass(kind, np.random.SeedSequence):  # it counts the children that it has spawned
            state = thing.__reduce__()[2]
            self.undo.append((path, lambda: thing.__setstate__(state)))
        elif issubclass(kind, _CTYPES):
            content, address = bytes(thing), ctypes.addressof(thing)
            self.undo.append((path, lambda: ctypes.memmove(address, content, len(content))))
            self._meet(thing._objects, path, "._objects")
        elif issubclass(kind, mmap.mmap):
            if not thing.closed:
                self.undo.append((path, functools.partial(thing.seek, thing.tell())))
        else:
            return False
        return True

    def _attributes(self, thing: object, path: Path, kind: type) -> bool:
        """Whether it has attributes, once those are kept."""
        attributes, slots = attributes_of(thing), slots_of(kind)
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
                if attributes_of(thing) is not attributes:
                    object.__setattr__(thing, "__dict__", attributes)

            self.undo.append((path, undo_class))
        for slot in slots:
            try:
                value = slot.__get__(thing, kind)
            except AttributeError:
                self.undo.append((path, functools.partial(empty_slot, slot, thing)))
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
                f"{path} is a file without a position to go back to, as a pipe, or one that is being read by "
                "next(); open it where it is read, or set it to None for the test"
            )
        self.undo.append((path, functools.partial(file.seek, position)))  # next(file) rules out tell()

    # -- NumPy's and PyTorch's -----------------------------------------------------------------------

    def _array(self, values: np.ndarray[Any, Any], path: Path) -> None:
        if is_mapped(values):
            return  # a file, and as far away as those
        if is_locked(values):
            self._meet(values.base, path, ".base")
        elif self._affords("data", values.nbytes):
            self.undo.append((path, keep_array(values)))
            if values.dtype == object:
                self._meet_all(enumerate(values.flat), path, ".flat[{}]")
        elif values.dtype.hasobject:
            self.beyond.append(path)
        else:
            before = checksum(values)
            self.watched.append((path, lambda: checksum(values) == before))

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
        if _is_stale(tensor):
            return
        kept = KeptTensor(tensor, path)
        if tensor.is_inference():
            pass  # nothing can write to it
        elif self._affords("data", kept.bytes):
            kept.copied = True
        else:
            before = kept.summary()
            self.watched.append((path, lambda: kept.summary() == before))
        self.tensors.append(kept)
        self._meet(kept.gradient, path, ".grad")
        for name, hooks in kept.hooks.items():
            self._meet(hooks, path, f".{name}")
        # Those of what FSDP1 has flattened are its own, which it makes once, at the first forward pass.
        if not (is_traceable_wrapper_subclass(tensor) or Runtime.is_flattened(tensor)):
            self._attributes(tensor, path, type(tensor))


def _is_stale(tensor: torch.Tensor) -> bool:
    """Whether it is a view that autograd lets nobody read any more, as its base was written to.

    Such are the attributes of modules that FSDP1 makes anew, as parts of its flat parameter, in each forward
    pass, and leaves behind.
    """
    try:
        tensor.grad_fn  # noqa: B018
    except RuntimeError:
        return True
    return False


def _is_constant(thing: object) -> bool:
    kind = type(thing)
    return kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, thing)))  # type: ignore[call-overload]


def _is_machinery(kind: type) -> bool:
    module = str(kind.__module__)
    if module == _SHARED_NUMBERS or issubclass(kind, _CTYPES):
        return False  # types of pointers are of the module that asked first for one, as importlib may
    return (module + ".").startswith(_MACHINERY)
