"""What an object graph looks like, to be compared with what it looks like later.

``fingerprint(model=model, loader=loader)`` maps the path of everything that can be reached to a
description: its type, its identity, and what it holds. ``differences(before, after)`` lists what is not as
before. Nothing of fastlr is used, so that what fastlr leaves out is not left out here too: attributes, slots,
containers, and, for whatever is implemented natively, what pickle would store.
"""

from __future__ import annotations

import array
import collections
import ctypes
import functools
import gc
import hashlib
import io
import mmap
import pickle
import types
import weakref

import numpy as np
import torch

ATOMS = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    range,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    np.generic,
)
GLOBAL = (type, types.ModuleType, types.FunctionType)
# What only leads to others.
LINKS = {
    types.MethodType: ("__self__",),
    types.BuiltinMethodType: ("__self__",),
    types.MethodWrapperType: ("__self__",),
    functools.partial: ("func", "args", "keywords"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    slice: ("start", "stop", "step"),
    BaseException: ("args",),
}


class Fingerprint(dict):
    """Path to description. Holds what it describes, so that no identity is given to another object."""

    def __init__(self):
        super().__init__()
        self.held = {}


def fingerprint(**roots) -> Fingerprint:
    found, queue = Fingerprint(), collections.deque(roots.items())
    while queue:
        path, thing = queue.popleft()
        if isinstance(thing, ATOMS):
            found[path] = (type(thing).__name__, repr(thing))
        elif id(thing) in found.held:
            found[path] = ("again", id(thing))
        else:
            found.held[id(thing)] = thing
            content, children = _describe(thing)
            # Tuples and bound methods are made anew all the time, without anything being changed.
            fleeting = isinstance(thing, (tuple, *LINKS))
            found[path] = (type(thing).__name__, None if fleeting else id(thing), content)
            queue.extend((f"{path}{step}", child) for step, child in children)
    return found


def differences(before: Fingerprint, after: Fingerprint) -> list[str]:
    """What appeared, vanished or changed, one line each."""
    paths = dict.fromkeys([*before, *after])
    return [
        f"{path}: {before.get(path, 'missing')} -> {after.get(path, 'missing')}"
        for path in paths
        if before.get(path) != after.get(path)
    ]


def _describe(thing):
    """What a thing holds itself, and the things that it refers to, by name."""
    if isinstance(thing, GLOBAL):
        return None, []
    if isinstance(thing, torch.Tensor):
        return _describe_tensor(thing)
    children = _attributes(thing)
    if isinstance(thing, np.ndarray):
        content = (thing.shape, thing.strides, str(thing.dtype), thing.flags.writeable)
        if thing.dtype.hasobject:
            return content, [*children, *((f".flat[{i}]", value) for i, value in enumerate(thing.flat))]
        return (*content, _digest(thing.tobytes())), children
    if isinstance(thing, dict):
        children += [(f"[{_name(key)}]", value) for key, value in thing.items()]
        children += [(f".key({_name(key)})", key) for key in thing]
        return [_name(key) for key in thing], children
    if isinstance(thing, (set, frozenset)):
        return list(map(_name, thing)), [*children, *((f"{{{_name(x)}}}", x) for x in thing)]
    if isinstance(thing, (list, tuple, collections.deque)):
        return len(thing), [*children, *((f"[{i}]", value) for i, value in enumerate(thing))]
    if isinstance(thing, (bytearray, array.array)):
        return _digest(bytes(thing)), children
    if isinstance(thing, (ctypes._SimpleCData, ctypes.Array, ctypes.Structure)):
        return bytes(thing), children
    if isinstance(thing, weakref.ref):
        return None, [*children, ("()", thing())]
    for kind, names in LINKS.items():
        if isinstance(thing, kind):
            name = getattr(thing, "__name__", None)
            return name, [*children, *((f".{name}", getattr(thing, name)) for name in names)]
    if isinstance(thing, (types.MappingProxyType, type({}.values()))):
        return None, [(f"({i})", held) for i, held in enumerate(gc.get_referents(thing))]
    if isinstance(thing, memoryview):
        return bytes(thing), [(".obj", thing.obj)]
    if isinstance(thing, ctypes._Pointer):
        return (bytes(thing), bytes(thing.contents)), []
    if isinstance(thing, mmap.mmap):
        return thing.tell(), children
    if isinstance(thing, torch.UntypedStorage):
        return [*thing], children
    if isinstance(thing, torch.Generator):
        return _digest(thing.get_state().numpy().tobytes()), children
    if isinstance(thing, np.random.Generator):
        return None, [*children, (".bit_generator", thing.bit_generator)]
    if isinstance(thing, np.random.BitGenerator):  # with what NumPy 1 does not store
        return _pickled(thing), [*children, (".seed_seq", thing.seed_seq)]
    if isinstance(thing, (io.BytesIO, io.StringIO)):
        return (thing.getvalue(), thing.tell()), children
    if isinstance(thing, io.IOBase):
        try:
            return (thing.closed or not thing.readable() or thing.tell()), children
        except OSError:
            return "somewhere between its lines", children
    native = not hasattr(thing, "__dict__") or type(thing).__module__ in ("random", "functools")
    return _pickled(thing) if native else None, children


def _describe_tensor(tensor):
    content = [
        tuple(tensor.shape),
        str(tensor.dtype),
        str(tensor.device),
        tensor.requires_grad,
        tensor.is_leaf,
    ]
    values = tensor.detach()
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        content += [tensor.stride(), tensor.storage_offset(), storage.nbytes(), storage._cdata]
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if tensor.numel() and (tensor.storage_offset() + reach) * tensor.element_size() > storage.nbytes():
            content.append("its storage is too small for it")
        else:
            # A copy, as no storage that NumPy has seen can be resized.
            values = values.cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
            content.append(_digest(values.numpy().tobytes()))
    elif tensor.layout is not torch.sparse_coo:  # compressed
        by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        outer = ("crow_indices", "col_indices") if by_rows else ("ccol_indices", "row_indices")
        parts = [getattr(values, name)() for name in (*outer, "values")]
        content.append(_digest(b"".join(part.clone().numpy().tobytes() for part in parts)))
    else:
        values = values.coalesce()
        content.append(_digest(values.indices().numpy().tobytes() + values.values().numpy().tobytes()))
    children = _attributes(tensor)
    if tensor.is_leaf:
        children.append((".grad", tensor.grad))
    hooks = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    return [*content, [len(h or ()) for h in hooks]], children


def _attributes(thing):
    found = list(getattr(thing, "__dict__", {}).items())
    for kind in type(thing).__mro__:
        if "__slots__" in vars(kind):
            members = [m for m in vars(kind).values() if isinstance(m, types.MemberDescriptorType)]
            found += [(member.__name__, getattr(thing, member.__name__, "empty")) for member in members]
    return [(f".{name}", value) for name, value in found]


def _pickled(thing):
    """What pickle would store, where it would."""
    try:
        return _digest(pickle.dumps(thing))
    except (TypeError, AttributeError, pickle.PicklingError):
        return None


def _name(key):
    return repr(key) if isinstance(key, (*ATOMS, tuple)) else f"{type(key).__name__} {id(key)}"


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
