"""The ranks' exchange of gradients, held back while an update's gradients are added up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def no_sync(model: Any) -> AbstractContextManager[Any]:
    """A context for forward and backward in which ranks exchange no gradients, whoever shares the model.

    ``DistributedDataParallel`` and FSDP1 have one of this name, FSDP2 a switch. With any other model it does
    nothing.
    """
    if callable(getattr(model, "no_sync", None)):
        context: AbstractContextManager[Any] = model.no_sync()
        return context
    if callable(getattr(model, "set_requires_gradient_sync", None)):
        return _switched_off(model)
    return nullcontext()


@contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
