"""Ctrl-C, or any other exception, at a chosen place of a call."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType


def places(function: Callable[[], object]) -> int:
    """How many places of a call Ctrl-C can come up at."""
    return _Tracer(function, None, KeyboardInterrupt).count


def interrupted(
    function: Callable[[], object], place: int, error: type[BaseException] = KeyboardInterrupt
) -> bool:
    """Calls the function with an exception at one of its places; whether it was raised to the caller.

    CPython does not raise it where it closes a generator.

    CPython looks for signals where a Python function begins and where a call of native code returns (and
    where loops jump back, which mostly call something). A profile function is called at these places and no
    others, also for Python code that native code calls, and may raise.
    """
    return _Tracer(function, place, error).raised


def chosen(count: int, most: int, seed: int) -> Iterator[int]:
    """Some of so many places, all of them where there are no more than ``most``."""
    everything = range(count)
    yield from everything if count <= most else sorted(random.Random(seed).sample(everything, most))


class _Tracer:
    def __init__(self, function: Callable[[], object], place: int | None, error: type[BaseException]) -> None:
        self.count = 0
        self.raised = False
        self._place, self._error = place, error
        gc.disable()  # what it finalizes at random would count
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            sys.setprofile(self._visit)
            function()
        except error:
            self.raised = True
        finally:
            sys.setprofile(None)
            sys.unraisablehook = hook
            gc.enable()

    def _visit(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "c_return") or argument is sys.setprofile:
            return
        at, self.count = self.count, self.count + 1
        if at == self._place:
            sys.setprofile(None)
            raise self._error
