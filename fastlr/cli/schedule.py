"""``fastlr schedule``: any policy in the terminal, as a picture, or in numbers.

The options of a policy are the fields of its dataclass; their help is its docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import warnings
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import fastlr
from fastlr import plotting
from fastlr._checks import file_name
from fastlr._extras import extra
from fastlr.cli.output import add_command, add_json, argument_helps, plain, print_json
from fastlr.plotting.schedules import shown_steps, shown_values

# What is drawn in the terminal: so many rows, each of a stretch that is looked at in so many places.
_ROWS, _PLACES = 24, 1000
_MOST_VALUES = 1_000_000  # in JSON, some 30 MB of it

# What rich draws bars of, from an eighth to the whole of a place, and what stands for it in plain ASCII.
_BLOCKS = str.maketrans("\u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588", "   #####")

_EXAMPLES = {
    "cosine": "--start 0.1 --end 0 --steps 9000",
    "one_cycle": "--max-lr 0.4 --total-steps 9000 --out lr.png",
    "triangular2": "--base 0.001 --max 0.006 --step-size-up 2000 --steps 20000",
}


def add(commands: Any) -> None:
    """Adds the command to what ``add_subparsers()`` returned."""
    parser = add_command(
        commands,
        "schedule",
        "draw any policy, or print its values",
        "Draws a policy in the terminal, saves its picture with --out, or prints its values with --at.",
        examples=[
            *(f"fastlr schedule {name} {options}" for name, options in _EXAMPLES.items()),
            "fastlr schedule step_decay --start 0.1 --every 30 --gamma 0.5 --at 0 29 30 --json",
            "fastlr schedule triangular2 --help",
        ],
    )
    policies = parser.add_subparsers(required=True, metavar="POLICY")
    for name, kind in _policies().items():
        text = plain((inspect.getdoc(kind) or "").split("\n\n")[0])
        summary = text.split(". ")[0].rstrip(".:").replace("%", "%%")
        _add_policy(policies.add_parser(name, help=summary, description=text), kind)


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


def _add_policy(parser: argparse.ArgumentParser, kind: type[fastlr.Schedule]) -> None:
    hints = get_type_hints(kind)
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        helps |= argument_helps(base.__doc__)
    fields = sorted(dataclasses.fields(kind), key=lambda field: bool(field.kw_only))
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        note = "" if required or field.default in (None, False) else f" (default: {field.default})"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            required=required,
            default=argparse.SUPPRESS,
            help=helps.get(field.name, "") + note,
            **_option(hints[field.name]),
        )
    if "steps" not in (field.name for field in fields):
        help_text = "clock units to show; to be given where the policy has no end"
        parser.add_argument("--steps", type=int, metavar="N", dest="drawn", help=help_text)
    parser.add_argument("--out", metavar="FILE", help="save a picture: .png, .svg, .pdf")
    parser.add_argument("--at", nargs="+", type=int, metavar="CLOCK", help="print the values at these clocks")
    add_json(parser)
    parser.set_defaults(command=_schedule, kind=kind, drawn=None)


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


def _schedule(arguments: argparse.Namespace) -> None:
    names = {field.name for field in dataclasses.fields(arguments.kind)}
    schedule = arguments.kind(**{key: value for key, value in vars(arguments).items() if key in names})
    saved = None
    if arguments.out is not None:  # whatever fails does so before anything is printed
        file_name("--out", arguments.out)
        saved = plotting.save(schedule.plot(arguments.drawn), arguments.out, bbox_inches="tight")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        if arguments.json:
            print_json(_as_json(schedule, arguments.at, arguments.drawn))
            return
        values = [(clock, schedule(clock)) for clock in arguments.at or ()]
    for clock, value in values:
        print(clock, value)
    if saved is not None:
        print(f"saved {saved}")
    elif not arguments.at:
        _draw(schedule, arguments.drawn)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Without the line of code that it comes from, which says nothing to whoever typed a command."""
    print(f"fastlr: warning: {message}", file=sys.stderr)


def _as_json(schedule: fastlr.Schedule, at: list[int] | None, steps: int | None) -> dict[str, Any]:
    """The schedule, as its ``from_dict()`` reads it, and its values at some clocks or at all."""
    if at is None:
        shown = _shown(schedule, steps)
        if shown > _MOST_VALUES:
            raise ValueError(f"{type(schedule).__name__} has {shown:,} values to print: pick some with --at")
        at = list(range(shown))
    return {
        "schedule": schedule.to_dict(),
        "quantity": schedule.quantity,
        "duration": schedule.duration,
        "clocks": at,
        "values": [schedule(clock) for clock in at],
    }


def _shown(schedule: fastlr.Schedule, steps: int | None) -> int:
    """How many clock units to show, none of them past the schedule's end."""
    steps = shown_steps({type(schedule).__name__: schedule}, steps)
    return steps if schedule.last is None else min(steps, schedule.last + 1)


def _draw(schedule: fastlr.Schedule, steps: int | None) -> None:
    """A bar for each stretch of the clock, from zero to the highest value in it.

    Bars, and not a curve from a library that draws those: rich is what the progress is shown with already,
    and its rows have room for the numbers, which are what one looks for.
    """
    with extra("cli"):
        from rich.bar import Bar
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table

    shown = _shown(schedule, steps)
    starts = sorted({shown * row // _ROWS for row in range(_ROWS)})
    stretches = []
    for start, stop in zip(starts, [*starts[1:], shown], strict=True):
        _, values = shown_values(schedule, start, stop, _PLACES)
        stretches.append((start, values.tolist()))
    top = max(value for _, values in stretches for value in values)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", expand=True)
    table.title = f"{type(schedule).__name__}: {schedule.quantity}, {shown:,} {schedule.unit}s"
    table.add_column(f"{schedule.unit}s from", justify="right")
    table.add_column("lowest", justify="right")
    table.add_column("highest", justify="right")
    table.add_column("", ratio=1)
    for start, values in stretches:
        bar = Bar(top or 1.0, 0.0, max(values), color="blue")
        table.add_row(f"{start:,}", f"{min(values):.4g}", f"{max(values):.4g}", bar)
    console = Console(highlight=False)
    # Where a terminal is narrower than the numbers, it breaks the lines; rich would cut the numbers.
    least = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.width = max(console.width, least)
    if not console.options.ascii_only:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    print(captured.get().translate(_BLOCKS), end="")
