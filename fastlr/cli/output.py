"""What the commands have in common: how they are described, and how they print."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastlr


def add_command(
    commands: Any,
    name: str,
    summary: str,
    description: str,
    *,
    examples: Sequence[str],
    command: Callable[[argparse.Namespace], None] | None = None,
) -> argparse.ArgumentParser:
    """A command, whose help ends with examples.

    Args:
        commands: what ``add_subparsers()`` returned.
        summary: of one line, for the list of commands.
        command: what runs it; None: its own commands do.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=_Help,
    )
    if command is not None:
        parser.set_defaults(command=command)
    return parser


class Parser(argparse.ArgumentParser):
    """Takes -1e-3 and -inf for values, too, so that they are refused by their range and not for an option
    without its value. Older argparse knows -1 and -0.5 only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples, and of nothing else."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def plain(text: str) -> str:
    """Docstring markup as plain text on one line."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")
    return " ".join(text.split())


def argument_helps(docstring: str | None) -> dict[str, str]:
    """What the ``Args`` section of a docstring says about each argument, for argparse."""
    section = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.cleandoc(docstring or ""), re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: plain(text).replace("%", "%%") for name, text in found}


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


@contextmanager
def printing() -> Iterator[None]:
    """Around all that is printed: what the encoding of stdout lacks becomes a question mark, and what stdout
    does not take is an error here, where it can be said, and not when the process ends.

    Raises:
        OSError: as of writing to stdout; BrokenPipeError: nobody reads it any more.
    """
    out = sys.stdout
    errors = getattr(out, "errors", None)
    if errors is not None and hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")
    try:
        yield
    finally:
        try:
            if out is not None:  # it is None where stdout is closed
                out.flush()
        except OSError:
            # What is left in the buffer is written once more when the process ends: to nowhere.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, out.fileno())
            os.close(nowhere)
            raise
        finally:
            if errors is not None and hasattr(out, "reconfigure"):
                out.reconfigure(errors=errors)


def print_error(error: BaseException) -> None:
    """What went wrong, on stderr; and where, if that is in code that the command was given.

    That nobody reads stdout any more, as behind ``| head -1``, is nothing to speak of.
    """
    given = [frame for frame in traceback.extract_tb(error.__traceback__) if not _installed(frame.filename)]
    if isinstance(error, BrokenPipeError) and not given:
        return
    print(*traceback.format_list(given), sep="", end="", file=sys.stderr)
    print(f"fastlr: error: {str(error) or type(error).__name__}", file=sys.stderr)


def _installed(file: str) -> bool:
    """Whether it is of fastlr, of another package or of Python."""
    path = Path(file)
    libraries = (Path(fastlr.__file__).parent, Path(sysconfig.get_path("stdlib")))
    return (
        file.startswith("<")
        or any(map(path.is_relative_to, libraries))
        or not {"dist-packages", "site-packages"}.isdisjoint(path.parts)
    )
