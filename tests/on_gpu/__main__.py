"""Proves and measures everything on a GPU, stage by stage; ``make gpu``.

Each stage is a process with a time limit of its own, and its result is on disk the moment it ends: one
that hangs, crashes or fails costs the others nothing. Needs what the machine has, and fetches nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import sources
from .report import write_json
from .stages import ROOT, STAGES, Found, Settings, Skip, Stage


@dataclass
class Outcome:
    stage: str
    status: str  # passed, failed or skipped
    seconds: float
    headline: str
    problems: list[str]

    def row(self) -> str:
        told = self.headline if self.status == "passed" else "; ".join([*self.problems[:2], self.headline])
        return f"{self.stage:14} {self.status:8} {self.seconds:7.1f} s  {told.strip('; ')}"


def environment(settings: Settings) -> dict[str, str]:
    """Finds the fastlr that stage b has built."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONOPTIMIZE"}  # checks are assertions
    caches = settings.site.parent / "caches"
    return {
        **inherited,
        "PATH": settings.path,
        "PYTHONPATH": os.pathsep.join([str(settings.site), str(ROOT / "benchmarks")]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Plug-ins that happen to be installed warn, and a warning is an error to the tests.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }


def check_build(settings: Settings) -> None:
    """Raises ValueError where what is built is not of the present sources."""
    built = settings.site / sources.FILE
    if not built.exists():
        raise ValueError("nothing is built here: run stage b too")
    if built.read_text() != sources.digest():
        raise ValueError("what is built here is of other sources: run stage b too")


def run_for(command: list[str], log: Path, limit: float, env: dict[str, str]) -> tuple[str, int]:
    """Runs it with all that it starts in a group of its own. Returns what went wrong, and the status."""
    with log.open("wb") as output:
        output.write(f"{shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT / "tests",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"still running after {limit:g} s", -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # one that the driver does not let go must not stop the others
    if status < 0:
        names = {s.value: s.name for s in signal.Signals}
        return f"ended by {names.get(-status, f'signal {-status}')}", status
    return (f"exit status {status}" if status else ""), status


def run_stage(stage: Stage, settings: Settings) -> Outcome:
    begin = time.perf_counter()
    log = stage.file(settings, ".log")
    for left_over in settings.out.glob(f"{stage.name}.*"):
        left_over.unlink()
    try:
        command = stage.command(settings, stage)
    except Skip as reason:
        outcome = Outcome(stage.name, "skipped", 0.0, "", [str(reason)])
        write_json(stage.file(settings, ".json"), vars(outcome))
        return outcome
    try:
        if stage.needs_build:
            check_build(settings)
        wrong, status = run_for(command, log, stage.limit, environment(settings))
    except ValueError as error:
        wrong, status = str(error), 1
        log.write_text(f"{wrong}\n")
    try:
        found = stage.read(settings, stage)
    except Exception as error:  # a file that was cut off
        found = Found("", [f"its results cannot be read: {type(error).__name__}: {error}"])
    problems = [*([wrong] if wrong else []), *found.problems]
    seconds = round(time.perf_counter() - begin, 1)
    outcome = Outcome(stage.name, "failed" if problems else "passed", seconds, found.headline, problems)
    own = {**vars(outcome), "exit_status": status, "sources": sources.digest()}
    content: dict[str, Any] = {**found.details, **own}
    write_json(stage.file(settings, ".json"), content)
    if problems:
        print(f"\n-- {log}")
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return outcome


def main(argv: list[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    parser = argparse.ArgumentParser(prog="python -m on_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "report" / "gpu", help="folder for results")
    parser.add_argument("--backend", choices=["cuda", "cuda-on-cpu"], default="cuda")
    parser.add_argument("--stages", default="", help="letters, such as c,d; default: all")
    parser.add_argument("--small", action="store_true", help="less of everything")
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever a log holds
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the running stage is ended too
    letters = set(arguments.stages.replace(",", " ").split())
    known = {stage.letter for stage in stages}
    if not letters <= known:
        parser.error(f"--stages must be among {', '.join(sorted(known))}, got {arguments.stages!r}")
    settings = Settings(
        python=sys.executable,
        out=arguments.out.resolve(),
        site=ROOT / "build" / "gpu" / arguments.backend,
        backend=arguments.backend,
        small=arguments.small,
        path=os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
        ),
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage in stages:
        if letters and stage.letter not in letters:
            continue
        print(f"{stage.name} ...", flush=True)
        outcomes.append(run_stage(stage, settings))
        print(outcomes[-1].row(), flush=True)
        write_json(settings.out / "summary.json", [vars(outcome) for outcome in outcomes])
    print(f"\n{'stage':14} {'':8} {'':9}  headline")
    for outcome in outcomes:
        print(outcome.row())
    print(f"results in {settings.out}")
    statuses = [outcome.status for outcome in outcomes]
    return int("failed" in statuses or "passed" not in statuses)


if __name__ == "__main__":
    sys.exit(main())
