"""The command ``fastlr``: parses arguments, calls the library, prints."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import fastlr

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 1 after an error; usage errors exit with 2.

    Args:
        argv: the arguments; None: the process's.

    >>> main(["schedule", "cosine", "--start", "0.1", "--end", "0", "--steps", "100", "--at", "0", "50"])
    0 0.1
    50 0.05
    0
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        print("fastlr: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("matplotlib", "sklearn"):
            raise
        print(f"fastlr: error: {error}; pip install 'fastlr[demo]' brings it", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fastlr: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastlr", description=inspect.getdoc(fastlr))
    parser.add_argument("--version", action="version", version=f"fastlr {fastlr.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="range test, training and comparison on a real data set")
    demo.set_defaults(command=_demo)
    demo.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    demo.add_argument("--data-path", metavar="DIR", help="folder of Fashion-MNIST's four idx files")
    demo.add_argument("--out", metavar="DIR", default="report", help="where to write (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each policy (default: 5)")
    demo.add_argument("--updates", type=int, metavar="N", help="of each run (default: 1500, 2000)")

    doctor = commands.add_parser("doctor", help="what was built, what is used, and why CUDA is off")
    doctor.set_defaults(command=_doctor)

    schedule = commands.add_parser("schedule", help="draw any policy, or print its values")
    policies = schedule.add_subparsers(required=True, metavar="POLICY")
    for name, kind in _policies().items():
        text = _plain((inspect.getdoc(kind) or "").split("\n\n")[0])
        summary = text.split(". ")[0].rstrip(".:")
        _add_policy(policies.add_parser(name, help=summary, description=text), kind)
    return parser


# -- demo and doctor -----------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    from fastlr import demo

    report = demo.run(
        arguments.data,
        arguments.data_path,
        out=arguments.out,
        seeds=arguments.seeds,
        updates=arguments.updates,
    )
    found = report.found
    print(f"\nrange test: base_lr {found.base_lr:.2g}, max_lr {found.max_lr:.2g}\n")
    print(_aligned(report.table()))
    print("\n" + "\n".join(report.verdict()))
    print("\n" + textwrap.fill(demo.TABLE_NOTE, 100))
    print(f"\nreport: {report.files[-1]}")


def _doctor(arguments: argparse.Namespace) -> None:
    rows = []
    for key, value in fastlr.build_info().items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        rows.append([key.replace("_", " "), text])
    print(_aligned(rows))


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


# -- schedule ------------------------------------------------------------------------------------------

# The options of a policy are the fields of its dataclass; their help is its docstring.


def _policies() -> dict[str, type[fastlr.Schedule]]:
    """Every schedule that is made from numbers, under its name in snake case."""
    found: dict[str, type[fastlr.Schedule]] = {}
    for name in fastlr.schedules.__all__:
        kind = getattr(fastlr.schedules, name)
        if not (isinstance(kind, type) and issubclass(kind, fastlr.Schedule)) or kind is fastlr.Schedule:
            continue
        made_of_schedules = any("Schedule" in str(field.type) for field in dataclasses.fields(kind))
        if not made_of_schedules:
            found[re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()] = kind
    return found


def _plain(text: str) -> str:
    """Docstring markup as plain text on one line, safe in argparse's format strings."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")
    return " ".join(text.split()).replace("%", "%%")


def _add_policy(parser: argparse.ArgumentParser, kind: type[fastlr.Schedule]) -> None:
    hints, helps = get_type_hints(kind), _field_helps(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda field: bool(field.kw_only))
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        note = "" if required or field.default in (None, False) else f" (default: {field.default})"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            required=required,
            default=argparse.SUPPRESS,
            help=_plain(helps.get(field.name, "")) + note,
            **_option(hints[field.name]),
        )
    if "steps" not in (field.name for field in fields):
        help_text = "clock units to draw; to be given where the policy has no end"
        parser.add_argument("--steps", type=int, metavar="N", dest="drawn", help=help_text)
    parser.add_argument("--out", metavar="FILE", help="where to save the picture: .png, .svg, .pdf")
    parser.add_argument("--at", nargs="+", type=int, metavar="CLOCK", help="print the values at these clocks")
    parser.set_defaults(command=_schedule, kind=kind, drawn=None, parser=parser)


def _option(hint: Any) -> dict[str, Any]:
    """What argparse needs to know to read a value of a field's type."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {**_option(get_args(hint)[0]), "nargs": "+"}
    if hint is bool:
        return {"action": "store_true"}
    return {"type": hint, "metavar": "N" if hint is int else "X"}


def _field_helps(kind: type) -> dict[str, str]:
    """What the ``Args`` sections of a class and its bases say about each field."""
    helps: dict[str, str] = {}
    for base in kind.__mro__:
        section = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.cleandoc(base.__doc__ or ""), re.MULTILINE)
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.M):
            helps.setdefault(name, text)
    return helps


def _schedule(arguments: argparse.Namespace) -> None:
    if not arguments.out and not arguments.at:
        arguments.parser.error("give --out FILE for a picture, or --at CLOCK ... for values")
    names = {field.name for field in dataclasses.fields(arguments.kind)}
    schedule = arguments.kind(**{key: value for key, value in vars(arguments).items() if key in names})
    for clock in arguments.at or ():
        print(clock, schedule(clock))
    if arguments.out:
        schedule.plot(arguments.drawn, arguments.out)
        print(f"saved {arguments.out}")
