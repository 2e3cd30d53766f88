"""How far a command is: bars in a terminal, elsewhere a line for each stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

Advance: TypeAlias = Callable[[], object]


def bars_console() -> Console | None:
    """What draws bars on stderr; None where none can be: without rich, into a file, or in a notebook without
    ipywidgets, where rich would show a warning and no bar."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console(stderr=True)
    if console.is_jupyter:
        return console if find_spec("ipywidgets") else None
    return console if console.is_terminal else None


@contextmanager
def progress(wanted: bool) -> Iterator[Callable[[str, int], Advance]]:
    """Yields what begins a stage of so many runs and returns what to call after each of them."""
    if not wanted:
        yield lambda name, total: lambda: None
        return
    console = bars_console()
    if console is None:
        yield _print_stage
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:

        def stage(name: str, total: int) -> Advance:
            task = bars.add_task(name, total=total)
            return lambda: bars.advance(task)

        yield stage


def _print_stage(name: str, total: int) -> Advance:
    begin, done = time.perf_counter(), count(1)

    def advance() -> None:
        if next(done) == total:
            runs = f", {total} runs" if total > 1 else ""
            print(f"{name}{runs}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)

    return advance
