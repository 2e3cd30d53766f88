"""What the commands have in common: how they are described, and how they print."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any


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
