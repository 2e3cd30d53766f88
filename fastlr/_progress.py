"""How far a command is: bars in a terminal, elsewhere a line for each stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TypeAlias

Advance: TypeAlias = Callable[[], object]


@contextmanager
def progress(wanted: bool) -> Iterator[Callable[[str, int], Advance]]:
    """Yields what begins a stage of so many runs and returns what to call after each of them."""
    if not wanted:
        yield lambda name, total: lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield _print_stage
        return
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _print_stage
        return
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
