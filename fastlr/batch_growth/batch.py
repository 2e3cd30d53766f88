"""What a loader yields: data, and what the training loop has to know about it."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from fastlr._exchange import no_sync


@dataclass(frozen=True, eq=False)
class Batch:
    r"""One micro-batch of a :class:`fastlr.GrowingLoader`.

    **Weight.** A mean loss over the micro-batch, times ``weight``, adds up to the mean over the update:
    with n of its B samples here and W ranks it is :math:`W n / B`. The W is there because
    ``DistributedDataParallel`` divides the ranks' sum by it.

    Attributes:
        data: what the collate function made of the samples.
        samples: how many there are, on this rank.
        weight: see above; with the loader's ``count`` its numbers stand in place of n and B.
        position: samples of the run, over all ranks, before this update: the clock of the plan's rates.
        global_batch: samples of the update, over all ranks and micro-batches.
        epoch: in which it is yielded, and its update begins; from 0.
        starts_update: whether it is the update's first micro-batch.
        ends_update: whether it is the last: now ``opt.step()``.
        full: whether the update has the batch size of its phase, and is no tail.
        ranks: that share the update.
        tokens: of the samples, by the plan's ``sequence_length``, or else what the loader's ``count`` says;
            None: there is neither, or the count is no whole number.
        global_tokens: the same of the update, over all ranks and micro-batches.
    """

    data: Any
    samples: int
    weight: float
    position: int
    global_batch: int
    epoch: int
    starts_update: bool
    ends_update: bool
    full: bool = True
    ranks: int = 1
    tokens: int | None = None
    global_tokens: int | None = None

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """This batch with every tensor in its data moved or converted; arguments as ``Tensor.to``'s.

        Looks into mappings, sequences and dataclasses, which keep their types; whatever has a method ``to``
        of its own is asked by it.

        Raises:
            TypeError: a container of another type can neither be copied nor made anew from its items.
        """
        return dataclasses.replace(self, data=_each(self.data, lambda value: value.to(*args, **kwargs), "to"))

    def pin_memory(self) -> Batch:
        """This batch with every tensor in its data in pinned memory; see :meth:`to`."""
        return dataclasses.replace(
            self, data=_each(self.data, lambda value: value.pin_memory(), "pin_memory")
        )

    def sync(self, model: object) -> AbstractContextManager[Any]:
        """A context for forward and backward in which ranks exchange gradients only if this ends an update.

        For ``DistributedDataParallel``, ``FullyShardedDataParallel`` and whatever else has ``no_sync()``, and
        for what ``fully_shard`` has sharded. It has to enclose the forward pass too: around the backward pass
        alone DDP still reduces.

        Args:
            model: any module; where ranks do not share it, the context does nothing.
        """
        return nullcontext() if self.ends_update else no_sync(model)


def _each(value: Any, change: Callable[[Any], Any], method: str) -> Any:
    """Nested data with ``change`` applied to whatever has the method.

    A container that holds such a thing is copied, so that it keeps its type and what else it knows (a
    ``defaultdict`` its factory); one that cannot be written into is made anew from its items. Others stay.
    """
    if isinstance(value, (type, str, bytes)):
        return value
    if callable(getattr(value, method, None)):
        # A container may well move its own items, as transformers' BatchEncoding does.
        return change(copy.copy(value) if isinstance(value, (MutableMapping, MutableSequence)) else value)
    if isinstance(value, Mapping):
        old = dict(value.items())
    elif isinstance(value, Sequence):
        old = dict(enumerate(value))
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        old = {name: getattr(value, name) for name in names if hasattr(value, name)}
    else:
        return value
    new = {key: _each(item, change, method) for key, item in old.items()}
    return value if all(new[key] is item for key, item in old.items()) else _with(value, new)


def _with(container: Any, items: dict[Any, Any]) -> Any:
    """The container with these items in place of its own, in its type."""
    if isinstance(container, (MutableMapping, MutableSequence)):
        return _refilled(container, items)
    if not isinstance(container, (Mapping, Sequence)):  # a dataclass
        container = copy.copy(container)
        for name, item in items.items():
            object.__setattr__(container, name, item)  # a frozen one's, too
        return container
    values: Any = items if isinstance(container, Mapping) else list(items.values())
    kind: Any = type(container)
    try:
        return kind._make(values) if hasattr(kind, "_make") else kind(values)
    except Exception as error:
        raise TypeError(
            f"a {kind.__name__} in a batch's data cannot be made anew from a {type(values).__name__} of its "
            "items; give it methods to(...) and pin_memory(), or let collate_fn return a dict or a tuple"
        ) from error


def _refilled(container: Any, items: dict[Any, Any]) -> Any:
    """A copy that has these items, while the container keeps its own."""
    before = {key: container[key] for key in items}
    new = copy.copy(container)
    if not isinstance(new, (dict, list, deque)) and not hasattr(new, "__copy__"):
        # A copy of a class of one's own shares its attributes, one of which may hold the items.
        for name, value in list(getattr(new, "__dict__", {}).items()):
            if isinstance(value, (dict, list, deque)):
                vars(new)[name] = copy.copy(value)
    for key, item in items.items():
        new[key] = item
    if all(container[key] is item for key, item in before.items()):
        return new
    for key, item in before.items():
        container[key] = item
    raise TypeError(
        f"a {type(new).__name__} in a batch's data cannot be copied: its copies share what holds its items; "
        "give it a method __copy__(), or to(...) and pin_memory()"
    )
