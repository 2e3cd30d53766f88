"""Ctrl-C, or any other exception, at a chosen place of a call."""

from __future__ import annotations

import gc
import inspect
import random
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType


def places(function: Callable[[], object], until: str | None = None) -> int:
    """How many places of a call Ctrl-C can come up at; up to the beginning of a function of that name."""
    tracer = _Tracer(function, None, KeyboardInterrupt, until)
    return tracer.count if until is None else tracer.names_at


def interrupted(
    function: Callable[[], object], place: int, error: type[BaseException] = KeyboardInterrupt
) -> bool:
    """Calls the function with an exception at one of its places; whether it was raised to the caller.

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
    def __init__(
        self,
        function: Callable[[], object],
        place: int | None,
        error: type[BaseException],
        name: str | None = None,
    ) -> None:
        self.count = 0
        self.names_at = -1
        self.raised = False
        self._place, self._error, self._name = place, error, name
        gc.disable()  # what it finalizes at random would count
        try:
            sys.setprofile(self._visit)
            function()
        except error:
            self.raised = True
        finally:
            sys.setprofile(None)
            gc.enable()

    def _visit(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "c_return") or argument is sys.setprofile:
            return
        if event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # raised here, it would end a generator without its own except and finally
        at, self.count = self.count, self.count + 1
        if self.names_at < 0 and event == "call" and frame.f_code.co_name == self._name:
            self.names_at = at
        if at == self._place:
            sys.setprofile(None)
            handler = signal.getsignal(signal.SIGINT)
            if self._error is KeyboardInterrupt and callable(handler):
                return handler(signal.SIGINT, frame)  # which raises, or keeps it for later
            raise self._error
