"""The command ``fastlr``: parses arguments, calls the library, prints."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import fastlr
from fastlr._checks import texts
from fastlr._extras import MissingExtra, extra
from fastlr._tables import aligned
from fastlr.bench.rules import RULES
from fastlr.cli import range_test, schedule
from fastlr.cli.output import Parser, add_command, add_json, print_error, print_json, printing

__all__ = ["main"]

_ENDING = """exit codes:
  0    all went well; of range-test: and there are bounds
  1    an error, which is said on stderr; of range-test, also: there are no bounds;
       without a word: nobody reads stdout any more, as in fastlr doctor | head -1
  2    the command line is wrong
  130  interrupted, as by Ctrl-C

fastlr COMMAND --help says more, with examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code, see ``fastlr --help``; usage errors exit with 2.

    Args:
        argv: the arguments; None: the process's.

    >>> main(["schedule", "cosine", "--start", "0.1", "--end", "0", "--steps", "100", "--at", "0", "50"])
    0 0.1
    50 0.05
    0
    """
    argv = None if argv is None else texts("argv", argv)
    try:
        with printing():
            arguments = parser().parse_args(argv)
            arguments.command(arguments)
    except KeyboardInterrupt:
        print("fastlr: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if not isinstance(error, MissingExtra):  # what a factory misses is its own affair
            raise
        print_error(error)
        return 1
    except (ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
        print_error(error)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """What reads the command line."""
    made = Parser(
        prog="fastlr",
        description=inspect.getdoc(fastlr),
        epilog=_ENDING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"fastlr {fastlr.__version__}")
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    demo = add_command(
        commands,
        "demo",
        "range test, training and comparison on a real data set",
        "Finds bounds by a range test, trains with them, with fixed rates and with step decay, and writes a "
        "page that compares them.",
        examples=[
            "fastlr demo",
            "fastlr demo --seeds 10 --out report/ten",
            "fastlr demo --data fashion-mnist",
        ],
        command=_demo,
    )
    demo.add_argument(
        "--data",
        choices=("digits", "fashion-mnist"),
        default="digits",
        help="what to train on (default: %(default)s)",
    )
    demo.add_argument("--data-path", metavar="DIR", help="folder of Fashion-MNIST's four idx files")
    demo.add_argument("--out", metavar="DIR", default="report", help="where to write (default: %(default)s)")
    demo.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each policy (default: 5)")
    demo.add_argument(
        "--updates",
        type=int,
        metavar="N",
        help="of each run (default: 1500 of digits, 2000 of Fashion-MNIST)",
    )

    range_test.add(commands)
    schedule.add(commands)

    bench = add_command(
        commands,
        "bench",
        "how long an update takes on this machine, beside torch's",
        "Times the optimizer's step, and the whole update (clipping, step, average), each with its "
        "schedule, on the CPU, beside the best that torch has for it. All are stepped in turn, round after "
        "round; shown are medians in microseconds, and in brackets how many times fastlr's that is, the "
        "median over the rounds.",
        examples=[
            "fastlr bench",
            "fastlr bench --rules adam rmsprop",
            "fastlr bench --threads 1 --json",
        ],
        command=_bench,
    )
    bench.add_argument(
        "--seconds", type=float, default=30.0, metavar="X", help="for all of it (default: %(default)g)"
    )
    bench.add_argument(
        "--rules",
        nargs="+",
        choices=list(RULES),
        default=["sgd", "adamw"],
        metavar="RULE",
        help=f"of {', '.join(RULES)} (default: sgd adamw)",
    )
    bench.add_argument("--threads", type=int, metavar="N", help="of fastlr and torch (default: torch's)")
    add_json(bench)

    doctor = add_command(
        commands,
        "doctor",
        "what was built, what is used, and what is not and why",
        "Says what fastlr was built with and what it runs on, as one pastes it into a report.",
        examples=["fastlr doctor", "fastlr doctor --json > doctor.json"],
        command=_doctor,
    )
    add_json(doctor)

    completion = add_command(
        commands,
        "completion",
        "print what completes fastlr's command line in a shell",
        "Prints a script that completes commands, options and their values. Needs shtab, which "
        "fastlr[cli] brings.",
        examples=[
            'eval "$(fastlr completion bash)"',
            "fastlr completion bash > ~/.local/share/bash-completion/completions/fastlr",
            "fastlr completion zsh > ~/.zsh/completions/_fastlr",
        ],
        command=_completion,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script to print")
    return made


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
    print(aligned(report.table()))
    print("\n" + "\n".join(report.verdict()))
    print("\n" + textwrap.fill(demo.TABLE_NOTE, 100))
    print(f"\nreport: {report.files[-1]}")


def _bench(arguments: argparse.Namespace) -> None:
    from fastlr import bench

    report = bench.run(arguments.seconds, arguments.rules, threads=arguments.threads)
    if arguments.json:
        print_json(report.to_dict())
        return
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.machine.items()))
    print("microseconds an update with its schedule; in brackets: times fastlr's\n")
    print(aligned(report.table()))
    if (busy := report.busy()) is not None:
        print(f"\n{busy}")


def _doctor(arguments: argparse.Namespace) -> None:
    from fastlr import doctor

    report = doctor.examined()
    if arguments.json:
        print_json(report)
        return
    print(aligned(doctor.table(report)))
    print("\nnot in use:" if report["not_in_use"] else "\neverything that could be used is in use")
    for line in report["not_in_use"]:
        print(f"- {line}")


def _completion(arguments: argparse.Namespace) -> None:
    with extra("cli"):
        import shtab  # type: ignore[import-not-found,unused-ignore]  # not everywhere that mypy runs

    made = parser()
    _complete_paths(made, {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE, "WHERE:FUNCTION": shtab.FILE})
    print(shtab.complete(made, arguments.shell))


def _complete_paths(parser: argparse.ArgumentParser, kinds: dict[str, Any]) -> None:
    """Tells shtab, which asks each argument for it, what kind of path an argument is."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, kinds)
        elif isinstance(action.metavar, str) and action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
