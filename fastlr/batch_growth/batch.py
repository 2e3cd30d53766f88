"""What a loader yields: data, and what the training loop has to know about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any


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

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """This batch with every tensor in its data moved or converted; arguments as ``Tensor.to``'s."""
        return dataclasses.replace(self, data=_each(self.data, lambda value: value.to(*args, **kwargs), "to"))

    def pin_memory(self) -> Batch:
        """This batch with every tensor in its data in pinned memory."""
        return dataclasses.replace(
            self, data=_each(self.data, lambda value: value.pin_memory(), "pin_memory")
        )

    def sync(self, model: object) -> AbstractContextManager[Any]:
        """A context for forward and backward in which ranks exchange gradients only if this ends an update.

        For ``DistributedDataParallel``, and whatever else has ``no_sync()``. It has to enclose the
        forward pass too: around the backward pass alone DDP still reduces.

        Args:
            model: any module; without ``no_sync()`` the context does nothing.
        """
        no_sync = getattr(model, "no_sync", None)
        if self.ends_update or not callable(no_sync):
            return nullcontext()
        context: AbstractContextManager[Any] = no_sync()
        return context


def _each(value: Any, change: Callable[[Any], Any], method: str) -> Any:
    """Nested data with ``change`` applied to whatever has the method."""
    if hasattr(value, method):
        return change(value)
    if isinstance(value, Mapping):
        changed = {key: _each(item, change, method) for key, item in value.items()}
        return changed if type(value) is dict else type(value)(changed)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(item, change, method) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, change, method) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _each(getattr(value, f.name), change, method) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
