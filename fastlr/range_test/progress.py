"""What a running test tells: a bar, and a few sentences."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fastlr._progress import bars_console

_log = logging.getLogger("fastlr.range_test")


class Progress(NamedTuple):
    """Attributes:
    advance: moves the bar by one update.
    say: tells a sentence: to the logger ``fastlr.range_test``, and where a bar is wanted on stderr too.
    """

    advance: Callable[[], object]
    say: Callable[[str], object]


@contextmanager
def progress(total: int, wanted: bool) -> Iterator[Progress]:
    """A bar for ``total`` updates, where it is wanted and can be shown: in a terminal or notebook."""

    def plain(text: str) -> None:
        _log.info(text)
        if wanted:
            print(f"range test: {text}", file=sys.stderr)

    console = bars_console() if wanted else None
    if console is None:
        yield Progress(lambda: None, plain)
        return
    from rich.progress import Progress as Bar

    def above(text: str) -> None:
        _log.info(text)
        console.print(f"range test: {text}", highlight=False, markup=False)

    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("range test", total=total)
        yield Progress(lambda: bar.advance(task), above)
