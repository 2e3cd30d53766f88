"""Single things and how to put each of them back in place: containers, attributes, arrays, tensors."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import operator
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Undo: TypeAlias = Callable[..., object]


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
        """What is to be copied: of an expanded tensor each value once; of one whose storage is too small for
        it, that storage."""
        if self._alias is None:
            return self._tensor.detach()
        values = self._alias
        if _reach(values) > self._size:  # freed, as sharding does, or cut: what there still is
            return torch.empty(0, dtype=torch.uint8, device=values.device).set_(values.untyped_storage())
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

    def summary(self) -> tuple[int, ...]:
        """Of what the tensor's memory holds: a checksum, or where it is not the host's the version counter,
        which misses what is written through ``.data`` or by other libraries."""
        if self._alias is None:
            return (self._tensor._version,)
        storage = self._alias.untyped_storage()
        size = storage.nbytes()
        if self._alias.device.type != "cpu" or storage.filename is not None:  # a file is far away
            return (self._alias._version, size)
        begin = int(self._alias.storage_offset()) * self._alias.element_size()
        end = min(_reach(self._alias), size)
        if begin >= end:
            return (0, size)
        # Not by NumPy: no storage that it has seen can be resized any more.
        memory = (ctypes.c_char * (end - begin)).from_address(storage.data_ptr() + begin)
        return (zlib.crc32(memory), size)

    def put_back_values(self, values: torch.Tensor | None) -> None:
        """Puts the memory back as it was; no values: they were not copied."""
        if self._alias is not None:
            storage = self._alias.untyped_storage()
            if storage.nbytes() != self._size:
                storage.resize_(self._size)
            if values is not None:
                self.values.copy_(values)
        elif values is not None:
            tensor = self._tensor
            if tensor.layout is torch.sparse_coo:  # how many values there are may differ
                tensor.data = values.to(tensor.device, copy=True)
                return
            if tensor.layout in _COMPRESSED and tensor._nnz() != values._nnz():
                tensor.resize_as_sparse_(values)
            tensor.copy_(values)

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
                if added is not None:
                    added.clear()  # autograd holds on to it
                setattr(tensor, name, hooks)


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _reach(tensor: torch.Tensor) -> int:
    """How many bytes of its storage a tensor needs."""
    if tensor.numel() == 0:
        return 0
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + sum(steps) + 1) * tensor.element_size()


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


def attributes_of(thing: object) -> dict[str, Any] | None:
    try:
        attributes = object.__getattribute__(thing, "__dict__")
        same = attributes is object.__getattribute__(thing, "__dict__")  # a property may make it anew
    except AttributeError:
        return None
    return attributes if same and isinstance(attributes, dict) else None


@functools.lru_cache(maxsize=1024)
def slots_of(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    """What ``__slots__`` of a class and its bases made; only classes written in Python have those."""
    return tuple(
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    )


def empty_slot(slot: types.MemberDescriptorType, thing: object) -> None:
    with contextlib.suppress(AttributeError):  # it is empty still
        slot.__delete__(thing)


def _same(a: Iterable[object], b: Iterable[object]) -> bool:
    return all(map(operator.is_, a, b))


# Containers that hold what they held are not touched: somebody may be looking at them.


def keep_dict(thing: dict[Any, Any]) -> tuple[dict[Any, Any], Undo]:
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


def keep_items(thing: Any, base: Any) -> tuple[Iterable[Any], Undo]:
    """Of a list or deque, by the methods of that type."""
    contents = list(base.__iter__(thing))

    def undo() -> None:
        if base.__len__(thing) == len(contents) and _same(base.__iter__(thing), contents):
            return
        base.clear(thing)
        base.extend(thing, contents)

    return contents, undo


# NOTE: [the order of a set]
# A set goes through its hash table, and where an item stands there depends on all that was ever added and
# discarded. No method of a set brings back a table, and none shows where pop() would go on. What was added is
# discarded, and the rest added, which keeps the order as long as the table was not enlarged; else the set is
# filled anew. Where neither gives the order of before, that is told.


def keep_set(thing: set[Any], reordered: Callable[[], object]) -> tuple[Iterable[Any], Undo]:
    """Calls ``reordered`` when the items could be put back, but not their order."""
    contents = list(set.__iter__(thing))

    def as_before() -> bool:
        return set.__len__(thing) == len(contents) and _same(set.__iter__(thing), contents)

    def undo() -> None:
        if as_before():
            return
        before = set(map(id, contents))
        set.difference_update(thing, [item for item in set.__iter__(thing) if id(item) not in before])
        set.update(thing, contents)
        if as_before():
            return
        set.clear(thing)
        set.update(thing, contents)
        if not as_before():
            reordered()

    return contents, undo


def is_locked(values: np.ndarray[Any, Any]) -> bool:
    """Whether nobody can write to it, other than through what it is a view of."""
    if values.flags.writeable:
        return False
    try:
        values.flags.writeable = True
    except ValueError:
        return True
    values.flags.writeable = False
    return False


def keep_array(values: np.ndarray[Any, Any]) -> Undo:
    """Of an array that is not locked."""
    before, writeable = values.copy(order="K"), values.flags.writeable
    # One that owns its memory can be made writeable again. Another may be the only way to its memory, such as
    # one of a tensor's; a view from when it was writeable remains so.
    owns = values.flags.owndata or not writeable
    view = values if owns else np.ndarray.view(values, np.ndarray)

    def undo() -> None:
        if values.dtype != before.dtype:
            values.dtype = before.dtype  # type: ignore[misc]
        if values.shape != before.shape:
            if values.size == before.size:
                values.shape = before.shape
            else:
                values.resize(before.shape, refcheck=False)
        if not view.flags.writeable:
            view.flags.writeable = True
        np.copyto(view, before)
        if values.flags.writeable != writeable:
            values.flags.writeable = writeable

    return undo


def is_mapped(values: np.ndarray[Any, Any]) -> bool:
    base: Any = values
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def checksum(values: np.ndarray[Any, Any]) -> int:
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
