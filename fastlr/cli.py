"""The command ``fastlr``: parses arguments, calls the library, prints."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import inspect
import os
import re
import sys
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

import fastlr
from fastlr._checks import file_name, texts
from fastlr._files import write_text

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
    arguments = _parser().parse_args(None if argv is None else texts("argv", argv))
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
    except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
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

    _add_range_test(commands.add_parser("range-test", help="find the bounds for a model of your own"))

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


# -- range test ----------------------------------------------------------------------------------------


def _add_range_test(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs a learning-rate range test and writes its picture, its curve and what it says. Exits with 0 "
        "when there are bounds, with 1 when there are none."
    )
    parser.add_argument(
        "factory",
        metavar="MODULE:FUNCTION",
        help="function without arguments that returns what to test: a dict of range_test's arguments, or a "
        "tuple (model, optimizer, loss_fn, train_loader[, val_loader]); looked for in this folder, too",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="report", help="where to write (default: %(default)s)"
    )
    options = {"start-lr": float, "end-lr": float, "num-steps": int, "sweep": str, "staircase": int}
    options |= {"val-every": int, "val-batches": int, "accumulate": int, "repeats": int, "backup": str}
    for name, kind in options.items():
        help_text = "as range_test's argument; goes before what the function says"
        metavar = {int: "N", float: "X", str: "WORD"}[kind]
        parser.add_argument(
            f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=help_text
        )
    parser.add_argument("--no-progress", dest="progress", action="store_false", default=argparse.SUPPRESS)
    parser.set_defaults(command=_range_test)


def _range_test(arguments: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401  # to be missed before the test, not after it

    folder = _writable_folder("--out", arguments.out)
    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "factory", "out")}
    if given.get("backup", "device") not in ("device", "host", "file"):
        given["backup"] = Path(given["backup"])
    found = fastlr.range_test(**{**_made(arguments.factory), **given})
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    found.plot(folder / "range_test.png")
    found.to_csv(folder / "range_test.csv")
    found.to_json(folder / "range_test.json")
    write_text(folder / "range_test.txt", found.summary() + "\n")
    print(found.summary())
    print(f"\nreport: {folder / 'range_test.png'}, .csv, .json, .txt")
    if not found:
        raise ValueError(f"the range test gives no bounds: {found.reason}")


def _writable_folder(option: str, name: str) -> Path:
    """A folder that is there or can be made, which shows before the work that it is for."""
    folder = Path(file_name(option, name))
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    return folder


def _made(name: str) -> dict[str, Any]:
    """What a function named ``package.module:function`` returns, as range_test's arguments."""
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"the factory must be given as package.module:function, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"there is no module {error.name} in this folder or among what is installed"
        ) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no function {function_name}")
    made = factory()
    if isinstance(made, tuple) and len(made) in (4, 5):
        made = dict(zip(("model", "optimizer", "loss_fn", "train_loader", "val_loader"), made, strict=False))
    known = inspect.signature(fastlr.range_test).parameters
    if not isinstance(made, dict) or not {"model", "optimizer"} <= set(made) <= set(known):
        got = sorted(map(str, made)) if isinstance(made, dict) else type(made).__name__
        raise ValueError(
            f"{name} must return a tuple (model, optimizer, loss_fn, train_loader[, val_loader]) or a dict "
            f"of range_test's arguments, got {got}"
        )
    return made


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
