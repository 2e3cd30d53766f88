"""``fastlr range-test``: a range test of the user's own model."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fastlr
from fastlr._extras import extra
from fastlr._files import writable_folder, write_text
from fastlr.cli.output import add_command, add_json, argument_helps, print_json

# range_test's arguments that can be given as one word or number.
_OPTIONS: dict[str, type] = {
    "start_lr": float,
    "end_lr": float,
    "num_steps": int,
    "sweep": str,
    "staircase": int,
    "val_every": int,
    "val_batches": int,
    "accumulate": int,
    "repeats": int,
    "diverge_factor": float,
    "backup": str,
}


def add(commands: Any) -> None:
    """Adds the command to what ``add_subparsers()`` returned."""
    parser = add_command(
        commands,
        "range-test",
        "find the bounds for a model of your own",
        "Runs a learning-rate range test and writes its picture, its curve and what it says. Exits with 0 "
        "when there are bounds, with 1 when there are none.",
        examples=[
            "fastlr range-test ./train.py:setup",
            "fastlr range-test package.training:setup --end-lr 10 --num-steps 300",
            "fastlr range-test ./train.py:setup --repeats 3 --json > found.json",
        ],
        command=_range_test,
    )
    parser.add_argument(
        "factory",
        metavar="WHERE:FUNCTION",
        help="function without arguments that returns what to test: a dict of range_test's arguments, or a "
        "tuple (model, optimizer, loss_fn, train_loader[, val_loader]). WHERE is a file such as ./train.py, "
        "which is run but for what stands under __name__ == '__main__', or a module, looked for in this "
        "folder, too",
    )
    parser.add_argument(
        "--out", metavar="DIR", default="report", help="where to write (default: %(default)s)"
    )
    helps = argument_helps(fastlr.range_test.__doc__)
    defaults = inspect.signature(fastlr.range_test).parameters
    options = parser.add_argument_group("options of the range test", "They go before what the function says.")
    for name, kind in _OPTIONS.items():
        options.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar={int: "N", float: "X", str: "WORD"}[kind],
            default=argparse.SUPPRESS,
            # Neither a list nor None can be given here.
            help=re.sub(r"; (a list|None)\b[^.;]*", "", helps[name])
            + f" (default: {defaults[name].default})",
        )
    parser.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        default=argparse.SUPPRESS,
        help="say nothing on the way",
    )
    add_json(parser)


def _range_test(arguments: argparse.Namespace) -> None:
    with extra("plot"):
        import matplotlib  # noqa: F401  # to be missed before the test, not after it

    folder = writable_folder("--out", arguments.out)
    given = {k: v for k, v in vars(arguments).items() if k not in ("command", "factory", "json", "out")}
    if given.get("backup", "device") not in ("device", "host", "file"):
        given["backup"] = Path(given["backup"])
    # What the user's code prints must not stand in the JSON.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        found = fastlr.range_test(**{**_made(arguments.factory), **given})
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    found.plot(folder / "range_test.png")
    found.to_csv(folder / "range_test.csv")
    found.to_json(folder / "range_test.json")
    write_text(folder / "range_test.txt", found.summary() + "\n")
    if arguments.json:
        print_json(found.to_dict())
    else:
        print(found.summary())
        print(f"\nreport: {folder / 'range_test.png'}, .csv, .json, .txt")
    if not found:
        raise ValueError(f"the range test gives no bounds: {found.reason}")


def _made(name: str) -> dict[str, Any]:
    """What a function named ``package.module:function`` or ``file.py:function`` returns, as range_test's
    arguments."""
    where, colon, function_name = name.rpartition(":")
    if not (where and colon and function_name):
        raise ValueError(
            f"the factory must be given as package.module:function or ./file.py:function, got {name!r}"
        )
    is_file = where.endswith(".py") or os.sep in where or "/" in where
    with _as_a_script(where):
        factory = getattr(_run_file(Path(where)) if is_file else _imported(where), function_name, None)
        if not callable(factory):
            raise ValueError(f"{where} has no function {function_name}")
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


@contextlib.contextmanager
def _as_a_script(where: str) -> Iterator[None]:
    """Around code that parses the command line or ends the process, as a script may: it finds no argument in
    ``sys.argv``, for those that stand there are fastlr's, and ends the command with an error."""
    before, sys.argv = sys.argv, [where]
    try:
        yield
    except SystemExit as stop:
        raise RuntimeError(
            f"{where} ended the process before there was anything to test, with {stop.code!r}"
        ) from stop
    finally:
        sys.argv = before


def _imported(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"there is no module {error.name} in this folder or among what is installed"
        ) from error


def _run_file(path: Path) -> ModuleType:
    """A file's module, under the file's own name: a loader's worker processes can import it by that."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    path = path.resolve()
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as python file.py does
    if path.stem in sys.modules:
        there = getattr(sys.modules[path.stem], "__file__", None)
        if there is None or Path(there).resolve() != path:
            raise ValueError(
                f"{path.name} has the name of a module that is loaded already ({there or 'built in'}); "
                "rename the file"
            )
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; its name must end with .py")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
