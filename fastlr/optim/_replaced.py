"""What becomes of an optimizer or a scheduler whose place another one has taken."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

# NOTE: [what is replaced]
# What would move or change an optimizer or a scheduler that nobody asks any more raises, and what tells of it
# says that it is of then. All else works: zero_grad() and unscale_() are about the parameters, which are the
# new one's, too. Nothing of the object's data changes, so that copies of it can go on.

# What changes an optimizer, of torch's and ours.
CHANGES = ("step", "load_state_dict", "add_param_group", "register_step_pre_hook", "register_step_post_hook")


class _Refused:
    """A method that raises RuntimeError, bound or not. It knows no object, which would keep that alive."""

    def __init__(self, message: str) -> None:
        self._message = message
        self.replaced = True  # its own, as what wraps a step takes over

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(self._message)

    def __get__(self, instance: object, owner: type | None = None) -> _Refused:
        return self

    @property
    def __func__(self) -> _Refused:
        """As torch's schedulers ask a bound method for it, to wrap that."""
        return self


def replace(old: Any, what_happened: str, instead: Mapping[str, str], reads: tuple[str, ...] = ()) -> None:
    """Lets methods of what nobody uses any more raise RuntimeError, see NOTE: [what is replaced].

    Args:
        old: an optimizer, or a scheduler.
        what_happened: in words.
        instead: the methods' names, ``step`` among them, and what to do in place of each.
        reads: those that go on, and warn.
    """
    kind, was = type(old), f"of a {type(old).__name__} that {what_happened}"
    there = {name: remedy for name, remedy in instead.items() if hasattr(kind, name)}
    refused = {name: _Refused(f"{name}() {was}; {remedy}") for name, remedy in there.items()}
    there_too = [name for name in reads if hasattr(kind, name)]  # timm's schedulers tell no rates
    told = {name: f"{name}() {was}: it says what was then; ask that one" for name in there_too}
    if isinstance(old, torch.optim.Optimizer):
        alive = weakref.ref(old)
        for name, method in refused.items():
            setattr(old, name, method)  # not in its state, nor in copies
        for name, message in told.items():
            setattr(old, name, _reading(getattr(kind, name), message, alive))
        return
    # A scheduler's state_dict is all that it holds itself, so that this has to be its class's.
    read = {name: _reading(getattr(kind, name), message) for name, message in told.items()}
    copied = {"__reduce__": lambda self: (object.__new__, (kind,), vars(self))}
    old.__class__ = type(kind.__name__, (kind,), {**refused, **read, **copied, "__module__": kind.__module__})


def _reading(
    method: Callable[..., Any], message: str, alive: weakref.ref[Any] | None = None
) -> Callable[..., Any]:
    """A method that warns. alive: the object, where it is not given, as to an object's own attribute."""

    def read(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(message, UserWarning, stacklevel=2)
        return method(*args, **kwargs) if alive is None else method(alive(), *args, **kwargs)

    return read


def is_replaced(old: Any) -> bool:
    """Whether another one has taken its place."""
    return getattr(old.step, "replaced", False)


def own_method(optimizer: torch.optim.Optimizer, kind: type) -> str | None:
    """A method by which an optimizer does something else than its known class, and nobody else would.

    Args:
        kind: that class, whose methods do what is expected.
    """
    step: Any = getattr(optimizer.step, "__func__", optimizer.step)  # which schedulers wrap
    if inspect.unwrap(step) is not inspect.unwrap(kind.step):  # type: ignore[attr-defined]
        return "step"
    others = ("zero_grad", "add_param_group", "state_dict", "load_state_dict")
    return next((name for name in others if getattr(type(optimizer), name) is not getattr(kind, name)), None)
